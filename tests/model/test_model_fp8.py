"""The model in FP8: what is and what never is, how near BF16 it stays, and what it keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.comm.dispatch import dispatcher
from counterflow.fp8 import NonFiniteError, Quantized, Recipe
from counterflow.fp8.products import Emulation
from counterflow.fp8.weights import QuantizedWeight
from counterflow.model import DeepSeekV3, ModelConfig
from counterflow.model.build import Recompute
from counterflow.parallel.chunk import Chunk
from counterflow.parallel.mesh import Mesh, MeshShape
from tests.cases_model import MTP, UNCOMPRESSED, batch, grads_by_name, total_loss
from tests.fp8.linears import Counting

CONFIGS = {
    "v3": MTP,
    "queries not compressed": UNCOMPRESSED,
    "tied": replace(MTP, tie_word_embeddings=True),
}
# Weights that are side by side count once: of attention, and of a feed-forward or the experts.
NUM_PRODUCTS = 3 * 4 + (1 + 2 + 2) * 2 + 1
HIGH = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "norm.weight")


def step(model: DeepSeekV3, *, split: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one micro-batch."""
    chunk = Chunk()
    tokens, targets = batch(model.config)
    loss = total_loss(model, tokens, targets, chunk)
    chunk.weight_grads.deferring = split
    loss.backward()
    chunk.weight_grads.run()
    return loss.item(), grads_by_name(model)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Identities of the weights that were quantised."""
    found: set[int] = set()
    get = QuantizedWeight.get

    def noted(
        self: QuantizedWeight, weights: Sequence[Tensor], recipe: Recipe
    ) -> tuple[Quantized, Quantized]:
        found.update(id(w) for w in weights)
        return get(self, weights, recipe)

    monkeypatch.setattr(QuantizedWeight, "get", noted)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_in_fp8_but_for_embedding_head_router_and_norms(
    config: ModelConfig, dtype: torch.dtype, touched: set[int]
) -> None:
    model = DeepSeekV3(config, dtype=dtype, recipe=Recipe())
    step(model)
    for name, parameter in model.named_parameters():
        is_high = name.endswith(HIGH)
        assert (id(parameter) in touched) != is_high, name
        assert parameter.grad is not None
        if name.endswith("mlp.gate.weight"):
            assert parameter.dtype == torch.float32
        else:
            # What is multiplied in FP8 is a master copy; its products round it, and nothing else.
            assert parameter.dtype == (dtype if is_high else torch.float32), name


def test_without_a_recipe_nothing_is_quantised(touched: set[int]) -> None:
    step(DeepSeekV3(MTP))
    assert not touched


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_names_and_shapes_are_those_without_fp8_and_states_go_both_ways(
    config: ModelConfig,
) -> None:
    plain = DeepSeekV3(replace(config, init_seed=3), dtype=torch.bfloat16)
    model = DeepSeekV3(config, dtype=torch.bfloat16, recipe=Recipe())
    for one, other in zip(plain.state_dict().items(), model.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert one[1].shape == other[1].shape
    tokens, _ = batch(config)
    with torch.no_grad():
        before = model(tokens)
        model.load_state_dict(plain.state_dict())
        assert not torch.equal(model(tokens), before)
    again = DeepSeekV3(config, dtype=torch.bfloat16)
    again.load_state_dict(model.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_loss_and_gradients_are_near_those_in_bf16() -> None:
    # With all experts for each token, rounding cannot send one elsewhere.
    config = replace(MTP, num_experts_per_tok=4, topk_group=2, initializer_range=0.06)
    plain, model = (
        DeepSeekV3(config, dtype=torch.bfloat16, recipe=recipe) for recipe in (None, Recipe())
    )
    (exact, exact_grads), (loss, grads) = step(plain), step(model)
    assert abs(loss - exact) / exact < 5e-3
    assert grads.keys() == exact_grads.keys()
    wrong = total = 0.0
    for name, grad in grads.items():
        norm = float(exact_grads[name].double().norm())
        error = float((grad.double() - exact_grads[name].double()).norm())
        # Four significant bits are wrong by 2.6 % of a number in the mean of squares, a product of
        # two by 3.7 %, and ten of them one after another, as in this depth, by 12 %.
        assert error <= 0.3 * norm, name
        wrong, total = wrong + error**2, total + norm**2
    assert 0.02 < (wrong / total) ** 0.5 < 0.15


@pytest.mark.parametrize("config", [MTP, UNCOMPRESSED])
def test_i_and_w_are_one_backward_in_bits(config: ModelConfig) -> None:
    models = [DeepSeekV3(config, dtype=torch.bfloat16, recipe=Recipe()) for _ in range(2)]
    (loss, grads), (same, halves) = step(models[0]), step(models[1], split=True)
    assert loss == same
    for name, grad in grads.items():
        assert torch.equal(grad, halves[name]), name


def test_w_has_a_third_of_the_products_and_no_backward_runs_one_twice() -> None:
    backend = Counting()
    model = DeepSeekV3(MTP, recipe=Recipe(backend=backend))
    chunk = Chunk()
    tokens, targets = batch(MTP)
    loss = total_loss(model, tokens, targets, chunk)
    forward = len(backend.products)
    chunk.weight_grads.deferring = True
    loss.backward()
    backward = len(backend.products) - forward
    assert backward == forward
    chunk.weight_grads.run()
    kinds = [p.accumulate is not None for p in backend.products]
    assert not any(kinds[: 2 * forward])
    assert all(kinds[2 * forward :])
    # Weights that are side by side are one product forward, and one each in W.
    stacked = {"q_a_proj.weight": 1, "gate_proj.weight": 1}
    twice = sum(name.endswith(tuple(stacked)) for name, _ in model.named_parameters())
    assert len(backend.products) == 3 * forward + twice


class Rows:
    """The row counts of all that the recipe quantised in tiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        for name in ("quantize_tiles", "quantize_both"):
            place = f"counterflow.fp8.recipe.{name}"
            monkeypatch.setattr(place, self._noted(_function(place)))

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(len(x))
            return function(x, *args, **kwargs)

        return noted


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("payload", ["exact", "fp8"])
def test_rows_that_arrive_in_fp8_are_not_quantised_again(
    payload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MTP
    exchange = dispatcher(
        "flat", Mesh(MeshShape()), num_experts=config.n_routed_experts, payload=payload
    )
    model = DeepSeekV3(config, dispatcher=exchange, dtype=torch.bfloat16, recipe=Recipe())
    rows = Rows(monkeypatch)
    step(model)
    arrived = batch(config)[0].numel() * config.num_experts_per_tok
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    # Otherwise the experts' input once, and the gradient of their output once.
    assert rows.seen.count(arrived) == (0 if payload == "fp8" else 2 * moe_layers)


def test_evaluation_keeps_nothing() -> None:
    model = DeepSeekV3(MTP, dtype=torch.bfloat16, recipe=Recipe(), recompute=Recompute(True, True))
    tokens, targets = batch(MTP)

    def evaluate() -> float:
        with torch.no_grad():
            hidden = model(tokens, Chunk(training=False))
            loss = model.loss(hidden, targets, Chunk(training=False))
        assert loss.grad_fn is None
        return loss.item()

    def tensors() -> list[Tensor]:
        gc.collect()
        return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]

    first = evaluate()  # weights are quantised now
    before = tensors()  # held, or a new one could be where an old one was and have its id
    assert evaluate() == first
    known = {id(x) for x in before}
    assert [x.shape for x in tensors() if id(x) not in known] == []
    with torch.inference_mode():
        assert model.loss(model(tokens), targets).item() == first


