"""How a dispatcher is asked for: names, layouts, payloads, checks, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from counterflow.comm import Dispatcher, dispatcher
from counterflow.comm.dispatch import ExpertLayout
from counterflow.parallel.mesh import Mesh, MeshShape
from tests import cases_dispatch_options as cases
from tests.cases_dispatch import SETTINGS, D, E, K, Setting
from tests.ranks import RankPool

LOCAL = ("flat", "dedup", "two_hop", "auto")


def alone(name: str = "flat", num_experts: int = E, **options: Any) -> Dispatcher[Any]:
    return dispatcher(name, Mesh(MeshShape()), num_experts=num_experts, **options)


def test_auto_chooses_by_topology_and_says_why(ranks: RankPool) -> None:
    whole = MeshShape(1, 4, 4)
    expected = [
        ((whole, (0, 0, 1, 1)), "two_hop", "an expert group spans 2 nodes with 2 ranks on each"),
        ((whole, (0, 1, 0, 1)), "two_hop", "an expert group spans 2 nodes with 2 ranks on each"),
        ((whole, (0, 0, 0, 0)), "dedup", "each expert group lies within a node"),
        ((MeshShape(1, 4, 2), (0, 0, 1, 1)), "dedup", "each expert group lies within a node"),
        ((whole, (0, 1, 2, 3)), "dedup", "each rank of an expert group is on a node of its own"),
        ((MeshShape(1, 4, 1), (0, 0, 1, 1)), "flat", "every rank has all experts"),
        ((whole, (0, 0, 0, 1)), "dedup", "not two_hop, because .* unevenly on their nodes"),
        ((whole, (0, 1, 1, 0)), "dedup", r"not two_hop, because .* changing order"),
        ((MeshShape(1, 4, 2), (0, 1, 0, 1)), "dedup", "each rank .* on a node of its own"),
    ]
    for found in ranks.run(cases.chosen, world=4, places=[place for place, _, _ in expected]):
        for (_, name, why), (found_name, found_why) in zip(expected, found, strict=True):
            assert found_name == name
            assert re.match(why, found_why), found_why


def test_a_backend_asked_for_by_name_says_so() -> None:
    for name in ("flat", "dedup", "two_hop"):
        d = alone(name)
        assert (d.name, d.why) == (name, "asked for by name")


@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(ranks: RankPool, name: str) -> None:
    for rank, found in enumerate(
        ranks.run(cases.strange_weight, world=4, setting=SETTINGS[name], check=None)
    ):
        (nan, _), (infinite, _), (of_no_expert, _) = found
        assert nan.startswith(f"weights_TK of ep rank {rank} holds nan at token 3, choice 2")
        assert infinite.startswith(f"weights_TK of ep rank {rank} holds inf at token 3, choice 2")
        assert of_no_expert == "no error"


def test_weights_are_not_looked_at_without_check(ranks: RankPool) -> None:
    for found in ranks.run(cases.strange_weight, world=4, setting=SETTINGS["two_hop"], check=False):
        assert [text for text, _ in found] == ["no error"] * 3


@pytest.mark.parametrize("name", ["flat", "two_hop"])
@pytest.mark.parametrize("payload", ["exact", "bf16", "fp8", "logfmt8", "logfmt10"])
def test_a_payload_rounds_rows_and_sums_but_not_weights(
    ranks: RankPool, name: Any, payload: Any
) -> None:
    setting = Setting(name, (0, 0, 1, 1), payload=payload)
    for found in ranks.run(cases.rounded, world=4, setting=setting):
        assert found.pop("rows were bfloat16") == (payload in ("bf16", "fp8"))
        assert found.pop("rows were E4M3 times a power of two") == (payload == "fp8")
        assert found == dict.fromkeys(found, True)


def test_padding_makes_each_experts_rows_a_multiple() -> None:
    experts_TK = torch.tensor([[0, 3], [3, -1], [3, 0]])
    x_TD = torch.arange(1.0, 4)[:, None].expand(3, D)
    d = alone("dedup", 4, alignment=4)
    out = d.dispatch(x_TD, experts_TK, torch.ones(3, 2))
    assert out.counts == out.handle.counts == [4, 0, 0, 4]
    assert out.rows_ND[:, 0].tolist() == [1, 3, 0, 0, 1, 2, 3, 0]
    assert out.weights_N.tolist() == [1, 1, 0, 0, 1, 1, 1, 0]
    # What experts make of padding is not looked at.
    rows_ND = out.rows_ND.clone()
    rows_ND[[2, 3, 7]] = torch.nan
    assert d.combine(rows_ND, out.handle)[:, 0].tolist() == [2, 2, 6]


def test_copies_of_an_expert_take_its_tokens_in_turn() -> None:
    d = alone("dedup", 2, layout=ExpertLayout(2, 1, (1, 0, 1)))
    assert list(d.local_experts) == [1, 0, 1]
    out = d.dispatch(torch.ones(5, D), torch.ones(5, 1, dtype=torch.int64), torch.ones(5, 1))
    assert out.counts == [3, 0, 2]


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
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
        ({"experts": torch.full((4, K), -2)}, "experts -2..-2.*or -1 for none"),
        ({"weights": torch.zeros(4, K + 1)}, r"weights_TK must be \[T, K\] = \[4, 3\]"),
        ({"weights": torch.zeros(4, K, dtype=torch.int64)}, "weights_TK.*floating dtype"),
        ({"weights": torch.zeros(4, K, device="meta")}, "x_TD is on cpu, weights_TK on meta"),
        ({"weights": torch.full((4, K), torch.inf)}, "weights must be finite"),
        ({"x": torch.zeros(4, D, device="meta")}, "x_TD is on meta, experts_TK on cpu"),
    ],
)
def test_wrong_inputs_are_refused_with_the_reason(
    change: dict[str, torch.Tensor], reason: str, name: str
) -> None:
    given = {
        "x": torch.zeros(4, D),
        "experts": torch.zeros(4, K, dtype=torch.int64),
        "weights": torch.zeros(4, K),
        **change,
    }
    with pytest.raises(ValueError, match=reason):
        alone(name).dispatch(given["x"], given["experts"], given["weights"])


def test_no_expert_is_no_mistake() -> None:
    d = alone()
    out = d.dispatch(torch.ones(4, D), torch.full((4, K), -1), torch.full((4, K), torch.nan))
    assert out.rows_ND.shape == (0, D)
    assert out.counts == [0] * E
    assert torch.equal(d.combine(out.rows_ND, out.handle), torch.zeros(4, D))


def test_combine_refuses_rows_that_were_not_dispatched() -> None:
    d = alone()
    out = d.dispatch(torch.zeros(4, D), torch.zeros(4, K, dtype=torch.int64), torch.zeros(4, K))
    with pytest.raises(ValueError, match=r"rows_ND must be \[N, D\] = \[12, D\].*\[11, 5\]"):
        d.combine(out.rows_ND[1:], out.handle)


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_nothing_comes_back_along_a_handle_that_nothing_went_along(name: str) -> None:
    d = alone(name)
    handle = d.start_preprocess(torch.zeros(4, K, dtype=torch.int64)).finish()
    for start in (
        lambda: d.combine(torch.zeros(12, D), handle),
        lambda: d.start_combine(torch.zeros(12, D), handle),
        lambda: d.start_combine_backward(torch.zeros(4, D), handle),
        lambda: d.start_dispatch_backward(torch.zeros(12, D), torch.zeros(12), handle),
    ):
        with pytest.raises(ValueError, match="nothing has been dispatched with this handle yet"):
            start()


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


@pytest.mark.parametrize("name", LOCAL)
def test_the_factory_refuses_what_it_cannot_make(name: str) -> None:
    with pytest.raises(ValueError, match="ep=2 does not divide the model's 7 routed experts"):
        dispatcher(name, Mesh(MeshShape(1, 2, 2)), num_experts=7)
    with pytest.raises(ValueError, match=r"no process groups: make it with Mesh\.create"):
        dispatcher(name, Mesh(MeshShape(1, 2, 2)), num_experts=E)
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        alone(name, 0)
    with pytest.raises(ValueError, match=r"layout is for 2 expert-parallel ranks.*ep=1"):
        alone(name, layout=ExpertLayout.contiguous(E, 2))
    with pytest.raises(ValueError, match=f"layout is of 16 experts, num_experts is {E}"):
        alone(name, layout=ExpertLayout.contiguous(16, 1))
    wrong: list[dict[str, Any]] = [{"alignment": 0}, {"chunks": 1.5}, {"node_limit": 0}]
    for options in wrong:
        with pytest.raises(
            ValueError, match=f"{next(iter(options))} must be a whole number from 1"
        ):
            alone(name, **options)
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        alone(name, timeout_s=0)
    with pytest.raises(ValueError, match="no payload 'fp4'; choose from exact, bf16, fp8, logfmt8"):
        alone(name, payload="fp4")


def test_the_nearest_name_is_offered_for_one_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no dispatcher 'flatt'; did you mean 'flat'"):
        alone("flatt")
    with pytest.raises(ValueError, match=r"did you mean 'two_hop'.*known: auto, flat, dedup"):
        alone("twohop")
