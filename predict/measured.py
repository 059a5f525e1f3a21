"""What `counterflow doctor --measure` found on a machine, as a file: written here, and read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast, get_args

from ..comm.cost import Links
from ..model import ModelConfig
from ..parallel.simulate.phases import NAMES
from .calibration import Calibration, Reference
from .cluster import Cluster, Gpu
from .layout import Kind, Layout

FORMAT = "counterflow measurement"
VERSION = 1
_RATES = ("matmul", "attention", "memory", "pair_gaps", "overhead_ms", "step_ms")
_AGAIN = "write it anew with counterflow doctor --measure"


def as_json(
    calibration: Calibration, cluster: Cluster, about: Mapping[str, object]
) -> dict[str, object]:
    """The file's contents.

    Args:
        calibration: measured, all its references of one model and layout.
        cluster: the machine.
        about: what a person may want to know besides, such as date and versions.
    """
    of = calibration.references[0]
    return {
        "format": FORMAT,
        "version": VERSION,
        "about": dict(about),
        "cluster": {
            "name": cluster.name,
            "gpu": asdict(cluster.gpu),
            "gpus_per_node": cluster.gpus_per_node,
            "num_gpus": cluster.num_gpus,
            "links": asdict(cluster.links),
            "sources": dict(cluster.sources or {}),
        },
        "model": of.model.to_hf(),
        "layout": asdict(of.layout),
        "phases_ms": {
            reference.kind: {"alone": dict(reference.alone), "paired": dict(reference.paired)}
            for reference in calibration.references
        },
        "rates": {
            **{name: getattr(calibration, name) for name in _RATES},
            "optimizer_gbps": calibration.optimizer_gbps,
            "layers": calibration.layers,
        },
    }


def read_measured(path: str | Path) -> tuple[Calibration, Cluster]:
    """The speed of a machine, and the machine, as they were measured.

    Raises:
        ValueError: the file is none of `counterflow doctor --measure`, of another version of it, or
            damaged: which key is wrong.
        OSError: it cannot be read.
    """
    try:
        found: object = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no JSON ({error}); {_AGAIN}") from None
    if not isinstance(found, dict) or cast("dict[str, object]", found).get("format") != FORMAT:
        raise ValueError(f'{path}: no measurement of a machine ("format" is missing); {_AGAIN}')
    content = cast("dict[str, object]", found)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {content.get('version')!r} of the format, and this is version "
            f"{VERSION}; {_AGAIN}"
        )
    reader = _Reader(str(path), content)
    cluster = reader.cluster()
    return reader.calibration(cluster), cluster


class _Reader:
    """Takes values out of a file's contents; what is wrong is a ValueError that names the key."""

    def __init__(self, path: str, content: Mapping[str, object]) -> None:
        self._path, self._content = path, content

    def cluster(self) -> Cluster:
        """The machine."""
        gpu, links = self._table("cluster", "gpu"), self._table("cluster", "links")
        values = self._table("cluster")
        try:
            return Cluster(
                name=self._text(values, "cluster.name"),
                gpu=Gpu(
                    name=self._text(gpu, "cluster.gpu.name"),
                    num_sms=self._count(gpu, "cluster.gpu.num_sms"),
                    memory_bytes=self._count(gpu, "cluster.gpu.memory_bytes"),
                    bf16_tflops=self._number(gpu, "cluster.gpu.bf16_tflops", above=0),
                    fp8_tflops=self._number(gpu, "cluster.gpu.fp8_tflops", above=0),
                    memory_gbps=self._number(gpu, "cluster.gpu.memory_gbps", above=0),
                ),
                gpus_per_node=max(1, self._count(values, "cluster.gpus_per_node")),
                links=Links(
                    self._text(links, "cluster.links.name"),
                    self._number(links, "cluster.links.inside_gbps"),
                    self._number(links, "cluster.links.across_gbps"),
                    self._number(links, "cluster.links.inside_us"),
                    self._number(links, "cluster.links.across_us"),
                ),
                num_gpus=self._count(values, "cluster.num_gpus"),
                sources={k: str(v) for k, v in self._table("cluster", "sources").items()},
            )
        except ValueError as error:
            raise self._told(error) from None

    def calibration(self, cluster: Cluster) -> Calibration:
        """Its speed."""
        rates, kinds = self._table("rates"), self._table("phases_ms")
        try:
            model = ModelConfig.from_hf(self._table("model"))
            layout = self._layout()
        except (TypeError, ValueError) as error:
            raise self._told(error) from None
        references: list[Reference] = []
        for kind in kinds:
            if kind not in get_args(Kind):
                raise self._wrong(f"phases_ms.{kind}", f"is none of {', '.join(get_args(Kind))}")
            times = {way: self._phases(kind, way) for way in ("alone", "paired")}
            references.append(
                Reference(
                    kind=cast(Kind, kind),
                    model=model,
                    layout=layout,
                    alone=times["alone"],
                    paired=times["paired"],
                    source=f"measured, {self._path}",
                    cluster=cluster,
                )
            )
        if not references:
            raise self._wrong("phases_ms", "has no layer")
        gbps = rates.get("optimizer_gbps")
        return Calibration(
            source="measured",
            name=self._path,
            references=tuple(references),
            optimizer_gbps=(
                None if gbps is None else self._number(rates, "rates.optimizer_gbps", above=0)
            ),
            layers=self._count(rates, "rates.layers"),
            **{name: self._number(rates, f"rates.{name}") for name in _RATES},
        )

    def _layout(self) -> Layout:
        values = self._table("layout")
        known = {field.name for field in fields(Layout)}
        if unknown := values.keys() - known:
            raise self._wrong(f"layout.{min(unknown)}", "is unknown")
        given: dict[str, Any] = dict(values)
        if isinstance(given.get("layers"), list):
            given["layers"] = tuple(given["layers"])
        return Layout(**given)

    def _phases(self, kind: str, way: str) -> dict[str, float]:
        table, where = self._table("phases_ms", kind, way), f"phases_ms.{kind}.{way}"
        for name in table:
            if name not in NAMES:
                raise self._wrong(f"{where}.{name}", f"is none of {', '.join(NAMES)}")
        return {name: self._number(table, f"{where}.{name}") for name in table}

    def _table(self, *keys: str) -> dict[str, object]:
        found: object = self._content
        for depth, key in enumerate(keys):
            found = cast("dict[str, object]", found).get(key)
            if not isinstance(found, dict):
                raise self._wrong(".".join(keys[: depth + 1]), "is missing, or no table")
        return cast("dict[str, object]", found)

    def _number(self, table: Mapping[str, object], key: str, *, above: float = -math.inf) -> float:
        value = table.get(key.rpartition(".")[2])
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, f"is {value!r}, and should be a number")
        if not 0 <= value < math.inf or value <= above:
            least = "above 0" if above >= 0 else "0 or more"
            raise self._wrong(key, f"is {value!r}, and should be finite and {least}")
        return float(value)

    def _count(self, table: Mapping[str, object], key: str) -> int:
        value = table.get(key.rpartition(".")[2])
        if type(value) is not int or value < 0:
            raise self._wrong(key, f"is {value!r}, and should be a whole number from 0 up")
        return value

    def _text(self, table: Mapping[str, object], key: str) -> str:
        value = table.get(key.rpartition(".")[2])
        if not isinstance(value, str):
            raise self._wrong(key, f"is {value!r}, and should be a text")
        return value

    def _wrong(self, key: str, why: str) -> ValueError:
        return ValueError(f"{self._path}: {key} {why}; {_AGAIN}")

    def _told(self, error: Exception) -> ValueError:
        text = str(error)
        return ValueError(
            text if text.startswith(self._path) else f"{self._path}: {text}; {_AGAIN}"
        )
