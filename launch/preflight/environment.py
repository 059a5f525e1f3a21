"""Variables of the environment that hurt a run, as a table: when, why, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .finding import Finding, Verdict

CHECK = "environment"


@dataclass(frozen=True)
class Circumstances:
    """What it depends on whether a variable hurts.

    Attributes:
        ranks: of the run on this node.
        cores: that they share.
        gpus: whether they compute on GPUs.
    """

    ranks: int
    cores: int
    gpus: bool


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        name: the variable.
        hurts: whether its text (None: not set) hurts.
        why, remedy: what it does, and what to do.
        on_cpus: whether it hurts a run on CPUs too.
        verdict: "bad" for what no run survives.
    """

    name: str
    hurts: Callable[[str | None, Circumstances], bool]
    why: str
    remedy: str = "unset it"
    on_cpus: bool = False
    verdict: Verdict = "warning"


def _on(text: str | None, _: Circumstances) -> bool:
    return text is not None and text.strip().lower() not in ("", "0", "false", "no", "off")


def _is(*wanted: str) -> Callable[[str | None, Circumstances], bool]:
    return lambda text, _: text is not None and text.strip().lower() in wanted


def _too_many_threads(text: str | None, on: Circumstances) -> bool:
    if text is None:  # as many threads as cores, in each rank
        return on.ranks > 1 and on.cores > 1
    return text.isdigit() and on.ranks > 1 and int(text) * on.ranks > 2 * on.cores


RULES = (
    Rule(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        _is("1"),
        "all streams of a GPU then share one queue, so that dispatch and combine cannot run beside "
        "computation (Megatron-LM wants it, this project overlaps otherwise)",
        "unset it, or set it to 8 or more",
    ),
    Rule("CUDA_LAUNCH_BLOCKING", _on, "every kernel is waited for, which hides nothing"),
    Rule("NCCL_P2P_DISABLE", _on, "GPUs of a node then do not use NVLink"),
    Rule("NCCL_SHM_DISABLE", _on, "ranks of a node then talk through the network card"),
    Rule("NCCL_IB_DISABLE", _on, "nodes then talk by TCP, several times slower than RDMA"),
    Rule("NCCL_NVLS_ENABLE", _is("0"), "sums within a node then do not use the NVSwitch's adders"),
    Rule(
        "NCCL_ALGO", _on, "one algorithm for all sizes is slow for most", "unset it after the test"
    ),
    Rule(
        "NCCL_PROTO", _on, "one protocol for all sizes is slow for most", "unset it after the test"
    ),
    Rule(
        "NCCL_DEBUG",
        _is("trace"),
        "NCCL then writes a line for each call, on every rank",
        "set it to WARN",
    ),
    Rule(
        "TORCH_NCCL_BLOCKING_WAIT",
        _on,
        "the host then stands still in every wait for a collective, so nothing overlaps",
    ),
    Rule(
        "NCCL_BLOCKING_WAIT",
        _on,
        "the host then stands still in every wait for a collective, so nothing overlaps",
    ),
    Rule(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        _is("0"),
        "a collective whose peer is gone then hangs for ever",
        "unset it (3 is the default)",
    ),
    Rule("PYTORCH_NO_CUDA_MEMORY_CACHING", _on, "every tensor then stops the GPU for its memory"),
    Rule("TORCH_DISTRIBUTED_DEBUG", _is("detail"), "every collective is then compared first"),
    Rule(
        "NVIDIA_TF32_OVERRIDE",
        _is("0", "1"),
        "float32 products are then computed otherwise than torch was told: 0 slows down, 1 rounds",
    ),
    Rule("CUBLAS_WORKSPACE_CONFIG", _is(":0:0"), "cuBLAS then has no workspace and slow kernels"),
    Rule(
        "OMP_NUM_THREADS",
        _too_many_threads,
        "the ranks of this node then have more threads than cores and wait for each other",
        "set it to the cores of the node by its ranks, or to 1 with GPUs",
        on_cpus=True,
    ),
)


def environment_findings(
    environ: Mapping[str, str], on: Circumstances, node: str, rules: tuple[Rule, ...] = RULES
) -> list[Finding]:
    """The variables that hurt, each with why and what to do.

    Args:
        environ: the environment that the ranks get.
        on: what it depends on.
        node: its name.
        rules: the table.
    """
    found: list[Finding] = []
    for rule in rules:
        text = environ.get(rule.name)
        if not (on.gpus or rule.on_cpus) or not rule.hurts(text, on):
            continue
        what = f"{rule.name} is not set" if text is None else f"{rule.name}={text}"
        message = f"{what}: {rule.why}; {rule.remedy}"
        kind = rule.name
        found.append(Finding(CHECK, rule.verdict, message, node, kind=kind, configured=True))
    return found
