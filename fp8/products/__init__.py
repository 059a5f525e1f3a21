"""Products of FP8 matrices with fine-grained scales: one contract, several backends.

`reference` states the order of every rounding; the other backends are held to it. `choice` takes a
backend by name, or picks one. May import torch and `..formats`; other libraries only when used.
"""

from .base import Backend, Product
from .choice import (
    AUTO,
    BACKENDS,
    backend,
    choose,
    grouped_matmul,
    grouped_matmul_along_k,
    scaled_matmul,
)
from .emulation import Emulation

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "Emulation",
    "Product",
    "backend",
    "choose",
    "grouped_matmul",
    "grouped_matmul_along_k",
    "scaled_matmul",
]
