"""Flat expert-parallel dispatch: exact, differentiable, deterministic, and bounded in time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from counterflow.comm import CommError, Dispatcher, dispatcher
from counterflow.parallel.mesh import Mesh, MeshShape
from tests import cases_dispatch as cases
from tests.ranks import RankError, RankPool

E, K, D = cases.E, cases.K, cases.D


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_row_arrives_where_a_loop_would_put_it(ranks: RankPool, ep: int) -> None:
    assert all(ranks.run(cases.exact_loop, world=4, ep=ep))


@pytest.mark.parametrize("load", cases.LOADS)
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_values_and_gradients_equal_the_dense_computation(
    ranks: RankPool, ep: int, load: str
) -> None:
    found = ranks.run(cases.mixture, world=4, ep=ep, load=load)
    expected = cases.dense(load)
    for rank in range(4):
        for what in ("y", "x", "weights"):
            # float64, sums of K = 3 or D = 5 terms in another order.
            torch.testing.assert_close(
                found[rank][what], expected[rank][what], rtol=1e-12, atol=1e-12
            )
    experts = sum(f["experts"] for f in found)
    torch.testing.assert_close(experts, expected[0]["experts"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("load", ["uneven", "idle experts", "a rank without tokens"])
def test_counts_add_up_to_the_routed_load(ranks: RankPool, load: str) -> None:
    found = ranks.run(cases.mixture, world=4, ep=4, load=load)
    routed = torch.cat([cases.inputs(r, load)[1].reshape(-1) for r in range(4)])
    assert [c for f in found for c in f["counts"]] == routed.bincount(minlength=E).tolist()
    assert [e for f in found for e in f["local"]] == list(range(E))


def test_two_runs_agree_bit_for_bit(ranks: RankPool) -> None:
    first, second = (ranks.run(cases.mixture, world=4, ep=4, load="uneven") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[what], b[what]) for what in ("y", "x", "weights", "experts"))


def test_the_result_does_not_depend_on_how_experts_are_spread(ranks: RankPool) -> None:
    whole, spread = (ranks.run(cases.mixture, world=4, ep=ep, load="uneven") for ep in (1, 4))
    for a, b in zip(whole, spread, strict=True):
        # Every row goes through a product of another height, so the last bits may differ.
        torch.testing.assert_close(a["y"], b["y"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ep", [1, 4])
def test_combine_sums_a_tokens_rows_in_order_whatever_the_dtype(
    ranks: RankPool, ep: int, dtype: torch.dtype
) -> None:
    assert all(ranks.run(cases.same_sum, world=4, ep=ep, dtype=dtype))


@pytest.mark.parametrize("ep", [1, 4])
def test_the_split_form_equals_the_differentiable_form(ranks: RankPool, ep: int) -> None:
    assert all(ranks.run(cases.split_form, world=4, ep=ep))


def test_a_handle_serves_again_for_recomputation(ranks: RankPool) -> None:
    assert all(ranks.run(cases.recompute, world=4, ep=4))


def test_what_needs_no_gradient_gets_none(ranks: RankPool) -> None:
    assert ranks.run(cases.frozen, world=4, ep=4) == [(True, True)] * 4


def test_a_second_backward_is_refused(ranks: RankPool) -> None:
    for text in ranks.run(cases.twice_differentiated, world=2):
        assert "once_differentiable" in text


OPERATIONS = ["dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_peer_that_dies_is_named_with_the_operation(operation: str) -> None:
    began = time.monotonic()
    with RankPool() as pool, pytest.raises(RankError) as caught:
        pool.run(cases.stop_or_raise, world=2, operation=operation, how="dies", timeout_s=20)
    assert time.monotonic() - began < 20
    assert caught.value.errors[1] == "the process died"
    text = caught.value.errors[0]
    assert re.fullmatch(
        re.escape(f"CommError: rank 0: {operation} failed while waiting for rank 1: ")
        + r".*Connection (reset|closed) by peer.*",
        text,
    ), text


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_peer_that_is_silent_is_named_once_the_limit_is_over(operation: str) -> None:
    with RankPool() as pool, pytest.raises(RankError) as caught:
        pool.run(cases.stop_or_raise, world=2, operation=operation, how="sleeps", timeout_s=20)
    assert caught.value.errors[0] == (
        f"CommError: rank 0: {operation} failed while waiting for rank 1: no answer within 1 s"
    )


def alone(num_experts: int = E) -> Dispatcher[Any]:
    return dispatcher("flat", Mesh(MeshShape()), num_experts=num_experts)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(4, D, 1)}, r"x_TD must be \[T, D\] = \[4, D\].*\[4, 5, 1\]"),
        ({"x": torch.zeros(3, D)}, r"x_TD must be \[T, D\] = \[4, D\]"),
        ({"x": torch.zeros(4, D, dtype=torch.int64)}, "floating dtype"),
        ({"experts": torch.zeros(4, dtype=torch.int64)}, r"experts_TK must be \[T, K\]"),
        ({"experts": torch.zeros(4, 0, dtype=torch.int64)}, "K >= 1"),
        ({"experts": torch.zeros(4, K, dtype=torch.int32)}, "must be int64, got torch.int32"),
        ({"experts": torch.full((4, K), E)}, f"experts 8..8.*has {E}: 0..7"),
        ({"experts": torch.full((4, K), -1)}, "experts -1..-1"),
        ({"weights": torch.zeros(4, K + 1)}, r"weights_TK must be \[T, K\] = \[4, 3\]"),
        ({"weights": torch.zeros(4, K, dtype=torch.int64)}, "weights_TK.*floating dtype"),
        ({"weights": torch.zeros(4, K, device="meta")}, "x_TD is on cpu, weights_TK on meta"),
        ({"x": torch.zeros(4, D, device="meta")}, "x_TD is on meta, experts_TK on cpu"),
    ],
)
def test_wrong_inputs_are_refused_with_the_reason(
    change: dict[str, torch.Tensor], reason: str
) -> None:
    given = {
        "x": torch.zeros(4, D),
        "experts": torch.zeros(4, K, dtype=torch.int64),
        "weights": torch.zeros(4, K),
        **change,
    }
    with pytest.raises(ValueError, match=reason):
        alone().dispatch(given["x"], given["experts"], given["weights"])


def test_an_index_out_of_range_that_was_not_looked_for_shows_in_the_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d = alone()
    monkeypatch.setattr(type(d), "_check_experts", lambda *_: None)
    with pytest.raises(ValueError, match="experts out of range, but this dispatcher has 8"):
        d.start_preprocess(torch.tensor([[0, E]])).finish()


def test_combine_refuses_rows_that_were_not_dispatched() -> None:
    d = alone()
    out = d.dispatch(torch.zeros(4, D), torch.zeros(4, K, dtype=torch.int64), torch.zeros(4, K))
    with pytest.raises(ValueError, match=r"rows_ND must be \[N, D\] = \[12, D\].*\[11, 5\]"):
        d.combine(out.rows_ND[1:], out.handle)


def test_a_handle_of_other_tokens_is_refused() -> None:
    d = alone()
    experts = torch.zeros(4, K, dtype=torch.int64)
    handle = d.dispatch(torch.zeros(4, D), experts, torch.zeros(4, K)).handle
    with pytest.raises(ValueError, match="a dispatch of 4 tokens x 3 experts"):
        d.dispatch(torch.zeros(2, D), experts[:2], torch.zeros(2, K), handle)


def test_what_was_started_is_finished_once() -> None:
    pending = alone().start_preprocess(torch.zeros(4, K, dtype=torch.int64))
    assert pending.finish().counts == [4 * K] + [0] * (E - 1)
    with pytest.raises(RuntimeError, match="called twice"):
        pending.finish()


def test_the_factory_refuses_what_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="no dispatcher 'flatt'; did you mean 'flat'"):
        dispatcher("flatt", Mesh(MeshShape()), num_experts=E)
    with pytest.raises(ValueError, match="ep=2 does not divide the model's 7 routed experts"):
        dispatcher("flat", Mesh(MeshShape(1, 2, 2)), num_experts=7)
    with pytest.raises(ValueError, match=r"no process groups: make it with Mesh\.create"):
        dispatcher("flat", Mesh(MeshShape(1, 2, 2)), num_experts=E)
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        alone(0)
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        dispatcher("flat", Mesh(MeshShape()), num_experts=E, timeout_s=0)


def test_comm_alone_needs_no_torch() -> None:
    code = (
        "import sys, counterflow.comm as comm; from counterflow.comm import CommError;"
        "assert 'torch' not in sys.modules; assert 'dispatcher' in comm.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert issubclass(CommError, RuntimeError)
