"""Traces of several GPUs: one is looked at, and the others are told."""

import pytest

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.devices import of_device
from counterflow.comm.profile.trace import Activity, Trace

NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(x)"
TRACE = Trace(
    "t.json",
    (
        Activity(NCCL, 0, 100, lane="stream 20", device=0),
        Activity("nvjet_x", 0, 100, lane="stream 7", device=1),
        Activity("nvjet_x", 100, 150, lane="stream 7", device=0),
    ),
)


def test_what_another_gpu_computes_hides_nothing() -> None:
    report = analyse(TRACE)
    assert (report.totals.comm, report.totals.exposed, report.totals.compute) == (100, 100, 50)
    assert "GPU 0 alone is analysed" in report.missing[0]
    assert "left out are GPU 1 (1 activities)" in report.missing[0]
    other = analyse(TRACE, device=1)
    assert (other.totals.comm, other.totals.compute) == (0, 100)
    assert of_device(of_device(TRACE)) == of_device(TRACE)
    with pytest.raises(ValueError, match="nothing ran on GPU 2; GPUs with activities: 0, 1"):
        analyse(TRACE, device=2)
