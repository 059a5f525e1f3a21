"""How numbers are stored and multiplied in eight bits: DeepSeek-V3's fine-grained FP8.

May import torch; knows nothing of pipelines, communication or models.
"""

from .adamw import AdamW
from .e5m6 import pack_e5m6, unpack_e5m6
from .formats import E4M3, E5M2, TILE, Quantized, decode
from .linear import GroupedLinear, Linear
from .logfmt import decode_logfmt, encode_logfmt
from .products import Emulation, grouped_matmul, grouped_matmul_along_k, scaled_matmul
from .quantize import (
    compact_scales,
    dequantize,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
    transpose_tiles,
)
from .recipe import NonFiniteError, Recipe
from .weights import forget

__all__ = [
    "E4M3",
    "E5M2",
    "TILE",
    "AdamW",
    "Emulation",
    "GroupedLinear",
    "Linear",
    "NonFiniteError",
    "Quantized",
    "Recipe",
    "compact_scales",
    "decode",
    "decode_logfmt",
    "dequantize",
    "encode_logfmt",
    "forget",
    "grouped_matmul",
    "grouped_matmul_along_k",
    "pack_e5m6",
    "quantize_blocks",
    "quantize_both",
    "quantize_columns",
    "quantize_tensor",
    "quantize_tiles",
    "scaled_matmul",
    "transpose_tiles",
    "unpack_e5m6",
]
