"""Hostlists as Slurm writes them, read without Slurm and held to its own reader."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.launch.slurm.hostlist import is_host_name, natural, nodes_of_job, parse_hostlist


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node7", "node7"),
        ("b,a", "b a"),
        ("n[1-3,7]", "n1 n2 n3 n7"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[099-101]", "n099 n100 n101"),
        ("n[1-2,01]", "n1 n2 n01"),
        ("rack[1-2]n[01-02,07],x9", "rack1n01 rack1n02 rack1n07 rack2n01 rack2n02 rack2n07 x9"),
        ("n[1-2]-ib,c.example-1", "n1-ib n2-ib c.example-1"),
    ],
)
def test_brackets_zeros_and_nesting_are_read(text: str, hosts: str) -> None:
    assert parse_hostlist(text) == tuple(hosts.split())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no name at character 1"),
        ("a,,b", "no name between commas at character 3"),
        ("a,", "no name between commas at character 3"),
        ("a[1-2", r"a '\[' without its '\]' at character 2"),
        ("a]", r"a '\]' without its '\[' at character 2"),
        ("a[1[2]]", r"a '\[' inside brackets at character 4"),
        ("a[]", "'' is no number"),
        ("a[1-]", "'1-' is no number"),
        ("a[1,3-2]", "'3-2' is a range that goes down at character 5"),
        ("ab$(x)", r"'\$' in a name at character 3"),
        ("a b", "' ' in a name at character 2"),
        ("-a", "begins with neither letter nor digit"),
        ("a[0-99999]", "more than 65536 hosts"),
        ("a[0-999]b[0-999]", "more than 65536 hosts"),
    ],
)
def test_anything_else_is_refused_with_its_text_and_place(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        parse_hostlist(text, "SLURM_JOB_NODELIST")
    assert "SLURM_JOB_NODELIST" in str(caught.value)
    assert repr(text) in str(caught.value)


_numbers = st.tuples(st.integers(0, 300), st.integers(0, 12), st.integers(1, 4)).map(
    lambda t: f"{t[0]:0{t[2]}d}" + (f"-{t[0] + t[1]:0{t[2]}d}" if t[1] else "")
)
_brackets = st.lists(_numbers, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
_items = st.tuples(
    st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.lists(_brackets, max_size=2)
).map(lambda t: "x".join([t[0], *t[1]]) if t[1] else t[0])
_lists = st.lists(_items, min_size=1, max_size=3).map(",".join)


def by_slurm(lists: Sequence[str], folder: Path) -> list[list[str]]:
    """`scontrol show hostnames` of each; it needs a configuration, but no controller."""
    conf = folder / "slurm.conf"
    conf.write_text("ClusterName=c\nSlurmctldHost=localhost\nNodeName=n\nPartitionName=p Nodes=n\n")
    environ = {**os.environ, "SLURM_CONF": str(conf)}
    script = 'for list in "$@"; do scontrol show hostnames "$list" || exit 1; echo; done'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *lists], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [part.split("\n") for part in done.stdout.removesuffix("\n\n").split("\n\n")]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm's commands are not installed")
@given(st.lists(_lists, min_size=20, max_size=20))
@settings(max_examples=5, deadline=None)
def test_every_list_is_read_as_scontrol_reads_it(
    tmp_path_factory: pytest.TempPathFactory, lists: list[str]
) -> None:
    expected = by_slurm(lists, tmp_path_factory.mktemp("slurm"))
    assert [list(parse_hostlist(text)) for text in lists] == expected


def test_the_nodes_of_all_components_of_a_heterogeneous_job_are_in_order() -> None:
    environ = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu[1-2]",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "cpu9",
    }
    assert nodes_of_job(environ) == ("gpu1", "gpu2", "cpu9")
    del environ["SLURM_HET_SIZE"]
    assert nodes_of_job(environ) == ("gpu1", "gpu2")


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        ({}, "no SLURM_JOB_NODELIST"),
        ({"SLURM_JOB_NODELIST": "a[1,1]"}, "names the node a1 that SLURM_JOB_NODELIST names"),
        ({"SLURM_HET_SIZE": "two"}, "SLURM_HET_SIZE='two'"),
        ({"SLURM_HET_SIZE": "1"}, "no SLURM_JOB_NODELIST_HET_GROUP_0"),
    ],
)
def test_an_environment_without_nodes_is_refused(environ: dict[str, str], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        nodes_of_job(environ)


@given(st.lists(st.from_regex(r"[a-c]{0,2}[0-9]{0,3}", fullmatch=True), unique=True))
@settings(deadline=None)
def test_natural_order_tells_all_names_apart(names: list[str]) -> None:
    assert len({natural(name) for name in names}) == len(names)


def test_natural_order_puts_node2_before_node10() -> None:
    names = ["node10", "node2", "node", "node1", "m3", "node02"]
    assert sorted(names, key=natural) == ["m3", "node", "node1", "node02", "node2", "node10"]


@pytest.mark.parametrize("name", ["", "-x", "a b", "a;b", "a/b", "a\n", "$(a)", "../a"])
def test_only_a_plain_name_is_a_host(name: str) -> None:
    assert not is_host_name(name)
    assert is_host_name("n-1.example_2")
