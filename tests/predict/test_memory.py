"""What a step takes of each pipeline rank's memory, predicted without torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.model import ModelConfig, Part, num_parameters
from counterflow.model.inventory import inventory
from counterflow.model.memory import Load, kept_for_backward
from counterflow.model.stages import EMBEDDING
from counterflow.parallel.schedule import Op, Schedule, actions, build
from counterflow.parallel.simulate import Costs, Memory, memory_of, simulate
from counterflow.parallel.zero_ends import BUCKET_BYTES
from counterflow.predict.activations import MicroBatch, Split, StageActivations, peaks
from counterflow.predict.layout import Layout
from counterflow.predict.memory import (
    ACTIVATIONS,
    CATEGORIES,
    EXACT,
    Device,
    rank_memory,
    rank_states,
    saved,
    storage_of,
)
from counterflow.predict.prediction import RankMemory

GIB = 2**30
V3 = ModelConfig()
# DeepSeek-V3's layout (arXiv 2412.19437, sections 3.2 and 4.2); it does not tell the tokens of a
# micro-batch.
LAYOUT = Layout(pp=16, dp=128, ep=64, microbatches=120)
SCHEDULE = LAYOUT.make_schedule()
DEVICES: tuple[Device, Device] = ("cuda", "cpu")
NAMES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zbv", "dualpipe", "dualpipev")

SMALL = replace(
    V3,
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
)


def fullest(ranks: Sequence[RankMemory]) -> int:
    return max(rank.total for rank in ranks)


@pytest.mark.parametrize(("length", "gib"), [(1024, 54.9), (2048, 66.3), (4096, 89.3)])
def test_deepseek_v3s_step_takes_what_its_tokens_ask_for(length: int, gib: float) -> None:
    """No source publishes these: they hold the estimate, whose parts are held elsewhere."""
    ranks = rank_memory(V3, replace(LAYOUT, length=length), SCHEDULE)
    assert fullest(ranks) / GIB == pytest.approx(gib, abs=0.051)
    assert ranks[0].total == fullest(ranks)  # embedding, head and multi-token prediction
    assert ranks == ranks[::-1]  # both ranks of a pair hold the same two stages


@pytest.mark.parametrize("device", DEVICES)
def test_every_rank_tells_every_category_in_order(device: Device) -> None:
    for rank in rank_memory(V3, LAYOUT, SCHEDULE, device=device):
        assert tuple(rank.parts) == CATEGORIES
        assert all(size >= 0 for size in rank.parts.values())
        assert rank.total == sum(rank.parts.values())
    assert set(EXACT) < set(CATEGORIES)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_one_rank_alone_holds_each_parameter_and_its_states(fp8: bool, moments: str) -> None:
    layout = Layout(dp=1, fp8=fp8, moments="float32" if moments == "float32" else "bfloat16")
    states = rank_states(SMALL, layout, (Part.whole(SMALL),), device="cuda")
    parameters = num_parameters(SMALL, mtp=True)
    moe = SMALL.num_hidden_layers - SMALL.first_k_dense_replace + SMALL.num_nextn_predict_layers
    routers = moe * SMALL.n_routed_experts * SMALL.hidden_size
    products = sum(p.numel for p in inventory(SMALL, Part.whole(SMALL)) if p.product)
    wide = routers + (products if fp8 else 0)  # in float32, which AdamW updates themselves
    assert states.parameters == 2 * parameters + 2 * wide
    assert states.masters == (4 * products if fp8 else 0)
    assert states.copies == 4 * (parameters - wide)
    assert states.gradients == 4 * parameters
    assert states.moments == parameters * (8 if moments == "float32" else 4)
    assert states.averaged == 4 * parameters
    # Both ways round, with a scale for each block.
    assert (2 * products < states.fp8 < 2.01 * products) if fp8 else not states.fp8


def test_zero_shares_what_equal_ranks_update() -> None:
    """Experts are held by dp / ep of the ranks, all else by dp."""
    parts = (LAYOUT.parts(V3, 16)[3],)
    shared = rank_states(V3, LAYOUT, parts, device="cuda")
    whole = rank_states(V3, replace(LAYOUT, zero=0), parts, device="cuda")
    found = inventory(V3, parts[0])
    experts = sum(p.numel for p in found if p.routed) // 64
    rest = sum(p.numel for p in found if not p.routed)
    assert whole.moments == 4 * (experts + rest)
    assert shared.moments == 4 * (experts // 2 + rest // 128)  # all are divisible
    assert shared.parameters == whole.parameters
    assert shared.gradients == whole.gradients


def test_what_two_stages_of_a_rank_share_is_there_once() -> None:
    first, last = LAYOUT.parts(SMALL, 8)[0], LAYOUT.parts(SMALL, 8)[-1]
    apart = [rank_states(SMALL, LAYOUT, (part,), device="cuda") for part in (first, last)]
    both = rank_states(SMALL, LAYOUT, (first, last), device="cuda")
    embedding = next(p for p in inventory(SMALL, first) if p.name == EMBEDDING)
    assert both.parameters == sum(s.parameters for s in apart) - 2 * embedding.numel
    assert both.gradients == sum(s.gradients for s in apart) - 4 * embedding.numel


def walked(schedule: Schedule, stages: Sequence[StageActivations]) -> list[int]:
    """The reference: each row from its first step to its last, bytes added and taken away."""
    found: list[int] = []
    for row in schedule.rows:
        held = most = 0
        for step in row:
            parts = actions(step)
            held += sum(stages[stage].kept.total for stage, op, _ in parts if op is Op.F)
            most = max(most, held)
            for stage, op, _ in parts:
                kept, waiting = stages[stage].kept.total, stages[stage].waiting.total
                held -= {Op.F: 0, Op.B: kept, Op.I: kept - waiting, Op.W: waiting}[op]
            most = max(most, held)
        found.append(most)
    return found


SPLITS = st.builds(Split, *(st.integers(0, 50) for _ in Split._fields))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(0, 6), st.data())
def test_peaks_are_those_of_the_rows_walked_step_by_step(
    name: str, half: int, more: int, data: st.DataObject
) -> None:
    schedule = build(name, ranks=2 * half, microbatches=4 * half + 2 * more)
    stages = [
        StageActivations(data.draw(SPLITS), data.draw(SPLITS), 0)
        for _ in range(schedule.num_stages)
    ]
    assert [peak.total for peak in peaks(schedule, stages)] == walked(schedule, stages)


@pytest.mark.parametrize("name", NAMES)
def test_peaks_are_the_simulations_where_that_can_tell(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    sizes = [(100 + i, 40 + i) for i in range(schedule.num_stages)]
    kept, waiting = (tuple(float(size[i]) for size in sizes) for i in (0, 1))
    simulated = memory_of(simulate(schedule, Costs()), Memory(activations=kept, kept=waiting))
    stages = [StageActivations(Split(a), Split(dense=b), 0) for a, b in sizes]
    assert [peak.total for peak in peaks(schedule, stages)] == [rank.peak for rank in simulated]


def test_1f1b_holds_as_many_chunks_as_ranks_follow() -> None:
    layout = replace(
        LAYOUT, pp=8, schedule="1f1b", microbatches=24, layers=(5, 8, 8, 8, 8, 8, 8, 8)
    )
    ranks = rank_memory(V3, layout, layout.make_schedule())
    load = MicroBatch(1, 4096, ep=64)
    counts = (load.tokens * 8 * 64 // 256,) * 4  # evenly over this rank's four experts
    layer = kept_for_backward(V3, storage_of(layout), Load(4096, counts=counts), moe=True)
    padding = layer.items.get("heads padded to one size (CPUs)", 0)
    for rank in range(1, 7):
        parts = ranks[rank].parts
        assert sum(parts[name] for name in ACTIVATIONS) == (8 - rank) * 8 * (layer.total - padding)
        assert parts["activations of attention"] == (8 - rank) * 8 * (layer.attention - padding)
        assert parts["activations of dense layers"] == parts["activations of heads"] == 0
    assert ranks[0].parts["activations of dense layers"] > 0
    assert ranks[7].parts["activations of heads"] > 0


def test_savings_are_what_turning_each_off_alone_costs_the_fullest_rank() -> None:
    layout = replace(LAYOUT, length=2048, ema=True)
    least = fullest(rank_memory(V3, layout, SCHEDULE))
    found = saved(V3, layout, SCHEDULE)
    for name, off in (
        ("E5M6", replace(layout, e5m6=False)),
        ("norms made again", replace(layout, recompute_norms=False)),
        ("up-projections made again", replace(layout, recompute_up_projections=False)),
        ("BF16 moments", replace(layout, moments="float32")),
        ("ZeRO-1", replace(layout, zero=0)),
    ):
        assert found.pop(name) == fullest(rank_memory(V3, off, SCHEDULE)) - least > 0, name
    assert found["FP8 activations"] > 0
    assert 0 < found["average on the host"] < found["FP8 activations"]
    assert len(found) == 2


def test_what_a_layout_does_not_use_saves_nothing() -> None:
    layout = replace(
        LAYOUT,
        fp8=False,
        recompute_norms=False,
        recompute_up_projections=False,
        moments="float32",
        zero=0,
    )
    assert saved(V3, layout, SCHEDULE) == {}


def test_the_host_keeps_averages_and_a_checkpoints_copy() -> None:
    """Of averages twice their bytes: what is on its way into them too."""
    layout = replace(LAYOUT, ema=True)
    states = rank_states(
        V3, layout, (LAYOUT.parts(V3, 16)[3], LAYOUT.parts(V3, 16)[12]), device="cuda"
    )
    without, with_copy = (
        rank_memory(V3, layout, SCHEDULE, snapshot=snapshot)[3] for snapshot in (False, True)
    )
    assert (without.host, without.staging) == (2 * states.averaged, 0)
    assert with_copy.staging == states.parameters + states.optimizer + states.averaged
    assert with_copy.host == without.host + with_copy.staging
    assert with_copy.parts == without.parts
    assert rank_memory(V3, LAYOUT, SCHEDULE, snapshot=False)[3].host == 0


def test_what_an_update_works_with_lies_where_activations_were() -> None:
    """Torch's AdamW copies all that it updates, and by then no micro-batch is there."""
    layout = replace(LAYOUT, length=64, moments="float32", zero=0)
    both = tuple(LAYOUT.parts(V3, 16)[stage] for stage in (3, 12))
    update = rank_states(V3, layout, both, device="cuda").update
    parts = rank_memory(V3, layout, SCHEDULE)[3].parts
    assert parts["working memory"] + sum(parts[name] for name in ACTIVATIONS) == update
    longer = rank_memory(V3, replace(layout, length=4096), SCHEDULE)[3].parts
    assert longer["working memory"] + sum(longer[name] for name in ACTIVATIONS) > update


