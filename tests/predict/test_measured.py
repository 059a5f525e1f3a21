"""What was measured on a machine, written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.cost import Links
from counterflow.model import ModelConfig
from counterflow.parallel.simulate.phases import NAMES
from counterflow.predict.calibration import Calibration, Reference
from counterflow.predict.cluster import Cluster, Gpu
from counterflow.predict.layout import Kind, Layout
from counterflow.predict.measured import as_json, read_measured
from counterflow.predict.step import predict

LAYOUT = Layout(dp=2, ep=2, length=128, dtype="float32", fp8=False, dispatcher="dedup", zero=0)
GPU = Gpu("a processor", 0, 8 << 30, 0.05, 0.05, 10.0)
CLUSTER = Cluster("here", GPU, 2, Links("measured", 1.0, 0.5, 30.0, 60.0), sources={"links": "me"})
MODEL = ModelConfig(
    hidden_size=64,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    n_routed_experts=8,
    n_group=2,
    topk_group=2,
    num_experts_per_tok=2,
    num_nextn_predict_layers=0,
)
KINDS: tuple[Kind, ...] = ("embedding", "dense", "moe", "head")


def times(kind: Kind, factor: float) -> dict[str, float]:
    return {
        name: factor * (1 + index) if kind in ("dense", "moe") or name.startswith("mlp") else 0.0
        for index, name in enumerate(NAMES)
        if kind == "moe" or name.startswith(("attn", "mlp"))
    }


def calibration(name: str) -> Calibration:
    references = tuple(
        Reference(kind, MODEL, LAYOUT, times(kind, 1.0), times(kind, 1.5), "measured", CLUSTER)
        for kind in KINDS
    )
    return Calibration(
        "measured", name, references, 1.0, 1.0, 1.0, 1.25, 4.5, 0.5, layers=2, step_ms=3.0
    )


def written(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    path = folder / "here.json"
    content = json.loads(json.dumps(as_json(calibration(str(path)), CLUSTER, {"date": "today"})))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path)
    found, cluster = read_measured(path)
    expected = calibration(str(path))
    assert cluster == CLUSTER
    assert [r.kind for r in found.references] == list(KINDS)
    for reference, own in zip(found.references, expected.references, strict=True):
        assert (reference.alone, reference.paired) == (own.alone, own.paired)
        assert (reference.model, reference.layout, reference.cluster) == (MODEL, LAYOUT, CLUSTER)
    rates = ("source", "name", "pair_gaps", "optimizer_gbps", "overhead_ms", "layers", "step_ms")
    for name in rates:
        assert getattr(found, name) == getattr(expected, name), name


def test_a_step_of_what_was_measured_takes_what_was_measured(tmp_path: Path) -> None:
    """One stage, one micro-batch: forward and backward, with nothing extrapolated."""
    found, cluster = read_measured(written(tmp_path))
    layout = Layout(**(vars(LAYOUT) | {"schedule": "1f1b", "overlap": False}))
    predicted = predict(MODEL, cluster, layout, found)
    layers = 1 + 1 + 3 + 1  # embedding, dense, with experts, head
    assert layers == len(predicted.stages[0]) + 1  # the embedding is counted with the first layer
    counts: dict[Kind, int] = {"embedding": 1, "dense": 1, "moe": 3, "head": 1}
    phases = sum(count * sum(times(kind, 1.0).values()) for kind, count in counts.items())
    no_gradient = times("embedding", 1.0)["mlp(B)"]  # tokens have none
    both = phases - no_gradient + 2 * found.overhead_ms
    assert predicted.ranks[0].forward + predicted.ranks[0].backward == pytest.approx(both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), 'no measurement of a machine ("format" is missing)'),
        (lambda c: c.update(version=0), "version 0 of the format, and this is version 1"),
        (lambda c: c.pop("cluster"), "cluster is missing, or no table"),
        (lambda c: c["cluster"].pop("gpu"), "cluster.gpu is missing, or no table"),
        (
            lambda c: c["cluster"]["gpu"].update(bf16_tflops=0),
            "cluster.gpu.bf16_tflops is 0, and should be finite and above 0",
        ),
        (
            lambda c: c["cluster"]["links"].update(inside_gbps="1"),
            "cluster.links.inside_gbps is '1', and should be a number",
        ),
        (lambda c: c["cluster"]["links"].update(inside_gbps=0), "inside=0 must be a bandwidth"),
        (
            lambda c: c["cluster"].update(gpus_per_node=1.5),
            "cluster.gpus_per_node is 1.5, and should be a whole number",
        ),
        (lambda c: c["model"].pop("model_type"), "model_type is None"),
        (lambda c: c["layout"].update(colour=1), "layout.colour is unknown"),
        (lambda c: c.update(phases_ms={}), "phases_ms has no layer"),
        (lambda c: c["phases_ms"].update(gate={}), "phases_ms.gate is none of"),
        (
            lambda c: c["phases_ms"]["moe"]["alone"].update({"attn(X)": 1}),
            "phases_ms.moe.alone.attn(X) is none of",
        ),
        (
            lambda c: c["phases_ms"]["moe"]["paired"].update({"attn(F)": -1}),
            "phases_ms.moe.paired.attn(F) is -1, and should be finite and 0 or more",
        ),
        (lambda c: c["rates"].pop("step_ms"), "rates.step_ms is None, and should be a number"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        read_measured(path)
    text = str(told.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("write it anew with counterflow doctor --measure")
    assert "\n" not in text


@pytest.mark.parametrize("content", [b"", b"[]", b"not json", b"\xff\xfe"])
def test_other_files_are_no_measurements(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="counterflow doctor --measure"):
        read_measured(path)
