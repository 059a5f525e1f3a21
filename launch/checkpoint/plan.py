"""What torch.distributed.checkpoint is to plan: pieces of flattened tensors, in and out.

To it every tensor has one dimension, and a piece is a chunk. It takes each chunk that several ranks
hold to one of them, the least loaded one, checks that chunks fit together, and on loading finds
which chunks of the checkpoint lie in a piece.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .errors import CheckpointError
from .manifest import DTYPE_NAMES
from .pieces import Piece

_NAMED = 8  # how many tensors an error lists

Pieces = dict[str, list[Piece]]
"""By name; what is handed to torch.distributed.checkpoint as its state dict."""


class Told(NamedTuple):
    """What a rank adds to its plan: the whole shapes of its tensors, and its own values."""

    shapes: Mapping[str, tuple[int, ...]]
    own: str


class Whole(NamedTuple):
    """What the coordinator adds to the plan of all: every tensor's shape, every rank's values."""

    shapes: Mapping[str, tuple[int, ...]]
    own: Sequence[str]


def by_name(pieces: Iterable[Piece]) -> Pieces:
    """The pieces of each name. Empty pieces of what has elements say nothing and are left out."""
    found: Pieces = {}
    for piece in pieces:
        if piece.data.numel() or not piece.numel:
            found.setdefault(piece.name, []).append(piece)
    return found


def check(pieces: Iterable[Piece]) -> None:
    """Raise CheckpointError unless each piece is a stretch of its whole, of a dtype we know."""
    for piece in pieces:
        data = piece.data
        if data.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{piece.name}: {data.dtype} is not for checkpoints")
        inside = piece.offset >= 0 and piece.offset + data.numel() <= piece.numel
        if data.dim() != 1 or not data.is_contiguous() or not inside:
            raise CheckpointError(
                f"{piece.name}: {list(data.shape)} elements from {piece.offset} on are no stretch "
                f"of the flattened {list(piece.shape)}"
            )


class StretchItem(WriteItem):
    """A chunk to write, which costs what the chunk weighs, not what the whole tensor does."""

    def tensor_storage_size(self) -> int:
        _, length = span(self)
        return length * dtype_of(self).itemsize


def span(item: WriteItem) -> tuple[int, int]:
    """The first element and the number of elements of a chunk to write."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return chunk.offsets[0], chunk.sizes[0]


