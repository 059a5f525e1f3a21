"""Clusters by name and from files: what they hold, and what is said of a bad description."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.cost import PRESETS
from counterflow.model.flops import peak_tflops
from counterflow.predict import cluster_file
from counterflow.predict.cluster import AllToAll, Cluster, load_cluster

NAMES = cluster_file.preset_names()
PLAIN = """
gpus_per_node = 4
[gpu]
name = "A100"
num_sms = 108
memory_gb = 40
bf16_tflops = 312
fp8_tflops = 312
memory_gbps = 1555
[inside]
gbps = 240
latency_us = 3
[across]
gbps = 20.5
latency_us = 5
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "lab.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    path = written(folder, text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_cluster(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def leaves(table: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_there_are_presets_of_three_gpus() -> None:
    assert NAMES == ("h100", "h200", "h800")
    assert [load_cluster(name).name for name in NAMES] == list(NAMES)


def test_the_h800_is_the_one_of_the_papers() -> None:
    cluster = load_cluster("h800")
    gpu = cluster.gpu
    assert (gpu.name, gpu.num_sms, gpu.memory_bytes, gpu.memory_gbps) == ("H800", 132, 84.9e9, 3350)
    assert (gpu.bf16_tflops, gpu.fp8_tflops, cluster.gpus_per_node) == (989, 2 * 989, 8)
    assert cluster.links in PRESETS
    assert cluster.links == load_cluster("h800").links_of(2048)


@pytest.mark.parametrize("name", NAMES)
def test_presets_agree_with_the_peaks_that_mfu_is_computed_with(name: str) -> None:
    gpu = load_cluster(name).gpu
    assert gpu.bf16_tflops == peak_tflops(f"NVIDIA {gpu.name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_preset_has_a_source_of_its_own(name: str) -> None:
    text = (Path(cluster_file.__file__).with_name("clusters") / f"{name}.toml").read_text()
    numbers = {
        key
        for key, value in leaves(tomllib.loads(text))
        if isinstance(value, int | float) and not key.startswith("sources.")
    }
    sources = load_cluster(name).sources
    assert sources is not None
    assert numbers <= sources.keys()
    assert not [key for key in numbers if sources[key] == name]  # that is what no source leaves


def test_nvlink_of_h100_and_h200_is_estimated_by_the_share_that_h800_reaches() -> None:
    h800 = load_cluster("h800")
    for name in ("h100", "h200"):
        cluster = load_cluster(name)
        assert cluster.links.inside_gbps / 450 == h800.links.inside_gbps / 200
        assert cluster.sources is not None
        assert cluster.sources["inside.gbps"].startswith("estimated")
        assert not cluster.all_to_all
    assert load_cluster("h200").gpu.memory_bytes == 150e9


def test_what_crosses_in_measured_all_to_alls_is_near_what_a_card_can_carry() -> None:
    """Logical bytes grow with the share of the sender's own node; what crosses does not.

    Among two nodes NVLink is slower: tokens go to 6.5 of 16 ranks, 3.2 for each node.
    """
    cluster = load_cluster("h800")
    crossing = {
        ranks: both.crossing(cluster.num_nodes(ranks))
        for ranks, both in cluster.all_to_all.items()
        if ranks > cluster.gpus_per_node
    }
    assert list(crossing) == [16, 32, 64, 128]
    two_nodes = crossing.pop(16)
    assert two_nodes.dispatch_gbps == 43.05 / 2
    assert all(42 < both.dispatch_gbps < 45 for both in crossing.values())
    assert all(38 < both.combine_gbps < 44 for both in crossing.values())
    assert crossing[64] == AllToAll(50.58 * 7 / 8, 48.54 * 7 / 8)


def test_a_job_fits_as_far_as_the_network_goes() -> None:
    cluster = load_cluster("h800")
    assert cluster.most_gpus == 16_384
    for num_gpus in (1, 3, 8, 2048, 16_384):
        cluster.check_gpus(num_gpus)
    with pytest.raises(ValueError, match=r"16392 GPUs are more than the 16384 .*8 planes, 2 tiers"):
        cluster.check_gpus(16_392)
    with pytest.raises(ValueError, match="no whole nodes of 8; use 8 or 16"):
        cluster.check_gpus(12)
    with pytest.raises(ValueError, match="1 or more"):
        cluster.check_gpus(0)


def test_a_job_fits_as_far_as_there_are_gpus(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, 'base = "h800"\nnodes = 256\n'))
    assert (cluster.num_gpus, cluster.most_gpus) == (2048, 2048)
    with pytest.raises(ValueError, match="2056 GPUs are more than the 2048 that cluster lab has;"):
        cluster.check_gpus(2056)


def test_without_a_network_or_a_number_there_is_no_limit(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, PLAIN))
    assert (cluster.most_gpus, cluster.network, cluster.all_to_all) == (0, None, {})
    cluster.check_gpus(10**6)
    assert not cluster.shares_leaf(8)
    assert cluster.links_of(8).across_us == 5


