"""config.json of DeepSeek-V2, V2-Lite and V3, read and written.

Read are the published files and what transformers 5 writes, which keeps the rotary settings in
`rope_parameters` instead of `rope_theta` and `rope_scaling` and leaves out what it takes for given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any

from .config import ModelConfig, Yarn

# What a file leaves out. The published code of each model has these as its only possibility, or
# as the default of its configuration class.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    },
}
# Settings with one value here: the architecture has nothing else.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
# How the published FP8 checkpoints say that they are that.
FP8_QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
_COPIED = [f.name for f in fields(ModelConfig) if f.name not in ("yarn", "rope_theta", "init_seed")]
_OPTIONAL = ("aux_loss_alpha", "initializer_range", "tie_word_embeddings", "rms_norm_eps")


def read_config(source: str | PathLike[str] | Mapping[str, Any]) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    where, hf = _load(source)
    model_type = hf.get("model_type")
    if model_type not in _DEFAULTS:
        raise ValueError(
            f"{where}: model_type is {model_type!r}; known are {', '.join(sorted(_DEFAULTS))}"
        )
    for key, only in _FIXED.items():
        if hf.get(key, only) not in (only, None):
            raise ValueError(f"{where}: {key}={hf[key]!r} is not supported, only {only!r}")
    _check_quantization(where, hf.get("quantization_config"))
    heads = hf.get("num_attention_heads")
    if hf.get("num_key_value_heads") not in (None, heads):
        raise ValueError(
            f"{where}: num_key_value_heads={hf['num_key_value_heads']} differs from "
            f"num_attention_heads={heads}; latent attention has one key and value for each head"
        )
    values = {**_DEFAULTS[model_type], **{k: v for k, v in hf.items() if k in _COPIED}}
    if "num_mtp_layers" in hf:  # transformers' name for it
        values["num_nextn_predict_layers"] = hf["num_mtp_layers"]
    if values["topk_method"] == "greedy":
        values["n_group"] = values["topk_group"] = 1  # the published code does not read them then
    for key in ("n_group", "topk_group"):
        values[key] = values.get(key) or 1
    values["n_shared_experts"] = values.get("n_shared_experts") or 0
    if model_type == "deepseek_v2" and values["norm_topk_prob"]:
        values["routed_scaling_factor"] = 1.0  # V2's code normalises or scales, never both
    missing = [k for k in _COPIED if k not in values and k not in _OPTIONAL]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    rope_theta, yarn = _rope(where, hf)
    return ModelConfig(**values, rope_theta=rope_theta, yarn=yarn)


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_hf`."""
    values = asdict(config)
    del values["init_seed"]
    yarn = values.pop("yarn")
    v2 = config.topk_method != "noaux_tc"
    return {
        "architectures": ["DeepseekV2ForCausalLM" if v2 else "DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v2" if v2 else "deepseek_v3",
        **_FIXED,
        **values,
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None if yarn is None else {"type": "yarn", **yarn},
    }


def _check_quantization(where: str, given: object) -> None:
    """Raise unless weights are as trained, or in FP8 with a scale for each block of 128x128.

    What each tensor is stored in, its file tells; a key that is left out has the published value.
    """
    if given is None:
        return
    if not isinstance(given, Mapping) or "quant_method" not in given:
        raise ValueError(f"{where}: quantization_config={given!r} does not name a quant_method")
    for key, only in FP8_QUANTIZATION.items():
        if given.get(key, only) != only:
            raise ValueError(
                f"{where}: quantization_config has {key}={given[key]!r}; of quantised checkpoints "
                f"only the published FP8 is read, with {key}={only!r}: take a checkpoint in that "
                "form, or in bfloat16"
            )


def _load(source: str | PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(source, Mapping):
        return "config", source
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: there is no such file; give a config.json or its folder"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path}: an object is needed, got {type(hf).__name__}")
    return str(path), hf


def _rope(where: str, hf: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    given = {**(hf.get("rope_parameters") or {}), **(hf.get("rope_scaling") or {})}
    theta = float(given.pop("rope_theta", None) or hf.get("rope_theta", 10000.0))
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"{where}: rotary scaling {kind!r} is not supported, only 'yarn'")
    names = [f.name for f in fields(Yarn)]
    missing = [k for k in ("factor", "original_max_position_embeddings") if given.get(k) is None]
    if missing:
        raise ValueError(f"{where}: rope_scaling has no {', '.join(missing)}")
    return theta, Yarn(**{k: v for k, v in given.items() if k in names and v is not None})
