"""The DeepSeek-V3 architecture: latent attention, mixture of experts, multi-token prediction.

`config` has the dimensions, `deepseek` the model or any contiguous part of it, `stages` the cut
into pipeline stages, `hf` weights by their Hugging Face names. May import `parallel` and `comm`.
The names below are imported on first use, so that reading a configuration needs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig, Yarn
    from .counts import num_active_parameters, num_parameters
    from .deepseek import DeepSeekV3, build_parts
    from .hf import CheckpointError, load_hf
    from .hf_write import save_hf, write_index, write_shard
    from .names import hf_grads, hf_shapes, hf_tensors
    from .router import updated_bias
    from .stages import Part, partition, shared_parameters

_HOMES = {
    "CheckpointError": "hf",
    "DeepSeekV3": "deepseek",
    "ModelConfig": "config",
    "Part": "stages",
    "Yarn": "config",
    "build_parts": "deepseek",
    "hf_grads": "names",
    "hf_shapes": "names",
    "hf_tensors": "names",
    "load_hf": "hf",
    "num_active_parameters": "counts",
    "num_parameters": "counts",
    "partition": "stages",
    "save_hf": "hf_write",
    "shared_parameters": "stages",
    "updated_bias": "router",
    "write_index": "hf_write",
    "write_shard": "hf_write",
}
__all__ = [
    "CheckpointError",
    "DeepSeekV3",
    "ModelConfig",
    "Part",
    "Yarn",
    "build_parts",
    "hf_grads",
    "hf_shapes",
    "hf_tensors",
    "load_hf",
    "num_active_parameters",
    "num_parameters",
    "partition",
    "save_hf",
    "shared_parameters",
    "updated_bias",
    "write_index",
    "write_shard",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