def test_nodes_under_one_leaf_switch_have_its_latency() -> None:
    cluster = load_cluster("h800")
    # 32 of the 64 ports of each plane's leaf go down, to a card of as many nodes.
    assert [cluster.links_of(n).across_us for n in (8, 64, 256, 264, 2048)] == [
        *(2.8, 2.8, 2.8),
        *(3.7, 3.7),
    ]
    assert cluster.links_of(64).inside_us == cluster.links.inside_us


def test_a_file_may_say_everything_itself(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN + '[sources]\ngpu = "the label"\n"gpu.num_sms" = "counted"\n')
    cluster = load_cluster(path)
    assert (cluster.name, cluster.gpus_per_node, cluster.gpu.name) == ("lab", 4, "A100")
    assert (cluster.links.inside_gbps, cluster.links.across_gbps) == (240, 20.5)
    assert cluster.sources is not None
    assert cluster.sources["gpu.memory_gb"] == "the label"
    assert cluster.sources["gpu.num_sms"] == "counted"  # the nearer one
    assert cluster.sources["across.gbps"] == str(path)  # who wrote it


def test_a_file_may_change_a_preset(tmp_path: Path) -> None:
    h800 = load_cluster("h800")
    text = 'base = "h800"\nname = "fat"\n[gpu]\nmemory_gb = 96\n[sources]\n"gpu.memory_gb" = "nvml"'
    fat = load_cluster(written(tmp_path, text))
    assert (fat.name, fat.gpu.memory_bytes, fat.gpu.num_sms) == ("fat", 96e9, 132)
    assert fat.sources is not None
    assert h800.sources is not None
    changed = {key for key in fat.sources if fat.sources[key] != h800.sources[key]}
    assert changed == {"gpu.memory_gb", "name"}
    assert fat.all_to_all == h800.all_to_all


def test_measurements_do_not_outlive_their_links(tmp_path: Path) -> None:
    slower = load_cluster(written(tmp_path, 'base = "h800"\n[across]\ngbps = 40\n'))
    assert slower.all_to_all == {}
    assert slower.links.across_gbps == 40
    text = 'base = "h800"\n[all_to_all.16]\ndispatch_gbps = 90\ncombine_gbps = 81\n'
    assert load_cluster(written(tmp_path, text)).all_to_all == {16: AllToAll(90, 81)}


def toml(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value).replace("\x7f", "\\u007f")


