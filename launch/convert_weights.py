"""A checkpoint's weights: found, read in stretches, and loaded into a model that is to be trained.

Everything here is done by each process on its own, without torch.distributed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import ModelConfig, load_hf
from .checkpoint.errors import CheckpointError, told
from .checkpoint.files import problem_of, read_into
from .checkpoint.folders import MANIFEST
from .checkpoint.pieces import Held, Piece
from .checkpoint.read import Manifest, checkpoints_in, open_checkpoint, verify
from .engine import Engine
from .settings import Given, apply

_log = logging.getLogger(__name__)
PARAMETERS, BUFFERS = "parameters/", "buffers/"
_IN_RUN = "checkpoints"  # of a run's folder


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path stands for, newest first.

    Args:
        path: a checkpoint, a folder of checkpoints, or the folder of a run.

    Raises:
        CheckpointError: there are none.
    """
    if (path / MANIFEST).exists():
        return [path]
    found: list[Path] = []
    if path.is_dir():
        try:
            found = checkpoints_in(path / _IN_RUN) or checkpoints_in(path)
        except OSError as error:
            raise told(error, path, "cannot be looked into") from None
    if not found:
        raise CheckpointError(
            f"{path}: no checkpoint there; give runs/NAME of a run that has saved one, or the "
            "folder of a checkpoint (step-00000100)"
        )
    return found


def newest_good(path: Path) -> Manifest:
    """The newest checkpoint that a path stands for and that is undamaged; all of it is read.

    Damaged ones are named in a warning and passed over.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for candidate in candidates(path):
        found = verify(candidate)
        if not found:
            return open_checkpoint(candidate)
        _log.warning("passed over: %s", "; ".join(found))
        problems += found
    raise CheckpointError(f"{path}: no undamaged checkpoint there: {'; '.join(problems)}")


def model_of(manifest: Manifest) -> ModelConfig:
    """The model whose weights a checkpoint holds.

    Raises:
        ValueError: it does not tell, or tells of no model that there can be.
    """
    where = str(manifest.path / MANIFEST)
    config = manifest.values.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{where}: does not tell which model it is of")
    given = {key: Given(value, where) for key, value in _flat(model)}
    return apply(ModelConfig(), given)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_elements(manifest: Manifest, name: str, offset: int, target: Tensor) -> None:
    """Fill `target`, [n], with elements of a flattened tensor from `offset` on.

    Raises:
        CheckpointError: there is no such tensor, or a file cannot be read.
    """
    record = manifest.content.records.get(name)
    if record is None:
        raise CheckpointError(f"{manifest.path}: there is no tensor {name!r} in it")
    end = offset + target.numel()
    assert 0 <= offset <= end <= record.numel
    for chunk in record.chunks:
        first, last = max(offset, chunk.offset), min(end, chunk.offset + chunk.length)
        if first >= last:
            continue
        path = manifest.path / chunk.file
        begin = chunk.begin + (first - chunk.offset) * record.dtype.itemsize
        try:
            with path.open("rb", buffering=0) as file:
                read_into(file, begin, record.dtype, target[first - offset : last - offset])
        except OSError as error:
            raise told(error, path, "cannot be read") from None


@torch.no_grad()
def load_weights(path: str | Path, engine: Engine) -> None:
    """Fill this rank's parameters and routers' biases; everything else stays as it was made.

    Float32 masters follow; moments do not, so call it before the first step. Each rank reads what
    it holds, and verifies the files that it reads.

    Args:
        path: a checkpoint of any layout, a folder of checkpoints or of a run (its newest one), or a
            Hugging Face folder.
        engine: of this rank.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit the model; names the tensors.
    """
    path = Path(path)
    if (path / "config.json").exists():
        for part in engine.parts.values():
            load_hf(part, path)
    else:
        _load(open_checkpoint(candidates(path)[0]), list(_pieces(engine)))
    updated = engine.optimizer.parameters
    for name, master in engine.optimizer.masters.items():
        master.copy_(updated[name])


def _load(manifest: Manifest, pieces: list[Piece]) -> None:
    records, problems = manifest.content.records, []
    for name, shape in dict.fromkeys((piece.name, piece.shape) for piece in pieces):
        if name not in records:
            problems.append(f"{name}: missing")
        elif records[name].shape != shape:
            problems.append(f"{name}: {list(records[name].shape)}, not {list(shape)}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{manifest.path} does not fit the model in {len(problems)} tensors: "
            f"{', '.join(problems[:8])}{more}; take [model] from the configuration it was saved by"
        )
    for file in sorted(_files(manifest, pieces)):
        if problem := problem_of(manifest.path / file, manifest.content.files[file]):
            raise CheckpointError(problem)
    for piece in pieces:
        read_elements(manifest, piece.name, piece.offset, piece.data)


def _files(manifest: Manifest, pieces: Iterable[Piece]) -> set[str]:
    """The files that have elements of these pieces."""
    found: set[str] = set()
    for piece in pieces:
        end = piece.offset + piece.data.numel()
        for chunk in manifest.content.records[piece.name].chunks:
            if chunk.offset < end and piece.offset < chunk.offset + chunk.length:
                found.add(chunk.file)
    return found


def _pieces(engine: Engine) -> Iterable[Piece]:
    for name, parameter in engine.parameters.items():
        flat = parameter.detach().view(-1)
        yield from engine.held[name].pieces(PARAMETERS + name, flat)
    for part in engine.parts.values():
        for name, tensor in part.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.nn.Parameter):
                yield from Held.entire(tensor).pieces(BUFFERS + name, tensor.view(-1))
