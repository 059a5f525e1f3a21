"""A model's tensors by their Hugging Face names.

Parameter names are Hugging Face's already, but for the routed experts, which are stacked here and
apart there:

    mlp.experts.gate_up_proj [E, 2 I, D]    mlp.experts.{e}.gate_proj.weight, .up_proj.weight [I, D]
    mlp.experts.down_proj    [E, D, I]      mlp.experts.{e}.down_proj.weight [D, I]

and for multi-token prediction, whose published layers hold copies of embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .experts import Experts
from .stages import EMBEDDING

if TYPE_CHECKING:
    from .deepseek import DeepSeekV3

HEAD = "lm_head.weight"


def hf_tensors(part: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and saved buffer of a part, as (Hugging Face name, view of it).

    Writing to a view writes to the model. Routed experts are those of this rank, named by their
    place among all.
    """
    experts = _local_experts(part)
    for name, parameter in part.named_parameters():
        yield from _views(name, parameter.detach(), experts)
    for name, buffer in part.state_dict(keep_vars=True).items():
        if not isinstance(buffer, torch.nn.Parameter):
            yield name, buffer


def hf_grads(part: DeepSeekV3) -> Iterator[tuple[str, Tensor | None]]:
    """The gradient of every parameter of a part, as (Hugging Face name, view of it or None)."""
    experts = _local_experts(part)
    for name, parameter in part.named_parameters():
        if parameter.grad is None:
            for view_name, _ in _views(name, parameter.detach(), experts):
                yield view_name, None
        else:
            yield from _views(name, parameter.grad, experts)


class Place(NamedTuple):
    """Where a Hugging Face tensor lies: elements of one of ours, whole and flattened.

    Attributes:
        name: of our parameter or buffer.
        is_buffer: which of them it is.
        offset: of the first element.
        shape: of the Hugging Face tensor, whose elements follow each other there.
        whole: shape of ours.
    """

    name: str
    is_buffer: bool
    offset: int
    shape: tuple[int, ...]
    whole: tuple[int, ...]


def hf_places(config: ModelConfig) -> dict[str, Place]:
    """Where every tensor of a model's checkpoint lies, by Hugging Face name; without the copies."""
    from .deepseek import DeepSeekV3

    model = DeepSeekV3(config, device=torch.device("meta"))
    parameters = dict(model.named_parameters())
    found: dict[str, Place] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in parameters:
            for hf_name, view in _views(name, tensor.detach(), range(config.n_routed_experts)):
                assert view.is_contiguous()
                shapes = tuple(view.shape), tuple(tensor.shape)
                found[hf_name] = Place(name, False, int(view.storage_offset()), *shapes)
        elif not isinstance(tensor, torch.nn.Parameter):
            found[name] = Place(name, True, 0, tuple(tensor.shape), tuple(tensor.shape))
    return found


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model's checkpoint, the copies left out."""
    from .deepseek import DeepSeekV3

    whole = DeepSeekV3(config, device=torch.device("meta"))
    return {name: tuple(tensor.shape) for name, tensor in hf_tensors(whole)}


def hf_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that a published checkpoint holds twice: the name of each copy, and what of."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    copies: dict[str, str] = {}
    for depth in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + depth}"
        copies[f"{layer}.embed_tokens.weight"] = EMBEDDING
        copies[f"{layer}.shared_head.head.weight"] = head
    return copies


def _local_experts(part: DeepSeekV3) -> Sequence[int]:
    """Which experts this rank has; all layers have the same."""
    for module in part.modules():
        if isinstance(module, Experts):
            return module.local
    return range(0)


def _views(name: str, tensor: Tensor, experts: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors within one of ours."""
    stem, _, leaf = name.rpartition(".")
    if not stem.endswith(".mlp.experts"):
        yield name, tensor
    elif leaf == "gate_up_proj":
        inner = tensor.shape[1] // 2
        for index, expert in enumerate(experts):
            yield f"{stem}.{expert}.gate_proj.weight", tensor[index, :inner]
            yield f"{stem}.{expert}.up_proj.weight", tensor[index, inner:]
    else:
        for index, expert in enumerate(experts):
            yield f"{stem}.{expert}.{leaf}.weight", tensor[index]