MISTAKES = [
    ('base = "h80"', "base: 'h80' is none of h100, h200, h800"),
    ("base = 7", "base: 7 is none of h100, h200, h800"),
    (f"nodez = 2\n{PLAIN}", "nodez: unknown; did you mean nodes?"),
    (f"gpus = 2\n{PLAIN}", "gpus: unknown; did you mean gpu?"),
    (f"{PLAIN}same_leaf = 2", "across.same_leaf: unknown; did you mean across.same_leaf_us?"),
    (f"network = 3\n{PLAIN}", "network: is a table, with keys of its own"),
    (PLAIN.replace("num_sms = 108", ""), "gpu.num_sms: missing; give a whole number from 0 to"),
    (PLAIN.replace("= 108", "= 10.5"), "gpu.num_sms: 10.5 is not a whole number from 0 to"),
    (PLAIN.replace("= 108", "= true"), "gpu.num_sms: true is not a whole number"),
    (PLAIN.replace("= 40", "= nan"), "gpu.memory_gb: nan is not a number from 1e-06 to 1e+09"),
    (PLAIN.replace("= 40", '= "40"'), "gpu.memory_gb: '40' is not a number from 1e-06 to 1e+09"),
    (PLAIN.replace("= 240", "= 0"), "inside.gbps: 0 is not a number from 1e-06 to 1e+09"),
    (PLAIN.replace('"A100"', '""'), "gpu.name: '' is not a text"),
    (PLAIN.replace("= 240", "= 2e9"), "inside.gbps: 2000000000.0 is not a number from 1e-06 to"),
    (PLAIN.replace("= 108", f"= {10**400}"), f"gpu.num_sms: {str(10**400)[:37]}... is not a whole"),
    (f'"gpu.num_sms" = 1\n{PLAIN}', "gpu.num_sms: is there twice"),
    (f'"a\\nb" = 1\n{PLAIN}', "'a\\nb': unknown; known are name, nodes"),
    (f"{PLAIN}peak_gbps = 20", "across.gbps: 20.5 reached is more than across.peak_gbps=20"),
    (f"{PLAIN}same_leaf_us = 6", "across.same_leaf_us: 6 under one leaf switch is more than"),
    (
        f"{PLAIN}peak_gbps = 25\nnic_gbit = 400",
        "across.peak_gbps: 25 GB/s of each of 4 GPUs are 100 of a node, but across.nic_gbit=400 of "
        "4 cards are 200",
    ),
    (f"nodes = 3\nnum_gpus = 16\n{PLAIN}", "num_gpus: 16 is not nodes=3 times gpus_per_node=4, 12"),
    (f"num_gpus = 18\n{PLAIN}", "num_gpus: 18 are no whole nodes of gpus_per_node=4"),
    (
        f"num_gpus = 2052\n{PLAIN}[network]\ntiers = 2\nports = 64",
        "network: 2052 GPUs are more than the 2048 that 2048 endpoints join",
    ),
    (f"{PLAIN}[network]\ntiers = 2", "network.ports: missing, but [network] is there"),
    (f"{PLAIN}[network]\ntiers = 2\nports = 63", "network: a switch of a fat tree has an even"),
    (f"{PLAIN}[network]\ntiers = 2\nports = 4", "network.ports: 4 are too few for the 4 cards"),
    (
        f"{PLAIN}[network]\ntiers = 2\nports = 64\nplanes = 3",
        "network.planes: 4 network cards of a node cannot be shared out evenly over 3",
    ),
    (f"{PLAIN}[all_to_all.8]\ndispatch_gbps = 9", "all_to_all.8.combine_gbps: missing"),
    (f"{PLAIN}[all_to_all.08]\ndispatch_gbps = 9", "all_to_all.08.dispatch_gbps: unknown"),
    (
        f"{PLAIN}[all_to_all.6]\ndispatch_gbps = 9\ncombine_gbps = 9",
        "all_to_all.6: 6 ranks are no whole nodes of 4",
    ),
    (f'{PLAIN}[sources]\n"gpu.num_sm" = "x"', "sources.gpu.num_sm: a source of what is not there;"),
    (f"{PLAIN}[sources]\ngpu = 1", "sources.gpu: 1 is not a text"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_with_file_key_and_remedy(
    tmp_path: Path, text: str, message: str
) -> None:
    told = refusal(tmp_path, text)
    assert told.startswith(f": {message}")
    assert "\n" not in told


keys = st.one_of(
    st.sampled_from([*cluster_file.KEYS, "all_to_all.16.dispatch_gbps"]), st.sampled_from("ab")
)
scalars = st.one_of(
    st.integers(-2, 70), st.floats(), st.booleans(), st.text(max_size=3), st.just(10**30)
)


@given(st.sampled_from(["", 'base = "h800"\n']), st.dictionaries(keys, scalars, max_size=8))
@settings(max_examples=150, deadline=None)
def test_whatever_a_file_says_is_a_cluster_or_a_mistake_with_its_place(
    base: str, values: dict[str, object]
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        # JSON's scalars are TOML's, but for what is no finite number and for one escape.
        lines = [f'"{key}" = {toml(value)}\n' for key, value in values.items()]
        path.write_text(base + "".join(lines), encoding="utf-8")
        told = str(path)
        try:
            cluster = load_cluster(path)
        except ValueError as error:
            cluster, told = None, str(error)
        assert told.startswith(str(path))
        if cluster is not None:
            assert cluster.gpu.memory_bytes > 0
            if cluster.most_gpus:
                cluster.check_gpus(cluster.most_gpus)
            assert cluster.links_of(16).across_us <= cluster.links.across_us


def test_all_mistakes_of_a_file_are_told_together(tmp_path: Path) -> None:
    text = 'base = "h800"\nnum_gpus = 4\nnodes = 2\n[gpu]\nnum_sm = 1\n[across]\nlatency_us = "x"'
    told = refusal(tmp_path, text)
    assert told.startswith(" on top of h800: 3 mistakes\n")
    assert [line.split(":")[0].strip() for line in told.splitlines()[1:]] == [
        *("gpu.num_sm", "across.latency_us", "num_gpus"),
    ]


def test_a_wrong_number_is_not_told_again_as_missing(tmp_path: Path) -> None:
    told = refusal(tmp_path, PLAIN.replace("= 108", "= -1").replace("= 312", "= 0"))
    assert told.count("\n") == told.count(" is not a ") == 3
    assert "missing" not in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 5000, "no cluster 'xxx"),
        ("h8000", "no cluster 'h8000'; did you mean h800"),
        ("mine", "no cluster 'mine'; use h100, h200, h800, or the path of a .toml file"),
        ("none.toml", "none.toml: no such file"),
    ],
)
def test_a_cluster_that_is_not_there_is_told_with_those_that_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_cluster(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = [", "not TOML"),
        (b"\xff\xfe=1", "not UTF-8"),
        (b"a = 1\na = 2", "not TOML"),
        (b"a = " + b"[" * 9999, "not TOML"),
    ],
)
def test_what_is_no_toml_is_told_so(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.toml: {message}"):
        load_cluster(path)


def test_a_cluster_without_the_newer_fields_stays_usable() -> None:
    h800 = load_cluster("h800")
    bare = Cluster("bare", h800.gpu, 8, h800.links)
    bare.check_gpus(64)
    assert (bare.most_gpus, bare.links_of(64), bare.all_to_all) == (0, h800.links, {})
