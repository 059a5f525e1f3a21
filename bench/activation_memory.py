"""Bytes a token that a decoder layer keeps for its backward, predicted and measured.

    python -m bench.activation_memory [--tokens 256] [--device cuda]

Options: BF16 or FP8, with and without E5M6 for the input of the product after attention; outputs
of norms, and of MLA's up-projections too, made again in the backward; rows dispatched in FP8.

Predicted are the bytes of counterflow.model.memory. Measured are those of all storages that were
made since the layer's forward began and that are alive when its output's node in autograd's graph
is all that is held (`Alive`); the layer's own input is made then too, and counts if it is kept.
On a GPU `torch.cuda.memory_allocated` is read beside, which counts blocks of 512 bytes. "waiting"
is what the weight-gradient queue holds between the halves I and W of the backward. Left out of the
table is what only CPUs keep, heads padded to one size.

Two sizes: a small model, and DeepSeek-V3's dimensions. There 8 experts are measured, of which a
token uses all: 256 do not fit a small machine, and what is kept depends on the rows alone but for
the router's affinities and the balance loss, which the column "256 experts" has as of V3. On a CPU
products at that size give zeros and weights are not quantised (a minute a layer, for no difference
in storages), few tokens are taken, and there is no backward.
Results go to bench/results/activation_memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counterflow.comm import dispatcher
from counterflow.comm.dispatch.names import PayloadName
from counterflow.fp8 import E4M3, Quantized, Recipe
from counterflow.fp8.formats import tiles_in
from counterflow.fp8.products.base import Backend, Product
from counterflow.launch.tables import print_table
from counterflow.model import ModelConfig
from counterflow.model.build import Build, Recompute
from counterflow.model.layer import DecoderLayer
from counterflow.model.memory import PADDING, Load, kept_between_halves, kept_for_backward
from counterflow.model.rope import RotaryTable
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.chunk import Chunk

from .machine import write_result

MOST = 0.6  # bytes that an FP8 layer keeps / those of the BF16 layer with the same recomputation

RESULT_TABLES = ("small_moe", "small_dense", "v3_moe", "v3_dense")

SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=512,
    intermediate_size=1280,
    moe_intermediate_size=256,
    num_attention_heads=4,
    q_lora_rank=256,
    kv_lora_rank=128,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
)
V3 = ModelConfig()
V3_FEW_EXPERTS = replace(V3, n_routed_experts=8, n_group=1, topk_group=1)


aten = torch.ops.aten


class Alive(TorchDispatchMode):
    """Within this context every new storage is noted; without `products`, matrices give zeros."""

    def __init__(self, *, products: bool = True) -> None:
        super().__init__()
        self._products = products
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if self._products or func not in (aten.mm.default, aten.mm.out):
            result = func(*args, **(kwargs or {}))
        elif func is aten.mm.out:
            result = (kwargs or {})["out"].zero_()
        else:
            result = args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        for t in tree_leaves(result):
            # A result in the storage of an operand is a view of it, or it in changed form.
            if isinstance(t, Tensor) and _storage(t) not in given:
                storage = t.untyped_storage()
                self._known[_storage(t)] = StorageWeakRef(storage), storage.nbytes()
        return result

    def nbytes(self) -> int:
        """Bytes of noted storages that are still alive."""
        return sum(size for ref, size in self._known.values() if not ref.expired())


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@dataclass(frozen=True)
class Option:
    """One line of the table."""

    recipe: Recipe | None
    recompute: Recompute
    payload: PayloadName = "exact"

    @property
    def name(self) -> str:
        parts = ["BF16" if self.recipe is None else "FP8"]
        if self.recipe is not None and not self.recipe.e5m6:
            parts.append("no E5M6")
        if self.payload != "exact":
            parts.append(f"rows sent in {self.payload.upper()}")
        if self.recompute.norms:
            parts.append("norms")
        if self.recompute.up_projections:
            parts.append("up-projections")
        return " + ".join(parts)


NOTHING, NORMS, BOTH = Recompute(), Recompute(norms=True), Recompute(True, True)
OPTIONS = [
    *(Option(None, again) for again in (NOTHING, NORMS, BOTH)),
    *(Option(Recipe(), again) for again in (NOTHING, NORMS, BOTH)),
    *(Option(Recipe(e5m6=False), again) for again in (NOTHING, NORMS, BOTH)),
    Option(None, NOTHING, "bf16"),
    Option(Recipe(), NOTHING, "fp8"),
    Option(Recipe(), BOTH, "fp8"),
]


@dataclass(frozen=True)
class Measured:
    """Bytes; see the module's docstring.

    Attributes:
        kept: from the forward to the backward.
        waiting: between I and W; None without a backward.
        allocated: as `kept`, by the GPU's allocator; None on a CPU.
        peak: the most that the GPU's allocator had given out in the half I, `allocated` included.
        counts: rows of each expert.
    """

    kept: int
    waiting: int | None
    allocated: int | None
    peak: int | None
    counts: tuple[int, ...]


class NoProducts(Backend):
    """Products of the right shape, full of zeros."""

    name: ClassVar[str] = "no products"

    def _compute(self, product: Product) -> Tensor:
        if product.accumulate is not None:
            return product.accumulate
        return product.a.values.new_zeros(product.shape, dtype=product.out_dtype)


class Unweighted(Recipe):
    """A recipe that does not look at weights, as a CPU takes minutes for those of a large layer."""

    def weight(self, weight: Tensor) -> Quantized:
        blocks = [*weight.shape[:-2], *map(tiles_in, weight.shape[-2:])]
        return Quantized(torch.zeros(weight.shape, dtype=E4M3), torch.ones(blocks))


def without_arithmetic(recipe: Recipe) -> Recipe:
    """The same recipe, as far as the storages of activations are concerned."""
    backend: Any = NoProducts()  # products take an object as well as a name
    return Unweighted(**(asdict(recipe) | {"backend": backend}))


def make_layer(
    config: ModelConfig,
    build: Build,
    *,
    moe: bool,
    payload: PayloadName = "exact",
    real: bool = True,
) -> DecoderLayer:
    """A layer alone; if not `real`, all numbers of a weight are one number in memory."""
    exchange = dispatcher(
        "flat", Mesh(MeshShape()), num_experts=config.n_routed_experts, payload=payload
    )
    config = replace(config, num_hidden_layers=2, first_k_dense_replace=1)
    layer = DecoderLayer(config, int(moe), exchange, build)
    for name, parameter in layer.named_parameters():
        if name.endswith("mlp.gate.weight"):
            nn.init.normal_(parameter)
        elif real:
            nn.init.constant_(parameter, 0.01)
        else:
            parameter.data = torch.full((), 0.01, dtype=parameter.dtype).expand(parameter.shape)
    return layer


def measure(
    layer: DecoderLayer, config: ModelConfig, build: Build, load: Load, *, real: bool = True
) -> Measured:
    """One forward and, in two halves, one backward of the layer; one of each goes before.

    If not `real`, there is no backward and no arithmetic of products.
    """
    shape = (load.sequences, load.tokens // load.sequences, config.hidden_size)
    source = torch.randn(shape, device=build.device).to(build.dtype).requires_grad_()
    rotation = RotaryTable(config, build.dtype).at(shape[1], source.device)
    counts: tuple[int, ...] = ()

    def forward(chunk: Chunk) -> list[GradientEdge]:
        """Where gradients enter; input and output live on only if someone keeps them."""
        nonlocal counts
        attended = layer.attend(source * 1, rotation, chunk)
        arrived = layer.dispatch(attended)
        counts = () if arrived is None else tuple(arrived.counts)
        y = layer.combine(attended, arrived, layer.feed_forward(attended, arrived, chunk))
        edges = [get_gradient_edge(root) for root in (y, *(value for _, value in chunk.losses))]
        chunk.losses.clear()
        return edges

    def back(edges: list[GradientEdge], chunk: Chunk) -> None:
        grads = [torch.ones(shape, dtype=build.dtype, device=source.device)]
        grads += [torch.ones((), device=source.device) for _ in edges[1:]]
        torch.autograd.backward(edges, grads)
        source.grad = None

    warm = Chunk()
    with Alive(products=real):
        edges = forward(warm)  # quantises weights
    if real:
        back(edges, warm)  # makes the weights' gradients
    del edges
    cuda = source.is_cuda
    before = torch.cuda.memory_allocated() if cuda else 0
    chunk, waiting, peak = Chunk(), None, None
    with Alive(products=real) as alive:
        edges = forward(chunk)
        kept = alive.nbytes()
        allocated = torch.cuda.memory_allocated() - before if cuda else None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if real:
            chunk.weight_grads.deferring = True
            back(edges, chunk)
            del edges
            waiting = alive.nbytes()
            peak = torch.cuda.max_memory_allocated() - before if cuda else None
            chunk.weight_grads.run()
    return Measured(kept, waiting, allocated, peak, counts)


@dataclass(frozen=True)
class Line:
    """One option at one size, bytes a token; see `Measured`."""

    option: str
    predicted: float
    measured: float
    exact: bool
    to_bf16: float
    to_bf16_alike: float
    waiting_predicted: float
    waiting_measured: float | None
    allocated: float | None
    peak: float | None
    items: dict[str, float]


def lines(
    config: ModelConfig, load: Load, device: torch.device, *, moe: bool, real: bool
) -> list[Line]:
    """All options at one size."""
    found: list[Line] = []
    bf16: dict[Recompute, float] = {}
    for option in (o for o in OPTIONS if moe or o.payload == "exact"):
        recipe = option.recipe
        if recipe is not None and not real:
            recipe = without_arithmetic(recipe)
        build = Build(torch.bfloat16, device, recipe, option.recompute)
        layer = make_layer(config, build, moe=moe, payload=option.payload, real=real)
        seen = measure(layer, config, build, load, real=real)
        del layer
        load = replace(load, counts=seen.counts) if moe else load
        found.append(line(option.name, seen, config, build, load, bf16, moe=moe))
    return found


def line(
    name: str,
    seen: Measured,
    config: ModelConfig,
    build: Build,
    load: Load,
    bf16: dict[Recompute, float],
    *,
    moe: bool,
) -> Line:
    """What was `seen` beside what was predicted; BF16's bytes are noted in `bf16` as they come."""
    kept = kept_for_backward(config, build, load, moe=moe)
    padding = kept.items.get(PADDING, 0)
    measured = seen.kept - (0 if seen.allocated is not None else padding)
    measured_per_token = measured / load.tokens
    if build.recipe is None:
        bf16.setdefault(build.recompute, measured_per_token)

    def per_token(size: int | None) -> float | None:
        return None if size is None else size / load.tokens

    return Line(
        option=name,
        predicted=kept.per_token(),
        measured=measured_per_token,
        exact=measured == kept.total - padding,
        to_bf16=measured_per_token / bf16[NOTHING],
        to_bf16_alike=measured_per_token / bf16[build.recompute],
        waiting_predicted=kept_between_halves(config, build, load, moe=moe).per_token(),
        waiting_measured=per_token(seen.waiting),
        allocated=per_token(seen.allocated),
        peak=per_token(seen.peak),
        items={what: size / load.tokens for what, size in kept.items.items() if what != PADDING},
    )