@pytest.mark.parametrize(("device", "copies"), [("cuda", 0), ("cpu", 1)])
def test_zeros_messages_lie_where_activations_were(device: Device, copies: int) -> None:
    """On CPUs gloo's copy counts most, on GPUs (BF16 parameters) the bucket that is packed."""
    layout = Layout(dp=2, schedule="1f1b", microbatches=2, length=8, fp8=False, zero=1)
    whole = Part.whole(SMALL)
    found = inventory(SMALL, whole)
    kinds = Counter[tuple[bool, bool]]()
    for p in found:
        kinds[p.routed, p.wide] += 4 * p.numel
    largest = max(kinds.values())
    assert largest < BUCKET_BYTES  # so that each kind is one bucket
    numel, half = sum(p.numel for p in found), sum(-(-p.numel // 2) for p in found)
    expected = 4 * half + copies * 4 * numel + largest
    assert rank_states(SMALL, layout, (whole,), device=device).buckets == expected

    def buffers(layout: Layout) -> tuple[int, int]:
        [rank] = rank_memory(SMALL, layout, layout.make_schedule(), device=device)
        return rank.parts["ZeRO buffers"], sum(rank.parts[name] for name in ACTIVATIONS)

    short, kept = buffers(layout)
    assert short == expected - kept > 0
    assert buffers(replace(layout, length=512, sequences=8))[0] == 0
    assert buffers(replace(layout, zero=0))[0] == 0


def test_what_has_no_other_holder_is_packed_and_not_shared() -> None:
    """With ep = dp each expert is on one rank."""
    layout = Layout(dp=2, ep=2, dtype="float32", fp8=False, zero=1)
    whole = Part.whole(SMALL)
    rest = [p.numel for p in inventory(SMALL, whole) if not p.routed]
    routed = sum(p.numel for p in inventory(SMALL, whole) if p.routed) // 2
    halves = sum(-(-n // 2) for n in rest)
    assert routed < sum(rest)
    states = rank_states(SMALL, layout, (whole,), device="cuda")
    # Shares of the sums beside a packed bucket; later shares of both, and wholes for gradients.
    assert states.buckets == 4 * max(halves + sum(rest), 2 * halves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [8, 64, 512])
def test_what_layers_buckets_and_updates_take_lies_in_one_place(
    device: Device, length: int
) -> None:
    """None of the three is there with another; buckets and updates not with activations either."""
    layout = Layout(dp=2, schedule="1f1b", microbatches=2, length=length, fp8=False, zero=1)
    states = rank_states(SMALL, layout, (Part.whole(SMALL),), device=device)
    [both] = rank_memory(SMALL, layout, layout.make_schedule(), device=device)
    bare = replace(layout, zero=0)
    kept = sum(both.parts[name] for name in ACTIVATIONS)
    beside = both.parts["working memory"] + both.parts["ZeRO buffers"]
    assert beside >= max(0, states.buckets - kept, states.update - kept)
    [least] = rank_memory(SMALL, bare, bare.make_schedule(), device=device)
    assert beside == max(states.buckets - kept, least.parts["working memory"])


def test_heads_are_filled_up_to_one_size_on_cpus_alone() -> None:
    layout = replace(LAYOUT, recompute_up_projections=False)
    gpu, cpu = (rank_memory(V3, layout, SCHEDULE, device=device)[3] for device in DEVICES)
    attention, *others = ACTIVATIONS
    assert gpu.parts[attention] < cpu.parts[attention]
    assert all(gpu.parts[name] == cpu.parts[name] for name in others)


def test_only_ranks_that_exchange_have_buffers_for_it() -> None:
    alone = Layout(schedule="1f1b", microbatches=2, length=128)
    [parts] = [rank.parts for rank in rank_memory(SMALL, alone, alone.make_schedule())]
    assert parts["pipeline messages"] == parts["dispatch buffers"] == 0
    [row] = {rank.parts["dispatch buffers"] for rank in rank_memory(V3, LAYOUT, SCHEDULE)}
    # Sent and received: a row in FP8 with its scales there, one in BF16 back.
    assert row == 2 * 4096 * 8 * (7168 + 4 * 56 + 2 * 7168)


def test_a_schedule_for_other_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule of 16 ranks cannot run on pp=8"):
        rank_memory(V3, replace(LAYOUT, pp=8), SCHEDULE)


def test_another_schedule_is_not_taken_for_the_one_before() -> None:
    """The cache goes by identity, also where an object stands in another's place in memory."""
    layout = replace(LAYOUT, length=512)
    for name in ("1f1b", "gpipe", "1f1b", "dualpipe"):
        layout = replace(layout, schedule=name)
        schedule = layout.make_schedule()
        stages = [StageActivations(Split(2), Split(1), 0)] * schedule.num_stages
        assert [p.total for p in peaks(schedule, stages)] == walked(schedule, stages)
        del schedule


def test_a_search_can_ask_thousands_of_times() -> None:
    """About 0.7 ms of processor time a call here; a search of 2,000 layouts has a minute."""
    layouts = [replace(LAYOUT, length=length) for length in range(512, 4096, 64)]
    rank_memory(V3, LAYOUT, SCHEDULE)
    start = time.process_time()
    for layout in layouts:
        rank_memory(V3, layout, SCHEDULE)
    assert (time.process_time() - start) / len(layouts) < 0.015


def test_predicting_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from counterflow.predict.layout import Layout\n"
        "from counterflow.predict.memory import rank_memory\n"
        "from counterflow.model import ModelConfig\n"
        "l = Layout(pp=4, microbatches=8)\n"
        "assert len(rank_memory(ModelConfig(), l, l.make_schedule())) == 4"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
