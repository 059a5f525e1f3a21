"""What the fake of DeepEP says to what DeepEP itself would not bear; see tests/fake_deep_ep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.cases_deep_ep import E, H, inputs
from tests.fake_deep_ep import FakeAssertionError, installed
from tests.fake_deep_ep.elastic import ElasticBuffer
from tests.fake_deep_ep.legacy import Buffer


def _asker(said: dict[str, str]) -> Callable[[str, Callable[[], object]], None]:
    def ask(what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except FakeAssertionError as error:
            said[what] = str(error)
        else:
            said[what] = "nothing"

    return ask


def strictness_v1(rank: int, world: int) -> dict[str, str]:
    """What the fake says to what V1 would not bear. Every call is made by all ranks alike."""
    x, experts, weights, _ = inputs(rank, "uneven")
    said: dict[str, str] = {}
    ask = _asker(said)
    with installed("v1"):
        configs = Buffer.get_dispatch_config(world), Buffer.get_combine_config(world)
        little, room = (c.get_nvl_buffer_size_hint(2 * H, world) for c in configs)
        b: Any = Buffer(dist.group.WORLD, room, explicitly_destroy=True)
        chosen = {"topk_idx": experts, "topk_weights": weights}
        ask("no layout", lambda: b.dispatch(x, **chosen))
        names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert",
                 "is_token_in_rank")  # fmt: skip
        given = chosen | dict(zip(names, b.get_dispatch_layout(experts, E), strict=False))
        ask("wide", lambda: b.dispatch(x.float(), **given))
        ask("strided", lambda: b.dispatch(x.repeat(1, 2)[:, ::2], **given))
        ask("double", lambda: b.dispatch(x, **(given | {"topk_weights": weights.double()})))
        ask("small", lambda: b.dispatch(x.repeat(1, 64), **given))
        other = given | {"topk_idx": (experts + 1) % E}
        ask("other routing", lambda: b.dispatch(x, **other))
        rows, _, _, _, handle, event = b.dispatch(x, **given, async_finish=True)
        said["early"] = str(bool(rows.isnan().all()))
        event.current_stream_wait()
        said["late"] = str(bool(rows.isfinite().all()))
        ask("rows", lambda: b.combine(torch.cat([rows, rows[:1]]), handle))
        less: Any = Buffer(dist.group.WORLD, little, explicitly_destroy=True)
        ask("small to combine", lambda: less.combine(rows, handle))
        _, _, event = b.combine(rows, handle, async_finish=True)
        rows += 1
        ask("changed", event.current_stream_wait)
        b.destroy()
        ask("destroyed", lambda: b.combine(rows, handle))
    return said


def strictness_v2(rank: int, world: int) -> dict[str, str]:
    """The same of V2."""
    x, experts, weights, _ = inputs(rank, "uneven")
    said: dict[str, str] = {}
    ask = _asker(said)
    with installed("v2"):
        sizes: dict[str, Any] = {"num_max_tokens_per_rank": 16, "hidden": H}
        group = dist.group.WORLD
        e: Any = ElasticBuffer(group, **sizes, deterministic=True, explicitly_destroy=True)
        given = {"topk_idx": experts, "topk_weights": weights, "num_experts": E}
        rows, _, _, handle, event = e.dispatch(x, **given, async_with_compute_stream=True)
        ask("unsorted", lambda: e.combine(rows, handle))
        event.current_stream_wait()
        ask("SMs", lambda: e.dispatch(x, handle=handle))
        again = {"handle": handle, "num_sms": handle.num_sms}
        ask("width", lambda: e.dispatch(x[:, :128].contiguous(), **again))
        ask(
            "format",
            lambda: e.dispatch((x.to(torch.float8_e4m3fn), torch.ones(len(x), 2)), **again),
        )
        ask("narrow", lambda: e.combine(rows[:, :128].contiguous(), handle))
        same = torch.tensor([[7 - 4 * rank, 7 - 4 * rank, -1]]).repeat(len(x), 1)  # of the other
        ask("twice", lambda: e.dispatch(x, **(given | {"topk_idx": same})))
        ask("limits", lambda: e.dispatch(x, **given, num_max_tokens_per_rank=12 + rank))
        ask("event", lambda: e.combine(rows, handle, previous_event=e.capture()))
        free: Any = ElasticBuffer(group, **sizes)
        orders = [free.dispatch(x, **given)[3].recv_src_metadata[:, 0] for _ in range(2)]
        said["free order"] = str(torch.equal(*orders))
    return said
