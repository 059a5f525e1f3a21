"""The parameters' moving average: the bits of its definition, beside the training, never a hang."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from counterflow.launch import ema as module
from counterflow.launch import report
from counterflow.launch.config import load
from counterflow.launch.ema import EMA
from counterflow.launch.trainer import train
from tests.ranks import free_port

pytestmark = pytest.mark.alone

DECAY = 0.9
SHAPES = {"embed": (7, 5), "experts": (3, 5, 4), "norm": (5,), "gain": (), "none": (0, 3)}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


@torch.no_grad()
def change(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in named.values():
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))


def averages(average: EMA) -> dict[str, Tensor]:
    return {name: a.clone() for name, a in average.state_dict()["averages"].items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


class ByDefinition:
    """The synchronous average, in numpy, all of a tensor at once."""

    def __init__(self) -> None:
        self.averages: dict[str, np.ndarray] = {}
        self.updates = 0

    def update(self, named: dict[str, Tensor]) -> None:
        self.updates += 1
        weight = np.float32((1 - DECAY) / (1 - DECAY**self.updates))
        for name, p in named.items():
            now = p.detach().float().numpy().copy()
            old = self.averages.get(name)
            self.averages[name] = now if old is None else old + weight * (now - old)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(a)) for name, a in self.averages.items()}


@pytest.mark.parametrize("piece", [8, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_averages_have_the_bits_of_the_synchronous_definition(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    named, expected = parameters(dtype), ByDefinition()
    with EMA(named.items(), DECAY) as average:
        assert same(averages(average), {n: p.detach().float() for n, p in named.items()})
        for step in range(10):
            change(named, step)
            average.update()
            expected.update(dict(named))
            with torch.no_grad():  # training goes on, whether the averaging is done or not
                named["embed"].zero_()
        assert same(averages(average), expected.tensors)


def test_an_average_is_the_mean_with_falling_weights_and_knows_nothing_of_initial_values() -> None:
    named = parameters()
    seen: list[Tensor] = []
    with EMA(named.items(), DECAY) as average:
        for step in range(10):
            change(named, step)
            average.update()
            seen.append(named["embed"].detach().double().clone())
        weights = [DECAY ** (len(seen) - 1 - i) for i in range(len(seen))]
        mean = torch.stack([w * p for w, p in zip(weights, seen, strict=True)]).sum(0) / sum(
            weights
        )
        torch.testing.assert_close(averages(average)["embed"].double(), mean, rtol=1e-6, atol=1e-6)


def test_masters_are_averaged_in_the_stead_of_the_parameters_that_they_round_to() -> None:
    named = parameters(torch.bfloat16)
    masters = {"embed": torch.full((7, 5), 1 + 2.0**-12)}  # bfloat16 has 1
    with EMA(named.items(), DECAY, masters=masters) as average:
        average.update()
        found = averages(average)
    assert torch.equal(found["embed"], masters["embed"])
    assert torch.equal(found["norm"], named["norm"].detach().float())


class Held(EMA):
    """An average whose thread does nothing until it is let."""

    def __init__(self, named: dict[str, nn.Parameter], timeout_s: float = 30.0) -> None:
        self.let = threading.Event()
        self.log: list[str] = []
        super().__init__(named.items(), DECAY, timeout_s=timeout_s)

    def _stage(self) -> None:
        super()._stage()
        self.log.append("staged")

    def _add(self, update: int) -> None:
        assert self.let.wait(30)
        super()._add(update)
        self.log.append("added")


def test_update_returns_before_the_averaging_and_what_comes_later_does_not_count() -> None:
    named = parameters()
    with Held(named) as average:
        average.update()
        assert average.log == ["staged"]
        before = named["embed"].detach().clone()
        change(named, 1)
        average.let.set()
        assert torch.equal(averages(average)["embed"], before)


def test_one_update_is_under_way_at_most() -> None:
    named, expected = parameters(), ByDefinition()
    with Held(named) as average:
        average.update()
        expected.update(dict(named))
        change(named, 1)
        expected.update(dict(named))
        second = threading.Thread(target=average.update)
        second.start()
        second.join(0.05)
        assert second.is_alive()  # it waits for the first, which is held
        assert average.log == ["staged"]
        average.let.set()
        second.join(30)
        average.wait()
        assert average.log == ["staged", "added", "staged", "added"]
        assert same(averages(average), expected.tensors)


def test_a_wait_that_is_too_long_ends_with_an_error_that_says_so() -> None:
    average = Held(parameters(), timeout_s=0.05)
    average.update()
    with pytest.raises(RuntimeError, match=r"update 1 .* is not done after 0\.05 s"):
        average.update()
    average.let.set()
    average._timeout_s = 30
    average.close()


class Failing(EMA):
    def _add(self, update: int) -> None:
        raise MemoryError("no room")


def test_an_error_of_the_thread_is_raised_by_the_next_call_and_by_every_one_after() -> None:
    average = Failing(parameters().items(), DECAY)
    average.update()
    for call in (average.update, average.state_dict, average.close):
        with pytest.raises(RuntimeError, match="failed, MemoryError: no room"):
            call()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "counterflow-ema"]


def test_no_thread_is_left_after_close_which_may_be_called_twice() -> None:
    average = EMA(parameters().items(), DECAY)
    average.update()
    average.close()
    average.close()
    assert threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        average.update()


def die_within(average: EMA) -> None:
    with average:
        raise KeyError("training died")


def test_when_training_dies_its_error_is_told_without_waiting_for_the_thread() -> None:
    average = Held(parameters())
    average.update()
    with pytest.raises(KeyError, match="training died"):
        die_within(average)
    assert threads(), "the thread is still held"
    average.let.set()
    with pytest.raises(RuntimeError, match="closed"):
        average.update()
    assert threads() == []


def test_when_both_die_training_s_error_is_told_and_the_other_one_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    average = Failing(parameters().items(), DECAY)
    average.update()
    with pytest.raises(RuntimeError, match="no room"):
        average.wait()
    with pytest.raises(KeyError, match="training died"):
        die_within(average)
    assert "the moving average failed as well" in caplog.text
    assert "MemoryError: no room" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_within_swapped_the_model_has_the_averages_and_after_it_its_own_bits(
    dtype: torch.dtype,
) -> None:
    named = parameters(dtype)
    with torch.no_grad():
        named["norm"][:2] = torch.tensor([float("nan"), -0.0])
    with EMA(named.items(), DECAY) as average:
        for step in range(3):
            average.update()
            change(named, step)
        before = {n: p.detach().clone() for n, p in named.items()}
        versions = {n: p._version for n, p in named.items()}
        with pytest.raises(KeyError):
            _failing_evaluation(average, named, dtype)
        for name, p in named.items():
            assert torch.equal(bits(p), bits(before[name])), name
            assert p._version > versions[name], "FP8 weights must learn of the change"
        average.update()


def _failing_evaluation(average: EMA, named: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
    with average.swapped():
        for name, value in averages(average).items():
            assert torch.equal(bits(named[name]), bits(value.to(dtype))), name
        with pytest.raises(RuntimeError, match="would be averaged themselves"):
            average.update()
        with pytest.raises(RuntimeError, match="already"), average.swapped():
            pass
        raise KeyError("an evaluation that fails")


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    named = parameters()
    with EMA(named.items(), DECAY) as whole, EMA(parameters(seed=9).items(), DECAY) as first:
        for step in range(3):
            change(named, step)
            whole.update()
        first.load_state_dict(whole.state_dict())
        with EMA(named.items(), DECAY) as resumed:
            resumed.load_state_dict(first.state_dict())
            for step in range(3, 6):
                change(named, step)
                whole.update()
                resumed.update()
            assert same(averages(whole), averages(resumed))


def test_what_does_not_fit_is_refused() -> None:
    named = parameters()
    for decay in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            EMA(named.items(), decay)
    with pytest.raises(ValueError, match="nobody has a master"):
        EMA(named.items(), DECAY, masters={"nobody": torch.zeros(1)})
    average = EMA(named.items(), DECAY)
    state = average.state_dict()
    with pytest.raises(ValueError, match="1 names differ, such as norm"):
        average.load_state_dict(
            {**state, "averages": {n: a for n, a in state["averages"].items() if n != "norm"}}
        )
    with pytest.raises(ValueError, match=r"norm has shape \(6,\), the parameter \(5,\)"):
        average.load_state_dict(
            {**state, "averages": {**state["averages"], "norm": torch.zeros(6)}}
        )


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> tuple[dict, list[dict]]:
    """The result and the metrics of a run of one small rank, in this process."""
    small = {
        "mesh.pp": "1",
        "mesh.dp": "1",
        "mesh.ep": "1",
        "schedule.name": "1f1b",
        "model.hidden_size": "32",
        "model.num_hidden_layers": "2",
        "run.device": "cpu",
        "data.sequence_length": "16",
        "train.eval_batches": "1",
        "train.steps": "3",
        "train.warmup_steps": "1",
        "train.eval_every": "2",
        "train.lr": "0.005",
        **{f"train.{key}": value for key, value in settings.items()},
    }
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for key, value in place.items():
        monkeypatch.setenv(key, str(value))
    # Drawing takes longer than all else, and is tested elsewhere.
    monkeypatch.setattr(report, "_pictures", lambda *_: None)
    folder.mkdir()
    small["data.kind"], small["data.path"] = "text", str(folder / "text.txt")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 100)
    train(load(None, small.items()), folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "result.json").read_text()), [json.loads(line) for line in lines]


def test_a_run_validates_the_averages_at_its_end_and_keeps_moments_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(tmp_path / "plain", monkeypatch)
    settings = {"ema_decay": "0.9", "moments": "bfloat16"}
    result, metrics = run(tmp_path / "averaged", monkeypatch, **settings)
    assert "ema_validation_loss" not in plain
    assert result["ema_validation_loss"] != result["validation_loss"]
    middle, end = (line for line in metrics if line["kind"] == "validation")
    assert "ema_loss" not in middle
    assert end["ema_loss"] == result["ema_validation_loss"]
    assert threads() == []
    # Rounded moments show in the second update, and little.
    assert result["validation_loss"] != plain["validation_loss"]
    assert result["validation_loss"] == pytest.approx(plain["validation_loss"], rel=0.01)
