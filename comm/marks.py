"""Names for profiles: what this thread does now, written into the torch profiler's trace.

Costs nothing while no profiler runs. A mark's name is a phase of a layer ("dispatch(F) layer 3"), a
step of a schedule ("(0F7;7B3)") or a wait, which begins with "wait ".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from torch.autograd import profiler

_WAIT = "wait "
_NOTHING = nullcontext()
# Of the calling context, so that a move on another thread goes by the name that it was started by.
_current: ContextVar[str] = ContextVar("counterflow_mark", default="")
_waits: ContextVar[bool] = ContextVar("counterflow_waits", default=False)


def profiling() -> bool:
    """Whether a profiler runs; it may be one that leaves this thread out."""
    return profiler._is_profiler_enabled


def mark(name: str) -> AbstractContextManager[object]:
    """Within this context, a profiler that runs shows this thread as doing `name`.

    Of waits within waits only the outermost shows, so that their times can be added up.
    """
    if not profiling():
        return _NOTHING
    return _wait(name) if name.startswith(_WAIT) else profiler.record_function(name)


@contextmanager
def _wait(name: str) -> Iterator[None]:
    if _waits.get():
        yield
        return
    token = _waits.set(True)
    try:
        with profiler.record_function(name):
            yield
    finally:
        _waits.reset(token)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Within this context `current_name` is `name`, for what is started now and runs elsewhere."""
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def current_name() -> str:
    """The innermost `named` of this context; "" outside any."""
    return _current.get()
