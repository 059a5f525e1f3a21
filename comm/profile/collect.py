"""Makes activities and annotations of a trace's events, as they come.

What ran on a GPU has a correlation id; the call that launched it has the same one. Calls come
before or after what they launch, so the two are joined at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from operator import attrgetter
from typing import Any, NamedTuple, cast

from .metadata import exchange, whole
from .scan import Event, Wanted
from .trace import Activity, Annotation, Exchange, Thread

# Categories as Kineto writes them today and as it or the autograd profiler once did.
_DEVICE = {
    "kernel": "kernel",
    "Kernel": "kernel",
    "gpu_memcpy": "memcpy",
    "Memcpy": "memcpy",
    "gpu_memset": "memset",
    "Memset": "memset",
}
_CALLS = frozenset(
    ("cuda_runtime", "cuda_driver", "hip_runtime", "hip_driver", "xpu_runtime", "Runtime")
)
# Frequent calls that never start anything on the device.
_IDLE_CALLS = frozenset(
    prefix + call
    for prefix in ("cuda", "hip")
    for call in (
        "DeviceGetAttribute",
        "DeviceSynchronize",
        "EventCreateWithFlags",
        "EventDestroy",
        "EventQuery",
        "EventRecord",
        "EventRecordWithFlags",
        "EventSynchronize",
        "Free",
        "FuncGetAttributes",
        "FuncSetAttribute",
        "GetDevice",
        "GetLastError",
        "Malloc",
        "OccupancyMaxActiveBlocksPerMultiprocessor",
        "OccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
        "PeekAtLastError",
        "PointerGetAttributes",
        "SetDevice",
        "StreamGetCaptureInfo",
        "StreamIsCapturing",
        "StreamQuery",
        "StreamSynchronize",
        "StreamWaitEvent",
    )
)
# What torch's backends for CPUs mark of the transfers that their own threads carry out; sends and
# receives they mark on the thread that posts them, until they have ended, whatever it does then: a
# receive posted early is no communication yet. A move's own mark, or that of a wait, shows them.
_TRANSFERS = re.compile(r"(?:gloo|mpi|ucc):(?!send|recv|receive)")
_ON_HOST, _ON_DEVICE = "user_annotation", "gpu_user_annotation"
_OPERATORS = frozenset(("cpu_op", "Operator"))
_COLLECTIVE_OPERATOR = "record_param_comms"  # c10d's; its arguments describe the collective
_NO_ARGS: Mapping[str, Any] = {}


def _ns(us: object) -> int:
    """A time in us, as a whole number or as text, in ns; exact, and rounded below 1 ns.

    Raises:
        ValueError: it is neither.
    """
    if type(us) is int:
        return us * 1000
    if isinstance(us, str):
        if us[-4:-3] == ".":  # as Kineto writes them: 5551.123
            try:
                return int(us[:-4] + us[-3:])
            except ValueError:
                pass
        try:
            return int((Decimal(us) * 1000).to_integral_value())
        except (InvalidOperation, OverflowError):
            pass
    raise ValueError(f"{us!r} is no time")


class _Ran(NamedTuple):
    """An activity of a GPU before its launch is known; see `Activity`."""

    name: str
    start: int
    end: int
    kind: str
    lane: str
    device: int
    grid: tuple[int, int, int] | None
    block: tuple[int, int, int] | None
    num_bytes: int | None
    exchange: Exchange | None
    correlation: int | str | None
    external: int | str | None


class Collector:
    """Takes events of a trace.

    Attributes:
        operators: whether operators of the CPU are kept as activities.
        num_malformed: events that lack a time, or whose time is no number.
        num_negative: events that end before they start; they are taken as without length.
        num_open: ranges that begin without an end, or end without a beginning.
        num_early: activities of the GPU that start before they were launched, once joined.
        most_early: ns that one of them starts before its launch at most.
        num_unlaunched: those without a launch in the trace, once joined.
    """

    def __init__(self, operators: bool) -> None:
        """
        Args:
            operators: keep operators of the CPU as activities.
        """
        self.operators = operators
        self.num_malformed = 0
        self.num_negative = 0
        self.num_open = 0
        self.num_early = 0
        self.most_early = 0
        self.num_unlaunched = 0
        self._ran: list[_Ran] = []
        self._ops: list[tuple[str, int, int, Thread]] = []
        self._annotations: list[Annotation] = []
        self._launches: dict[object, tuple[int, Thread]] = {}
        self._exchanges: dict[object, Exchange] = {}
        self._halves: list[tuple[int, Thread, bool, Event]] = []
        self._thread_names: dict[Thread, str] = {}
        self._same: dict[object, object] = {}  # one object for each of many equal values
        self._shapes: dict[tuple[Any, ...], tuple[int, int, int] | None] = {}
        self._threads: dict[tuple[object, object], Thread] = {}
        self._ids: dict[object, int] = {}

    def wanted(self, top: Mapping[str, Any]) -> Wanted:
        """Which events are needed, given the top-level keys before them.

        A trace that lists no device is most likely of a CPU run, so operators are kept at once.
        """
        self.operators = self.operators or top.get("deviceProperties") == []
        categories = dict.fromkeys((*_DEVICE, _ON_HOST, _ON_DEVICE), frozenset[str]())
        if self.operators:
            categories |= dict.fromkeys(_OPERATORS, frozenset[str]())
        # Only a call is idle by its name; a range that a user names so is as wanted as any.
        categories |= dict.fromkeys(_CALLS, _IDLE_CALLS)
        containing = f'"{_COLLECTIVE_OPERATOR}"'
        return Wanted(categories, frozenset("BEM"), containing)

    def take(self, events: list[Event]) -> None:
        """Note what is needed of some events."""
        launches = self._launches
        for event in events:
            phase, category = event.get("ph"), event.get("cat")
            try:
                if phase == "X":
                    if category in _CALLS:
                        if event.get("name") not in _IDLE_CALLS:
                            launch = _ns(event["ts"]), self._thread(event)
                            launches.setdefault(event["args"]["correlation"], launch)
                    else:
                        self._range(event, category)
                elif phase == "B" or phase == "E":
                    half = _ns(event["ts"]), self._thread(event), phase == "B", event
                    self._halves.append(half)
                elif phase == "M" and event.get("name") == "thread_name":
                    self._thread_names[self._thread(event)] = str(event["args"]["name"])
            except (KeyError, TypeError, ValueError):
                # Calls that launch nothing need no correlation id.
                self.num_malformed += str(category) not in _CALLS

    def _range(self, event: Event, category: object) -> None:
        """Note an event with a beginning and a duration."""
        kind = _DEVICE.get(cast(str, category))
        operator = category in _OPERATORS
        name = str(event.get("name", ""))
        used = operator and (self.operators or name == _COLLECTIVE_OPERATOR)
        if not used and kind is None and category != _ON_HOST and category != _ON_DEVICE:
            return
        start, length = _ns(event["ts"]), _ns(event.get("dur", 0))
        if length < 0:
            self.num_negative += 1
            length = 0
        name = self._one(name)
        if kind is not None:
            self._kernel(event, kind, name, start, start + length)
        elif category == _ON_HOST:
            thread = self._thread(event)
            self._annotations.append(Annotation(name, start, start + length, thread))
            if self.operators and _TRANSFERS.match(name):
                self._ops.append((name, start, start + length, thread))
        elif category == _ON_DEVICE:
            lane = self._stream(event.get("tid"))
            self._annotations.append(Annotation(name, start, start + length, None, lane))
        else:
            if name == _COLLECTIVE_OPERATOR:
                args = _args(event)
                described = exchange(args)
                if described is not None and args.get("External id"):
                    self._exchanges[args["External id"]] = described
            if self.operators:
                self._ops.append((name, start, start + length, self._thread(event)))

    def _kernel(self, event: Event, kind: str, name: str, start: int, end: int) -> None:
        args = _args(event)
        stream = args["stream"] if "stream" in args else event.get("tid")
        device = args["device"] if "device" in args else event.get("pid")
        if type(device) is not int:
            device = whole(device) or 0
        ran = _Ran(
            name,
            start,
            end,
            kind,
            self._stream(stream),
            device,
            self._shape(args.get("grid")),
            self._shape(args.get("block")),
            None if kind == "kernel" else whole(args.get("bytes")),
            exchange(args),
            _id(args.get("correlation")),
            _id(args.get("External id")),
        )
        self._ran.append(ran)

    def activities(self, groups: Mapping[str, tuple[int, ...]]) -> list[Activity]:
        """What ran on GPUs, by start, each with its launch; tells in `num_early` and so on.

        Args:
            groups: ranks of each process group, by name, as far as the trace lists them.
        """
        self._pair_halves()
        joined: list[Activity] = []
        for ran in self._ran:
            launched: int | None = None
            launcher: Thread | None = None
            if ran.correlation and (launch := self._launches.get(ran.correlation)):
                launched, launcher = launch
                # A recorder of whole us may show a kernel up to one before its launch.
                if ran.start + 1000 < launched:
                    self.num_early += 1
                    self.most_early = max(self.most_early, launched - ran.start)
            else:
                self.num_unlaunched += 1
            told = ran.exchange
            if told is None and ran.external:
                told = self._exchanges.get(ran.external)
            if told is not None and not told.group_ranks and told.group in groups:
                told = told._replace(group_ranks=groups[told.group])
            joined.append(Activity(*ran[:6], launched, launcher, *ran[6:9], told))
        joined.sort(key=attrgetter("start"))
        return joined

    def cpu_operators(self) -> list[Activity]:
        """Operators by start, outer before inner; their lanes are their threads' names."""
        self._pair_halves()
        lanes = self._lanes({thread for *_, thread in self._ops})
        made = [
            Activity(name, start, end, "operator", lanes[thread], -1, launcher=thread)
            for name, start, end, thread in self._ops
        ]
        made.sort(key=lambda activity: (activity.start, -activity.end))
        return made

    def annotations(self) -> list[Annotation]:
        """Annotations by start, outer before inner."""
        self._pair_halves()
        self._annotations.sort(key=lambda each: (each.start, -each.end))
        return self._annotations

    def _pair_halves(self) -> None:
        """Make ranges of events that tell beginning and end apart ("B", "E")."""
        halves, self._halves = self._halves, []
        halves.sort(key=lambda half: half[0])
        open_: dict[Thread, list[tuple[int, Event]]] = {}
        for time, thread, begins, event in halves:
            stack = open_.setdefault(thread, [])
            if begins:
                stack.append((time, event))
            elif stack:
                start, beginning = stack.pop()
                both: Event = {**_args(beginning), **_args(event)}
                whole_range = {"ph": "X", "args": both, "dur": _in_us(time - start)}
                self.take([{**beginning, **whole_range}])
            else:
                self.num_open += 1
        self.num_open += sum(map(len, open_.values()))

    def _lanes(self, threads: set[Thread]) -> dict[Thread, str]:
        """A name for each thread, no two of them the same."""
        names = {
            thread: self._thread_names.get(thread) or f"thread {thread[1]}"
            for thread in sorted(threads)
        }
        taken = list(names.values())
        return {
            (pid, tid): name if taken.count(name) == 1 else f"{name} ({pid}, {tid})"
            for (pid, tid), name in names.items()
        }

    def _thread(self, event: Event) -> Thread:
        told = event.get("pid"), event.get("tid")
        thread = self._threads.get(told)
        if thread is None:
            thread = self._threads[told] = self._number(told[0]), self._number(told[1])
        return thread

    def _number(self, identity: object) -> int:
        """A process's or thread's number; a negative one of our own where it has only a name."""
        number = whole(identity)
        if number is None:
            number = self._ids.setdefault(str(identity), -1 - len(self._ids))
        return number

    def _stream(self, number: object) -> str:
        return self._one(f"stream {number}")

    def _shape(self, value: Any) -> tuple[int, int, int] | None:
        if not isinstance(value, list):
            return None
        shape = tuple(cast(list[Any], value))
        if shape not in self._shapes:
            numbers = [whole(each) for each in shape]
            right = len(numbers) == 3 and None not in numbers
            self._shapes[shape] = cast(tuple[int, int, int], tuple(numbers)) if right else None
        return self._shapes[shape]

    def _one(self, value: Any) -> Any:
        return self._same.setdefault(value, value)


def _args(event: Event) -> Mapping[str, Any]:
    args = event.get("args")
    return cast(Mapping[str, Any], args) if isinstance(args, dict) else _NO_ARGS


def _id(value: object) -> int | str | None:
    return value if isinstance(value, int | str) else None


def _in_us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03}"
