"""Checkpoints in Hugging Face's layout: safetensors files, their index, and config.json.

A folder has either `model.safetensors`, or several files and `model.safetensors.index.json`, which
says which file has which tensor. They are read here and written by `hf_write`.

A matrix may be stored in FP8 as DeepSeek-V3 is published: NAME.weight in float8_e4m3fn, and
NAME.weight_scale_inv, float32 [ceil(N/128), ceil(K/128)], by which each block of 128x128 is to be
multiplied. Such are, in any mixture with wider ones, the projections of attention and feed-forward
(not the embedding, head, norms, routers and eh_proj).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..fp8 import E4M3, Quantized, dequantize
from ..fp8.formats import tiles_in
from .config import ModelConfig
from .deepseek import DeepSeekV3
from .names import hf_copies, hf_shapes, hf_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_OPEN = 2  # files that are mapped at a time: one for a weight, one for its scales
_NAMED = 8  # how many names of each kind an error lists
# Rotary frequencies, which old checkpoints hold though they follow from the configuration.
_DERIVED = "rotary_emb.inv_freq"
SCALES = "_scale_inv"  # after the name of a weight in FP8
F8 = "F8_E4M3"  # float8_e4m3fn, as safetensors call it


class CheckpointError(ValueError):
    """A checkpoint does not fit the model; the message names the tensors."""


def load_hf(part: DeepSeekV3, folder: str | PathLike[str]) -> None:
    """Fill a part with the weights of a checkpoint, its own experts only.

    The checkpoint must be of exactly the model that `part.config` describes: a tensor that is
    missing, unexpected or of another shape is an error, and then nothing has been written. Copies
    of embedding and head in the layers of multi-token prediction may be there and are not read.
    Values are converted to the part's dtypes, those in FP8 by way of float32.

    Raises:
        CheckpointError: the files do not fit or cannot be read.
    """
    folder = Path(folder)
    wanted = dict(hf_tensors(part))
    _copy(folder, check_files(folder, read_index(folder), part.config, wanted), wanted)


class HfWeights:
    """The weights of a checkpoint, to be read one by one.

    Args:
        folder: of the checkpoint.
        config: the model, which it must be of exactly.

    Attributes:
        tensors: dtype and shape of every tensor, by name, without copies and scales. What is stored
            in FP8 is float32, which holds its values exactly.

    Raises:
        CheckpointError: the files do not fit or cannot be read.
    """

    def __init__(self, folder: str | PathLike[str], config: ModelConfig) -> None:
        self._folder = Path(folder)
        self._files = read_index(self._folder)
        whole = DeepSeekV3(config, device=torch.device("meta"))
        wanted = dict(hf_tensors(whole))
        check_files(self._folder, self._files, config, wanted)
        self._open: dict[str, safe_open] = {}
        self.tensors = {
            name: (self._dtype(name), tuple(tensor.shape)) for name, tensor in wanted.items()
        }

    def read(self, name: str) -> Tensor:
        """The values of one tensor, in the dtype that `tensors` tells."""
        stored = self._opened(name).get_tensor(name)
        if stored.dtype != E4M3:
            return stored
        scales = self._opened(name + SCALES).get_tensor(name + SCALES)
        return dequantize(Quantized(stored, scales))

    def _dtype(self, name: str) -> torch.dtype:
        if name + SCALES in self._files:
            return torch.float32
        piece = self._opened(name).get_slice(name)
        return piece[:0].dtype  # reads nothing

    def _opened(self, name: str) -> safe_open:
        file = self._files[name]
        stored = self._open.pop(file, None) or opened(self._folder / file)
        self._open[file] = stored  # as the one that was used last
        if len(self._open) > _MOST_OPEN:
            del self._open[next(iter(self._open))]
        return stored


def check_files(
    folder: Path, files: Mapping[str, str], config: ModelConfig, wanted: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Make sure that a checkpoint is of exactly this model; nothing but headers is read.

    Args:
        folder: of the checkpoint.
        files: which of its files has which tensor.
        config: the model.
        wanted: those of its tensors that are to be read; their shapes count.

    Returns:
        What to read from each file: the names in `wanted`, and those of their scales.

    Raises:
        CheckpointError: the files do not fit or cannot be read.
    """
    problems = _mismatches(files, config, wanted)
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        for stored_name in (name, name + SCALES):
            if stored_name in files:
                by_file.setdefault(files[stored_name], []).append(stored_name)
    dtypes: dict[str, str] = {}
    for file, names in by_file.items():
        with opened(folder / file) as stored:
            held = set(stored.keys())
            for name in names:
                if name not in held:
                    problems.append(f"{name}: the index says {file}, which has no such tensor")
                    continue
                piece = stored.get_slice(name)
                dtypes[name] = piece.get_dtype()
                shape = _expected_shape(name, wanted)
                if list(piece.get_shape()) != shape:
                    problems.append(f"{name}: shape {piece.get_shape()}, not {shape}")
    problems += unpaired(dtypes, files)
    if problems:
        raise CheckpointError(report(folder, problems))
    return by_file


