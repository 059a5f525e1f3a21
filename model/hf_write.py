"""A model into Hugging Face's layout (see `hf`): safetensors files, their index, config.json.

One process saves a whole model with `save_hf`, or with `write_hf` what is not in memory at once; of
a distributed one each rank writes what it has with `write_shard`, and one of them `write_index`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..fp8 import quantize_blocks
from ..fp8.formats import tiles_in
from .config import ModelConfig
from .deepseek import DeepSeekV3
from .hf import (
    F8,
    INDEX,
    SCALES,
    SINGLE,
    CheckpointError,
    is_in_fp8,
    listed,
    opened,
    report,
    unpaired,
)
from .hf_config import FP8_QUANTIZATION
from .names import hf_copies, hf_shapes, hf_tensors


def save_hf(
    parts: Sequence[DeepSeekV3],
    folder: str | PathLike[str],
    *,
    max_file_bytes: int = 5 * 10**9,
    fp8: bool = False,
) -> None:
    """Write a whole model, given as parts in this process, with config.json, into a folder.

    Args:
        parts: of one model.
        folder: made if it is not there.
        max_file_bytes: of one file, if no tensor is larger.
        fp8: store projections in FP8 with a power of two for each block of 128x128, see `hf`: the
            numbers that a model trained by `fp8.Recipe()` multiplies with, as long as no block has
            rows of two of the matrices that it multiplies as one: moe_intermediate_size,
            intermediate_size, and q_lora_rank (num_attention_heads * qk_head_dim where queries are
            not compressed) must be multiples of 128.

    Raises:
        CheckpointError: the parts do not make up the whole model.
    """
    sources = {
        # A view of a stacked tensor, or a tensor under two names, cannot be written as it is.
        name: Source(t.dtype, tuple(t.shape), lambda t=t: t.detach().cpu().clone())
        for name, t in _all_tensors(parts).items()
    }
    write_hf(parts[0].config, sources, folder, max_file_bytes=max_file_bytes, fp8=fp8)


class Source(NamedTuple):
    """A tensor to write: what it is, and where its values come from when its turn has come.

    `values` gives them on the CPU, in memory that they do not share with another tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def write_hf(
    config: ModelConfig,
    sources: Mapping[str, Source],
    folder: str | PathLike[str],
    *,
    max_file_bytes: int = 5 * 10**9,
    fp8: bool = False,
) -> None:
    """Write a whole model as `save_hf` does, with the tensors of one file in memory at a time.

    Args:
        config: the model.
        sources: its tensors by Hugging Face name; copies may be left out.
        folder, max_file_bytes, fp8: as of `save_hf`.

    Raises:
        CheckpointError: tensors are missing, or a file cannot be written.
    """
    missing = sorted(set(hf_shapes(config)) - set(sources))
    if missing:
        raise CheckpointError(
            f"these parts are not the whole model: {listed(missing)} missing; where other ranks "
            "have the rest, use write_shard on each and then write_index"
        )
    sources = {copy: sources[name] for copy, name in hf_copies(config).items()} | dict(sources)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: _stored_bytes(name, source, fp8=fp8) for name, source in sources.items()}
    groups = _split(sizes, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: sources[name].values() for name in names}
        if fp8:
            tensors = _in_fp8(tensors)
        _save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        _write_index(folder, weight_map, sum(sizes.values()))
    _write_config(config, folder, fp8=fp8)


def write_shard(
    parts: Sequence[DeepSeekV3], folder: str | PathLike[str], label: str, *, fp8: bool = False
) -> None:
    """Write one rank's share of a model into `model-{label}.safetensors`.

    Ranks that hold the same tensors need not all write; `label` is theirs alone. `fp8` is as of
    `save_hf`, the same for all.
    """
    tensors = _all_tensors(parts)
    if fp8:
        tensors = _in_fp8(tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(tensors, folder / f"model-{label}.safetensors")


def write_index(folder: str | PathLike[str], config: ModelConfig) -> None:
    """Write the index over all safetensors files of a folder, and config.json.

    Raises:
        CheckpointError: together the files do not make up the whole model.
    """
    folder = Path(folder)
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes = hf_shapes(config) | dict.fromkeys(hf_copies(config), vocabulary)
    shapes |= {n + SCALES: tuple(map(tiles_in, s)) for n, s in shapes.items() if is_in_fp8(n)}
    weight_map: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    total = 0
    problems: list[str] = []
    for file in _weight_files(folder):
        with opened(folder / file) as stored:
            for name in stored.keys():  # noqa: SIM118  not a dict
                piece = stored.get_slice(name)
                if name not in shapes:
                    problems.append(f"{name} in {file}: unexpected")
                elif tuple(piece.get_shape()) != shapes[name]:
                    problems.append(f"{name} in {file}: shape {piece.get_shape()}")
                elif name not in weight_map:  # replicas of a tensor may be in several files
                    weight_map[name], dtypes[name] = file, piece.get_dtype()
                    total += stored.get_tensor(name).nbytes
                elif piece.get_dtype() != dtypes[name]:
                    problems.append(
                        f"{name}: {dtypes[name]} in {weight_map[name]}, {piece.get_dtype()} in "
                        f"{file}"
                    )
    problems += [f"{n}: missing" for n in shapes if n not in weight_map and not n.endswith(SCALES)]
    problems += unpaired(dtypes, dtypes)
    if problems:
        raise CheckpointError(report(folder, problems))
    _write_index(folder, weight_map, total)
    _write_config(config, folder, fp8=F8 in dtypes.values())


@torch.no_grad()
def _in_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as an FP8 checkpoint has them; scales come after their weights."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_in_fp8(name):
            low = tensor if tensor.dtype == torch.bfloat16 else tensor.float()
            stored[name], stored[name + SCALES] = quantize_blocks(low)
        else:
            stored[name] = tensor
    return stored


def _stored_bytes(name: str, source: Source, *, fp8: bool) -> int:
    """What a tensor takes in a file, its scales included."""
    if fp8 and is_in_fp8(name):
        return math.prod(source.shape) + 4 * math.prod(map(tiles_in, source.shape))
    return math.prod(source.shape) * source.dtype.itemsize


def _write_index(folder: Path, weight_map: Mapping[str, str], num_bytes: int) -> None:
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(config: ModelConfig, folder: Path, *, fp8: bool) -> None:
    quantization = {"quantization_config": FP8_QUANTIZATION} if fp8 else {}
    text = json.dumps(config.to_hf() | quantization, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Copies: views of one stacked tensor, or one tensor under two names, cannot be written as such.
    _save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def _all_tensors(parts: Sequence[DeepSeekV3]) -> dict[str, Tensor]:
    """All the tensors of some parts, with the copies that those imply."""
    if not parts:
        raise ValueError("no parts were given")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors.update(hf_tensors(part))
    if any(part.part.head for part in parts):
        tensors |= {copy: tensors[name] for copy, name in hf_copies(parts[0].config).items()}
    return tensors


def _split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in groups of at most `max_bytes`, or of one larger tensor."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def _weight_files(folder: Path) -> list[str]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors files there")
    return files
