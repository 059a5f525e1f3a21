"""Marks in profiles."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from counterflow.comm.marks import current_name, mark, named
from counterflow.comm.profile.read import read


def marked(tmp_path: Path, work: object) -> list[tuple[str, bool]]:
    """Names of the marks that `work` makes, by start, and whether this thread made them."""
    assert callable(work)
    everyone = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everyone) as profiler:
        with mark("here"):
            torch.ones(1).sum()
        work()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = read(tmp_path / "trace.json")
    here = next(each.thread for each in trace.annotations if each.name == "here")
    return [(each.name, each.thread == here) for each in trace.annotations if each.name != "here"]


def test_without_a_profiler_a_mark_is_nothing() -> None:
    assert isinstance(mark("attn(F) layer 0"), nullcontext)
    assert isinstance(mark("wait dispatch(F)"), nullcontext)


def test_of_waits_within_waits_only_the_outermost_shows(tmp_path: Path) -> None:
    def work() -> None:
        with mark("dispatch(F)"):
            with mark("wait dispatch(F) layer 3"), mark("inner"), mark("wait for something else"):
                torch.ones(1).sum()
            with mark("wait combine(F)"):
                torch.ones(1).sum()

    names = [name for name, _ in marked(tmp_path, work)]
    assert names == ["dispatch(F)", "wait dispatch(F) layer 3", "inner", "wait combine(F)"]


def test_a_wait_of_one_thread_hides_none_of_another(tmp_path: Path) -> None:
    def work() -> None:
        def other() -> None:
            with mark("wait other"):
                torch.ones(1).sum()

        with mark("wait here"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    assert marked(tmp_path, work) == [("wait here", True), ("wait other", False)]


def test_names_are_of_the_innermost_context() -> None:
    assert current_name() == ""
    with named("dispatch(F) layer 1"):
        with named("combine(F) layer 1"):
            assert current_name() == "combine(F) layer 1"
        assert current_name() == "dispatch(F) layer 1"
    assert current_name() == ""
