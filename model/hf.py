"""Checkpoints in Hugging Face's layout: safetensors files, their index, and config.json.

A folder has either `model.safetensors`, or several files and `model.safetensors.index.json`, which
says which file has which tensor. One process saves a whole model with `save_hf`; of a distributed
one each rank writes what it has with `write_shard`, and one of them `write_index` when all have.

A matrix may be stored in FP8 as DeepSeek-V3 is published: NAME.weight in float8_e4m3fn, and
NAME.weight_scale_inv, float32 [ceil(N/128), ceil(K/128)], by which each block of 128x128 is to be
multiplied. Such are, in any mixture with wider ones, the projections of attention and feed-forward
(not the embedding, head, norms, routers and eh_proj); they are written so if asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..fp8 import E4M3, Quantized, dequantize, quantize_blocks
from ..fp8.formats import tiles_in
from .config import ModelConfig
from .deepseek import DeepSeekV3
from .hf_config import FP8_QUANTIZATION
from .names import hf_copies, hf_shapes, hf_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMED = 8  # how many names of each kind an error lists
# Rotary frequencies, which old checkpoints hold though they follow from the configuration.
_DERIVED = "rotary_emb.inv_freq"
_SCALES = "_scale_inv"  # after the name of a weight in FP8
_F8 = "F8_E4M3"  # float8_e4m3fn, as safetensors call it


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
    files = _read_index(folder)
    wanted = dict(hf_tensors(part))
    problems = _mismatches(files, part.config, wanted)
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        for stored_name in (name, name + _SCALES):
            if stored_name in files:
                by_file.setdefault(files[stored_name], []).append(stored_name)
    dtypes: dict[str, str] = {}
    for file, names in by_file.items():
        with _opened(folder / file) as stored:
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
    problems += _unpaired(dtypes, files)
    if problems:
        raise CheckpointError(_report(folder, problems))
    _copy(folder, by_file, wanted)


def _expected_shape(name: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """The shape of a stored tensor: one of `tensors`, or the scales of one."""
    if name in tensors:
        return list(tensors[name].shape)
    return [tiles_in(size) for size in tensors[name.removesuffix(_SCALES)].shape]


def _unpaired(dtypes: Mapping[str, str], known: Collection[str]) -> list[str]:
    """Weights in FP8 without scales, scales without a weight in FP8, and FP8 where it cannot be."""
    problems: list[str] = []
    for name, dtype in dtypes.items():
        if name.endswith(_SCALES):
            weight = name.removesuffix(_SCALES)
            if dtype != "F32":
                problems.append(f"{name}: {dtype}, not F32")
            elif weight in dtypes and dtypes[weight] != _F8:
                problems.append(f"{name}: scales, but {weight} is {dtypes[weight]}, not {_F8}")
        elif dtype.startswith("F8") and not is_in_fp8(name):
            problems.append(f"{name}: {dtype}, but only projections are stored in FP8")
        elif dtype == _F8 and name + _SCALES not in known:
            problems.append(f"{name}: in FP8, but there is no {name}{_SCALES}")
        elif dtype.startswith("F8") and dtype != _F8:
            problems.append(f"{name}: {dtype}; of FP8 only {_F8} is read")
    return problems


@torch.no_grad()
def _copy(folder: Path, by_file: Mapping[str, Sequence[str]], wanted: Mapping[str, Tensor]) -> None:
    """Fill `wanted` from files that have been checked; scales may be in another file."""
    half: dict[str, Tensor] = {}  # weights in FP8 or scales, until the other is there
    for file, names in by_file.items():
        with _opened(folder / file) as stored:
            for name in names:
                tensor = stored.get_tensor(name)
                weight = name.removesuffix(_SCALES)
                if weight == name and tensor.dtype != E4M3:
                    wanted[name].copy_(tensor)
                elif weight not in half:
                    half[weight] = tensor
                else:
                    both = (half.pop(weight), tensor)
                    values, scales = both if weight != name else both[::-1]
                    wanted[weight].copy_(dequantize(Quantized(values, scales)))


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
        fp8: store projections in FP8 with a power of two for each block of 128x128, see above: the
            numbers that a model trained by `fp8.Recipe()` multiplies with, as long as no block has
            rows of two of the matrices that it multiplies as one: moe_intermediate_size,
            intermediate_size, and q_lora_rank (num_attention_heads * qk_head_dim where queries are
            not compressed) must be multiples of 128.

    Raises:
        CheckpointError: the parts do not make up the whole model.
    """
    tensors = _all_tensors(parts)
    config = parts[0].config
    missing = sorted(set(hf_shapes(config)) - set(tensors))
    if missing:
        raise CheckpointError(
            f"these parts are not the whole model: {_listed(missing)} missing; where other ranks "
            "have the rest, use write_shard on each and then write_index"
        )
    if fp8:
        tensors = _in_fp8(tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = _split(tensors, max_file_bytes)
    for number, names in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write({name: tensors[name] for name in names}, folder / file)
    if len(groups) == 1:
        _write_config(config, folder, fp8=fp8)
    else:
        write_index(folder, config)


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
    shapes |= {n + _SCALES: tuple(map(tiles_in, s)) for n, s in shapes.items() if is_in_fp8(n)}
    weight_map: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    total = 0
    problems: list[str] = []
    for file in _weight_files(folder):
        with _opened(folder / file) as stored:
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
    problems += [f"{n}: missing" for n in shapes if n not in weight_map and not n.endswith(_SCALES)]
    problems += _unpaired(dtypes, dtypes)
    if problems:
        raise CheckpointError(_report(folder, problems))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_config(config, folder, fp8=_F8 in dtypes.values())


def is_in_fp8(name: str) -> bool:
    """Whether a published FP8 checkpoint has the tensor of this name in FP8."""
    of_layer = ".self_attn." in name or ".mlp." in name
    return of_layer and name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


@torch.no_grad()
def _in_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as an FP8 checkpoint has them; scales come after their weights."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_in_fp8(name):
            low = tensor if tensor.dtype == torch.bfloat16 else tensor.float()
            stored[name], stored[name + _SCALES] = quantize_blocks(low)
        else:
            stored[name] = tensor
    return stored


def _write_config(config: ModelConfig, folder: Path, *, fp8: bool) -> None:
    quantization = {"quantization_config": FP8_QUANTIZATION} if fp8 else {}
    text = json.dumps(config.to_hf() | quantization, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Copies: views of one stacked tensor, or one tensor under two names, cannot be written as such.
    separate = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save_file(separate, path, metadata={"format": "pt"})


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


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in groups of at most `max_bytes`, or of one larger tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups


def _weight_files(folder: Path) -> list[str]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors files there")
    return files


def _read_index(folder: Path) -> dict[str, str]:
    """Which file has which tensor."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        with _opened(folder / SINGLE) as stored:
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
    known |= {name + _SCALES for name in known if is_in_fp8(name) and name in files}
    return [
        *(f"{name}: missing" for name in wanted if name not in files),
        *(f"{n}: unexpected" for n in files if n not in known and not n.endswith(_DERIVED)),
    ]


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _report(folder: Path, problems: Sequence[str]) -> str:
    return (
        f"{folder} does not fit the model in {len(problems)} tensors: {_listed(problems)}. Take "
        "the configuration from its config.json; a checkpoint without the layers of multi-token "
        "prediction needs num_nextn_predict_layers=0"
    )


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")