def dtype_of(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


class SaveStretches(DefaultSavePlanner):
    """Plans the writing of pieces.

    Args:
        own: this rank's own values, as JSON.
        ready: waits until the pieces can be read; what it raises, all ranks are told.
    """

    def __init__(self, own: str, ready: Callable[[], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._own, self._ready = own, ready
        self._exact: dict[tuple[str, int, int], Piece] = {}

    def set_up_planner(
        self,
        state_dict: Pieces,
        storage_meta: StorageMeta | None = None,  # noqa: ARG002  of torch's interface
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self._ready()
        properties: dict[torch.dtype, TensorProperties] = {}
        items: list[WriteItem] = []
        for name, pieces in self.state_dict.items():
            for piece in pieces:
                dtype = piece.data.dtype
                shared = properties.setdefault(dtype, TensorProperties(dtype))
                length = piece.data.numel()
                self._exact[name, piece.offset, length] = piece
                items.append(_item(name, piece.offset, length, piece.numel, shared))
        shapes = {name: pieces[0].shape for name, pieces in self.state_dict.items()}
        self.plan = SavePlan(items, planner_data=Told(shapes, self._own))
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        told: list[Told] = [plan.planner_data for plan in all_plans]
        whole = Whole(_agreed_shapes(told), [of.own for of in told])
        cut = _cut([replace(plan, planner_data=None) for plan in all_plans])
        plans, metadata = super().create_global_plan(cut)
        self.metadata = replace(metadata, planner_data=whole)
        return plans, self.metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The elements of a chunk, [n], which lies in one of this rank's pieces."""
        name = write_item.index.fqn
        offset, length = span(write_item)
        exact = self._exact.get((name, offset, length))
        if exact is not None:
            return exact.data
        for piece in self.state_dict[name]:
            start = offset - piece.offset
            if start >= 0 and start + length <= piece.data.numel():
                return piece.data[start : start + length]
        raise AssertionError(f"{name}: the plan has elements that this rank has not")


class LoadStretches(DefaultLoadPlanner):
    """Plans the reading of pieces; a name that is missing or has another shape is an error."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: object) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shapes, self._path = shapes, path

    def set_up_planner(
        self,
        state_dict: Pieces,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.state_dict: Pieces = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        problems: list[str] = []
        for name, pieces in self.state_dict.items():
            check(pieces)
            shapes = {piece.shape for piece in pieces}
            if name not in self._shapes:
                problems.append(f"{name} is missing")
            elif shapes != {self._shapes[name]}:
                problems.append(f"{name} is {list(self._shapes[name])}, not {_listed(shapes)}")
        if problems:
            more = len(problems) - _NAMED
            text = ", ".join(problems[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            raise CheckpointError(
                f"{self._path} does not fit this model in {len(problems)} tensors: {text}; take "
                "the configuration of the run that wrote it"
            )
        items: list[ReadItem] = []
        for name, pieces in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [_chunk(piece.offset, piece.data.numel()) for piece in pieces]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the elements of a read item belong: a stretch of one of the pieces."""
        number = read_item.dest_index.index
        assert number is not None  # set by create_read_items_for_chunk_list
        piece = self.state_dict[read_item.dest_index.fqn][number]
        return piece.data.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])


def _chunk(offset: int, length: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([offset]), sizes=torch.Size([length]))


def _item(
    name: str, offset: int, length: int, numel: int, properties: TensorProperties
) -> StretchItem:
    return StretchItem(
        index=MetadataIndex(name, torch.Size([offset])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(_chunk(offset, length), properties, torch.Size([numel])),
    )


def _agreed_shapes(told: Sequence[Told]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, of in enumerate(told):
        for name, shape in of.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise CheckpointError(
                    f"{name}: rank {rank} says {list(shape)}, a rank before it "
                    f"{list(shapes[name])}; all must have the same whole"
                )
    return shapes


def _cut(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Plans whose chunks are equal or have no element in common.

    Ranks may hold overlapping stretches, as where the copies of a stage have their optimizers
    sharded in different places: chunks are cut wherever one begins or ends.

    Raises:
        CheckpointError: the chunks of a tensor do not cover it, or are of several dtypes.
    """
    spans: dict[str, set[tuple[int, int]]] = {}
    known: dict[str, tuple[torch.dtype, int]] = {}
    for plan in plans:
        for item in plan.items:
            assert item.tensor_data is not None
            name, what = item.index.fqn, (dtype_of(item), item.tensor_data.size[0])
            if known.setdefault(name, what) != what:
                raise CheckpointError(
                    f"{name}: is {what[0]} on one rank and {known[name][0]} on another"
                )
            offset, length = span(item)
            spans.setdefault(name, set()).add((offset, offset + length))
    cuts: dict[str, list[int]] = {}
    for name, found in spans.items():
        _require_cover(name, found, known[name][1])
        edges = sorted({edge for both in found for edge in both})
        if len(edges) > 1 and found != set(pairwise(edges)):
            cuts[name] = edges
    return [replace(plan, items=_cut_items(plan.items, cuts)) for plan in plans]


def _cut_items(items: Sequence[WriteItem], cuts: Mapping[str, Sequence[int]]) -> list[WriteItem]:
    """The items cut at `cuts`, by name, and each chunk once."""
    made: dict[MetadataIndex, WriteItem] = {}
    for item in items:
        name = item.index.fqn
        if name not in cuts:
            made.setdefault(item.index, item)
            continue
        assert item.tensor_data is not None
        offset, length = span(item)
        edges = cuts[name]
        inside = edges[bisect_left(edges, offset) : bisect_right(edges, offset + length)]
        for start, end in pairwise(inside):
            numel, shared = item.tensor_data.size[0], item.tensor_data.properties
            part = _item(name, start, end - start, numel, shared)
            made.setdefault(part.index, part)
    return list(made.values())


def _require_cover(name: str, spans: Iterable[tuple[int, int]], numel: int) -> None:
    reached = 0
    for start, end in [*sorted(spans), (numel, numel)]:
        if start > reached:
            raise CheckpointError(f"{name}: elements {reached} to {start - 1} are on no rank")
        reached = max(reached, end)


def _listed(shapes: Iterable[tuple[Any, ...]]) -> str:
    return " and ".join(str(list(shape)) for shape in sorted(shapes))
