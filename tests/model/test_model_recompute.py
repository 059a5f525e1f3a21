"""What the backward makes again changes no bit, and nothing stays alive that nobody needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.layer_memory import Alive
from counterflow.fp8 import Recipe
from counterflow.model import DeepSeekV3, ModelConfig
from counterflow.model.build import Recompute
from counterflow.parallel.chunk import Chunk
from tests.cases_model import MTP, UNCOMPRESSED, batch, grads_by_name, total_loss

AGAIN = [Recompute(True, False), Recompute(False, True), Recompute(True, True)]
# A dense layer whose values are longer than queries.
LONG_VALUES = replace(MTP, num_hidden_layers=1, num_nextn_predict_layers=0, v_head_dim=20)


def make(config: ModelConfig, recipe: Recipe | None, recompute: Recompute | None) -> DeepSeekV3:
    return DeepSeekV3(config, dtype=torch.bfloat16, recipe=recipe, recompute=recompute)


def step(
    model: DeepSeekV3, *, queue: bool = True, split: bool = False, length: int = 12
) -> dict[str, Tensor]:
    """Gradients of one micro-batch, and its loss among them."""
    tokens, targets = batch(model.config, length=length)
    chunk = Chunk()
    if queue:
        loss = total_loss(model, tokens, targets, chunk)
        chunk.weight_grads.deferring = split
    else:
        loss = model.loss(model(tokens), targets)
    loss.backward()
    chunk.weight_grads.run()
    if not queue:  # multi-token prediction has a loss in a chunk alone
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads_by_name(model)}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("config", "recipe", "again"),
    [
        (MTP, None, AGAIN),
        (MTP, Recipe(), AGAIN),
        (MTP, Recipe(e5m6=False), AGAIN[-1:]),
        (MTP, Recipe(scales="float32"), AGAIN[-1:]),
        (UNCOMPRESSED, None, AGAIN[-1:]),
        (UNCOMPRESSED, Recipe(), AGAIN[-1:]),
    ],
)
def test_what_is_made_again_is_the_same_to_the_last_bit(
    config: ModelConfig, recipe: Recipe | None, again: list[Recompute]
) -> None:
    expected = step(make(config, recipe, None))
    for recompute in again:
        found = step(make(config, recipe, recompute), split=recompute == AGAIN[-1])
        require_same(found, expected)


@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["bf16", "fp8"])
def test_it_is_the_same_without_a_queue(recipe: Recipe | None) -> None:
    expected = step(make(MTP, recipe, None), queue=False)
    require_same(step(make(MTP, recipe, AGAIN[-1]), queue=False), expected)


def test_e5m6_changes_gradients_by_its_rounding_alone() -> None:
    """Its steps are 2**-6 of a number apart, E4M3's 2**-3: no more than an error of that size.

    The forward is the same. What differs are the output of attention in its own backward, which
    without E5M6 is not rounded, and the input of the product after it, which then is in E4M3.
    """
    config = replace(MTP, num_nextn_predict_layers=0)
    plain = step(make(config, Recipe(e5m6=False), None))
    packed = step(make(config, Recipe(), None))
    assert torch.equal(plain["loss"], packed["loss"])
    changed = [n for n, g in plain.items() if not torch.equal(g, packed[n])]
    assert any("o_proj" in name for name in changed)
    last = "model.layers.1"
    after = [n for n in plain if n.startswith((f"{last}.mlp", f"{last}.post", "lm_head"))]
    assert after
    assert not set(after) & set(changed)
    for name in changed:
        error = (plain[name].float() - packed[name].float()).norm() / plain[name].float().norm()
        assert error < 2**-3, name


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (SDPBackend.MATH, torch.bfloat16),
        (SDPBackend.MATH, torch.float32),
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    ],
    ids=str,
)
def test_scores_of_the_outputs_shape_are_not_taken_for_it(
    backend: SDPBackend, dtype: torch.dtype
) -> None:
    """Only what keeps the output has E5M6's rounding: unfused, that is the product after it."""

    def gradients(recipe: Recipe | None, recompute: Recompute) -> dict[str, Tensor]:
        model = DeepSeekV3(LONG_VALUES, dtype=dtype, recipe=recipe, recompute=recompute)
        with sdpa_kernel(backend):
            return step(model, length=LONG_VALUES.v_head_dim)

    require_same(gradients(None, AGAIN[-1]), gradients(None, Recompute()))
    packed = gradients(Recipe(), Recompute())
    require_same(gradients(Recipe(), AGAIN[-1]), packed)
    plain = gradients(Recipe(e5m6=False), Recompute())
    changed = {name for name, grad in plain.items() if not torch.equal(packed[name], grad)}
    after = {"model.layers.0.self_attn.o_proj.weight"}
    assert after < changed if backend == SDPBackend.FLASH_ATTENTION else after == changed
    for name in changed:
        error = (plain[name].float() - packed[name].float()).norm() / plain[name].float().norm()
        assert error < 2**-3, name


@pytest.mark.parametrize(
    "name",
    ["input_layernorm.weight", "self_attn.q_a_layernorm.weight", "self_attn.kv_b_proj.weight"],
)
@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["bf16", "fp8"])
def test_a_weight_that_changed_before_something_was_made_again_is_told(
    recipe: Recipe | None, name: str
) -> None:
    recompute = Recompute(norms=name.startswith("input"), up_projections=name.startswith("self"))
    model = make(LONG_VALUES, recipe, recompute)
    tokens, targets = batch(model.config, length=12)
    loss = total_loss(model, tokens, targets, Chunk())
    with torch.no_grad():
        model.get_parameter(f"model.layers.0.{name}").mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since the forward"):
        loss.backward()


@pytest.mark.parametrize(
    ("recipe", "recompute"), [(None, AGAIN[-1]), (Recipe(), Recompute()), (Recipe(), AGAIN[-1])]
)
def test_nothing_stays_alive(recipe: Recipe | None, recompute: Recompute) -> None:
    """Not without gradients, nor of a graph that is dropped, nor of what was made again."""
    model = make(MTP, recipe, recompute)
    tokens, targets = batch(MTP, length=12)
    step(model)  # weights are quantised, gradients and the table of angles are there
    with Alive() as alive:
        with torch.no_grad():
            hidden = model(tokens, Chunk())
            assert alive.nbytes() == hidden.nbytes
            del hidden
        chunk = Chunk()
        loss = total_loss(model, tokens, targets, chunk)
        assert alive.nbytes() > 10 * loss.nbytes
        del loss, chunk
        assert alive.nbytes() == 0
        step(model, split=True)
        assert alive.nbytes() == 0
