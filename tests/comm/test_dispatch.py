"""Expert-parallel dispatch: exact, differentiable, deterministic, whatever the backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from counterflow.comm import CommError
from tests import cases_dispatch as cases
from tests import cases_dispatch_uses as uses
from tests.ranks import RankPool

E = cases.E
ONE_WAY = {
    name: cases.SETTINGS[name] for name in ("flat", "dedup", "two_hop", "two_hop on one node")
}


@pytest.mark.parametrize("name", cases.SETTINGS)
def test_rows_values_and_gradients_are_bit_for_bit_the_references(
    ranks: RankPool, name: str
) -> None:
    given = [(load, torch.float32, torch.float32) for load in cases.LOADS]
    given += [
        ("some without expert", dtype, weights)
        for dtype in (torch.bfloat16, torch.float16)
        for weights in (dtype, torch.float32)
    ]
    given += [("some without expert", torch.float64, torch.float64)]
    found = ranks.run(cases.exact, world=4, settings=[cases.SETTINGS[name]], given=given)
    assert found == [[]] * 4


def test_eight_ranks_are_bit_for_bit_the_reference(ranks: RankPool) -> None:
    given = [("uneven", dtype, torch.float32) for dtype in (torch.float32, torch.bfloat16)]
    settings = list(cases.EIGHT.values())
    found = ranks.run(cases.exact, world=8, settings=settings, given=given)
    assert found == [[]] * 8


@pytest.mark.parametrize("name", cases.SETTINGS)
def test_values_and_gradients_equal_the_dense_computation(ranks: RankPool, name: str) -> None:
    found = ranks.run(uses.mixtures, world=4, setting=cases.SETTINGS[name])
    for load in cases.LOADS:
        expected = uses.dense(load)
        for rank in range(4):
            for what in ("y", "x", "weights"):
                # float64, sums of K = 3 or D = 5 terms in another order.
                torch.testing.assert_close(
                    found[rank][load][what], expected[rank][what], rtol=1e-12, atol=1e-12
                )
        experts = sum(f[load]["experts"] for f in found)
        torch.testing.assert_close(experts, expected[0]["experts"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ONE_WAY)
def test_counts_add_up_to_the_routed_load(ranks: RankPool, name: str) -> None:
    loads = ["uneven", "some without expert", "one busy rank"]
    found = ranks.run(uses.mixtures, world=4, setting=ONE_WAY[name], loads=loads)
    for load in loads:
        routed = torch.cat([cases.batch(r, load).experts_TK.reshape(-1) for r in range(4)])
        expected = routed[routed >= 0].bincount(minlength=E).tolist()
        assert [c for f in found for c in f[load]["counts"]] == expected
        assert [e for f in found for e in f[load]["local"]] == list(range(E))


@pytest.mark.parametrize("name", ONE_WAY)
def test_two_runs_agree_bit_for_bit(ranks: RankPool, name: str) -> None:
    loads = ["uneven", "some without expert"]
    first, second = (
        ranks.run(uses.mixtures, world=4, setting=ONE_WAY[name], loads=loads) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        for load in loads:
            for what in ("y", "x", "weights", "experts"):
                assert cases.same_bits(a[load][what], b[load][what])


def test_the_result_does_not_depend_on_how_experts_are_spread(ranks: RankPool) -> None:
    spread = [
        ranks.run(uses.mixtures, world=4, setting=cases.SETTINGS[name], loads=["uneven"])
        for name in ("dedup, one rank has all experts", "flat", "dedup", "two_hop")
    ]
    for other in spread[1:]:
        for a, b in zip(spread[0], other, strict=True):
            # Every row goes through a product of another height, so the last bits may differ.
            torch.testing.assert_close(a["uneven"]["y"], b["uneven"]["y"], rtol=1e-13, atol=1e-13)


def test_passes_finished_in_another_order_than_started_equal_the_whole_form(
    ranks: RankPool,
) -> None:
    settings = list(cases.SETTINGS.values())
    assert ranks.run(uses.split_form, world=4, settings=settings) == [[]] * 4


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_different_steps_of_several_passes_can_be_under_way_at_once(
    ranks: RankPool, name: str
) -> None:
    assert all(ranks.run(uses.mixed_steps, world=4, setting=cases.SETTINGS[name]))


def test_a_handle_serves_again_and_sends_neither_counts_nor_indices(ranks: RankPool) -> None:
    settings = list(cases.SETTINGS.values())
    assert ranks.run(uses.recompute, world=4, settings=settings) == [[]] * 4


def test_buffers_are_kept_and_results_are_not_theirs(ranks: RankPool) -> None:
    names = ("flat", "dedup", "two_hop")
    settings = [cases.SETTINGS[name] for name in names]
    for found in ranks.run(uses.kept_buffers, world=4, settings=settings):
        for after in found:
            assert after[0] > 0
            assert after[1:] == after[:1] * 4


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_what_needs_no_gradient_gets_none(ranks: RankPool, name: str) -> None:
    found = ranks.run(uses.frozen, world=4, setting=cases.SETTINGS[name])
    assert found == [(True, True)] * 4


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop", "flat, one rank has all experts"])
def test_tensors_may_lie_in_memory_as_they_like(ranks: RankPool, name: str) -> None:
    assert all(ranks.run(uses.strided, world=4, setting=cases.SETTINGS[name]))


def test_a_second_backward_is_refused(ranks: RankPool) -> None:
    setting = cases.Setting("two_hop", (0, 1))
    for text in ranks.run(uses.twice_differentiated, world=2, setting=setting):
        assert "once_differentiable" in text


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_the_models_layer_on_four_ranks_equals_the_whole_layer(
    ranks: RankPool, name: cases.Name
) -> None:
    setting = cases.Setting(name, (0, 0, 1, 1), num_experts=uses.LAYER.n_routed_experts)
    found = ranks.run(uses.layers, world=4, setting=setting)
    expected = uses.whole_layer()

    def close(a: torch.Tensor, b: torch.Tensor) -> None:
        # float32, sums in another order: a few units in the last place of the largest.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))

    for rank in range(4):
        for what in ("y", "x"):
            close(found[rank][what], expected[rank][what])
    for parameter in set(found[0]) - {"y", "x"}:
        parts = [f[parameter] for f in found]
        local = parameter.startswith("experts.")
        whole = torch.cat(parts) if local else torch.stack(parts).sum(dim=0)
        close(whole, expected[-1][parameter])


def test_comm_alone_needs_no_torch() -> None:
    code = (
        "import sys, counterflow.comm as comm; from counterflow.comm import CommError;"
        "assert 'torch' not in sys.modules; assert 'dispatcher' in comm.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert issubclass(CommError, RuntimeError)
