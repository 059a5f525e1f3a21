"""The model as a whole, cut into parts, split into I and W, and in several dtypes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from counterflow.comm.dispatch import Dispatcher, dispatcher
from counterflow.model import (
    DeepSeekV3,
    ModelConfig,
    Part,
    Yarn,
    build_parts,
    hf_tensors,
    partition,
    shared_parameters,
)
from counterflow.model.linear import rms_norm
from counterflow.model.rope import (
    RotaryTable,
    frequencies,
    rotate,
    rotation_scale,
    softmax_scale,
)
from counterflow.model.stages import EMBEDDING
from counterflow.parallel.accumulate import accumulate_in_float32
from counterflow.parallel.chunk import Chunk
from counterflow.parallel.mesh import Mesh, MeshShape
from tests.cases_model import (
    SMALL,
    V2,
    YARN,
    batch,
    expert_parallel_grads,
    grads_by_name,
    grads_of,
    set_biases,
    total_loss,
)
from tests.ranks import RankPool

MTP = replace(SMALL, num_nextn_predict_layers=2)


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 30), stages=st.integers(1, 30), dense=st.integers(0, 3))
def test_a_partition_covers_the_layers_in_order(layers: int, stages: int, dense: int) -> None:
    config = replace(SMALL, num_hidden_layers=layers, first_k_dense_replace=min(dense, layers))
    if stages > layers:
        with pytest.raises(ValueError, match=f"num_hidden_layers to {stages}"):
            partition(config, stages)
        return
    parts = partition(config, stages)
    assert [n for part in parts for n in part.layers] == list(range(layers))
    assert len(parts) == stages
    assert all(len(part.layers) > 0 for part in parts)
    assert [part.embed for part in parts] == [True] + [False] * (stages - 1)
    assert [part.head for part in parts] == [False] * (stages - 1) + [True]


def test_v3_on_sixteen_stages_spares_the_last_one() -> None:
    sizes = [len(part.layers) for part in partition(ModelConfig(), 16)]
    assert sizes == [4] * 15 + [1]


def test_a_given_cut_is_taken_as_it_is() -> None:
    config = replace(SMALL, num_hidden_layers=6)
    parts = partition(config, 3, (1, 4, 1))
    assert [part.layers for part in parts] == [range(1), range(1, 5), range(5, 6)]
    assert [(part.embed, part.head) for part in parts] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    sizes = [len(part.layers) for part in partition(config, 3)]
    assert partition(config, 3, sizes) == partition(config, 3)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((3, 3), "2 stages, but there are 3"),
        ((3, 0, 3), "stage 1 has 0"),
        ((3, 3, 1), "7 layers in all, but the model has num_hidden_layers=6"),
    ],
)
def test_a_cut_that_is_not_of_the_model_is_refused(layers: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        partition(replace(SMALL, num_hidden_layers=6), 3, layers)


@pytest.mark.parametrize(
    "part",
    [Part(range(1, 5), False, False), Part(range(1, 3), True, True), Part(range(2), True, True)],
)
def test_what_is_not_a_part_is_refused(part: Part) -> None:
    with pytest.raises(ValueError, match="layer"):
        DeepSeekV3(SMALL, part)


@pytest.mark.parametrize("config", [MTP, V2, replace(MTP, tie_word_embeddings=True)])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_parts_one_after_another_are_the_whole_bit_for_bit(
    config: ModelConfig, num_stages: int
) -> None:
    tokens, targets = batch(config)
    whole = DeepSeekV3(config)
    expected = total_loss(whole, tokens, targets, Chunk())
    expected.backward()

    parts = build_parts(config, partition(config, num_stages))
    chunks = [Chunk(stage) for stage in range(num_stages)]
    x = tokens
    for part, chunk in zip(parts, chunks, strict=True):
        x = part(x, chunk)
    loss = parts[-1].loss(x, targets, chunks[-1])
    loss = loss + sum(value for chunk in chunks for _, value in chunk.losses)
    loss.backward()

    assert torch.equal(loss, expected)
    grads = {name: grad for part in parts for name, grad in grads_by_name(part).items()}
    reference = grads_by_name(whole)
    assert grads.keys() == reference.keys()
    for name, grad in reference.items():
        assert torch.equal(grads[name], grad), name


def test_parts_on_one_rank_share_the_embedding() -> None:
    first, _, last = partition(MTP, 3)
    (((stage, name), (other, same)),) = shared_parameters(MTP, 3)
    assert (stage, other, name, same) == (0, 2, EMBEDDING, EMBEDDING)
    a, b = build_parts(MTP, [first, last])
    assert a.get_parameter(name) is b.get_parameter(name)
    apart = DeepSeekV3(MTP, last).get_parameter(name)
    assert torch.equal(apart, a.get_parameter(name))
    assert shared_parameters(MTP, 1) == ()
    assert shared_parameters(SMALL, 3) == ()
    assert "model.embed_tokens.weight" not in dict(
        DeepSeekV3(SMALL, partition(SMALL, 3)[-1]).named_parameters()
    )


@pytest.mark.parametrize("config", [MTP, replace(V2, q_lora_rank=None)], ids=["v3", "v2"])
def test_i_and_w_are_one_backward_in_bits_and_flops(config: ModelConfig) -> None:
    tokens, targets = batch(config)
    flops: list[dict[str, int]] = []
    grads: list[dict[str, Tensor]] = []
    for split in (False, True):
        model, chunk = DeepSeekV3(config), Chunk()
        counted = {"I": 0, "W": 0}
        for _ in range(2):  # gradients add up over micro-batches too
            chunk.losses.clear()
            loss = total_loss(model, tokens, targets, chunk)
            chunk.weight_grads.deferring = split
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            counted["I"] += counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                chunk.weight_grads.run()
            counted["W"] += counter.get_total_flops()
        flops.append(counted)
        grads.append(grads_by_name(model))
    full, halves = flops
    assert full["W"] == 0
    assert full["I"] == halves["I"] + halves["W"]
    assert halves["W"] > 0.3 * full["I"]
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, tie_word_embeddings=True)])
def test_w_has_the_products_of_every_weight_and_no_others(config: ModelConfig) -> None:
    model, chunk = DeepSeekV3(config), Chunk()
    tokens, targets = batch(config)
    loss = total_loss(model, tokens, targets, chunk)
    chunk.weight_grads.deferring = True
    loss.backward()
    with FlopCounterMode(display=False) as counter:
        chunk.weight_grads.run()
    products = config.vocab_size * config.hidden_size  # the head, also where it is the embedding
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name not in (EMBEDDING, "lm_head.weight"):
            products += parameter.numel()
        elif parameter.dim() == 3:
            products += parameter[0].numel() * config.num_experts_per_tok
    assert counter.get_total_flops() == 2 * products * tokens.numel()


@pytest.mark.parametrize("depth", [1, 2])
def test_prediction_loss_is_the_formula_of_the_paper(depth: int) -> None:
    """Eq. 21-25, one sequence at a time, t[i] being token i of the paper (from 1)."""
    config = replace(SMALL, num_nextn_predict_layers=depth)
    model = DeepSeekV3(config, dtype=torch.float64)
    model.mtp_loss_weight = 0.7
    tokens, targets = batch(config, length=9)
    chunk = Chunk()
    hidden = model(tokens)
    main = model.loss(hidden, targets, chunk)
    table = model.get_parameter(EMBEDDING)
    head = model.get_parameter("lm_head.weight")
    length = tokens.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for s in range(len(tokens)):
        t = [-1, *tokens[s].tolist(), int(targets[s, -1])]  # t[1..T+1]
        norm = model.model.norm
        assert norm is not None
        h = norm(hidden[s : s + 1])
        logp = (h[0] @ head.T).log_softmax(-1)
        main = main + sum(logp[i - 1, t[i + 1]] for i in range(1, length + 1)) / length / 2
        for k, layer in enumerate(model.prediction_layers(), start=1):
            joined = [
                torch.cat((layer.enorm(table[t[i + k]]), layer.hnorm(h[0, i - 1])))
                for i in range(1, length - k + 1)
            ]
            projected = torch.stack(joined).unsqueeze(0) @ layer.eh_proj.weight.T
            h = layer(projected, model.rotation(length - k, tokens.device))
            logp = (layer.shared_head.norm(h[0]) @ head.T).log_softmax(-1)
            # P_i^k predicts t[i] from h_{i-k-1}^k; i runs from 2 + k to T + 1
            total = total - sum(logp[i - k - 2, t[i]] for i in range(2 + k, length + 2)) / length
    expected = 0.7 / depth * total / len(tokens)
    (value,) = (v for name, v in chunk.losses if name == "mtp")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert abs(float(main.detach())) < 1e-12  # what `loss` returned, less the plain formula


def test_without_a_chunk_there_are_no_auxiliary_losses() -> None:
    model = DeepSeekV3(MTP)
    tokens, targets = batch(MTP)
    model.loss(model(tokens), targets).backward()
    assert all(layer.eh_proj.weight.grad is None for layer in model.prediction_layers())
    assert all(int(moe.gate.load_E.sum()) == 0 for moe in model.moe_layers().values())


def test_later_tokens_do_not_change_earlier_ones() -> None:
    model = DeepSeekV3(SMALL, dtype=torch.float64)
    tokens, _ = batch(SMALL)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % SMALL.vocab_size
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :12], b[:, :12], rtol=1e-12, atol=1e-12)
    assert not torch.equal(a[:, 12:], b[:, 12:])


def test_float64_is_float64_throughout() -> None:
    config = replace(MTP, yarn=YARN)
    model = DeepSeekV3(config, dtype=torch.float64)
    chunk = Chunk()
    tokens, targets = batch(config)
    total_loss(model, tokens, targets, chunk)
    assert {t.dtype for _, t in hf_tensors(model)} == {torch.float64}
    assert {value.dtype for _, value in chunk.losses} == {torch.float64}
    # Twice the weights' last bit: differences stay at float64's level, so nothing is narrower.
    with torch.no_grad():
        nudged = DeepSeekV3(config, dtype=torch.float64)
        for parameter in nudged.parameters():
            parameter.mul_(1 + 1e-12)
    a, b = model(tokens), nudged(tokens)
    difference = float((a - b).detach().norm() / a.detach().norm())
    assert 1e-14 < difference < 1e-9


def test_float32_and_bfloat16_are_close_to_float64() -> None:
    tokens, targets = batch(MTP)
    wide = DeepSeekV3(MTP, dtype=torch.float64)
    exact = wide.loss(wide(tokens), targets).item()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model, chunk = DeepSeekV3(MTP, dtype=dtype), Chunk()
        hidden = model(tokens, chunk)
        loss = model.loss(hidden, targets, chunk)
        (loss + sum(value for _, value in chunk.losses)).backward()
        assert hidden.dtype == dtype
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=tolerance)
        for name, parameter in model.named_parameters():
            gate = name.endswith("mlp.gate.weight")
            assert parameter.dtype == (torch.float32 if gate else dtype), name
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_wrong_inputs_are_named() -> None:
    first, last = (DeepSeekV3(MTP, part) for part in partition(MTP, 2))
    tokens, targets = batch(MTP)
    hidden = first(tokens)
    cases = [
        (lambda: first(hidden), "tokens .B, L. of int64"),
        (lambda: first(tokens + MTP.vocab_size), "vocab_size is 61"),
        (lambda: last(tokens), "take hidden states"),
        (lambda: last(torch.zeros(1, 257, 32)), "max_position_embeddings=256"),
        (lambda: first.loss(hidden, targets), "has no head"),
        (lambda: DeepSeekV3(MTP, Part(range(1, 2), False, False)).embed(tokens), "no embedding"),
        (lambda: last.loss(hidden, targets[:, 1:]), "targets are"),
        (lambda: last.loss(hidden[:, :2], targets[:, :2], Chunk()), "too short"),
        (lambda: DeepSeekV3(MTP, None, _dispatcher(8)), "is for 8 experts"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def _dispatcher(num_experts: int) -> Dispatcher[Any]:
    return dispatcher("flat", Mesh(MeshShape()), num_experts=num_experts)


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    whole = dict(hf_tensors(DeepSeekV3(MTP)))
    state = torch.get_rng_state()
    for part in build_parts(MTP, partition(MTP, 3)):
        for name, value in hf_tensors(part):
            assert torch.equal(value, whole[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    other = dict(hf_tensors(DeepSeekV3(replace(MTP, init_seed=1))))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(other[name], whole[name])
    assert not torch.equal(whole[name.replace(".3.", ".4.")], whole[name])
    assert float(whole[EMBEDDING].std()) == pytest.approx(MTP.initializer_range, rel=0.05)
    wide = dict(hf_tensors(DeepSeekV3(MTP, dtype=torch.float64)))
    assert all(torch.equal(wide[name], value.double()) for name, value in whole.items())


@pytest.mark.parametrize("world", [2, 4])
def test_expert_parallel_gradients_are_those_of_one_process(ranks: RankPool, world: int) -> None:
    config = replace(SMALL, num_nextn_predict_layers=1)
    results = ranks.run(expert_parallel_grads, world=world, config=config)
    model = DeepSeekV3(config, dtype=torch.float64)
    set_biases(model)
    expected = grads_of(model, *batch(config, sequences=4))
    assert {name for grads, _ in results for name in grads} == set(expected)
    for name, grad in expected.items():
        # Each rank's loss is the mean over its own share, the global one the mean of those.
        held = [torch.from_numpy(grads[name]) for grads, _ in results if name in grads]
        assert len(held) == (1 if ".mlp.experts." in name else world), name
        summed = torch.stack(held).sum(0) / world
        assert (summed - grad).norm() <= 1e-12 * grad.norm(), name
    for name, moe in model.moe_layers().items():
        load = sum(torch.from_numpy(loads[name]) for _, loads in results)
        assert torch.equal(torch.as_tensor(load), moe.gate.load_E)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    """DeepSeek-V3's context extension: factor 40 from 4096 tokens, beta 32 and 1."""
    yarn = Yarn(factor=40, original_max_position_embeddings=4096, mscale_all_dim=1.0)
    config = ModelConfig(yarn=yarn)
    plain = [10000 ** (-2 * i / 64) for i in range(32)]
    stretched = frequencies(config).tolist()
    assert frequencies(ModelConfig()).tolist() == pytest.approx(plain, rel=1e-15)
    assert stretched[:11] == pytest.approx(plain[:11], rel=1e-15)  # 32 turns at pair 10.5
    assert stretched[23:] == pytest.approx([f / 40 for f in plain[23:]], rel=1e-15)  # 1 at 22.5
    assert all(f / 40 < s < f for f, s in zip(plain[11:23], stretched[11:23], strict=True))
    assert rotation_scale(yarn) == 1.0
    assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    table = RotaryTable(config, torch.float64)
    assert table.at(100, torch.device("cpu")).cos[99].tolist() == pytest.approx(
        [math.cos(99 * f) for f in stretched], rel=1e-12
    )


