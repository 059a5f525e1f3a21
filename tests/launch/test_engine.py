"""Distributed training equals that of one process: gradients, norms, losses, biases."""

from __future__ import annotations

import pytest
import torch

from counterflow.parallel.schedule import names
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
    results = ranks.run(cases.curves_agree, world=4, schedule=schedule, pp=2, ep=2, dp=2, steps=20)
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
        ranks.run(cases.curves_agree, world=4, schedule="dualpipe", pp=2, ep=2, dp=2, steps=5)
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert one["losses"] == two["losses"]
        assert one["loads"] == two["loads"]
        for name, tensor in one["tensors"].items():
            assert torch.equal(tensor, two["tensors"][name]), name


def test_replicas_stay_bit_identical(ranks: RankPool) -> None:
    """Whoever holds a tensor (dp, a stage held twice, the tied embedding) has the same bits."""
    results = ranks.run(cases.curves_agree, world=8, schedule="dualpipe", pp=2, ep=2, dp=4, steps=4)
    seen: dict[str, torch.Tensor] = {}
    copies = 0
    for result in results:
        for name, tensor in result["tensors"].items():
            copies += name in seen
            assert torch.equal(tensor, seen.setdefault(name, tensor)), name
    assert copies > len(seen)
