"""On a GPU, a checkpoint has the values of its step though training goes on while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterflow.launch.checkpoint.pieces import Held, State
from counterflow.launch.checkpoint.store import Checkpoints

SIZE = 1 << 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_save_has_the_values_of_its_step_and_loads_them_back(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    held = expected = torch.randn(SIZE, device="cuda").to(dtype)
    store = Checkpoints(tmp_path, keep=1, asynchronous=True, timeout_s=120)
    for step in (1, 2):  # the second goes through the same host memory
        pieces = list(Held.entire(held).pieces("values", held))
        expected = held.clone()
        store.save(step, State(pieces))
        held.neg_().add_(step)  # queued behind the copies on the same stream
    store.wait()
    assert [saved.error for saved in store.poll()] == ["", ""]
    found = store.newest()
    assert found is not None
    assert found.step == 2
    again = torch.zeros_like(held)
    store.load(found, Held.entire(again).pieces("values", again))
    assert torch.equal(again, expected)
    store.close()
