"""Distributed training equals that of one process: gradients, norms, losses, biases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from counterflow.launch.engine import Engine
from counterflow.model import hf_grads
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.accumulate import accumulate_in_float32
from counterflow.parallel.schedule import build, names
from tests import cases_training as cases
from tests.ranks import RankPool

# (pp, dp, ep); world = pp x dp. Experts replicated (ep 1), sharded over part of dp, over all of it.
MESHES = [(2, 2, 1), (2, 4, 2), (2, 4, 4), (4, 2, 2), (4, 4, 4), (8, 1, 1), (8, 2, 2)]
KINDS = ["1f1b", "dualpipe", "dualpipev"]  # over all meshes; every other schedule over one
SCHEDULES = [(schedule, mesh) for schedule in KINDS for mesh in MESHES]
SCHEDULES += [(schedule, (2, 2, 2)) for schedule in names() if schedule not in KINDS]


def worst_errors(ranks: RankPool, schedule: str, pp: int, dp: int, ep: int, dtype: torch.dtype):
    """The largest relative error of a gradient, and the error of the loss."""
    sizes = {"schedule": schedule, "pp": pp, "dp": dp, "dtype": dtype}
    results = ranks.run(cases.gradients, world=pp * dp, ep=ep, **sizes)
    loss, want = cases.one_process_gradients(**sizes, microbatches=results[0]["microbatches"])
    worst = 0.0
    for result in results:
        for name, grad in result["grads"].items():
            expected = want[name]
            assert grad is not None, name
            assert expected is not None, name
            error, norm = float((grad - expected).norm()), float(expected.norm())
            worst = max(worst, error / norm if norm else error)
    assert set().union(*(r["grads"] for r in results)) == set(want), "some rank holds every one"
    return worst, max(abs(r["loss"] - loss) for r in results)


@pytest.mark.parametrize(("schedule", "mesh"), SCHEDULES)
def test_float64_gradients_of_every_parameter_equal_those_of_one_process(
    ranks: RankPool, schedule: str, mesh: tuple[int, int, int]
) -> None:
    pp, dp, ep = mesh
    gradient, loss = worst_errors(ranks, schedule, pp, dp, ep, torch.float64)
    assert gradient <= 1e-12
    assert loss <= 1e-12


@pytest.mark.parametrize("schedule", KINDS)
def test_float32_gradients_of_every_parameter_equal_those_of_one_process(
    ranks: RankPool, schedule: str
) -> None:
    gradient, _ = worst_errors(ranks, schedule, 2, 4, 2, torch.float32)
    assert gradient <= 1e-5  # rounding; no routing decision may flip


@pytest.mark.parametrize("schedule", KINDS)
def test_twenty_optimizer_steps_follow_those_of_one_process(ranks: RankPool, schedule: str) -> None:
    sizes = {"schedule": schedule, "pp": 2, "ep": 2, "dp": 2}
    results = ranks.run(cases.curves, world=4, **sizes, steps=20, single=True)
    single = results[0]["single"]
    for result in results:
        assert result["losses"] == results[0]["losses"], "every rank reports the same losses"
        assert result["norms"] == results[0]["norms"]
        torch.testing.assert_close(result["losses"], single["losses"], rtol=0, atol=1e-10)
        torch.testing.assert_close(result["norms"], single["norms"], rtol=1e-9, atol=0)
        for name, tensor in result["tensors"].items():
            # 20 updates of AdamW, which divides by the root of small numbers, spread 1e-16
            # somewhat.
            torch.testing.assert_close(tensor, single["tensors"][name], rtol=0, atol=1e-9)
    assert single["losses"][-1] < single["losses"][0]
    covered = set().union(*(r["tensors"] for r in results))
    assert covered == set(single["tensors"]), "together the ranks hold every tensor"


def test_two_runs_agree_bit_for_bit(ranks: RankPool) -> None:
    first, second = (
        ranks.run(cases.curves, world=4, schedule="dualpipe", pp=2, ep=2, dp=2, steps=5)
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert one["losses"] == two["losses"]
        assert one["loads"] == two["loads"]
        for name, tensor in one["tensors"].items():
            assert torch.equal(tensor, two["tensors"][name]), name


def test_a_given_cut_trains_as_the_balanced_one(ranks: RankPool) -> None:
    sizes = {"schedule": "dualpipe", "pp": 2, "ep": 2, "dp": 2, "steps": 2}
    cuts = (None, (1, 3))
    balanced, given = (ranks.run(cases.curves, world=4, **sizes, layers=cut) for cut in cuts)
    held = [sorted(result["tensors"]) for result in (balanced[0], given[0])]
    assert len(held[0]) == len(held[1]), "both stages, on every rank of two"
    for one, other in zip(balanced, given, strict=True):
        assert other["losses"][0] == one["losses"][0], "nothing is summed in another order"
        assert other["loads"] == one["loads"]
        # The norm, with which gradients are clipped, sums stages in another order.
        assert other["losses"][1] == pytest.approx(one["losses"][1], rel=1e-12)
        for name, tensor in one["tensors"].items():
            torch.testing.assert_close(other["tensors"][name], tensor, rtol=0, atol=1e-10)


def test_replicas_stay_bit_identical(ranks: RankPool) -> None:
    """Whoever holds a tensor (dp, a stage held twice, the tied embedding) has the same bits."""
    results = ranks.run(cases.curves, world=8, schedule="dualpipe", pp=2, ep=2, dp=4, steps=4)
    seen: dict[str, torch.Tensor] = {}
    copies = 0
    for result in results:
        for name, tensor in result["tensors"].items():
            copies += name in seen
            assert torch.equal(tensor, seen.setdefault(name, tensor)), name
    assert copies > len(seen)


def bfloat16_sums(microbatches: int, dp: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each micro-batch's gradient in one process, summed exactly and as bfloat16 would have it."""
    single = cases.OneProcess(cases.config_for("dualpipe", 2), torch.bfloat16)
    accumulate_in_float32(single.model.parameters())
    inputs, targets = cases.global_batch(0, microbatches, dp)
    exact: dict[str, Tensor] = {}
    low: dict[str, Tensor] = {}
    for x, y in zip(inputs.split(2), targets.split(2), strict=True):
        single.gradients(x, y, 1)
        for name, grad in hf_grads(single.model):
            assert grad is not None
            assert grad.dtype == torch.float32
            mean = grad / (microbatches * dp)  # a power of two: exact
            exact[name] = exact.get(name, 0) + mean.double()
            low[name] = low.get(name, 0) + mean.bfloat16()
    return exact, low


