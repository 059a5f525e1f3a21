"""Checkpoints for tools: one process, no torch.distributed, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError, unreadable
from .files import Say, is_absent, problem_of, silent
from .folders import MANIFEST, checkpoints_in, named_step
from .manifest import Content, parsed

__all__ = [
    "Manifest",
    "Share",
    "checkpoints_in",
    "is_complete",
    "manifest_bytes",
    "open_checkpoint",
    "verified_share",
    "verify",
]


class Manifest:
    """A checkpoint that is read; made by `open_checkpoint`.

    Attributes:
        path: its folder.
        content: all that its checkpoint.json says.
    """

    def __init__(self, path: Path, content: Content) -> None:
        self.path, self.content = path, content

    @property
    def step(self) -> int:
        """After which it was saved."""
        return self.content.step

    @property
    def values(self) -> Mapping[str, Any]:
        """What the run saved beside its tensors, plain JSON."""
        return self.content.values

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and the shape of every tensor, by name."""
        return {name: (of.dtype, of.shape) for name, of in self.content.records.items()}

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own; files are mapped, so no more than it is read.

        Raises:
            CheckpointError: there is no such tensor, or a file cannot be read.
        """
        record = self.content.records.get(name)
        if record is None:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in it")
        whole = torch.empty(record.numel, dtype=record.dtype)
        for chunk in record.chunks:
            if chunk.length:
                with self._mapped(chunk.file) as mapped:
                    view = memoryview(mapped)[chunk.begin :]
                    stored = torch.frombuffer(view, dtype=record.dtype, count=chunk.length)
                    whole[chunk.offset : chunk.offset + chunk.length] = stored
                    del stored, view  # a mapping that is looked at cannot be closed
        return whole.view(record.shape)

    def _mapped(self, name: str) -> mmap.mmap:
        path, size = self.path / name, self.content.files[name].size
        try:
            with path.open("rb") as file:
                # Private, not read-only: torch warns of tensors over what cannot be written to.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            reason = error if isinstance(error, OSError) else OSError(None, str(error))
            raise CheckpointError(unreadable(reason, path)) from None
        if len(mapped) != size:
            raise CheckpointError(f"{path}: has {len(mapped)} bytes, not {size}")
        return mapped


def open_checkpoint(path: str | Path) -> Manifest:
    """Read what a checkpoint holds; its files are not verified, see `verify`.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read or is damaged.
    """
    path = Path(path)
    try:
        return Manifest(path, parsed(manifest_bytes(path), path / MANIFEST))
    except OSError as error:
        raise CheckpointError(unreadable(error, path / MANIFEST)) from None


def manifest_bytes(path: Path) -> bytes:
    """The bytes of a checkpoint's manifest.

    Raises:
        CheckpointError: there is none.
        OSError: it is there and cannot be read now.
    """
    try:
        return (path / MANIFEST).read_bytes()
    except OSError as error:
        if not is_absent(error):
            error.filename = error.filename or str(path / MANIFEST)
            raise
        raise CheckpointError(f"{path / MANIFEST}: is missing; {path} is no checkpoint") from None


def verify(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint, a line each; every byte of it is read.

    Raises:
        OSError: it cannot be read now, which says nothing of what is in it.
    """
    return verified_share(Path(path), 0, 1).problems


class Share(NamedTuple):
    """What a rank has found that verifies its share of a checkpoint's files.

    `content`: what the manifest says, or None; `digest`: the SHA-256 of its bytes, which is the
    same on all ranks; `problems`: what is wrong with the manifest or with this rank's files.
    """

    content: Content | None
    digest: str
    problems: list[str]


def verified_share(path: Path, rank: int, world: int, say: Say = silent) -> Share:
    """A rank's share of verifying a checkpoint; the ranks' shares together are all of it.

    Raises:
        OSError: as of `verify`.
    """
    digest = ""
    try:
        data = manifest_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        content = parsed(data, path / MANIFEST)
        if named_step(path) not in (None, content.step):
            raise CheckpointError(f"{path / MANIFEST}: is of step {content.step}")
    except CheckpointError as error:
        return Share(None, digest, [str(error)])
    by_size = sorted(content.files.items(), key=lambda of: (-of[1].size, of[0]))
    mine = by_size[rank::world]
    problems = [p for name, of in mine if (p := problem_of(path / name, of, say))]
    return Share(content, digest, problems)


def is_complete(path: Path) -> bool:
    """Whether its manifest is good and its files have their sizes; contents are not read."""
    try:
        files = open_checkpoint(path).content.files.items()
        return all((path / name).stat().st_size == of.size for name, of in files)
    except (CheckpointError, OSError):
        return False
