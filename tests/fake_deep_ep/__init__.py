"""A FAKE of DeepEP, for tests on CPUs: its public names and signatures, none of its code.

DeepEP itself needs Hopper GPUs. The fake has V1's `Buffer` and V2's `ElasticBuffer` as their
public interface gives them (deepseek-ai/DeepEP, V1 1.2.1 and V2 2.1.0), does what they promise over
gloo, and is stricter than they are: it refuses arguments, shapes, dtypes and orders of calls that
the real ones would refuse, crash at, or answer with garbage. So

- results of an asynchronous call are NaN until its event was waited for, and its inputs must not
  change before;
- a handle of V2 serves rows of one width and format;
- V1's buffer must have room for both its configurations, of which each needs more of one kind;
- V2 without `deterministic` hands tokens out in an order that changes from call to call;
- a call that not all ranks make alike raises, instead of hanging.

    with installed("v2") as made:      # import deep_ep now finds the fake
        ...
    made[0].calls                      # what was asked of the first buffer, in order
    with installed("v2", nvlink_gbs=0):
        ...                            # on a host where that is not to be found out
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

from .elastic import ElasticBuffer, EPHandle
from .legacy import Buffer, Config
from .shared import Call, EventHandle, EventOverlap, FakeAssertionError, host, made, topk_idx_t

__all__ = ["Call", "FakeAssertionError", "installed"]

V1 = {"Buffer": Buffer, "Config": Config, "EventOverlap": EventOverlap, "topk_idx_t": topk_idx_t}
V2 = {**V1, "ElasticBuffer": ElasticBuffer, "EPHandle": EPHandle, "EventHandle": EventHandle}


@contextmanager
def installed(version: str, **facts: Any) -> Iterator[list[Any]]:
    """Within, `import deep_ep` gives the fake of version "v1" or "v2"; yields the buffers made.

    Args:
        facts: of the host, see `shared.Host`.
    """
    module = ModuleType("deep_ep", __doc__)
    for name, value in {"v1": V1, "v2": V2}[version].items():
        setattr(module, name, value)
    before = sys.modules.get("deep_ep")
    sys.modules["deep_ep"] = module
    made.clear()
    try:
        with mock.patch.multiple(host, **facts) if facts else nullcontext():
            yield made
    finally:
        del sys.modules["deep_ep"]
        if before is not None:
            sys.modules["deep_ep"] = before
