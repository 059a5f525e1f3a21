"""docs/overlap.md: its programs run and print what it shows, its orders are taken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from counterflow.launch.overlap_config import OverlapConfig
from counterflow.parallel.simulate.orders import best_order

_FILE = Path(__file__).parents[2] / "docs" / "overlap.md"
_DOCS = _FILE.read_text(encoding="utf-8")
_ORDER, _BEST, _PROFILED, _MODEL = re.findall(r"^```python\n(.*?)^```$", _DOCS, re.M | re.S)


def run(program: str) -> dict[str, Any]:
    """What the program's names stand for at its end."""
    names: dict[str, Any] = {}
    exec(compile(program, _FILE.name, "exec"), names)
    return names


def shown_after(program: str) -> str:
    """What is documented that a program prints, or how it is called and what it prints."""
    after = _DOCS.split(f"```python\n{program}```\n")[1].lstrip("\n")
    lines = re.match(r"(    .*\n)+", after)
    assert lines is not None
    return re.sub(r"^    ", "", lines[0], flags=re.M)


def test_the_documented_order_is_the_same_in_python_and_in_a_configuration() -> None:
    (table,) = re.findall(r"^```toml\n(.*?)^```$", _DOCS, re.M | re.S)
    keys = tomllib.loads(table)["overlap"]
    config = OverlapConfig(pair=tuple(keys.pop("pair")))
    assert not keys
    assert config.interleaving == run(_ORDER)["order"]


def test_the_documented_search_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(_BEST)
    assert capsys.readouterr().out == shown_after(_BEST)
    with_shared = {"shared(F)": 1.0, "shared(B)": 1.0, "shared(W)": 1.0}
    tried = [best_order(names["times"] | more, layers=1).tried for more in ({}, with_shared)]
    assert "{}, or\n{:,} with shared experts apart".format(*tried) in _DOCS


def test_the_documented_program_takes_the_times_of_a_layer_from_a_profile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from counterflow.launch.cli import main

    times: dict[str, float] = run(_BEST)["times"]
    capsys.readouterr()
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": list(events(times))}))
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "trace.json", "--json"]) == 0
    Path("profile.json").write_text(capsys.readouterr().out)
    assert run(_PROFILED)["times"] == pytest.approx(times)  # decimals of milliseconds
    assert capsys.readouterr().out.split() == list(best_order(times).order)


def events(times: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A GPU's trace in which these phases, ms, of layer 3 run twice each, and others once."""
    at = 0.0
    for number, (phase, layer) in enumerate([*((p, 3) for p in [*times, *times]), ("attn(F)", 4)]):
        length = 1000 * times[phase]
        moves = phase.startswith(("dispatch", "combine"))
        name = "ncclDevKernel_SendRecv()" if moves else "gemm"
        host = {"pid": 1, "tid": 1, "ts": at, "ph": "X"}
        of = {"correlation": number + 1}
        marked = {"cat": "user_annotation", "name": f"{phase} layer {layer}", "dur": length}
        yield host | marked
        yield host | {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 1, "args": of}
        device = {"pid": 0, "tid": 7, "ts": at, "ph": "X", "dur": length}
        yield device | {"cat": "kernel", "name": name, "args": of | {"device": 0, "stream": 7}}
        at += length


def test_the_documented_model_trains_to_the_same_bits_with_overlap(tmp_path: Path) -> None:
    command, _, printed = shown_after(_MODEL).partition("\n")
    file = tmp_path / "mine.py"
    file.write_text(_MODEL, encoding="utf-8")
    assert command == f"$ torchrun --nproc-per-node 2 {file.name}"
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found = subprocess.run(
        [*starter, *command.split()[2:]],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == printed
