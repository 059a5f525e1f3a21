"""Checkpoints out to Hugging Face's layout, and in from it, little of them in memory at a time."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterflow import __version__  # the root package is no room, so no relative import finds it

from ..model import ModelConfig
from ..model.hf import HfWeights
from ..model.hf_write import Source, write_hf
from ..model.names import Place, hf_places
from .checkpoint.errors import CheckpointError
from .checkpoint.files import Entry, in_order, write_bytes, write_file
from .checkpoint.folders import MANIFEST, part_folder, put_in_place, sync_folder
from .checkpoint.manifest import Chunk, Content, FileRecord, TensorRecord, written
from .checkpoint.read import Manifest
from .checkpoint.weights import BUFFERS, PARAMETERS
from .convert_weights import model_of, read_elements
from .settings import to_toml

_EMA, _MASTERS = "ema/", "optimizer/master/"
_FILE_BYTES = 5 * 10**9  # of a file of a checkpoint


def to_hf(
    manifest: Manifest,
    out: Path,
    *,
    ema: bool = False,
    fp8: bool = False,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder, whole or not at all.

    Args:
        manifest: the checkpoint, verified.
        out: the folder; new or empty.
        ema: the parameters' moving average rather than the parameters.
        fp8: projections in FP8, see `model.hf`.
        dtype: of what is not in FP8, but for the routers, which stay as they are where that is
            wider. None: as stored. float32 takes the optimizer's masters where there are any.
        max_file_bytes: of one file, if no tensor is larger.

    Raises:
        ValueError: the checkpoint does not hold the model or an average, `out` cannot be used, or
            writing fails.
    """
    config = model_of(manifest)
    if ema and not any(name.startswith(_EMA) for name in manifest.tensors):
        raise CheckpointError(
            f"{manifest.path}: holds no moving average; a run keeps one with train.ema_decay"
        )
    sources: dict[str, Source] = {}
    problems: list[str] = []
    for hf_name, place in hf_places(config).items():
        name = _stored_name(manifest, place, ema=ema, masters=dtype == torch.float32)
        record = manifest.content.records.get(name)
        if record is None or record.shape != place.whole:
            problems.append(f"{name} ({'missing' if record is None else list(record.shape)})")
            continue
        to = _target_dtype(hf_name, record.dtype, dtype)
        values = partial(_values, manifest, name, place, record.dtype, to)
        sources[hf_name] = Source(to, place.shape, values)
    if problems:
        raise CheckpointError(
            f"{manifest.path}: {len(problems)} tensors are not as its model has them, such as "
            f"{problems[0]}"
        )
    with new_folder(out) as part:
        write_hf(config, sources, part, max_file_bytes=max_file_bytes, fp8=fp8)


def from_hf(folder: Path, out: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a Hugging Face folder's weights as a checkpoint without anything else.

    Args:
        folder: with config.json and safetensors files.
        out: a folder for checkpoints; new or empty.
        dtype: as of `to_hf`; None: as stored, what is in FP8 in float32.

    Returns:
        The checkpoint's folder, out/step-00000000.

    Raises:
        ValueError: the weights do not fit config.json, `out` cannot be used, or writing fails.
    """
    config = ModelConfig.from_hf(folder)
    weights = HfWeights(folder, config)
    places = hf_places(config)
    dtypes: dict[str, torch.dtype] = {}  # by our names: parts of one may be stored differently
    for hf_name, place in places.items():
        mine = _target_dtype(hf_name, weights.tensors[hf_name][0], dtype)
        dtypes[_ours(place)] = torch.promote_types(mine, dtypes.get(_ours(place), mine))
    entries: list[Entry] = []
    for hf_name, place in places.items():
        name = _ours(place)
        length = torch.Size(place.shape).numel()
        values = partial(_flat_values, weights, hf_name, dtypes[name])
        entries.append(Entry(f"{name}@{place.offset}", dtypes[name], length, values))
    values = {"step": 0, "config": {"model": tomllib.loads(to_toml(config))}}
    shapes = {_ours(place): place.whole for place in places.values()}
    with new_folder(out) as part:
        _write_checkpoint(part, entries, shapes, values)
    return out / "step-00000000"


def require_new(out: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        CheckpointError: it has, or is no folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; give a folder that is new or empty")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill, which takes its place at the end; removed on any error.

    Raises:
        CheckpointError: `out` is there and not empty, or cannot be written.
    """
    target = out.resolve()
    part = target.with_name(f".{target.name}.part")
    try:
        require_new(out)
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        yield part
        sync_folder(part)
        part.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{error.filename or part}: cannot be written: {reason}; nothing is left of it"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _stored_name(manifest: Manifest, place: Place, *, ema: bool, masters: bool) -> str:
    if place.is_buffer:
        return BUFFERS + place.name
    if ema:
        return _EMA + place.name
    if masters and _MASTERS + place.name in manifest.content.records:
        return _MASTERS + place.name
    return PARAMETERS + place.name


def _ours(place: Place) -> str:
    return (BUFFERS if place.is_buffer else PARAMETERS) + place.name


def _target_dtype(name: str, stored: torch.dtype, wished: torch.dtype | None) -> torch.dtype:
    """Routers are float32 at least in every model here, whatever the rest is."""
    if ".mlp.gate." in name:
        return torch.promote_types(wished or stored, torch.float32)
    return wished or stored


def _values(
    manifest: Manifest, name: str, place: Place, stored: torch.dtype, dtype: torch.dtype
) -> Tensor:
    flat = torch.empty(torch.Size(place.shape).numel(), dtype=stored)
    read_elements(manifest, name, place.offset, flat)
    return flat.view(place.shape).to(dtype)


def _flat_values(weights: HfWeights, name: str, dtype: torch.dtype) -> Tensor:
    return weights.read(name).to(dtype).reshape(-1).contiguous()


def _write_checkpoint(
    folder: Path, entries: list[Entry], shapes: dict[str, tuple[int, ...]], values: dict[str, Any]
) -> None:
    """Write a checkpoint of step 0 into a folder of checkpoints."""
    part = part_folder(folder, 0)
    part.mkdir()
    files: dict[str, FileRecord] = {}
    chunks: dict[str, list[Chunk]] = {name: [] for name in shapes}
    dtypes: dict[str, torch.dtype] = {}
    for number, group in enumerate(_groups(entries)):
        file = f"rank{number:05}.safetensors"
        files[file], begins = write_file(part / file, group, {"format": "pt", "step": "0"})
        for entry, begin in zip(group, begins, strict=True):
            name, _, offset = entry.key.rpartition("@")
            chunks[name].append(Chunk(int(offset), entry.length, file, begin))
            dtypes[name] = entry.dtype
    content = Content(
        step=0,
        values=values,
        own=({},),
        versions={"counterflow": __version__, "torch": str(torch.__version__)},
        files=files,
        records={
            name: TensorRecord(dtypes[name], shape, tuple(sorted(chunks[name])))
            for name, shape in shapes.items()
        },
    )
    write_bytes(part / MANIFEST, written(content))
    sync_folder(part)
    put_in_place(folder, 0)


def _groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries of about a file's size each, in the order in which a file has them."""
    group: list[Entry] = []
    size = 0
    for entry in entries:
        group.append(entry)
        size += entry.length * entry.dtype.itemsize
        if size >= _FILE_BYTES:
            yield in_order(group)
            group, size = [], 0
    if group:
        yield in_order(group)
