"""FP8 and recomputation as a configuration asks for them, and what a run says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.collectives import gather
from ..fp8 import E4M3, Quantized, Recipe
from ..fp8.formats import padded_rows, tiles_in
from ..fp8.products import AUTO, Product, backend, choose
from ..fp8.products.base import Kind
from ..fp8.weights import quantized_weights
from ..model import DeepSeekV3
from ..model.attention import Attention
from ..model.build import Recompute
from ..model.experts import MLP, Experts
from ..model.linear import Linear
from ..model.mtp import PredictionLayer
from .config import Config
from .fp8_config import FP8Config
from .settings import ConfigError

if TYPE_CHECKING:
    from .engine import Engine

# Layers of one input, which are multiplied as one matrix: see `side_by_side` and `MLP`.
_SIDE_BY_SIDE = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj")


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
            raise ConfigError(
                f"fp8.backend={wanted.backend} cannot compute {product.name} on {device.type}: "
                f"{reason}; fp8.backend=auto takes for each product what can"
            )


def backends(config: Config, device: torch.device) -> tuple[dict[str, list[str]], str]:
    """Which backends compute the model's products of each kind, and why these."""
    wanted = config.fp8.backend
    names: dict[str, dict[str, None]] = {}  # sets that keep their order
    reasons: dict[str, None] = {}
    for product in _products(config, device):
        name, why = wanted, "fp8.backend asks for it"
        if wanted == AUTO:
            chosen, why = choose(product)
            name = chosen.name
        names.setdefault(product.kind, {})[name] = None
        reasons[why] = None
    return {kind: list(names[kind]) for kind in sorted(names)}, "; ".join(reasons)


def totals(config: Config, engine: Engine, device: torch.device) -> dict[str, Any]:
    """What ran in FP8 and by whom, and what all ranks keep for it. A collective of the world."""
    wanted = config.fp8
    if not wanted.enabled:
        return {"enabled": False}
    names, why = backends(config, device)
    mine = sum(w.nbytes() for part in engine.parts.values() for w in quantized_weights(part))
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
    """What a run says at its beginning; "" where FP8 is not asked for."""
    if not config.fp8.enabled:
        given = [f.name for f in fields(FP8Config) if getattr(config.fp8, f.name) != f.default]
        return f"fp8.{given[0]} has no effect without fp8.enabled" if given else ""
    names, why = backends(config, device)
    if len({tuple(found) for found in names.values()}) == 1:
        by = " and ".join(next(iter(names.values())))
    else:
        by = ", ".join(
            f"{' and '.join(found)} ({kind.replace('_', ' ')})" for kind, found in names.items()
        )
    scales = config.fp8.scales.replace("_", " ")
    return f"FP8, scales {scales}, gradients {config.fp8.gradient_format}, products by {by} ({why})"


@dataclass(frozen=True)
class _Planned(Product):
    """A product that has no numbers yet, to ask who can compute it.

    Attributes:
        where: the device it will be on; its tensors are on "meta".
        name: what it is, with its layer and shapes.
    """

    where: torch.device
    name: str

    @property
    def device(self) -> torch.device:
        return self.where

    def _check_accumulate(self) -> None:
        """What is added to is made here, and on "meta", as the operands are."""


@dataclass(frozen=True)
class _Layer:
    """Weights that are multiplied as one.

    Attributes:
        name: of the layer, or of those that are multiplied side by side.
        inner: K.
        outer: the N of each of the weights that are stacked.
        rows: M, or of each expert.
        experts: of this rank, for grouped products; 0 for a dense one.
    """

    name: str
    inner: int
    outer: tuple[int, ...]
    rows: int
    experts: int = 0

    def products(self, config: Config, device: torch.device) -> Iterator[_Planned]:
        """Forward, input gradient, and the gradient of each of the weights."""
        dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
        low = torch.float8_e5m2 if config.fp8.gradient_format == "e5m2" else E4M3
        lead = (self.experts,) if self.experts else ()
        counts = (self.rows,) * self.experts
        rows = self.rows * (self.experts or 1)
        columns, stacked = padded_rows(counts or [rows]), sum(self.outer)

        def plan(what: str, a: Quantized, b: Quantized, into: Tensor | None) -> _Planned:
            kind: Kind = "dense"
            if counts:
                kind = "grouped" if into is None else "grouped_along_k"
            shapes = f"{list(a.values.shape)} x {list(b.values.shape)}"
            name = f"the {what} of {self.name} ({kind.replace('_', ' ')}, {shapes})"
            return _Planned(kind, a, b, counts, dtype, into, device, name)

        inputs, gradients = _tiles(rows, self.inner), _tiles(rows, stacked, low)
        yield plan("forward product", inputs, _blocks(*lead, stacked, self.inner), None)
        yield plan("input gradient", gradients, _blocks(*lead, self.inner, stacked), None)
        for size in self.outer:
            into = torch.empty(*lead, size, self.inner, device="meta")
            across = _tiles(size, columns, low)
            yield plan("weight gradient", across, _tiles(self.inner, columns), into)


def _products(config: Config, device: torch.device) -> list[_Planned]:
    """The products of a micro-batch, those of equal layers once.

    How many rows an expert gets shows with the routing; it is taken to be all of them, and no
    backend asks for a certain number.
    """
    found: dict[_Layer, _Layer] = {}  # by all but the name, the first of each
    for layer in _layers(config):
        found.setdefault(replace(layer, name=""), layer)
    return [product for layer in found.values() for product in layer.products(config, device)]


def _layers(config: Config) -> Iterator[_Layer]:
    """What is multiplied in FP8, with the shapes of the model's own weights."""
    model, train = config.model, config.train
    whole = DeepSeekV3(model, device="meta", recipe=make_recipe(config))
    lengths = [config.data.sequence_length] * model.num_hidden_layers
    # Each depth of multi-token prediction sees one position less.
    lengths += [config.data.sequence_length - 1 - k for k in range(model.num_nextn_predict_layers)]
    for name, module in whole.named_modules():
        if not isinstance(module, Attention | MLP | Experts | PredictionLayer):
            continue
        rows = train.sequences * lengths[int(name.split(".")[2])]
        if isinstance(module, Experts):
            experts = len(module.local) // config.mesh.ep
            for leaf, weight in module.named_parameters(prefix=name):
                yield _Layer(leaf, weight.shape[2], (weight.shape[1],), rows, experts)
            continue
        linears = {leaf: m for leaf, m in module.named_children() if isinstance(m, Linear)}
        stack = [leaf for leaf in linears if leaf in _SIDE_BY_SIDE]
        for leaves in [stack, *([leaf] for leaf in linears if leaf not in stack)]:
            if leaves:
                shapes = [linears[leaf].weight.shape for leaf in leaves]
                outer = tuple(shape[0] for shape in shapes)
                yield _Layer(f"{name}.{' and '.join(leaves)}", shapes[0][1], outer, rows)


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
