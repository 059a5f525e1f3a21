"""Costs from files: what they say, and what is wrong with them."""

import json
import re
from pathlib import Path

import pytest

from counterflow.parallel.simulate import Costs, Memory, Phases
from counterflow.parallel.simulate.cost_file import load_costs
from counterflow.parallel.simulate.phases import NAMES

UNIT = "F = 1\nI = 1\nW = 1\n"
PHASES = "[phases]\n" + "".join(f'"{name}" = {i + 1}\n' for i, name in enumerate(NAMES))


def written(folder: Path, text: str, name: str = "costs.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_costs(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


def test_every_field_of_costs_and_memory_can_stand_in_a_file(tmp_path: Path) -> None:
    text = """
        F = [1, 1.5]
        I = 0.5
        W = 0.25
        B = 1
        pair = 2
        send = 0.1
        message = 10
        bandwidth = 100
        reduce = 0.5
        mirror = [0.5, 1]
        optimizer = 0.75
        unit = "ms"
        [memory]
        weights = [1, 2]
        gradients = 3
        optimizer = 4
        activations = 5
        kept = 2
        unit = "GiB"
    """
    found = load_costs(written(tmp_path, text))
    assert found.costs == Costs(
        F=(1, 1.5),
        I=0.5,
        W=0.25,
        B=1,
        pair=2,
        send=0.1,
        message=10,
        bandwidth=100,
        reduce=0.5,
        mirror=(0.5, 1),
        optimizer=0.75,
        unit="ms",
    )
    assert found.memory == Memory((1, 2), 3, 4, 5, 2, "GiB")


def test_phases_stand_in_a_table_under_their_published_names(tmp_path: Path) -> None:
    order = json.dumps(list(reversed(NAMES[8:])) + list(NAMES[:4]) + list(NAMES[4:8]))
    text = "unit = 'ms'\n" + PHASES + "layers = [1, 2]\ncomm_share = 0.25\n"
    found = load_costs(written(tmp_path, text))
    times = {name: i + 1 for i, name in enumerate(NAMES)}
    assert found.costs == Costs(phases=Phases(times, [1, 2], comm_share=0.25), unit="ms")
    assert found.memory is None
    # Weight gradients before what they need.
    assert "which it needs" in error_of(written(tmp_path, PHASES + f"order = {order}\n"))


def test_json_says_the_same_as_toml(tmp_path: Path) -> None:
    toml = written(tmp_path, UNIT + "send = 0.5\n[memory]\nweights = [1, 2]\n")
    same = {"F": 1, "I": 1, "W": 1, "send": 0.5, "memory": {"weights": [1, 2]}}
    assert load_costs(written(tmp_path, json.dumps(same), "c.json")) == load_costs(toml)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F = 1\nI = 1\nW = -1\n", ", line 3: cost W=-1 must be finite and from 0 up"),
        ("F = 1\nI = 1\nW = inf\n", ", line 3: cost W=inf must be finite and from 0 up"),
        ("F = 0\nI = 1\nW = 1\n", ": cost F=0: a forward must take some time"),
        ("F = 1\nI = 1\n", ": no cost W; give F, I and W, or [phases]"),
        ("", ": no cost F, I, W; give F, I and W, or [phases]"),
        ("F = 1\nI = true\nW = 1\n", ", line 2: cost I=True is not a number"),
        ("F = [1, 'x']\nI = 1\nW = 1\n", ", line 1: cost F[1]='x' is not a number"),
        ("F = []\nI = 1\nW = 1\n", ", line 1: cost F is an empty list"),
        (UNIT + "pair = [1, 2]\n", ", line 4: cost pair is one number, not a list by stage"),
        (UNIT + "snd = 1\n", ", line 4: unknown 'snd'; did you mean send?"),
        (UNIT + "w = 1\n", ", line 4: unknown 'w'; did you mean W?"),
        (UNIT + "unit = 5\n", ', line 4: unit is a short text, such as "ms", not 5'),
        (UNIT + "message = 5\n", ": cost bandwidth, in bytes a unit, is missing"),
        (UNIT + "memory = 5\n", ", line 4: memory is a table of its own, not 5"),
        (UNIT + "[memory]\nkept = -1\n", ", line 5: memory kept=-1 must be finite"),
        (UNIT + "[memory]\nweight = 1\n", ", line 5: in [memory]: unknown 'weight'; did you mean"),
        (UNIT + "[F]\n", ": not TOML: "),
        ("F 1\n", ": not TOML: Expected '=' after a key in a key/value pair (at line 1, column 3)"),
        (UNIT + PHASES, ", line 1: F is given beside [phases]"),
        (
            PHASES.replace("attn(W)", "attn(w)"),
            ", line 11: in [phases]: unknown 'attn(w)'; did you",
        ),
        ("[phases]\n'attn(F)' = 1\n", ": phases: no time for 'dispatch(F)'"),
        (PHASES + "layers = 1.5\n", ", line 12: layers in [phases] is a whole number, or a list"),
        (PHASES + "layers = 0\n", ": phases: layers=0 must be whole numbers from 1 up"),
        (PHASES + "order = 1\n", ", line 12: order in [phases] is a list of the names"),
        (PHASES + "comm_share = 1\n", ": phases: comm_share=1 must be from 0 to below 1"),
        (PHASES.replace("= 3\n", "= -3\n"), ", line 4: phases: mlp(F)=-3 must be finite"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place(
    tmp_path: Path, text: str, words: str
) -> None:
    assert words in error_of(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ": not JSON: Expecting value (at line 1, column 1)"),
        ('{"F": 1,\n', ": not JSON: "),
        ("[1]", ": not costs: an object such as"),
        ('{"F": 1, "F": 2}', ": F is there twice"),
        ('{"F": 1, "I": 1,\n "W": NaN}', ", line 2: cost W=nan must be finite"),
        ('{"F": 1, "I": 1, "W": 1' + "0" * 400 + "}", "too large"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_with_json_is_one_line_too(tmp_path: Path, text: str, words: str) -> None:
    assert words in error_of(written(tmp_path, text, "c.json"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.toml") == ": no such file of costs"
    assert "ends in .toml or .json" in error_of(written(tmp_path, UNIT, "costs.txt"))
    (tmp_path / "folder.toml").mkdir()
    assert "cannot be read: Is a directory" in error_of(tmp_path / "folder.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in error_of(binary)