def test_bfloat16_gradients_add_up_in_float32_over_micro_batches_and_ranks(ranks: RankPool) -> None:
    sizes = {"schedule": "dualpipe", "pp": 2, "dp": 2, "ep": 2, "dtype": torch.bfloat16}
    results = ranks.run(cases.gradients, world=4, **sizes)
    exact, low = bfloat16_sums(results[0]["microbatches"], dp=2)
    assert set().union(*(r["grads"] for r in results)) == set(exact)
    lost: list[float] = []
    for result in results:
        for name, grad in result["grads"].items():
            expected, norm = exact[name], float(exact[name].norm())
            assert grad.dtype == torch.float32, name
            # float32's rounding of some sums; the products are the same bits.
            assert float((grad - expected).norm()) <= 1e-6 * norm, name
            if not name.endswith("mlp.gate.weight"):  # the router's is float32 by itself
                lost.append(float((low[name] - expected).norm()) / norm)
    assert min(lost) > 1e-4  # a sum in bfloat16 would be far off, of any parameter


def alone(dtype: torch.dtype, ema_decay: float | None) -> Engine:
    """The whole of a small model in this process."""
    config = replace(cases.TINY, num_hidden_layers=2, num_nextn_predict_layers=1)
    schedule = build("1f1b", ranks=1, microbatches=2)
    mesh = Mesh(MeshShape(1, 1, 1))
    return Engine(config, mesh, schedule, dtype=dtype, ema_decay=ema_decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_of_masters_after_each_step_and_training_does_not_notice(
    dtype: torch.dtype,
) -> None:
    plain, averaged = alone(dtype, None), alone(dtype, 0.9)
    assert plain.ema is None
    assert averaged.ema is not None
    sources = {n: averaged.optimizer.masters.get(n, p) for n, p in averaged.parameters.items()}
    seen: list[dict[str, Tensor]] = []
    with averaged.ema:
        for step in range(3):
            batch = cases.global_batch(step, 2, 1)
            assert averaged.step(*batch, **cases.STEP) == plain.step(*batch, **cases.STEP)
            seen.append({name: s.detach().double().clone() for name, s in sources.items()})
        batch = cases.global_batch(9, 2, 1)
        loss = averaged.evaluate(*batch)
        with averaged.ema.swapped():
            assert averaged.evaluate(*batch) != loss
        assert averaged.evaluate(*batch) == loss
        found = averaged.ema.state_dict()["averages"]
    for name, average in found.items():
        mean = sum(w * s[name] for w, s in zip((0.81, 0.9, 1.0), seen, strict=True)) / 2.71
        torch.testing.assert_close(average.double(), mean, rtol=1e-6, atol=1e-7)
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, averaged.parameters[name]), name