def predicted_per_token(config: ModelConfig, option: Option, *, moe: bool) -> float:
    """At one sequence of 4096 tokens."""
    build = Build(torch.bfloat16, None, option.recipe, option.recompute)
    return kept_for_backward(config, build, Load(4096), moe=moe).per_token()


def show(title: str, found: Sequence[Line], whole: Sequence[float] | None) -> None:
    """Print one table; `whole` are predictions with all experts."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:,.0f}"

    head = ["option", "predicted", "measured", "equal", "/ BF16", "/ BF16 alike", "waiting", "seen"]
    body = [
        [
            li.option,
            number(li.predicted),
            number(li.measured),
            "yes" if li.exact else "no",
            f"{li.to_bf16:.3f}",
            f"{li.to_bf16_alike:.3f}",
            number(li.waiting_predicted),
            number(li.waiting_measured),
        ]
        for li in found
    ]
    if found[0].allocated is not None:
        head += ["allocated", "peak"]
        for row, li in zip(body, found, strict=True):
            row += [number(li.allocated), number(li.peak)]
    if whole is not None:
        head.append("256 experts")
        for row, value in zip(body, whole, strict=True):
            row.append(number(value))
    print_table(f"{title}, bytes a token", head, body, names=1)
    print()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="in two sequences")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {"tokens": options.tokens, "device": str(device)}
    for name, config, real in (("small", SMALL, True), ("v3", V3_FEW_EXPERTS, on_gpu)):
        load = Load(options.tokens, 2) if real else Load(8)
        for kind in ("moe", "dense"):
            moe = kind == "moe"
            found = lines(config, load, device, moe=moe, real=real)
            chosen = [option for option in OPTIONS if moe or option.payload == "exact"]
            whole = None
            if moe and name == "v3":
                whole = [predicted_per_token(V3, option, moe=True) for option in chosen]
            show(f"{name}, {kind}", found, whole)
            result[f"{name}_{kind}"] = [asdict(line) for line in found]
            if whole is not None:
                result["v3_moe_256_experts"] = dict(
                    zip([o.name for o in chosen], whole, strict=True)
                )
    result["targets"] = targets(result)
    path = write_result("activation_memory" + ("_gpu" if on_gpu else ""), result)
    print(f"wrote {path}")


def targets(result: dict[str, Any]) -> dict[str, Any]:
    """What has to hold, and whether it does."""
    everything = [line for name in RESULT_TABLES for line in result[name]]
    fp8 = [line for line in everything if line["option"].startswith("FP8")]
    worst = max(line["to_bf16_alike"] for line in fp8)
    return {
        "fp8_to_bf16_alike_at_most": MOST,
        "worst": worst,
        "met": worst <= MOST,
        "predictions_exact": all(line["exact"] for line in everything),
    }


if __name__ == "__main__":
    main()