def _expected_shape(name: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """The shape of a stored tensor: one of `tensors`, or the scales of one."""
    if name in tensors:
        return list(tensors[name].shape)
    return [tiles_in(size) for size in tensors[name.removesuffix(SCALES)].shape]


def unpaired(dtypes: Mapping[str, str], known: Collection[str]) -> list[str]:
    """Weights in FP8 without scales, scales without a weight in FP8, and FP8 where it cannot be."""
    problems: list[str] = []
    for name, dtype in dtypes.items():
        if name.endswith(SCALES):
            weight = name.removesuffix(SCALES)
            if dtype != "F32":
                problems.append(f"{name}: {dtype}, not F32")
            elif weight in dtypes and dtypes[weight] != F8:
                problems.append(f"{name}: scales, but {weight} is {dtypes[weight]}, not {F8}")
        elif dtype.startswith("F8") and not is_in_fp8(name):
            problems.append(f"{name}: {dtype}, but only projections are stored in FP8")
        elif dtype == F8 and name + SCALES not in known:
            problems.append(f"{name}: in FP8, but there is no {name}{SCALES}")
        elif dtype.startswith("F8") and dtype != F8:
            problems.append(f"{name}: {dtype}; of FP8 only {F8} is read")
    return problems


@torch.no_grad()
def _copy(folder: Path, by_file: Mapping[str, Sequence[str]], wanted: Mapping[str, Tensor]) -> None:
    """Fill `wanted` from files that have been checked; scales may be in another file."""
    half: dict[str, Tensor] = {}  # weights in FP8 or scales, until the other is there
    for file, names in by_file.items():
        with opened(folder / file) as stored:
            for name in names:
                tensor = stored.get_tensor(name)
                weight = name.removesuffix(SCALES)
                if weight == name and tensor.dtype != E4M3:
                    wanted[name].copy_(tensor)
                elif weight not in half:
                    half[weight] = tensor
                else:
                    both = (half.pop(weight), tensor)
                    values, scales = both if weight != name else both[::-1]
                    wanted[weight].copy_(dequantize(Quantized(values, scales)))


def is_in_fp8(name: str) -> bool:
    """Whether a published FP8 checkpoint has the tensor of this name in FP8."""
    of_layer = ".self_attn." in name or ".mlp." in name
    return of_layer and name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


def read_index(folder: Path) -> dict[str, str]:
    """Which file has which tensor.

    Raises:
        CheckpointError: there are no weights, or the index cannot be read.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        with opened(folder / SINGLE) as stored:
            return dict.fromkeys(stored.keys(), SINGLE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files: {error!r}") from error


def _mismatches(
    files: Mapping[str, str], config: ModelConfig, wanted: Mapping[str, Tensor]
) -> list[str]:
    """Names in a checkpoint that the model does not have, and of this part's that it lacks."""
    known = {*hf_shapes(config), *hf_copies(config)}
    if config.tie_word_embeddings:
        known.add("lm_head.weight")  # some writers store it though it is the embedding
    known |= {name + SCALES for name in known if is_in_fp8(name) and name in files}
    return [
        *(f"{name}: missing" for name in wanted if name not in files),
        *(f"{n}: unexpected" for n in files if n not in known and not n.endswith(_DERIVED)),
    ]


def opened(path: Path) -> safe_open:
    """A safetensors file to read from.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def report(folder: Path, problems: Sequence[str]) -> str:
    return (
        f"{folder} does not fit the model in {len(problems)} tensors: {listed(problems)}. Take "
        "the configuration from its config.json; a checkpoint without the layers of multi-token "
        "prediction needs num_nextn_predict_layers=0"
    )


def listed(items: Sequence[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")
