"""Phases of traces that mark none, from the order of their kernels."""

from dataclasses import replace

import pytest

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.classify import classify_all
from counterflow.comm.profile.infer import infer_phases
from counterflow.comm.profile.trace import Activity, Exchange, Thread, Trace

MAIN: Thread = (1, 10)
AUTOGRAD: Thread = (1, 11)

NOTIFY = "void deep_ep::internode::notify_dispatch<false, 8>(int const*)"
CACHED = "void deep_ep::internode::cached_notify<false>(int)"
DISPATCH = "void deep_ep::internode::dispatch<false, 8>(int4*)"
COMBINE = "void deep_ep::internode::combine<false, 8>(int4*)"
LAYOUT = "void deep_ep::layout::get_dispatch_layout(long const*)"
HYBRID_DISPATCH = "void hybrid_ep::dispatch_kernel<int>(int)"
HYBRID_COMBINE = "void hybrid_ep::combine_kernel<int>(int)"
GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
ALL_TO_ALL = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"


def trace_of(*kernels: str | tuple[str, Thread | None]) -> Trace:
    """Kernels one after the other, each launched as it starts, by MAIN if nothing else is said."""
    activities: list[Activity] = []
    for place, kernel in enumerate(kernels):
        name, thread = kernel if isinstance(kernel, tuple) else (kernel, MAIN)
        start = 10 * place
        told = Exchange("all_to_allv") if name == ALL_TO_ALL else None
        lane = "stream 7" if name == GEMM else "stream 9"
        launched = None if thread is None else start
        activities.append(
            Activity(name, start, start + 9, "kernel", lane, 0, launched, thread, exchange=told)
        )
    return Trace("t", tuple(activities))


def phases_of(trace: Trace) -> list[str]:
    classes = classify_all(activity.name for activity in trace.activities)
    phases = infer_phases(trace, classes)
    return [phases.runs[run].name if run >= 0 else "" for run in phases.of]


def test_a_layer_after_the_other_is_told_whole() -> None:
    forward = [LAYOUT, NOTIFY, DISPATCH, GEMM, CACHED, COMBINE, GEMM]
    backward = [CACHED, DISPATCH, GEMM, CACHED, COMBINE, GEMM]
    dispatched = ["dispatch(F)"] * 3
    combined = ["combine(F)"] * 2
    assert phases_of(trace_of(*forward, *forward[:-1], *backward, *backward)) == [
        *(*dispatched, "mlp(F)", *combined, "attn(F)"),
        *(*dispatched, "mlp(F)", *combined),
        *("combine(B)", "combine(B)", "mlp(B)", "dispatch(B)", "dispatch(B)", "attn(B)"),
        *("combine(B)", "combine(B)", "mlp(B)", "dispatch(B)", "dispatch(B)", ""),
    ]


def test_interleaved_combines_answer_dispatches_in_their_order() -> None:
    pair = [CACHED, DISPATCH, GEMM, NOTIFY, DISPATCH, CACHED, COMBINE, GEMM, CACHED, COMBINE]
    one = ["combine(B)"] * 2 + [""] + ["dispatch(F)"] * 2 + ["dispatch(B)"] * 2 + [""]
    trace = trace_of(*pair, *pair)
    assert phases_of(trace) == [*one, "combine(F)", "combine(F)"] * 2
    report = analyse(trace)
    assert all(phase.inferred for phase in report.phases)
    assert [(one.name, one.layer, one.count) for one in report.layers] == [
        (name, layer, 1)
        for layer in (0, 1)
        for name in ("combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)")
    ]
    said = " ".join(report.missing)
    assert "inferred" in said
    assert "The trace names no layers: they are numbered" in said
    assert "Phases that compute cannot be told" in said


def test_a_combine_goes_in_the_direction_of_its_thread() -> None:
    """Forward's combine comes first although backward's dispatch is the older one."""
    kernels = [
        (CACHED, AUTOGRAD),
        (DISPATCH, AUTOGRAD),
        (NOTIFY, MAIN),
        (DISPATCH, MAIN),
        (COMBINE, MAIN),
        (COMBINE, AUTOGRAD),
    ]
    assert phases_of(trace_of(*kernels)) == [
        *("combine(B)", "combine(B)", "dispatch(F)", "dispatch(F)"),
        *("combine(F)", "dispatch(B)"),
    ]


def test_without_notifications_the_thread_tells_the_direction() -> None:
    forward = [(HYBRID_DISPATCH, MAIN), (GEMM, MAIN), (HYBRID_COMBINE, MAIN)]
    backward = [(HYBRID_DISPATCH, AUTOGRAD), (GEMM, AUTOGRAD), (HYBRID_COMBINE, AUTOGRAD)]
    assert phases_of(trace_of(*forward, *backward)) == [
        *("dispatch(F)", "mlp(F)", "combine(F)"),
        *("combine(B)", "mlp(B)", "dispatch(B)"),
    ]


@pytest.mark.parametrize("thread", [MAIN, None])
def test_a_direction_that_nothing_shows_is_left_open(thread: Thread | None) -> None:
    trace = trace_of((HYBRID_DISPATCH, thread), (GEMM, thread), (HYBRID_COMBINE, thread))
    assert phases_of(trace) == ["dispatch", "", "combine"]
    assert any("cannot be told" in line for line in analyse(trace).missing)


