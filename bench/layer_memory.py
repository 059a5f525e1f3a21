"""One decoder layer alone, and which storages it keeps alive."""

from __future__ import annotations

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
from counterflow.model import ModelConfig
from counterflow.model.build import Build
from counterflow.model.layer import DecoderLayer
from counterflow.model.memory import Load
from counterflow.model.rope import RotaryTable
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.chunk import Chunk

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
    layer: DecoderLayer,
    config: ModelConfig,
    build: Build,
    load: Load,
    *,
    depth: int = 1,
    real: bool = True,
) -> Measured:
    """One forward and, in two halves, one backward of the layer; one of each goes before.

    The layer is applied `depth` times, each time to what it gave before. If not `real`, there is no
    backward and no arithmetic of products.
    """
    shape = (load.sequences, load.tokens // load.sequences, config.hidden_size)
    source = torch.randn(shape, device=build.device).to(build.dtype).requires_grad_()
    rotation = RotaryTable(config, build.dtype).at(shape[1], source.device)
    counts: tuple[int, ...] = ()

    def forward(chunk: Chunk) -> list[GradientEdge]:
        """Where gradients enter; input and output live on only if someone keeps them."""
        nonlocal counts
        y = source * 1
        for _ in range(depth):
            attended = layer.attend(y, rotation, chunk)
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
