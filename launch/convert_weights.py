"""A checkpoint's weights: found, read in stretches, and loaded into a model that is to be trained.

`load_weights` is a collective of a run's ranks; all else needs no torch.distributed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import ModelConfig, load_hf
from .checkpoint.errors import CheckpointError, unreadable
from .checkpoint.files import read_into
from .checkpoint.folders import MANIFEST
from .checkpoint.read import Manifest, checkpoints_in, open_checkpoint, verify
from .checkpoint.reader import Reader
from .checkpoint.weights import weight_pieces
from .engine import Engine
from .settings import Given, apply

_log = logging.getLogger(__name__)
_IN_RUN = "checkpoints"  # of a run's folder
_HF = "config.json"  # of a Hugging Face folder


def candidates(path: Path) -> list[Path]:
    """The checkpoints that a path stands for, newest first.

    Args:
        path: a checkpoint, a folder of checkpoints, or the folder of a run.

    Raises:
        CheckpointError: there are none.
        OSError: the path cannot be looked into now.
    """
    if (path / MANIFEST).exists():
        return [path]
    found: list[Path] = []
    if path.is_dir():
        found = checkpoints_in(path / _IN_RUN) or checkpoints_in(path)
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
        OSError: one cannot be read now, so nobody knows whether it is damaged.
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
            raise CheckpointError(unreadable(error, path)) from None


@torch.no_grad()
def load_weights(path: str | Path, engine: Engine) -> None:
    """Fill parameters and routers' biases; all else stays as it was made. A collective.

    Float32 masters follow; moments do not, so call it before the first step. The ranks share out
    the files that are verified, and each reads what it holds.

    Args:
        path: a checkpoint of any layout, a folder of checkpoints or of a run (its newest undamaged
            one), or a Hugging Face folder; rank 0 looks which.
        engine: of this rank.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or it does not fit the model;
            names the tensors; on all ranks.
        ReadError: what is there cannot be read now; on all ranks.
        ValueError: the Hugging Face folder does not fit the model.
        CommError: another rank is gone or did not answer in time.
    """
    path, mesh = Path(path), engine.mesh
    reader = Reader(mesh.world_group, timeout_s=None, board=mesh.waits)
    hugging_face = path / _HF

    def look() -> list[Path]:
        return [hugging_face] if hugging_face.exists() else candidates(path)

    paths = reader.agreed_paths(look, path)
    if paths == [hugging_face]:
        for part in engine.parts.values():
            load_hf(part, path)
    else:
        found = reader.newest(paths, remedy="repair one, or take other weights")
        assert found is not None  # there are paths
        pieces = weight_pieces(engine.parameters, engine.held, engine.parts.values())
        reader.load(found, pieces)
    engine.optimizer.take_wholes()
