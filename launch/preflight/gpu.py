"""From what NVML tells of a node's GPUs to findings; each names the GPU and what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ...comm.topology.health import GpuHealth, GpusHealth
from .finding import Finding, Verdict

CHECK = "gpu"

# NVIDIA replaces boards with this many retired pages.
_MOST_RETIRED = 60
_NEAR_SLOWDOWN_C = 5
_HOT_C = 85  # where the threshold is not told
_SLOW_CLOCK = 0.5  # of the most, at work
# What lowers clocks of a GPU that is well; under full load most stand at their power limit.
_NORMAL = ("idle", "clock setting", "power cap", "sync boost", "display setting")
_LOW_SETTING = 0.9
# Links correct a few errors each day; a link that is ill has many.
_MANY_LINK_ERRORS = 1000
# A context without work has half a gigabyte; what holds more will be missed.
_FOREIGN_BYTES = 1 << 30


def gpu_findings(
    health: GpusHealth, *, wanted: int | None, node: str, own_pids: Collection[int] = ()
) -> list[Finding]:
    """What is wrong with a node's GPUs.

    Args:
        health: of the node's GPUs that the job may use.
        wanted: GPUs that the run needs here; 0 looks at none, None takes those that there are.
        node: its name.
        own_pids: processes that may compute there.
    """
    if wanted == 0:
        return []

    def finding(verdict: Verdict, kind: str, message: str, *, configured: bool = False) -> Finding:
        return Finding(CHECK, verdict, message, node, kind=kind, configured=configured)

    if health.reason:
        if wanted is None and (health.no_library or health.no_driver):
            return []
        if health.no_library:
            return [finding("warning", "library", f"GPUs are not looked at: {health.reason}")]
        needed = f"{wanted} GPUs wanted, " if wanted else ""
        message = f"{needed}no GPU answers: {health.reason}; see to the driver"
        return [finding("bad", "driver", message)]
    found: list[Finding] = []
    if wanted is not None and len(health.gpus) < wanted:
        found.append(_too_few(health, wanted, node))
    names = dict.fromkeys(gpu.name for gpu in health.gpus if not gpu.errors)
    if len(names) > 1:
        found.append(finding("warning", "names", f"GPUs of several kinds: {', '.join(names)}"))
    most = max((sum(link.active for link in gpu.links) for gpu in health.gpus), default=0)
    for gpu in health.gpus:
        problems = [
            *_errors(gpu),
            *_memory(gpu),
            *_clocks(gpu),
            *_modes(gpu),
            *_links(gpu, most),
            *_processes(gpu, own_pids),
        ]
        found += [
            finding(verdict, kind, f"GPU {gpu.index} {text}") for verdict, kind, text in problems
        ]
    return found


Problem = tuple[Verdict, str, str]  # and the kind of the finding, and what the GPU does or has


def _bad(kind: str, text: str) -> Problem:
    return "bad", kind, text


def _warning(kind: str, text: str) -> Problem:
    return "warning", kind, text


def _too_few(health: GpusHealth, wanted: int, node: str) -> Finding:
    """A node that lacks GPUs, or a job that was given fewer than it wants."""
    few = f"{len(health.gpus)} GPUs where {wanted} are wanted"
    if health.named is not None and health.named < wanted:
        message = f"{few}: CUDA_VISIBLE_DEVICES names {health.named}; ask for more GPUs"
        return Finding(CHECK, "bad", message, node, kind="named", configured=True)
    return Finding(CHECK, "bad", f"{few}; see dmesg for Xid", node, kind="missing")


def _errors(gpu: GpuHealth) -> Iterator[Problem]:
    """One finding for each question that failed, however many questions the same way."""
    by_words: dict[str, list[str]] = {}
    for error in gpu.errors:
        what, _, words = error.partition(": ")
        by_words.setdefault(words, []).append(what)
    for words, asked in by_words.items():
        what = ", ".join(asked[:3]) + (", ..." if len(asked) > 3 else "")
        yield _bad(
            "answers",
            f"does not answer NVML ({what}): {words}; see dmesg for Xid, reset the GPU or the node",
        )


def _memory(gpu: GpuHealth) -> Iterator[Problem]:
    if count := gpu.ecc_volatile:
        yield _bad("ecc", f"has {count} uncorrected ECC errors since its last reset; reset it")
    elif count := gpu.ecc_aggregate:
        yield _warning("ecc", f"had {count} uncorrected ECC errors before its last reset")
    if gpu.rows_failed:
        yield _bad("rows", "has a memory row that could not be remapped; have the GPU replaced")
    if gpu.rows_pending:
        yield _bad("rows", "has memory rows that wait to be remapped; reset it")
    if gpu.retired_pending:
        yield _bad("pages", "has memory pages that wait to be retired; reset it")
    if gpu.retired_pages:
        text = f"has {gpu.retired_pages} memory pages retired after double-bit errors"
        if gpu.retired_pages >= _MOST_RETIRED:
            yield _bad("pages", f"{text}; have the GPU replaced")
        else:
            yield _warning("pages", text)


def _clocks(gpu: GpuHealth) -> Iterator[Problem]:
    held = [name for name in gpu.slowdowns if name not in _NORMAL]
    at = f" at {gpu.celsius} °C" if gpu.celsius is not None else ""
    if held:
        text = f"is slowed down{at}: {', '.join(held)}; look at cooling and power supply"
        hard = any(not name.startswith("software") for name in held)
        yield _bad("slowdown", text) if hard else _warning("slowdown", text)
        return
    limit = gpu.slowdown_celsius
    too_hot = _HOT_C if limit is None else limit - _NEAR_SLOWDOWN_C
    if gpu.celsius is not None and gpu.celsius >= too_hot:
        near = "" if limit is None else f", and is slowed down at {limit} °C"
        yield _warning("heat", f"has {gpu.celsius} °C{near}; look at the cooling")
    if gpu.sm_mhz is None or not gpu.sm_max_mhz:
        return
    share, clocks = gpu.sm_mhz / gpu.sm_max_mhz, f"{gpu.sm_mhz} of {gpu.sm_max_mhz} MHz"
    if "clock setting" in gpu.slowdowns and share < _LOW_SETTING:
        remedy = "nvidia-smi -rgc and -rac take it back"
        yield _warning("clocks", f"is held at {clocks} by a setting; {remedy}")
    elif "idle" in gpu.slowdowns or share >= _SLOW_CLOCK:
        return
    elif "power cap" in gpu.slowdowns:
        yield _warning(
            "clocks", f"is held at {clocks} by its power limit; see nvidia-smi -q -d POWER"
        )
    else:
        yield _warning("clocks", f"runs at {clocks} for no reason that is told")


def _modes(gpu: GpuHealth) -> Iterator[Problem]:
    if gpu.mig:
        yield _bad(
            "mig", "is divided (MIG), and its parts have no NVLink; nvidia-smi -mig 0 ends that"
        )
    if gpu.persistence is False:
        yield _warning(
            "persistence",
            "has no persistence mode, so its driver is loaded for each job; start "
            "nvidia-persistenced",
        )


def _links(gpu: GpuHealth, most: int) -> Iterator[Problem]:
    active = sum(link.active for link in gpu.links)
    if active < most and not gpu.errors:
        down = [str(link.index) for link in gpu.links if not link.active]
        which = f"NVLink {', '.join(down)} down: " if down else ""
        yield _bad(
            "links",
            f"has {which}{active} links active where other GPUs of the node have {most}; reset "
            "the GPUs and the fabric manager, or have it seen to",
        )
    for link in gpu.links:
        counts = dict(link.errors)
        ill = counts.get("recovery", 0) or max(counts.values(), default=0) >= _MANY_LINK_ERRORS
        if ill:
            told = ", ".join(f"{kind} {count}" for kind, count in link.errors)
            yield _warning("link errors", f"NVLink {link.index} has had errors: {told}")


def _processes(gpu: GpuHealth, own_pids: Collection[int]) -> Iterator[Problem]:
    foreign = [(pid, size) for pid, size in gpu.processes if pid not in own_pids]
    if not foreign:
        return
    known = [size for _, size in foreign if size is not None]
    held = sum(known) if len(known) == len(foreign) else gpu.used_bytes or 0
    pids = ", ".join(str(pid) for pid, _ in foreign[:4]) + (", ..." if len(foreign) > 4 else "")
    text = f"is in use by other processes ({pids}), {held / 2**30:.1f} GiB; end them"
    yield _bad("in use", text) if held >= _FOREIGN_BYTES else _warning("in use", text)