def test_all_to_alls_are_dispatch_and_combine_by_turns_between_products() -> None:
    layer = [ALL_TO_ALL, ALL_TO_ALL, GEMM, ALL_TO_ALL, GEMM]
    kernels = [(name, thread) for thread in (MAIN, AUTOGRAD) for name in (*layer, *layer)]
    names = phases_of(trace_of(*kernels))
    forward = ["dispatch(F)", "dispatch(F)", "mlp(F)", "combine(F)"]
    backward = ["combine(B)", "combine(B)", "mlp(B)", "dispatch(B)"]
    assert names == [*forward, "attn(F)", *forward, "", *backward, "attn(B)", *backward, ""]


def layers_of(trace: Trace) -> list[tuple[str, int | None]]:
    classes = classify_all(activity.name for activity in trace.activities)
    phases = infer_phases(trace, classes)
    return [(phases.runs[run].name, phases.runs[run].layer) for run in phases.of if run >= 0]


def test_layers_begin_anew_where_forward_and_backward_take_turns() -> None:
    """Two micro-batches through two layers; attention lies between the layers."""
    forward = [NOTIFY, DISPATCH, GEMM, COMBINE, GEMM, NOTIFY, DISPATCH, GEMM, COMBINE]
    backward = [CACHED, DISPATCH, GEMM, COMBINE, GEMM, CACHED, DISPATCH, GEMM, COMBINE]

    def halves(first: str, mlp: str, second: str, attention: str, its: int) -> list[object]:
        one = [[(first, n), (first, n), (mlp, n), (second, n)] for n in (0, 1)]
        return [*one[0], (attention, its), *one[1]]

    found = layers_of(trace_of(*forward, *backward, *forward, *backward))
    assert found == 2 * [
        *halves("dispatch(F)", "mlp(F)", "combine(F)", "attn(F)", 1),
        *halves("combine(B)", "mlp(B)", "dispatch(B)", "attn(B)", 0),
    ]


def test_layers_are_left_open_where_forwards_and_backwards_do_not_match() -> None:
    forward = [NOTIFY, DISPATCH, GEMM, COMBINE]
    backward = [CACHED, DISPATCH, GEMM, COMBINE]
    for kernels in (forward * 2 + backward, forward * 3 + backward * 2 + forward + backward * 2):
        trace = trace_of(*kernels)
        assert {layer for _, layer in layers_of(trace)} == {None}
        assert any("Layers cannot be told" in line for line in analyse(trace).missing)


def test_a_recomputed_forward_is_told_from_the_backward_after_it() -> None:
    forward = [ALL_TO_ALL, GEMM, ALL_TO_ALL, GEMM]
    kernels = [(name, MAIN) for name in forward * 3]
    kernels += [(name, AUTOGRAD) for name in forward * 6]
    names = [name for name in phases_of(trace_of(*kernels)) if "attn" not in name and name]
    ahead = ["dispatch(F)", "mlp(F)", "combine(F)"]
    assert names == [*ahead * 3, *[*ahead, "combine(B)", "mlp(B)", "dispatch(B)"] * 3]


def test_an_uneven_number_of_moves_in_backwards_thread_is_left_undirected_and_told() -> None:
    forward = [ALL_TO_ALL, GEMM, ALL_TO_ALL, GEMM]
    kernels = [(name, MAIN) for name in forward * 2]
    kernels += [(name, AUTOGRAD) for name in forward * 3]
    trace = trace_of(*kernels)
    names = phases_of(trace)[len(forward) * 2 :]
    assert {name for name in names if name} == {"dispatch", "combine"}
    assert any("not twice as many" in line for line in analyse(trace).missing)


def test_communication_without_a_phase_is_told_by_collective_and_group() -> None:
    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    trace = trace_of(gather, GEMM, gather, NOTIFY, DISPATCH, gather)
    told = Exchange("_allgather_base", 100, 800, "1", 8)
    gathers = {0: told, 2: told, 5: told._replace(group="", collective="")}
    report = analyse(
        replace(
            trace,
            activities=tuple(
                one._replace(exchange=gathers.get(place))
                for place, one in enumerate(trace.activities)
            ),
        )
    )
    phases = {one.name: one for one in report.phases}
    assert list(phases) == ["all_gather [group 1]", "dispatch(F)", "all_gather [NCCL]"]
    one = phases["all_gather [group 1]"]
    assert (one.count, one.comm, one.exposed, one.inferred) == (2, 18, 18, False)
    assert (one.algorithm_bytes, one.bus_bytes, one.waiting_known) == (1600, 1400, False)
    assert phases["dispatch(F)"].waiting_known
    assert sum(p.exposed for p in report.phases) == report.totals.exposed
    assert analyse(trace_of(GEMM, gather)).phases[0].name == "all_gather [NCCL]"


def test_a_trace_without_any_exchange_has_no_phases_and_says_so() -> None:
    report = analyse(trace_of(GEMM, GEMM))
    assert report.phases == ()
    assert any("none can be inferred" in line for line in report.missing)
    assert any("known to communicate" in line for line in report.missing)


def test_nothing_is_inferred_where_phases_are_marked_or_the_cpu_ran() -> None:
    trace = trace_of(NOTIFY, DISPATCH)
    operators = tuple(one._replace(kind="operator", device=-1) for one in trace.activities)
    assert analyse(replace(trace, on_gpu=False, activities=operators)).phases == ()
