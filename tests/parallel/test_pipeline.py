"""The executor: gradients as of one process, dead tensors freed, and never a hang."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
import torch

from counterflow.parallel import Mesh, MeshShape, Pipeline, PipelineError
from counterflow.parallel.schedule import (
    Action,
    Op,
    Placement,
    Schedule,
    build,
    forward_only,
    names,
)
from counterflow.parallel.simulate import Costs, simulate
from tests import cases_pipeline as cases
from tests.ranks import RankError, RankPool

# All of them for what depends on the order of steps. The rest is held against these: whole
# backwards, pairs, two stages a rank, two routes, and a V whose backwards are all split.
SCHEDULES = names()
KINDS = ("1f1b", "zbv", "dualpipe", "dualpipev")


@pytest.mark.parametrize(
    ("schedule", "world"),
    [*((s, w) for s in SCHEDULES for w in (2, 4)), *((s, 8) for s in KINDS)],
)
def test_gradients_and_loss_equal_those_of_one_process(
    ranks: RankPool, schedule: str, world: int
) -> None:
    results = ranks.run(cases.agrees, world=world, schedule=schedule, microbatches=2 * world)
    # float64: the same products, summed over micro-batches in another order.
    assert max(r["gradient"] for r in results) <= 1e-14
    assert max(r["loss"] for r in results) <= 1e-14


@pytest.mark.parametrize("schedule", KINDS)
def test_float32_gradients_equal_those_of_one_process(ranks: RankPool, schedule: str) -> None:
    results = ranks.run(
        cases.agrees, world=4, schedule=schedule, microbatches=8, dtype=torch.float32
    )
    assert max(r["gradient"] for r in results) <= 1e-5  # rounding of 8 summed micro-batches


def test_a_schedule_of_ones_own_runs(ranks: RankPool) -> None:
    """Two ranks, three stages, the middle one on rank 1 with its backward split."""
    m = range(4)
    ours = (
        *(Action(0, Op.F, i) for i in m),
        *(Action(2, Op.F, i) for i in m),
        *(Action(2, Op.I, i) for i in m),
        *(Action(0, Op.B, i) for i in m),
        *(Action(2, Op.W, i) for i in reversed(m)),
    )
    theirs = (
        *(Action(1, Op.F, i) for i in m),
        *(Action(1, Op.I, i) for i in m),
        *(Action(1, Op.W, i) for i in m),
    )
    schedule = Schedule("ours", Placement.of([(0, 1, 0)] * 4), (ours, theirs))
    results = ranks.run(cases.agrees, world=2, schedule=schedule)
    assert max(r["gradient"] for r in results) <= 1e-14
    assert [r["peaks"] for r in results] == [8, 4]


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_shapes_dtypes_and_none_gradients_may_differ_by_stage_and_step(
    ranks: RankPool, schedule: str, world: int
) -> None:
    assert max(ranks.run(cases.mixed_payloads, world=world, schedule=schedule)) <= 1e-13


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_tied_parameters_get_the_sum_of_their_gradients(
    ranks: RankPool, schedule: str, world: int
) -> None:
    assert max(ranks.run(cases.tied_parameters, world=world, schedule=schedule)) <= 1e-14


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_stage_gets_no_gradient_until_it_is_trained(
    ranks: RankPool, schedule: str, frozen: int
) -> None:
    assert max(ranks.run(cases.frozen_stage, world=2, schedule=schedule, frozen=frozen)) <= 1e-14


def test_ties_between_different_ranks_are_summed_each_among_their_own(ranks: RankPool) -> None:
    (w0, b0), (w1, b1), (w2, b2) = ranks.run(cases.chained_ties, world=3)
    assert torch.equal(w0, w1)
    assert torch.equal(b1, b2)
    assert not torch.equal(w1, w2)
    assert not torch.equal(b0, b1)


def test_separate_copies_of_a_tied_parameter_on_one_rank_are_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(cases.separate_copies_of_a_tie, world=2)
    assert "must be the same Parameter object" in caught.value.errors[0]


def test_replicas_that_begin_with_different_values_are_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(cases.unequal_replicas, world=2)
    for text in caught.value.errors.values():
        assert "parameter 'bias' of stage 0 is held by pipeline ranks [0, 1]" in text


def test_gradients_add_up_over_steps_schedules_and_refused_batches(ranks: RankPool) -> None:
    for errors in ranks.run(cases.accumulates, world=4):
        assert list(errors) == [
            "8 micro-batches",
            "16 micro-batches",
            "a refused batch",
            "one more",
        ]
        assert max(errors.values()) <= 1e-14


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("world", [3, 4])
def test_channels_with_groups_of_their_own_run_the_same(
    ranks: RankPool, schedule: str, world: int
) -> None:
    """As CUDA tensors have them; here over gloo."""
    if world == 3 and schedule == "dualpipe":
        pytest.skip("DualPipe has an even number of ranks")
    results = ranks.run(
        cases.agrees, world=world, schedule=schedule, microbatches=8, separate_channels=True
    )
    assert max(r["gradient"] for r in results) <= 1e-14


def test_after_a_failed_step_a_pipeline_says_that_it_cannot_go_on() -> None:
    first, second = cases.steps_after_a_failure(0, 1)
    assert first == "ArithmeticError: broken stage ['rank 0, step 1, action 0F0']"
    assert second.startswith("RuntimeError: this Pipeline cannot go on")
    assert "broken stage" in second


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [2, 10])
def test_a_rank_holds_as_many_chunks_as_were_simulated(
    ranks: RankPool, schedule: str, microbatches: int
) -> None:
    results = ranks.run(
        cases.live_activations, world=4, schedule=schedule, microbatches=microbatches
    )
    expected = simulate(build(schedule, ranks=4, microbatches=microbatches), Costs())
    # Chunks as the executor counts them, to the end of W; activations as the tensors themselves
    # show, freed by I; and none left over.
    peaks = zip(expected.peak_chunks, expected.peak_activations, strict=True)
    assert results == [(chunks, activations, 0) for chunks, activations in peaks]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_dualpipe_holds_ranks_plus_one_chunks_on_every_rank(ranks: RankPool, world: int) -> None:
    results = ranks.run(
        cases.live_activations, world=world, schedule="dualpipe", microbatches=2 * world + 4
    )
    assert results == [(world + 1, world + 1, 0)] * world


@pytest.mark.parametrize("block", ["Block", "Custom"])
@pytest.mark.parametrize("schedule", KINDS)
def test_a_split_backward_costs_the_flops_of_a_full_one(
    ranks: RankPool, schedule: str, block: str
) -> None:
    for ours, plain in ranks.run(cases.backward_flops, world=4, schedule=schedule, block=block):
        assert ours == plain > 0


def test_auxiliary_losses_are_added_on_every_stage(ranks: RankPool) -> None:
    # Two stages add 3 w with w = 1; the main loss is the mean of x w w, whose derivative by either
    # w is 1.
    for loss, losses, grad in ranks.run(cases.aux_losses, world=2, name="extra"):
        assert (loss, losses, grad) == (7.0, {"main": 1.0, "extra": 6.0}, 4.0)


def test_an_unknown_auxiliary_loss_is_named(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(cases.aux_losses, world=2, name="surprise")
    assert "'surprise'" in caught.value.errors[0]
    assert "loss_names" in caught.value.errors[0]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("view", "is a view of a tensor of another size, [1, 4]"),
        ("dict", "output 0 of stage 0 (Bad) is a dict"),
        ("list inside", "output 1 of stage 0 (Bad) is a list"),
    ],
)
def test_what_a_stage_may_not_return_is_refused_in_one_line(
    ranks: RankPool, what: str, words: str
) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(cases.returns, world=2, what=what)
    assert words in caught.value.errors[0]
    assert "\n" not in caught.value.errors[0]


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_when_a_rank_dies_every_other_ends_with_an_error_that_names_where(
    schedule: str, victim: int
) -> None:
    began = time.monotonic()
    with RankPool() as pool, pytest.raises(RankError) as caught:
        pool.run(cases.dies_midway, world=4, schedule=schedule, victim=victim, limit_s=100.0)
    # Without a wait for the limit. The first pool of a process imports torch within it.
    assert time.monotonic() - began < 100
    errors = caught.value.errors
    assert errors[victim] == "the process died"
    for rank in {0, 1, 2, 3} - {victim}:
        assert errors[rank].startswith(f"PipelineError: rank {rank}, step 1, action ")
        assert "(peer: rank " in errors[rank] or "(peers: rank" in errors[rank]


@pytest.mark.alone
def test_a_peer_that_never_answers_ends_in_an_error_within_the_limit() -> None:
    limit_s = 2.0
    with RankPool() as pool:
        text, seconds = pool.run(cases.never_answers, world=2, limit_s=limit_s)[0]
    assert "rank 0, step 1, action" in text
    assert "peer: rank 1" in text
    assert "no answer within 2 s" in text
    assert limit_s <= seconds < limit_s + 20  # a busy machine may take a while to say it


def test_a_batch_that_does_not_divide_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(cases.bad_batch, world=2)
    assert "batch: shape [6, 4] does not divide into 4 micro-batches" in caught.value.errors[0]


def one_rank(stages: Any, **arguments: Any) -> Pipeline:
    schedule = build("1f1b", ranks=1, microbatches=2)
    return Pipeline(stages, schedule, Mesh(MeshShape()), **arguments)


def test_one_rank_needs_no_process_group() -> None:
    torch.manual_seed(0)  # the same numbers whatever ran before
    layer = torch.nn.Linear(3, 1, dtype=torch.float64)
    pipeline = one_rank([layer], loss_fn=lambda y, t: (y - t).square().mean())
    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.randn(4, 1, dtype=torch.float64)
    loss = pipeline.step(x, y)
    want = (layer(x) - y).square().mean()
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-14)
    (grad,) = torch.autograd.grad(want, layer.weight)
    assert layer.weight.grad is not None
    # Sums of four terms about 1 in another order: they differ by last places of the terms, however
    # little the terms leave of each other.
    torch.testing.assert_close(layer.weight.grad, grad, rtol=0, atol=1e-14)


def test_what_does_not_fit_is_refused_when_the_pipeline_is_made() -> None:
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="loss_fn is needed"):
        one_rank([layer])
    with pytest.raises(ValueError, match=r"holds stages \[0\], got 2 modules"):
        one_rank([layer, layer], loss_fn=lambda y, t: y)
    with pytest.raises(ValueError, match=r"holds stages \[0\], got modules for \[1\]"):
        one_rank({1: layer}, loss_fn=lambda y, t: y)
    with pytest.raises(ValueError, match="is for 2 ranks, the mesh has pp=1"):
        Pipeline([layer], build("1f1b", ranks=2, microbatches=2), Mesh(MeshShape()))
    with pytest.raises(ValueError, match="no parameter 'nothing'; it has weight, bias"):
        one_rank([layer], loss_fn=lambda y, t: y, tied=[[(0, "nothing"), (0, "weight")]])


def test_loss_names_are_distinct_and_main_is_taken() -> None:
    layer = torch.nn.Linear(1, 1)
    for given in (["a", "a"], ["main"]):
        with pytest.raises(ValueError, match="names must differ"):
            one_rank([layer], loss_fn=lambda y, t: y, loss_names=given)


def test_a_schedule_without_backwards_does_not_train() -> None:
    schedule = forward_only(build("1f1b", ranks=1, microbatches=2))
    layer = torch.nn.Linear(1, 1)
    pipeline = Pipeline([layer], schedule, Mesh(MeshShape()), lambda y, t: (y - t).mean())
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match="only runs forward; call evaluate"):
        pipeline.step(x, x)
    assert float(pipeline.evaluate(x, x)) == pytest.approx(float((layer(x) - x).mean().detach()))


def test_another_placement_needs_another_pipeline() -> None:
    pipeline = one_rank([torch.nn.Linear(1, 1)], loss_fn=lambda y, t: (y - t).mean())
    with pytest.raises(ValueError, match="make another Pipeline"):
        pipeline.use(build("1f1b", ranks=2, microbatches=2))


def test_a_mesh_without_groups_is_refused() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    with pytest.raises(ValueError, match="make it with Mesh"):
        Pipeline([torch.nn.Linear(1, 1)], schedule, Mesh(MeshShape(pp=2)))


def test_an_error_can_be_sent_to_another_process() -> None:
    error = PipelineError(1, 2, "action 0F3", "waiting for it", (0,))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "rank 1, step 2, action 0F3: waiting for it"
    assert (again.rank, again.step, again.position, again.peers) == (1, 2, "action 0F3", (0,))


def test_an_incomplete_schedule_never_runs() -> None:
    schedule = build("1f1b", ranks=1, microbatches=2)
    broken = Schedule("broken", schedule.placement, (schedule.rows[0][:-1],))
    with pytest.raises(ValueError, match="0B1"):
        Pipeline([torch.nn.Linear(1, 1)], broken, Mesh(MeshShape()), lambda y, t: y)


def test_the_error_of_a_peer_is_a_communication_error() -> None:
    from counterflow.comm import CommError

    assert issubclass(PipelineError, CommError)
