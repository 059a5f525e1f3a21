"""FP8 and recomputation as a configuration asks for them, and what a run says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm.collectives import gather
from ..fp8 import E4M3, Quantized, Recipe
from ..fp8.formats import tiles_in
from ..fp8.linear import Call
from ..fp8.products import AUTO, Product, backend, choose
from ..fp8.products.base import padded_rows
from ..fp8.weights import QuantizedWeight
from ..model.build import Recompute
from .config import Config
from .settings import ConfigError

if TYPE_CHECKING:
    from .engine import Engine


def make_recipe(config: Config) -> Recipe | None:
    """How linear layers are computed in FP8; None without.

    Raises:
        ConfigError: the recipe refuses a value.
    """
    wanted = config.fp8
    if not wanted.enabled:
        return None
    try:
        return Recipe(
            scales=wanted.scales,
            gradient_format=wanted.gradient_format,
            backend=wanted.backend,
            e5m6=wanted.e5m6,
            check=wanted.check,
        )
    except ValueError as error:
        raise ConfigError(f"fp8.{error}") from None


def make_recompute(config: Config) -> Recompute:
    """What the backward makes again rather than keeps."""
    wanted, by_default = config.recompute, config.fp8.enabled
    return Recompute(
        norms=by_default if wanted.norms is None else wanted.norms,
        up_projections=by_default if wanted.up_projections is None else wanted.up_projections,
    )


def require_backend(config: Config, device: torch.device) -> None:
    """Raise unless the backend that fp8.backend names can compute this model's products.

    Raises:
        ConfigError: it is not installed, or cannot serve this device or these products.
    """
    wanted = config.fp8
    if not wanted.enabled or wanted.backend == AUTO:
        return
    try:
        found = backend(wanted.backend)
    except ValueError as error:
        raise ConfigError(f"fp8.backend={wanted.backend}: {error}") from None
    for product in _products(config, device):
        reason = found.why_not(product)
        if reason is not None:
            kind = product.kind.replace("_", " ")
            raise ConfigError(
                f"fp8.backend={wanted.backend} cannot compute this model's {kind} products on "
                f"{device.type}: {reason}; fp8.backend=auto takes for each product what can"
            )


def backends(config: Config, device: torch.device) -> tuple[dict[str, str], str]:
    """Which backend computes each kind of product of the experts, and why these."""
    wanted = config.fp8.backend
    if wanted != AUTO:
        kinds = {product.kind for product in _products(config, device)}
        return dict.fromkeys(sorted(kinds), wanted), "fp8.backend asks for it"
    names: dict[str, str] = {}
    reasons: dict[str, None] = {}  # a set that keeps its order
    for product in _products(config, device):
        chosen, why = choose(product)
        names.setdefault(product.kind, chosen.name)
        reasons[why] = None
    return dict(sorted(names.items())), "; ".join(reasons)


def quantized_weights(parts: Iterable[nn.Module]) -> list[QuantizedWeight]:
    """The FP8 forms of all weights; empty ones where layers are multiplied side by side."""
    calls = (
        value
        for part in parts
        for module in part.modules()
        for value in vars(module).values()
        if isinstance(value, Call)
    )
    return list({id(call.quantized): call.quantized for call in calls}.values())


def totals(config: Config, engine: Engine, device: torch.device) -> dict[str, Any]:
    """What ran in FP8 and by whom, and what all ranks keep for it. A collective of the world."""
    wanted = config.fp8
    if not wanted.enabled:
        return {"enabled": False}
    names, why = backends(config, device)
    mine = sum(weight.nbytes() for weight in quantized_weights(engine.parts.values()))
    world = dist.group.WORLD if dist.is_initialized() else None
    with engine.pipeline.at("adding up the weights in FP8"):
        kept = gather(mine, world, "bytes in FP8", board=engine.mesh.waits)
    return {
        "enabled": True,
        "scales": wanted.scales,
        "gradient_format": wanted.gradient_format,
        "e5m6": wanted.e5m6,
        "check": wanted.check,
        "backends": names,
        "why": why,
        "weight_bytes": sum(kept),
    }


def introduction(config: Config, device: torch.device) -> str:
    """What a run says at its beginning; "" without FP8."""
    if not config.fp8.enabled:
        return ""
    names, why = backends(config, device)
    if len(set(names.values())) == 1:
        by = next(iter(names.values()))
    else:
        by = ", ".join(f"{name} ({kind.replace('_', ' ')})" for kind, name in names.items())
    scales = config.fp8.scales.replace("_", " ")
    return f"FP8, scales {scales}, gradients {config.fp8.gradient_format}, products by {by} ({why})"


@dataclass(frozen=True)
class _Planned(Product):
    """A product that has no numbers yet, to ask who can compute it.

    Attributes:
        where: the device it will be on; its tensors are on "meta".
    """

    where: torch.device

    @property
    def device(self) -> torch.device:
        return self.where


def _products(config: Config, device: torch.device) -> list[Product]:
    """The products with the first weight of a dense layer and of two experts, all three ways."""
    model, train = config.model, config.train
    rows = train.sequences * config.data.sequence_length
    dtype = torch.bfloat16 if train.dtype == "bfloat16" else torch.float32
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    gradient = torch.float8_e5m2 if config.fp8.gradient_format == "e5m2" else E4M3
    counts = (rows, rows)
    dense, columns = _tiles(rows, hidden), padded_rows([rows])

    def planned(kind: Any, a: Quantized, b: Quantized, counts: tuple[int, ...] = ()) -> Product:
        return _Planned(kind, a, b, counts, dtype, None, device)

    wide = model.intermediate_size
    return [
        planned("dense", dense, _blocks(wide, hidden)),
        planned("dense", _tiles(rows, wide, gradient), _blocks(hidden, wide)),
        planned("dense", _tiles(wide, columns, gradient), _tiles(hidden, columns)),
        planned("grouped", _tiles(2 * rows, hidden), _blocks(2, 2 * inner, hidden), counts),
        planned(
            "grouped", _tiles(2 * rows, 2 * inner, gradient), _blocks(2, hidden, 2 * inner), counts
        ),
        planned(
            "grouped_along_k",
            _tiles(2 * inner, padded_rows(counts), gradient),
            _tiles(hidden, padded_rows(counts)),
            counts,
        ),
    ]


def _tiles(rows: int, columns: int, dtype: torch.dtype = E4M3) -> Quantized:
    return Quantized(
        torch.empty(rows, columns, dtype=dtype, device="meta"),
        torch.empty(rows, tiles_in(columns), device="meta"),
    )


def _blocks(*shape: int) -> Quantized:
    *experts, rows, columns = shape
    return Quantized(
        torch.empty(shape, dtype=E4M3, device="meta"),
        torch.empty(*experts, tiles_in(rows), tiles_in(columns), device="meta"),
    )