def test_rotation_depends_on_the_distance_alone() -> None:
    model = DeepSeekV3(replace(SMALL, yarn=YARN), dtype=torch.float64)
    table = model.rotation(40, torch.device("cpu"))
    q, k = torch.randn(2, 1, 40, 1, SMALL.qk_rope_head_dim, dtype=torch.float64)
    same_q, same_k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    products = rotate(same_q, table)[0, :, 0] @ rotate(same_k, table)[0, :, 0].T
    for distance in (0, 3, 17):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(products.diagonal(0)[0], products.diagonal(-3)[0])


def test_a_norms_weight_gets_a_float32_gradient_that_was_not_rounded() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found: list[Tensor] = []
    for in_float32 in (False, True):
        weight = torch.ones(16, dtype=torch.bfloat16).requires_grad_()
        if in_float32:
            accumulate_in_float32([weight])
        rms_norm(x, weight, 1e-6).sum().backward()
        assert weight.grad is not None
        found.append(weight.grad)
    rounded, exact = found
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())


def test_attention_without_experts_is_softmax_attention() -> None:
    """Scores scaled by 1 / sqrt(d_h + d_h^R), rotated key shared by all heads (eq. 4, 10)."""
    model = DeepSeekV3(SMALL, dtype=torch.float64)
    attention = model.decoder_layers()[0].self_attn
    rotation = model.rotation(6, torch.device("cpu"))
    x = torch.randn(1, 6, SMALL.hidden_size, dtype=torch.float64)
    q, k, v = attention.expand(attention.latents(x), rotation)
    rotated = k[..., SMALL.qk_nope_head_dim :]
    assert torch.equal(rotated, rotated[:, :1].expand_as(rotated))
    mask = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    weights = F.softmax(q @ k.mT / SMALL.qk_head_dim**0.5 + mask, dim=-1)
    expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, rotation), expected)
