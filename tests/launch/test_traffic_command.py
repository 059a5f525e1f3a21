"""`counterflow traffic`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.comm.cost import Links, phase_costs
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.matrix_file import buffer_bytes, from_text, to_text
from counterflow.comm.traffic import BACKENDS, node_matrix, route
from counterflow.comm.traffic_sizes import PHASES, PayloadSizes, RowSizes
from counterflow.comm.traffic_synthetic import Choice, random_routing
from counterflow.launch.cli import main
from tests.launch.commands import Command

SMALL = ("--ranks", "8", "--ranks-per-node", "2", "--experts", "32", "--groups", "4")
SMALL = (*SMALL, "--node-limit", "2", "--top-k", "4", "--tokens", "50", "--hidden", "256")
PLAIN = ("--ranks", "4", "--ranks-per-node", "2", "--experts", "4", "--hidden", "64")


_COMMAND = Command("traffic")
shown, printed, error_of = _COMMAND.shown, _COMMAND.printed, _COMMAND.error_of


def saved(folder: Path, experts: Any) -> str:
    np.save(folder / "routing.npy", np.array(experts))
    return str(folder / "routing.npy")


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# ---- what is printed ----


def test_json_tells_what_the_library_counts(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *SMALL, "--payload", "fp8", "--seed", "3", "--skew", "0.5")
    experts = random_routing(Choice(32, 4, 4, 2), num_ranks=8, num_tokens=50, skew=0.5, seed=3)
    grid = NodeGrid.of([0, 0, 1, 1, 2, 2, 3, 3])
    routes = route(experts, ExpertLayout.contiguous(32, 8), grid)
    sizes, links = RowSizes(PayloadSizes.named("fp8"), 256), Links.parse("h800")
    assert (found["ranks"], found["nodes"], found["tokens"], found["top_k"]) == (8, 4, 400, 4)
    assert found["nodes_per_token"] == {
        "histogram": np.bincount(routes.nodes_per_token).tolist(),
        "mean": routes.nodes_per_token.mean(),
        "max": 2,
    }
    assert found["rows_per_rank"] == routes.rows_per_rank.tolist()
    assert sum(found["rows_per_slot"]) == 1600
    assert found["beyond_node_limit"] == 0
    assert set(found["backends"]) == set(BACKENDS)
    for backend, told in found["backends"].items():
        traffic = routes.traffic(backend)
        sent = traffic.rank_bytes("dispatch(F)", sizes)
        assert told["rank_bytes"] == sent.tolist()
        assert told["node_bytes"] == node_matrix(sent, grid).tolist()
        assert [hop["rank_bytes"] for hop in told["hops"]] == [
            hop.tolist() for hop in traffic.hop_bytes("dispatch(F)", sizes)
        ]
        costs = phase_costs(traffic, sizes, links, chunks=1)  # 50 tokens are too few for more
        assert set(told["phases"]) == set(PHASES)
        for phase, numbers in told["phases"].items():
            assert (numbers["ms"], numbers["bound_by"]) == (costs[phase].ms, costs[phase].bound_by)
            assert numbers["across_bytes"] + numbers["inside_bytes"] == int(
                traffic.rank_bytes(phase, sizes).sum()
            )


def test_text_has_a_line_of_the_routing_the_nodes_and_a_row_a_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    lines = shown(capsys, *SMALL).splitlines()
    assert lines[0] == (
        "random routing (seed 0): 8 ranks on 4 nodes, 50 tokens each, top 4 of 32 experts in 2 of "
        "4 groups; rows of 256 in bf16"
    )
    assert "nodes  tokens   share" in lines
    assert "tokens beyond the node limit of 2: 0" in lines
    table = next(i for i, line in enumerate(lines) if line.startswith("backend"))
    assert [line.split()[0] for line in lines[table + 1 : table + 4]] == list(BACKENDS)
    flat = lines[table + 1].split()
    assert flat[-1] == "1.000"  # time vs flat
    for backend, line in zip(BACKENDS, lines[table + 4 :], strict=True):
        assert line.startswith(f"{backend}: dispatch is bound by ")


@pytest.mark.parametrize("columns", [40, 50, 60, 80, 100, 140])
def test_lines_keep_the_width_and_tables_are_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, *SMALL)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    head = next(line for line in text.splitlines() if line.startswith("backend"))
    assert {"across/token", "dispatch"} <= set(head.split())
    assert ("bytes vs flat" in head, "time vs flat" in head, "all sent" in head) == (
        columns >= 50,
        columns >= 80,
        columns >= 140,
    )


def test_a_phase_and_a_payload_change_the_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    there = printed(capsys, *SMALL, "--phase", "combine(B)")["backends"]["two_hop"]
    back = printed(capsys, *SMALL, "--phase", "combine(F)")["backends"]["two_hop"]
    assert np.transpose(there["rank_bytes"]).tolist() == back["rank_bytes"]
    # Hops go by the names they have in a dispatch, whichever way they are taken.
    assert [hop["name"] for hop in back["hops"]] == ["across nodes", "inside nodes"]
    for one, other in zip(there["hops"], back["hops"], strict=True):
        assert np.transpose(one["rank_bytes"]).tolist() == other["rank_bytes"]
    wide = printed(capsys, *SMALL, "--phase", "combine(F)", "--payload", "fp32")
    assert np.array_equal(
        wide["backends"]["two_hop"]["rank_bytes"], 2 * np.array(back["rank_bytes"])
    )


def test_links_and_chunks_change_the_times(capsys: pytest.CaptureFixture[str]) -> None:
    def ms(*more: str) -> float:
        found = printed(capsys, *SMALL, "--tokens", "1024", *more)
        return found["backends"]["two_hop"]["phases"]["combine(F)"]["ms"]

    slow = ms("--links", "inside=2,across=1")
    assert ms("--links", "inside=4,across=2") == pytest.approx(slow / 2)
    assert ms("--links", "inside=2,across=1", "--chunks", "1") > slow
    assert ms("--links", "inside=2,across=1,across_us=9,inside_us=1") == pytest.approx(slow + 0.01)


@pytest.mark.parametrize(("tokens", "pieces"), [("1023", 1), ("1024", 4)])
def test_hops_overlap_in_as_many_pieces_as_those_of_the_dispatchers(
    capsys: pytest.CaptureFixture[str], tokens: str, pieces: int
) -> None:
    found = printed(capsys, *SMALL, "--tokens", tokens)
    assert (found["chunks"], found["pieces"]) == (4, pieces)
    cost = found["backends"]["two_hop"]["phases"]["dispatch(F)"]
    hops = cost["hop_ms"]
    expected = (sum(hops) + (pieces - 1) * max(hops)) / pieces
    assert cost["transfer_ms"] == pytest.approx(expected, rel=1e-12)
    shown_pieces = f"hops in {pieces} piece{'s' if pieces > 1 else ''}"
    assert shown_pieces in " ".join(shown(capsys, *SMALL, "--tokens", tokens).split())


def test_the_largest_sizes_that_are_taken_give_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(
        capsys, *SMALL, "--hidden", "1048576", "--skew", "10", "--links", "inside=1e-6,across=1e9"
    )
    for told in found["backends"].values():
        assert np.min(told["rank_bytes"]) >= 0
        assert 0 < told["phases"]["dispatch(F)"]["ms"] < 1e15


def test_balanced_routing_is_even_and_hot_routing_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ("--ranks", "8", "--ranks-per-node", "2", "--experts", "32", "--top-k", "4")
    even = printed(capsys, *SMALL[:-4], "--tokens", "64", "--routing", "balanced")
    assert even["rank_imbalance"] == even["slot_imbalance"] == 1
    hot = printed(capsys, *sizes, "--tokens", "64", "--routing", "hot")
    assert (hot["rank_imbalance"], hot["slot_imbalance"]) == (8, 8)


def test_without_a_limit_none_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (*SMALL[:6], "--tokens", "50", "--groups", "1")
    found = printed(capsys, *sizes)
    assert (found["node_limit"], found["beyond_node_limit"]) == (None, 0)
    assert found["nodes_per_token"]["max"] == 4
    assert "node limit" not in shown(capsys, *sizes)


# ---- files ----


def test_a_routing_of_a_file_is_counted_with_or_without_ranks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    experts = [[[0, 1]], [[2, -1]], [[0, 3]], [[-1, -1]]]
    found = printed(capsys, "--routing", saved(tmp_path, experts), *PLAIN)
    assert (found["tokens"], found["top_k"], found["rows_per_slot"]) == (4, 2, [2, 1, 1, 1])
    assert found["nodes_per_token"]["histogram"] == [1, 2, 1]
    assert (found["groups"], found["seed"]) == (None, None)
    flat_file = saved(tmp_path, [tokens[0] for tokens in experts])
    assert printed(capsys, "--routing", flat_file, *PLAIN) == found
    told = shown(capsys, "--routing", flat_file, *PLAIN, "--node-limit", "1")
    assert "tokens beyond the node limit of 1: 1" in told
    named = printed(capsys, "--routing", flat_file, *PLAIN, "--node-limit", "1")["first_beyond"]
    assert named == [{"rank": 2, "token": 0}]


def test_a_layout_places_experts_and_their_copies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    routing = saved(tmp_path, [[[0], [0]], [[0], [0]]])
    layout = written(tmp_path, "layout.json", "[1, 0, 0, 2]")
    arguments = ("--routing", routing, "--layout", layout, "--ranks-per-node", "1")
    found = printed(capsys, *arguments)
    assert (found["experts"], found["slots"]) == (3, 4)
    assert found["rows_per_slot"] == [0, 2, 2, 0]  # the copies take turns
    assert "1 of 4 slots redundant" in " ".join(shown(capsys, *arguments).split())


@pytest.mark.parametrize("target", ["flat", "dedup", "two_hop", "two_hop:1", "two_hop:2", None])
def test_the_matrix_is_written_as_alltoallv_reads_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: str | None
) -> None:
    path = tmp_path / "matrix.txt"
    chosen = () if target is None else ("--matrix-of", target)
    told = shown(capsys, *SMALL, "--matrix", str(path), *chosen)
    found = printed(capsys, *SMALL)["backends"]
    backend, _, hop = (target or "two_hop").partition(":")
    source = found[backend]["hops"][int(hop) - 1] if hop else found[backend]
    matrix = np.array(source["rank_bytes"])
    assert path.read_text() == to_text(matrix)
    assert (from_text(path.read_text()) >= matrix).all()
    size = buffer_bytes(matrix)
    assert f"alltoallv_perf -b {size} -e {size}" in told


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_has_a_panel_a_backend_for_ranks_and_for_nodes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"bytes{suffix}"
    told = shown(capsys, *SMALL, "--plot", str(path))
    assert told.splitlines()[-1] == f"wrote {path}"
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    text = path.read_text(encoding="utf-8")
    for backend in BACKENDS:
        assert re.search(rf">{backend}: [0-9.]+ kB across, [0-9.]+ kB inside nodes<", text)
    assert (text.count(">to rank<"), text.count(">to node<"), text.count("<image")) == (3, 3, 8)


def test_cells_of_the_picture_are_the_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plot = pytest.importorskip("counterflow.launch.traffic_plot")
    from matplotlib.colors import LogNorm

    drawn: list[Any] = []
    monkeypatch.setattr(plot, "save_png", lambda figure, path: drawn.append(figure) or path.touch())
    shown(capsys, *SMALL, "--plot", str(tmp_path / "bytes.png"))
    found = printed(capsys, *SMALL)["backends"]
    panels = [axes for axes in drawn[0].axes if axes.get_images()]
    matrices = [found[b][key] for key in ("rank_bytes", "node_bytes") for b in BACKENDS]
    for axes, matrix in zip(panels, matrices, strict=True):
        cells = axes.get_images()[0].get_array().filled(0)
        assert np.array_equal(np.nan_to_num(cells), matrix)
    limits = [axes.get_images()[0].get_clim() for axes in panels]
    assert len(set(limits[:3])) == len(set(limits[3:])) == 1  # backends compare by colour
    # By orders of magnitude, as much more passes inside nodes than across.
    assert all(isinstance(axes.get_images()[0].norm, LogNorm) for axes in panels)


def test_a_picture_of_nothing_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bytes.png"
    assert main(["traffic", *SMALL[:-4], "--tokens", "0", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("counterflow.launch.traffic_options.find_spec", lambda name: None)
    told = error_of(capsys, *SMALL, "--plot", str(tmp_path / "x.svg"))
    assert told.endswith("needs matplotlib: pip install 'counterflow[plots]'")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ranks", "12"), "256 experts do not divide among 12 ranks"),
        (("--ranks", "4"), "4 ranks do not divide into nodes of 8; change --ranks or"),
        (("--ranks", "0"), "--ranks must be a whole number from 1 up, got '0'"),
        (("--tokens", "-1"), "--tokens must be a whole number from 0 up"),
        (("--top-k", "200", "--tokens", "9"), "too few for 200 a token"),
        (("--node-limit", "9"), "cannot go to 9 groups of 8"),
        (("--skew", "big"), "--skew must be a number from 0 to 10, got 'big'"),
        (("--skew", "nan"), "--skew must be a number"),
        (("--routing", "balanced", "--skew", "1"), "--skew goes with --routing random"),
        (("--routing", "hot", "--groups", "4"), "--groups goes with --routing random or balanced"),
        (("--routing", "what"), "use random, balanced, hot or a file ending in .npy"),
        (("--payload", "fp4"), "there is no payload 'fp4'"),
        (("--links", "h900"), "--links: 'h900'"),
        (("--phase", "dispatch"), "--phase dispatch: use one of dispatch(F)"),
        (("--matrix-of", "flat"), "--matrix-of goes with --matrix FILE"),
        (("--plot", "x.pdf"), "--plot x.pdf: must end in .svg or .png"),
        (("--matrix", "/no/such/x.txt"), "there is no directory /no/such"),
        (("--matrix", ""), "the name of a file is needed"),
        (("--tokens", "100000000"), "chosen experts (ranks x tokens x top-k) are more than"),
        (("--experts", "65537"), "65,537 experts are more than"),
        (("--tokens", "9" * 20), f"--tokens can be 2,147,483,647 at most, got '{'9' * 20}'"),
        (("--seed", "9" * 5000), "--seed must be a whole number from 0 up"),
        (("--hidden", "9" * 20), "--hidden can be 1,048,576 at most"),
        (("--hidden", "1048577"), "--hidden can be 1,048,576 at most"),
        (("--skew", "1e300"), "--skew must be a number from 0 to 10, got '1e300'"),
        (("--links", "inside=5e-324,across=1"), "--links: inside=4.94066e-324 must be a bandwidth"),
        (("--links", "inside=1e-300,across=1"), "--links: inside=1e-300 must be a bandwidth"),
        (("--ranks", "4096"), "4,096 ranks are more than"),
        (("--routing", "none.npy"), "none.npy: No such file"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("experts", "more", "words"),
    [
        ([[0, 4]] * 4, (), "rank 0 holds experts 0..4, but there are 4"),
        ([[0, 1]] * 5, (), "5 tokens do not divide among 4 ranks"),
        ([[0.5]] * 4, (), "got [4, 1] of float64"),
        ([0, 1], (), "must be integers [ranks, tokens, k] or [tokens, k]"),
        ([[[0]]] * 3, (), "--ranks is 4, but"),
        ([[0, 1]] * 4, ("--top-k", "3"), "--top-k is 3, but"),
        ([[0, 1]] * 4, ("--tokens", "2"), "--tokens is 2, but"),
        ([[0, 1]] * 4, ("--seed", "2"), "--seed goes with --routing random; with a file"),
        ([[0, 1]] * 4, ("--matrix-of", "deep", "--matrix", "m.txt"), "--matrix-of 'deep': use one"),
    ],
)
def test_a_wrong_routing_file_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    experts: Any,
    more: tuple[str, ...],
    words: str,
) -> None:
    assert words in error_of(capsys, "--routing", saved(tmp_path, experts), *PLAIN, *more)


def test_what_is_no_numpy_file_is_refused_unopened(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = written(tmp_path, "text.npy", "0 1 2")
    assert "text.npy: is no array of numbers" in error_of(capsys, "--routing", text, *PLAIN)
    empty = written(tmp_path, "empty.npy", "")
    assert "empty.npy: is no array of numbers" in error_of(capsys, "--routing", empty, *PLAIN)
    np.save(tmp_path / "code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    told = error_of(capsys, "--routing", str(tmp_path / "code.npy"), *PLAIN)
    assert "code.npy: is no array of numbers" in told
    np.savez(tmp_path / "zip.npz", experts=np.zeros((4, 1), int))
    zipped = (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    told = error_of(capsys, "--routing", str(zipped), *PLAIN)
    assert "zip.npy: is no array of numbers" in told
    endless = tmp_path / "endless.npy"
    with endless.open("wb") as file:
        shape = {"descr": "<i8", "fortran_order": False, "shape": (1 << 62, 1 << 62)}
        np.lib.format.write_array_header_1_0(file, shape)
    told = error_of(capsys, "--routing", str(endless), *PLAIN)
    assert "endless.npy: is no array of numbers" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[0, 1", "is no JSON"),
        ('{"slots": [0]}', "must be a list of whole numbers"),
        ("[]", "must be a list of whole numbers"),
        ("[0, 1.5]", "must be a list of whole numbers"),
        ("[0, 2, 0, 2]", "no slot for expert 1"),
        ("[0, 1, 2]", "3 expert slots do not divide among 4 ranks"),
        ("[0, -1, 1, 2]", "from 0 up"),
    ],
)
def test_a_wrong_layout_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    layout = written(tmp_path, "layout.json", text)
    sizes = ("--ranks", "4", "--ranks-per-node", "2", "--top-k", "1", "--groups", "1")
    assert words in error_of(capsys, "--layout", layout, *sizes)


def test_no_file_is_written_over_that_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    routing = saved(tmp_path, [[0]] * 4)
    told = error_of(capsys, "--routing", routing, *PLAIN, "--matrix", routing)
    assert "is the same file as that of --routing" in told


def test_no_tokens_at_all_are_counted_too(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (*SMALL[:-4], "--tokens", "0")
    found = printed(capsys, *sizes)
    assert (found["tokens"], sum(found["rows_per_rank"])) == (0, 0)
    told = shown(capsys, *sizes)
    assert "there are no tokens, so nothing is sent" in told.splitlines()
    assert "two_hop: dispatch is bound by nothing, for nothing is sent" in told


@pytest.mark.alone
def test_a_small_question_is_answered_without_torch_in_under_a_second() -> None:
    program = (
        "import sys, time; from counterflow.launch.cli import main\n"
        f"assert main(['traffic', *{SMALL!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "assert time.process_time() < 1.0"  # of the processor: other tests share the machine
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