def test_weights_are_quantised_once_a_step_and_not_once_a_micro_batch() -> None:
    model = DeepSeekV3(MTP, recipe=Recipe())
    caches = {id(c): c for m in model.modules() for c in _caches(m)}.values()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for steps in (1, 2):
        for _ in range(2):
            step(model)
        used = [cache.times_quantized for cache in caches if cache.times_quantized]
        assert used == [steps] * len(used)
        assert len(used) == NUM_PRODUCTS
        optimizer.step()


def _caches(module: torch.nn.Module) -> list[QuantizedWeight]:
    calls = [value for value in vars(module).values() if hasattr(value, "quantized")]
    return [call.quantized for call in calls]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_a_proj",
        "model.layers.0.self_attn.kv_a_proj_with_mqa",
        "model.layers.1.self_attn.q_b_proj",
        "model.layers.1.self_attn.kv_b_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.2.eh_proj",
    ],
)
def test_errors_name_the_published_module(name: str) -> None:
    model = DeepSeekV3(MTP, recipe=Recipe(check=True))
    parameters = dict(model.named_parameters())
    parameter = parameters[name] if name in parameters else parameters[f"{name}.weight"]
    with torch.no_grad():
        parameter[..., 0].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="the weight") as caught:
        step(model)
    said, _, _ = str(caught.value).partition(": ")
    layer, _, part = name.rpartition(".")
    assert said.startswith(layer)
    assert part in said


def test_a_model_learns_on_an_emulated_accumulator() -> None:
    config = UNCOMPRESSED
    model = DeepSeekV3(config, recipe=Recipe(backend=Emulation(bits=14)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    before, grads = step(model)
    assert all(grad.isfinite().all() for grad in grads.values())
    optimizer.step()
    assert step(model)[0] < before
