"""Tables in the terminal print names as they are."""

from __future__ import annotations

import pytest

from counterflow.launch.tables import print_table


def test_names_with_brackets_and_colons_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["kernel[int]", "[/red]", "at::native::gem :gem:"]
    print_table("Kernels", ["name", "ms"], [[name, "1"] for name in names], names=1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
