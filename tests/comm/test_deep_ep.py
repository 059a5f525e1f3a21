"""DeepEP behind the dispatcher's interface, over a fake of it (tests/fake_deep_ep)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from counterflow.comm import dispatcher
from counterflow.comm.dispatch.deep_ep_versions import DEFAULT_SMS
from counterflow.parallel.mesh import Mesh, MeshShape
from tests import cases_deep_ep as cases
from tests import cases_deep_ep_refusals as refusals
from tests import cases_fake_deep_ep as fake_cases
from tests import fake_deep_ep
from tests.ranks import RankError, RankPool

# As published: deepseek-ai/DeepEP, V1 1.2.1 (without enable_shrink) and V2 2.1.0.
SIGNATURES = {
    "Buffer": "group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, "
    "num_qps_per_rank=24, allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, "
    "explicitly_destroy=False, enable_shrink=False, comm=None",
    "Buffer.destroy": "self",
    "Buffer.set_num_sms": "new_num_sms",
    "Buffer.capture": "",
    "Buffer.get_dispatch_config": "num_ranks",
    "Buffer.get_combine_config": "num_ranks",
    "Buffer.is_sm90_compiled": "",
    "Buffer.get_dispatch_layout": "self, topk_idx, num_experts, previous_event=None, "
    "async_finish=False, allocate_on_comm_stream=False",
    "Buffer.dispatch": "self, x, handle=None, num_tokens_per_rank=None, "
    "num_tokens_per_rdma_rank=None, is_token_in_rank=None, num_tokens_per_expert=None, "
    "topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None, "
    "previous_event=None, async_finish=False, allocate_on_comm_stream=False",
    "Buffer.combine": "self, x, handle, topk_weights=None, bias=None, config=None, "
    "previous_event=None, async_finish=False, allocate_on_comm_stream=False",
    "Config.get_nvl_buffer_size_hint": "self, hidden_bytes, num_ranks",
    "Config.get_rdma_buffer_size_hint": "self, hidden_bytes, num_ranks",
    "EventOverlap": "event=None, extra_tensors=None",
    "EventOverlap.current_stream_wait": "self, release_handle=False",
    "ElasticBuffer": "group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, "
    "hidden=0, num_topk=0, use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, "
    "allow_multiple_reduction=True, prefer_overlap_with_compute=True, sl_idx=3, "
    "num_allocated_qps=0, num_cpu_timeout_secs=300, num_gpu_timeout_secs=100, "
    "explicitly_destroy=False",
    "ElasticBuffer.destroy": "self",
    "ElasticBuffer.capture": "",
    "ElasticBuffer.get_buffer_size_hint": "group, num_max_tokens_per_rank, hidden, num_topk=0, "
    "use_fp8_dispatch=False, allow_hybrid_mode=True, allow_multiple_reduction=True",
    "ElasticBuffer.get_theoretical_num_sms": "self, num_experts, num_topk, num_scaleout_topk=0, "
    "rdma_gbs=0, nvlink_gbs=0, sm_read_gbs=200, sm_write_gbs=50",
    "ElasticBuffer.dispatch": "self, x, topk_idx=None, topk_weights=None, "
    "cumulative_local_expert_recv_stats=None, num_experts=None, num_max_tokens_per_rank=None, "
    "expert_alignment=None, num_sms=0, num_qps=0, previous_event=None, "
    "previous_event_before_epilogue=None, async_with_compute_stream=False, "
    "allocate_on_comm_stream=False, handle=None, do_handle_copy=True, do_cpu_sync=None, "
    "do_expand=False, do_zero_padding=False, use_tma_aligned_col_major_sf=False",
    "ElasticBuffer.combine": "self, x, handle, topk_weights=None, bias=None, num_sms=0, "
    "num_qps=0, previous_event=None, previous_event_before_epilogue=None, "
    "async_with_compute_stream=False, allocate_on_comm_stream=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_fake_has_the_published_signatures(name: str) -> None:
    target = fake_deep_ep.V2[name.split(".")[0]]
    for part in name.split(".")[1:]:
        target = getattr(target, part)
    parameters = inspect.signature(target).parameters.values()
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert ", ".join(map(str, shown)) == SIGNATURES[name]


V1_REFUSALS = {
    "no layout": "dispatch without a layout",
    "wide": "x without scales must be bfloat16",
    "strided": "contiguous",
    "double": "topk_weights must be float32",
    "small": "the buffer is too small",
    "small to combine": "the buffer is too small",
    "other routing": "the layout is of another routing",
    "early": "True",
    "late": "True",
    "rows": "rows",
    "changed": "an input changed",
    "destroyed": "after destroy",
}
V2_REFUSALS = {
    "unsorted": "sorted only once the event",
    "SMs": "SM count",
    "width": "another width or format",
    "format": "another width or format",
    "narrow": "256",
    "twice": "names an expert twice",
    "limits": "the ranks disagree",
    "event": "allocate_on_comm_stream",
    "free order": "False",
}


@pytest.mark.parametrize(
    ("case", "expected"),
    [(fake_cases.strictness_v1, V1_REFUSALS), (fake_cases.strictness_v2, V2_REFUSALS)],
    ids=["v1", "v2"],
)
def test_the_fake_refuses_what_deep_ep_would_not_bear(
    ranks: RankPool, case: Callable[..., Any], expected: dict[str, str]
) -> None:
    for said in ranks.run(case, world=2):
        assert said.keys() == expected.keys()
        for what, text in expected.items():
            assert text in said[what], what


@pytest.mark.parametrize(
    ("version", "payload", "world"),
    [
        ("v1", "exact", 2),
        ("v1", "fp8", 4),
        ("v1 over nodes", "bf16", 4),
        ("v2", "exact", 2),
        ("v2", "bf16", 4),
        ("v2 over nodes", "fp8", 4),
    ],
)
def test_values_and_gradients_equal_the_single_process_computation(
    ranks: RankPool, version: str, payload: str, world: int
) -> None:
    alignment = 8 if payload == "fp8" else 1
    found = ranks.run(
        cases.mixture, world=world, version=version, payload=payload, alignment=alignment
    )
    assert found == [[]] * world


@pytest.mark.parametrize("version", cases.VERSIONS)
def test_rows_are_grouped_as_by_the_other_backends(ranks: RankPool, version: str) -> None:
    assert all(ranks.run(cases.grouped, world=4, version=version))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_fp8_rows_travel_as_tiles_with_their_scales(ranks: RankPool, version: str) -> None:
    assert all(ranks.run(cases.rounded, world=2, version=version))


@pytest.mark.parametrize("version", cases.VERSIONS)
def test_a_handle_serves_again_with_other_rows_and_weights(ranks: RankPool, version: str) -> None:
    assert all(ranks.run(cases.recompute, world=4, version=version))


@pytest.mark.parametrize("version", cases.VERSIONS)
def test_the_split_form_equals_the_differentiable_form(ranks: RankPool, version: str) -> None:
    assert all(ranks.run(cases.split_form, world=4, version=version))


def test_v1_is_called_in_its_order(ranks: RankPool) -> None:
    for calls in ranks.run(cases.order_of_calls, world=2, version="v1"):
        names = [name for name, _ in calls]
        first, again, cached = (given for name, given in calls if name == "dispatch")
        assert names == [
            "Buffer", "get_dispatch_layout", "dispatch", "dispatch", "combine", "dispatch",
            "combine", "destroy",
        ]  # fmt: skip
        assert {"topk_idx", "topk_weights", "is_token_in_rank"} <= set(first)
        assert "topk_weights" in again  # V1's handles carry none
        assert "handle" in cached
        assert "topk_idx" not in cached
        combines = [given for name, given in calls if name == "combine"]
        assert ["topk_weights" in given for given in combines] == [False, True]


def test_v2_is_called_in_its_order(ranks: RankPool) -> None:
    for calls in ranks.run(cases.order_of_calls, world=2, version="v2"):
        assert [name for name, _ in calls] == [
            "ElasticBuffer", "dispatch", "dispatch", "combine", "dispatch", "combine", "destroy",
        ]  # fmt: skip
        first, again, cached = (given for name, given in calls if name == "dispatch")
        assert "topk_idx" in first
        assert "handle" not in first
        for given in (again, cached):  # metadata travels once
            assert "handle" in given
            assert "topk_idx" not in given
        assert "topk_weights" in again
        assert "topk_weights" not in cached


def test_a_buffer_grows_with_the_tokens_and_old_handles_still_serve(ranks: RankPool) -> None:
    for made in ranks.run(cases.growing, world=4):
        assert made == [
            ("ElasticBuffer", ["ElasticBuffer", "dispatch", "destroy"]),
            ("ElasticBuffer", ["ElasticBuffer", "dispatch", "dispatch", "combine"]),
        ]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_handle_refuses_rows_of_another_width_and_still_serves(
    ranks: RankPool, version: str
) -> None:
    for said in ranks.run(refusals.width, world=2, version=version):
        moves = "dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)"
        for text, move in zip(said, moves, strict=True):
            assert text.startswith(f"{move}: rows have 512 columns, but this handle's first dispat")
            assert "had 256" in text


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("to all", 6),
        ("differently", 14),  # the most that a rank needs
        ("not to rank 1", 6),
        ("to none", DEFAULT_SMS),
        ("to none over nodes", DEFAULT_SMS),
        ("not beyond nodes", DEFAULT_SMS),
    ],
)
def test_all_ranks_use_one_number_of_sms_whatever_they_know_of_their_links(
    ranks: RankPool, known: str, expected: int
) -> None:
    assert ranks.run(cases.sms, world=4, known=known) == [[expected] * 2] * 4


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("num_sms", [12, None])
def test_communication_takes_as_many_sms_as_it_is_given(
    ranks: RankPool, version: str, num_sms: int | None
) -> None:
    sms = num_sms or {"v1": 24, "v2": 6}[version]  # or else the library's own number
    moves = ("dispatch", "dispatch", "combine", "dispatch", "combine")
    expected = [(move, sms) for move in moves]
    assert ranks.run(cases.given_sms, world=2, version=version, num_sms=num_sms) == [expected] * 2


def test_a_number_of_sms_that_cannot_be_is_refused(ranks: RankPool) -> None:
    for odd, none, gloo in ranks.run(cases.refused_sms, world=2):
        assert "takes SMs in pairs; give num_sms=12" in odd
        assert "num_sms must be a whole number from 1 up, got 0" in none
        assert "only DeepEP and NCCL, on GPUs" in gloo
        assert "leave num_sms out" in gloo


def test_v2_gets_a_buffer_for_these_sizes_and_the_limit_of_waits(ranks: RankPool) -> None:
    for (made,) in ranks.run(cases.room, world=4, version="v2"):
        assert made == {
            "hidden": cases.H,
            "num_topk": cases.E,
            "use_fp8_dispatch": False,
            "num_max_tokens_per_rank": 960,
            "deterministic": True,
            "num_cpu_timeout_secs": 42,
            "num_gpu_timeout_secs": 42,
        }


def test_v1_gets_a_buffer_for_both_its_configurations(ranks: RankPool) -> None:
    dispatch, combine = cases.v1_room(world=4)
    assert combine[0] > dispatch[0]
    assert dispatch[1] > combine[1]
    for (made,) in ranks.run(cases.room, world=4, version="v1 over nodes"):
        assert made == {"num_nvl_bytes": combine[0], "num_rdma_bytes": dispatch[1]}


def test_errors_of_deep_ep_itself_name_ranks_and_operation(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(refusals.library_fails, world=4)):
        others = tuple(r for r in range(4) if r != rank)
        names = ", ".join(map(str, others))
        expected = {
            "PCIe": ("dispatch(F)", "FakeAssertionError: PCIe cards have NVLink in pairs only"),
            "another": ("dispatch(F)", "KeyError: 'one\\ntwo'"),
            "close": ("close", "AssertionError"),
        }
        assert found.keys() == {*expected, "setting"}
        for what, (operation, reason) in expected.items():
            assert found[what] == (
                "CommError",
                f"rank {rank}: {operation} with ranks {names} failed in DeepEP "
                f"(V2 ElasticBuffer): {reason}",
                others,
            )
        kind, said, _ = found["setting"]
        assert kind == "ValueError"
        assert "fill_uninitialized_memory = False" in said


@pytest.mark.parametrize("version", ["v1 over nodes", "v2 over nodes"])
def test_bytes_count_a_token_once_for_each_node(ranks: RankPool, version: str) -> None:
    for counted, expected in ranks.run(cases.bytes_sent, world=4, version=version):
        assert counted == expected > 0


def test_a_node_limit_is_kept_and_sets_the_sms(ranks: RankPool) -> None:
    for free, bound, said in ranks.run(cases.node_limit, world=4):
        # V2's own estimate is for balanced routing only, which a limit is not.
        assert (free, bound) == (6, DEFAULT_SMS)
        assert "node_limit is 1" in said


@pytest.mark.parametrize("version", ["v1 over nodes", "v2"])
def test_what_deep_ep_does_not_take_is_refused_with_a_remedy(ranks: RankPool, version: str) -> None:
    for said in ranks.run(refusals.refusals, world=4, version=version):
        expected = [
            "x_TD is torch.float32, but DeepEP moves bfloat16",
            "takes multiples of 256",
            "weights_TK is float64",
            "at most 32 experts a token",
            "experts_TK of rank 1 holds experts -1..8",
            "a token of rank 1 names one expert twice",
            "combine(F): rows_ND is torch.float32",
            "experts_TK is on meta, but DeepEP's kernels run on a GPU",
        ]
        for text, wanted in zip(said, expected, strict=True):
            assert wanted in text
        assert all("two_hop" in text for i, text in enumerate(said) if i != 4)


def test_an_unfit_mesh_or_setting_is_named(ranks: RankPool) -> None:
    for said in ranks.run(refusals.obstacles, world=3):
        assert "V1 takes 2, 4, 8" in said["ranks"]
        assert "takes 8 ranks for a node, here are 1" in said["nodes"]
        assert "at most 7936 columns, not 8192" in said["too wide"]
        assert "neither leaves the node nor carries FP8" in said["nodes of older GPUs"]
        assert "256 a rank" in said["slots"]
        assert "multiples of 256 columns, not 200" in said["columns"]
        assert "at most 32 experts a token, not 33" in said["choices"]
        assert "not 'logfmt10': ask for payload 'fp8', or for 'two_hop'" in said["LogFMT"]
        assert "NVIDIA A100-PCIE-40GB: DeepEP takes PCIe cards in pairs only" in said["PCIe"]
        assert "says rank 1: deep_ep is not installed" in said["one lacks it"]
        assert (
            "different generations of DeepEP (V1 Buffer, V2 ElasticBuffer)" in said["generations"]
        )
        assert "fill_uninitialized_memory = False" in said["fills"]


def test_auto_takes_deep_ep_only_where_it_can_be_used(ranks: RankPool) -> None:
    refused = {
        "absent": "deep_ep is not installed",
        "exact": "'exact'",
        "LogFMT": "not 'logfmt8'",
        "old GPU": "compute capability is below 8.0",
        "no V1": "compute capability is below 9.0",
        "compiled for others": "compiled for GPUs of compute capability 9.0",
        "v1 FP8 on an older GPU": "nor carries FP8",
        "v2 FP8 on an older GPU": "nor carries FP8",
        "PCIe": "NVIDIA H100 PCIe is a PCIe card",
        "columns": "multiples of 256 columns, not 128",
        "choices": "at most 32 experts a token, not 33",
        "gloo": "NCCL",
        "no GPU": "no GPU",
    }
    taken = {
        "fits": "V2 ElasticBuffer",
        "sizes": "V2 ElasticBuffer",
        "v1 on an older GPU": "V1 Buffer",
        "v2 on an older GPU": "V1 Buffer",  # which the package of V2 has, too
    }
    for found in ranks.run(refusals.automatic, world=2):
        assert found.keys() == {*taken, *refused}
        for how, (name, why) in found.items():
            if how in refused:
                assert name == "dedup"
                assert why is not None
                assert refused[how] in why
            else:
                assert (name, why) == (taken[how], None)


def test_a_deep_ep_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(MeshShape())
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ValueError, match=r"not installed: .*install DeepEP, or use 'two_hop'"):
        dispatcher("deep_ep", mesh, num_experts=4)
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    with pytest.raises(ValueError, match="so it is not DeepEP"):
        dispatcher("deep_ep", mesh, num_experts=4)


def test_one_rank_has_no_use_for_deep_ep() -> None:
    with fake_deep_ep.installed("v2"), pytest.raises(ValueError, match="ep=1"):
        dispatcher("deep_ep", Mesh(MeshShape()), num_experts=4)


def test_a_peer_that_dies_is_named() -> None:
    with RankPool() as pool, pytest.raises(RankError) as caught:
        pool.run(cases.peer_dies, world=2, version="v2", timeout_s=120)
    assert caught.value.errors[0].startswith(
        "CommError: rank 0: combine(F) with rank 1 failed in DeepEP (V2 ElasticBuffer)"
    )
