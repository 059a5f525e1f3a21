"""How fast this machine runs a model, measured by ranks that all work at once."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from counterflow import __version__  # the root package is no room, so no relative import finds it

from ..comm.dispatch import Dispatcher
from ..model.stages import Part
from ..parallel.mesh import Mesh
from ..predict.calibration import Calibration, Reference
from ..predict.cluster import Cluster, Gpu
from ..predict.exchange import stage_parameters
from ..predict.layout import Layout
from ..predict.work import optimizer_bytes
from .config import Config
from .doctor_facts import find_host
from .experts import make_experts
from .measure_fit import PhaseResults
from .measure_phases import PhaseTimer, measured_model
from .measure_rates import (
    StepParts,
    StepTimer,
    Together,
    fp8_tflops,
    matmul_tflops,
    measured_links,
    memory_gbps,
)
from .plan_layout import layout_of
from .preflight.host_memory import memory_of_machine


@dataclass(frozen=True)
class Machine:
    """What does not depend on the model.

    Attributes:
        cluster: this machine, or the machines that measured together.
        device: what computes.
    """

    cluster: Cluster
    device: str


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        calibration: of the model's layers.
        cluster: where.
        step: of the whole step of a small model.
        about: for people: when, by what, with what.
    """

    calibration: Calibration
    cluster: Cluster
    step: StepParts
    about: dict[str, object]


def measure_machine(
    config: Config, mesh: Mesh, device: torch.device, *, timeout_s: float
) -> Machine:
    """Products, memory and links; a collective of all ranks.

    Raises:
        CommError: a rank is gone, or did not answer within the limit.
    """
    together = Together(mesh, device)
    dtype = getattr(torch, config.train.dtype)
    host = find_host()
    local = mesh.nodes.count(mesh.nodes[mesh.rank])
    on_gpu = device.type == "cuda"
    name, sms, memory = host.cpu, 0, memory_of_machine() // local
    if on_gpu:
        found = torch.cuda.get_device_properties(device)
        name, sms, memory = found.name, found.multi_processor_count, found.total_memory
    products = matmul_tflops(together, dtype, device)
    in_fp8 = fp8_tflops(together, device) if config.fp8.enabled else products
    links, unused = measured_links(mesh, device, timeout_s)
    sources = {
        "gpu.bf16_tflops": f"measured: products in {config.train.dtype}, {local} ranks at once",
        "gpu.fp8_tflops": "measured" if config.fp8.enabled else "not measured: as the other",
        "gpu.memory_gbps": "measured: a copy, read and written",
        "links": _of_links(unused, mesh.shape.world_size),
    }
    gpu = Gpu(name, sms, memory, products, in_fp8, memory_gbps(together, device))
    nodes = len(set(mesh.nodes))
    per_node = mesh.shape.world_size // nodes
    where = f"{name}, measured"
    cluster = Cluster(where, gpu, per_node, links, num_gpus=0, sources=sources)
    return Machine(cluster, device.type)


class Measuring:
    """Measures a model's layers and a step, round by round.

    Args:
        config: of a run: model, micro-batch, formats, dispatcher.
        mesh: of all ranks that measure, one stage each: pp is 1.
        device: where this rank computes.
        experts: the dispatcher; None makes the run's.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        experts: Dispatcher[Any] | None = None,
    ) -> None:
        self._config, self._mesh = config, mesh
        experts = make_experts(config, mesh) if experts is None else experts
        self._model = measured_model(config.model)
        self._phases = PhaseTimer(config, mesh, experts, device)
        self._step = StepTimer(config, self._model, mesh, experts, device)
        self._phases.warm_up()
        self._step.warm_up()

    def round(self) -> None:
        """One sample of each; a collective of all ranks."""
        self._phases.round()
        self._step.round()

    def results(self, name: str, machine: Machine) -> Measurement:
        """What the rounds have found; a collective of all ranks.

        Args:
            name: of the measurement, such as the file that it goes to.
            machine: as measured.
        """
        phases, step = self._phases.results(), self._step.results()
        layout = replace(
            layout_of(self._config),
            pp=1,
            dp=self._mesh.shape.dp,
            ep=self._mesh.shape.ep,
            schedule="1f1b",
            microbatches=1,
            stages_per_rank=None,
            layers=None,
        )
        cluster = machine.cluster
        calibration = Calibration(
            source="measured",
            name=name,
            references=_references(self._config, layout, phases, name, cluster),
            matmul=1.0,
            attention=1.0,
            memory=1.0,
            pair_gaps=phases.pair_gaps,
            optimizer_gbps=self._updated_bytes(layout) / max(step.update, 1e-6) * 1e-6,
            overhead_ms=phases.overhead_ms,
            layers=self._model.num_hidden_layers,
            step_ms=step.rest,
        )
        about: dict[str, object] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": machine.device,
            "counterflow": __version__,
            "torch": str(torch.__version__),
            "ranks": self._mesh.shape.world_size,
            "nodes": len(set(self._mesh.nodes)),
            "rounds": len(self._phases.rounds),
            "step_ms": asdict(step),
            "totals_ms": dict(phases.totals),
        }
        return Measurement(calibration, cluster, step, about)

    def _updated_bytes(self, layout: Layout) -> float:
        """That the optimizer of the small model reads and writes on this rank."""
        held = stage_parameters(self._model, layout, Part.whole(self._model))
        return optimizer_bytes(layout, routed=held.routed, other=held.other, plain=held.plain)


def _of_links(unused: str, world_size: int) -> str:
    """Where the numbers of links are from."""
    if world_size == 1:
        return "not measured: there is one rank, and 1 GB/s stands for what it does not use"
    if unused:
        return f"measured: all-to-all; {unused} nodes not measured: as the other link"
    return "measured: all-to-all"


def _references(
    config: Config, layout: Layout, phases: PhaseResults, name: str, cluster: Cluster
) -> tuple[Reference, ...]:
    return tuple(
        Reference(
            kind=kind,
            model=config.model,
            layout=layout,
            alone=times,
            paired=phases.paired[kind],
            source=f"measured, {name}",
            cluster=cluster,
        )
        for kind, times in phases.alone.items()
    )
