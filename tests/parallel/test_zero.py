"""ZeRO-1: shares of parameters, their collectives, and training with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from counterflow.parallel.schedule import Step, actions, build
from counterflow.parallel.schedule.actions import Op
from counterflow.parallel.zero import Shards, bounds
from counterflow.parallel.zero_ends import StageCalls, stage_ends
from tests import cases_zero as cases
from tests.ranks import RankPool

FLOAT32 = {"dtype": torch.float32, "ema_decay": 0.9}
BFLOAT16 = {"dtype": torch.bfloat16}
LOW_MOMENTS = {"dtype": torch.bfloat16, "moments": torch.bfloat16}


@given(numel=st.integers(0, 10_000), num=st.integers(1, 300))
def test_shares_cover_a_parameter_and_differ_by_one_element_at_most(numel: int, num: int) -> None:
    cut = bounds(numel, num)
    sizes = [end - start for start, end in pairwise(cut)]
    assert (cut[0], cut[-1], len(sizes)) == (0, numel, num)
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zbv", "dualpipe", "dualpipev", "interleaved"])
def test_a_stage_begins_at_its_first_action_and_ends_at_its_last_backward(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    for rank, row in enumerate(schedule.rows):
        seen = _calls(row)
        stages = schedule.placement.stages(rank)
        for stage in stages:
            touched = [
                i for i, step in enumerate(row) if any(a.stage == stage for a in actions(step))
            ]
            backward = [
                i
                for i, step in enumerate(row)
                if any(a.stage == stage and a.op is not Op.F for a in actions(step))
            ]
            assert (touched[0], "begin", stage) in seen
            assert (backward[-1], "end", stage) in seen
        assert len(seen) == 2 * len(stages)
        assert seen == sorted(seen, key=lambda call: call[0])
        begun = [stage for found in stage_ends(row).begins.values() for stage in found]
        assert begun == [stage for _, what, stage in seen if what == "begin"]


def test_a_weight_of_two_stages_is_reduced_when_both_have_ended() -> None:
    tied, mine = Parameter(torch.zeros(3)), Parameter(torch.zeros(2))
    shards = Shards({0: {"tied": tied}, 1: {"mine": mine, "tied": tied}}, lambda p: None)
    tied.grad, mine.grad = torch.ones(3), torch.ones(2)
    shards.end_stage(1)
    assert mine.grad is None, "on its way"
    assert tied.grad is not None
    tied.grad += 1
    shards.end_stage(0)
    shards.finish_gradients()
    grad = shards.instead[tied].grad
    assert grad is not None
    assert grad.tolist() == [2.0] * 3


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_shares_get_mean_gradients_and_wholes_get_every_share(
    ranks: RankPool, bucket_bytes: int
) -> None:
    sizes, world = [7, 1, 64, 3, 5], 3
    answers = ranks.run(
        cases.reduced_and_gathered, world=world, sizes=sizes, bucket_bytes=bucket_bytes
    )
    for i, size in enumerate(sizes):
        cut = bounds(size, world)
        factor = sum(rank + 1 for rank in range(i, world)) / world
        expected = [r + 1.0 for r in range(world) for _ in range(cut[r], cut[r + 1])]
        for rank, answer in enumerate(answers):
            grad, whole = answer[i]
            assert whole == expected
            if i >= world:
                assert grad is None, "no rank had one"
            else:
                share = torch.arange(size)[cut[rank] : cut[rank + 1]] * factor
                assert grad == pytest.approx(share.tolist(), rel=1e-6)


@pytest.mark.alone
def test_a_rank_that_is_gone_is_an_error_that_names_what_was_gathered(ranks: RankPool) -> None:
    told = ranks.run(cases.without_a_peer, world=2)[0]
    assert "the updated parameters model.norm" in told
    assert "rank 1" in told


@pytest.mark.parametrize(
    ("schedule", "pp", "ep", "kinds"),
    [
        ("1f1b", 1, 1, [FLOAT32, LOW_MOMENTS]),
        ("dualpipe", 2, 1, [LOW_MOMENTS]),
        ("dualpipev", 2, 2, [BFLOAT16]),
        ("1f1b", 2, 2, [FLOAT32]),  # the embedding is tied over two ranks
    ],
)
def test_two_ranks_train_with_shares_bit_for_bit_as_without(
    ranks: RankPool, schedule: str, pp: int, ep: int, kinds: list[dict[str, Any]]
) -> None:
    """Two addends have one sum, so that no order of summation differs."""
    answers = ranks.run(
        cases.against_whole, world=2 * pp, schedule=schedule, pp=pp, ep=ep, kinds=kinds
    )
    for answer in (kind for of_rank in answers for kind in of_rank):
        whole, shared = answer["told"]
        assert [told for told, _ in shared] == [told for told, _ in whole]
        # The norm's squares are added in float64 in another order.
        norms = [norm for _, norm in shared]
        assert norms == pytest.approx([norm for _, norm in whole], rel=1e-14)
        assert norms[0] > cases.cases.STEP["max_norm"], "gradients are clipped"
        assert answer["differ"] == {}
        assert answer["loss"][0] == answer["loss"][1]
    averaged = [k["loss"][1] for of_rank in answers for k in of_rank if len(k["loss"][1]) > 1]
    assert all(first != within and first == after for first, within, after in averaged)


def test_four_ranks_share_states_out_evenly_and_cover_everything(ranks: RankPool) -> None:
    """dp 4, experts in two shards with two replicas each: 1/4 of the dense, 1/2 of the experts."""
    answers = ranks.run(cases.against_whole, world=4, schedule="1f1b", pp=1, ep=2, kinds=[BFLOAT16])
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, set[tuple[int, int]]] = {}
    for (answer,) in answers:
        for name, shape, offset, numel in answer["places"]:
            assert shapes.setdefault(name, shape) == shape
            places.setdefault(name, set()).add((offset, numel))
        # float32's rounding of sums over four ranks in another order, through AdamW's quotient.
        assert max(answer["differ"].values(), default=0.0) <= 1e-2
        for (whole, _), (shared, _) in zip(*answer["told"], strict=True):
            assert shared[0]["main"] == pytest.approx(whole[0]["main"], rel=1e-3)
    for name, found in places.items():
        end = 0
        for offset, numel in sorted(found):
            assert offset == end, name
            end += numel
        assert end == torch.Size(shapes[name]).numel(), name
    expected = _bytes_of_shares(shapes, dp=4, edp=2, ep=2)
    for (answer,) in answers:
        assert answer["bytes"][1] == pytest.approx(expected, rel=0.02)


def test_a_rejected_step_leaves_parameters_and_states_as_they_were(ranks: RankPool) -> None:
    assert ranks.run(cases.rejected, world=2) == [True, True]


def test_sharded_and_whole_optimizers_go_on_from_each_others_checkpoints(ranks: RankPool) -> None:
    for first, whole, shared, second, from_whole in ranks.run(cases.resumed, world=2):
        for other in (whole, shared, second, from_whole):
            assert [told for told, _ in other] == [told for told, _ in first]


def test_pieces_of_one_layout_are_read_by_others(ranks: RankPool) -> None:
    assert ranks.run(cases.other_layouts, world=4) == [[]] * 4


def _calls(row: Sequence[Step]) -> list[tuple[int, str, int]]:
    """(index in the row, what, stage) of every call while a row is walked."""
    seen: list[tuple[int, str, int]] = []
    now = [0]
    calls = StageCalls(
        row,
        lambda stage: seen.append((now[0], "begin", stage)),
        lambda stage: seen.append((now[0], "end", stage)),
    )
    for now[0] in range(len(row)):
        calls.before(now[0])
        calls.after(now[0])
    return seen


def _bytes_of_shares(shapes: dict[str, tuple[int, ...]], *, dp: int, edp: int, ep: int) -> float:
    """Moments and master of float32: 12 bytes an element, less where the parameter is float32."""
    total = 0.0
    for name, shape in shapes.items():
        kind, _, parameter = name.removeprefix("optimizer/").partition("/")
        if name.startswith("optimizer/") and kind != "step":
            ways = edp * ep if len(shape) == 3 else dp
            assert parameter
            total += 4 * torch.Size(shape).numel() / ways
    return total
