"""DeepSpeed's ZeRO-1 as a backend: equal to this project's where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from counterflow.launch.zero_deepspeed import DeepSpeedZero
from counterflow.parallel import Mesh, MeshShape
from tests import cases_zero as cases
from tests.ranks import RankError, RankPool


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
@pytest.mark.parametrize(
    "kind",
    [
        {"dtype": torch.float32, "ema_decay": 0.9},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "moments": torch.bfloat16},
    ],
)
def test_deepspeed_trains_bit_for_bit_as_counterflow(ranks: RankPool, kind: dict[str, Any]) -> None:
    for answer in ranks.run(cases.against_deepspeed, world=2, kind=kind):
        ours, theirs = answer["told"]
        assert [told for told, _ in theirs] == [told for told, _ in ours]
        assert [n for _, n in theirs] == pytest.approx([n for _, n in ours], rel=1e-14)
        assert answer["loss"][0] == answer["loss"][1]
        assert answer["differ"] == []


def test_without_deepspeed_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr("counterflow.launch.zero_deepspeed.import_module", broken)
    group: Any = object()  # nobody gets to see it
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"undefined symbol.*pip install 'counterflow\[deepspeed"):
        DeepSpeedZero({"p": parameter}, group)


def test_one_data_parallel_rank_has_nothing_to_share_by_deepspeed() -> None:
    mesh = Mesh(MeshShape(1, 1, 1))
    with pytest.raises(ValueError, match="two data-parallel ranks or more"):
        cases.make_engine(mesh, "1f1b", zero=1, zero_backend="deepspeed")


def test_layouts_that_deepspeed_cannot_express_are_refused(ranks: RankPool) -> None:
    for schedule, pp, ep in (("1f1b", 1, 2), ("dualpipe", 2, 1)):
        with pytest.raises(RankError, match="knows neither experts that are spread"):
            ranks.run(cases.by_deepspeed, world=2, schedule=schedule, pp=pp, ep=ep)
