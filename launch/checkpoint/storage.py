"""Where torch.distributed.checkpoint writes to and reads from: files of ours under a manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from counterflow import __version__

from ..errors import ReadError
from .errors import CheckpointError, told, unreadable
from .files import Entry, Progress, Say, in_order, read_into, write_bytes, write_file
from .folders import MANIFEST, part_folder, put_in_place, sync_folder
from .manifest import Chunk, Content, FileRecord, TensorRecord, written
from .plan import Whole, dtype_of, span

T = TypeVar("T")

WAITING = "waiting for the other ranks"


class _Written(NamedTuple):
    """What is told of a chunk that was written: its file, that file's record, its first byte."""

    file: str
    record: FileRecord
    begin: int


class PartWriter(StorageWriter):
    """Writes one checkpoint into a folder beside its final place, and then moves it there.

    Args:
        folder: of all checkpoints.
        step: of this one.
        values: the run's, as JSON.
        say: called with what is being done, for whoever asks where this rank stands.
    """

    def __init__(self, folder: Path, step: int, values: str, say: Say) -> None:
        self._folder, self._step = folder, step
        self._values, self._say = values, say
        self._part = part_folder(folder, step)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None  # the folder is given to the constructor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return False  # such a writer is always made by whoever saves

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        if is_coordinator:
            self._doing(f"making {self._part}", self._part, self._make_part)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        needed = sum(item.tensor_storage_size() or 0 for plan in plans for item in plan.items)
        free = self._doing("looking for free space", self._part, self._free_bytes)
        if needed > free:
            raise CheckpointError(
                f"{self._part}: needs {needed} bytes, and {free} are free there; free some space, "
                "lower checkpoint.keep, or take a run.folder on a larger disk"
            )
        return [
            replace(plan, storage_data=f"rank{rank:05}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; the future is done already, as the thread is ours."""
        path = self._part / plan.storage_data
        future: Future[list[WriteResult]] = Future()
        results = self._doing(f"writing {path}", path, lambda: self._write(path, plan, planner))
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest, and give the folder its name: all files are on disk by now."""
        whole = metadata.planner_data
        assert isinstance(whole, Whole)
        path = self._part / MANIFEST
        data = written(self._content(metadata, whole, results))
        self._doing(f"writing {path}", path, lambda: self._finish(path, data))

    def _doing(self, what: str, path: Path, run: Callable[[], T]) -> T:
        self._say(what)
        try:
            result = run()
        except OSError as error:
            raise told(error, path, "cannot be written") from None
        self._say(WAITING)
        return result

    def _make_part(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._part.exists():
            shutil.rmtree(self._part)
        self._part.mkdir()

    def _free_bytes(self) -> int:
        found = os.statvfs(self._part)
        return found.f_bavail * found.f_frsize

    def _write(self, path: Path, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        if not plan.items:
            return []
        items = {_key(item.index): item for item in plan.items}
        entries = in_order(
            [
                Entry(key, dtype_of(item), span(item)[1], lambda i=item: _values(planner, i))
                for key, item in items.items()
            ]
        )
        metadata = {"format": "pt", "step": str(self._step)}
        record, begins = write_file(path, entries, metadata, self._say)
        return [
            WriteResult(
                index=items[entry.key].index,
                size_in_bytes=entry.length * entry.dtype.itemsize,
                storage_data=_Written(path.name, record, begin),
            )
            for entry, begin in zip(entries, begins, strict=True)
        ]

    def _content(
        self, metadata: Metadata, whole: Whole, results: list[list[WriteResult]]
    ) -> Content:
        at = {result.index: result.storage_data for of in results for result in of}
        records: dict[str, TensorRecord] = {}
        for name, stored in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(stored, TensorStorageMetadata)
            chunks: list[Chunk] = []
            for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
                place: _Written = at[MetadataIndex(name, chunk.offsets)]
                chunks.append(Chunk(chunk.offsets[0], chunk.sizes[0], place.file, place.begin))
            dtype = stored.properties.dtype
            records[name] = TensorRecord(dtype, tuple(whole.shapes[name]), tuple(chunks))
        return Content(
            step=self._step,
            values=json.loads(self._values),
            own=tuple(json.loads(own) for own in whole.own),
            versions={"counterflow": __version__, "torch": str(torch.__version__)},
            files={place.file: place.record for place in at.values()},
            records=records,
        )

    def _finish(self, path: Path, data: bytes) -> None:
        write_bytes(path, data)
        sync_folder(self._part)
        self._say(f"renaming {self._part}")
        put_in_place(self._folder, self._step)


class ManifestReader(StorageReader):
    """Reads pieces of tensors out of a checkpoint whose files have been verified.

    Args:
        path: of the checkpoint.
        content: its manifest.
        say: as of `PartWriter`.
    """

    def __init__(self, path: Path, content: Content, say: Say) -> None:
        self._path, self._content, self._say = path, content, say

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        properties = {r.dtype: TensorProperties(r.dtype) for r in self._content.records.values()}
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties[record.dtype],
                    torch.Size([record.numel]),
                    [
                        ChunkStorageMetadata(torch.Size([c.offset]), torch.Size([c.length]))
                        for c in record.chunks
                    ],
                )
                for name, record in self._content.records.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        del metadata, is_coordinator, args, kwargs

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for, a file after the other, each in the order of its bytes."""
        wanted: dict[str, list[tuple[int, ReadItem]]] = {}
        for item in plan.items:
            chunk, begin = self._place(item)
            wanted.setdefault(chunk.file, []).append((begin, item))
        for name, reads in sorted(wanted.items()):
            path = self._path / name
            num_bytes = sum(self._num_bytes(item) for _, item in reads)
            progress = Progress(f"reading {path}", num_bytes, self._say)
            progress.moved(0)
            try:
                with path.open("rb", buffering=0) as file:
                    for begin, item in sorted(reads, key=lambda read: read[0]):
                        target = planner.resolve_tensor(item).detach()
                        dtype = self._content.records[item.storage_index.fqn].dtype
                        read_into(file, begin, dtype, target, progress.moved)
                        planner.commit_tensor(item, target)
            except OSError as error:
                raise ReadError(unreadable(error, path)) from None
        self._say(WAITING)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _num_bytes(self, item: ReadItem) -> int:
        return item.lengths[0] * self._content.records[item.storage_index.fqn].dtype.itemsize

    def _place(self, item: ReadItem) -> tuple[Chunk, int]:
        record = self._content.records[item.storage_index.fqn]
        number = item.storage_index.index
        assert number is not None  # set by create_read_items_for_chunk_list
        chunk = record.chunks[number]
        return chunk, chunk.begin + item.storage_offsets[0] * record.dtype.itemsize


def _key(index: MetadataIndex) -> str:
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"


def _values(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    values = planner.resolve_data(item)
    assert isinstance(values, torch.Tensor)
    return values
