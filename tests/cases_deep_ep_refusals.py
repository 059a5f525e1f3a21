"""What DeepEP's dispatcher refuses, and where it does not serve, over the fake of DeepEP."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from counterflow.comm import Dispatcher, dispatcher
from counterflow.comm.dispatch import ExpertLayout, deep_ep, deep_ep_versions
from counterflow.parallel.mesh import Mesh, MeshShape
from tests.cases_deep_ep import E, fake, inputs, make, refusal
from tests.fake_deep_ep.elastic import ElasticBuffer


def width(rank: int, world: int, version: str) -> list[str]:
    """What is said to other widths than the first dispatch's; then the handle still serves."""
    x, experts, weights, _ = inputs(rank, "uneven")
    wide = x.repeat(1, 2)
    with fake(version):
        d = make(world, version)
        out = d.dispatch(x, experts, weights)
        counted = d.crossed_bytes, {k: list(v) for k, v in d.sent_bytes.items()}
        mistakes: list[Callable[[], object]] = [
            lambda: d.dispatch(wide, experts, weights, out.handle),
            lambda: d.combine(out.rows_ND.repeat(1, 2), out.handle),
            lambda: d.start_combine_backward(wide, out.handle),
            lambda: d.start_dispatch_backward(out.rows_ND.repeat(1, 2), None, out.handle),
        ]
        said = [refusal(mistake) for mistake in mistakes]
        assert counted == (d.crossed_bytes, d.sent_bytes)
        y = d.combine(out.rows_ND, out.handle)
    assert torch.equal(y, x * (experts >= 0).sum(1, keepdim=True))
    return said


def library_fails(rank: int, world: int) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """(type, message, peers) of what comes of DeepEP's own errors."""
    x, experts, weights, _ = inputs(rank, "uneven")
    found = {}

    def ask(what: str, d: Dispatcher[Any], call: Callable[[Dispatcher[Any]], object]) -> None:
        try:
            call(d)
        except Exception as error:
            found[what] = type(error).__name__, str(error), getattr(error, "peers", ())

    def dispatch(d: Dispatcher[Any]) -> object:
        return d.dispatch(x, experts, weights)

    with fake("v2", gpu="NVIDIA A100-PCIE-40GB"):
        ask("PCIe", make(world, "v2"), dispatch)
    with fake("v2"), mock.patch.object(ElasticBuffer, "dispatch", side_effect=KeyError("one\ntwo")):
        ask("another", make(world, "v2"), dispatch)
    with fake("v2"):
        d = make(world, "v2")
        dispatch(d)
        with mock.patch.object(ElasticBuffer, "destroy", side_effect=AssertionError):
            ask("close", d, lambda d: d.close())
        d = make(world, "v2")
        with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
            ask("setting", d, dispatch)
    return found


def _combine_wide(d: Dispatcher[Any]) -> None:
    out = d.dispatch(*inputs(dist.get_rank(), "uneven")[:3])
    d.combine(out.rows_ND.float(), out.handle)


def refusals(rank: int, world: int, version: str) -> list[str]:
    """What is said to each of these mistakes."""
    x, experts, weights, _ = inputs(rank, "uneven")
    far = experts.clone()
    twice = experts.clone()
    if rank == 1:
        far[0, 0] = E
        twice[0] = 3
    many = torch.arange(33).expand(len(x), 33) % E
    mistakes: list[Callable[[Dispatcher[Any]], object]] = [
        lambda d: d.dispatch(x.float(), experts, weights),
        lambda d: d.dispatch(x[:, :200], experts, weights),
        lambda d: d.dispatch(x, experts, weights.double()),
        lambda d: d.dispatch(x, many, torch.ones(many.shape)),
        lambda d: d.dispatch(x, far, weights),
        lambda d: d.dispatch(x, twice, weights),
        _combine_wide,
        lambda d: d.dispatch(*(t.to("meta") for t in (x, experts, weights))),
    ]
    with fake(version):
        d = make(world, version)
        return [refusal(partial(mistake, d)) for mistake in mistakes]


def obstacles(rank: int, world: int) -> dict[str, str]:
    """Why a dispatcher cannot be made."""
    shape = MeshShape(1, world, world)
    mesh = Mesh.create(shape, nodes=(0,) * world)

    def ask(*, mesh: Mesh = mesh, **options: Any) -> str:
        return refusal(lambda: dispatcher("deep_ep", mesh, num_experts=12, **options))

    with fake("v1"):
        said = {"ranks": ask()}
        mixed = Mesh.create(shape, nodes=tuple(range(world)))
        with mock.patch.object(deep_ep_versions.Legacy, "RANKS", (world,)):
            said["nodes"] = ask(mesh=mixed)
            said["too wide"] = ask(hidden=8192)
    with (
        fake("v1", sm90=False),
        mock.patch.multiple(deep_ep_versions.Legacy, RANKS=(world,), NODE=1),
        on_gpu("NVIDIA A100-SXM4-40GB", (8, 0)),
    ):
        said["nodes of older GPUs"] = ask(mesh=mixed)
    with fake("v2"):
        many = ExpertLayout(12, world, tuple(range(12)) * 64 * world)
        said["slots"] = ask(layout=many)
        said["columns"] = ask(hidden=200)
        said["choices"] = ask(top_k=33)
        said["LogFMT"] = ask(payload="logfmt10")
        with on_gpu("NVIDIA A100-PCIE-40GB", (9, 0)):
            said["PCIe"] = ask()
    with ExitStack() as stack:
        if rank != 1:
            stack.enter_context(fake("v2"))
        said["one lacks it"] = ask()
    with (
        mock.patch.object(deep_ep_versions.Legacy, "RANKS", (world,)),
        fake("v1" if rank == 1 else "v2"),
    ):
        said["generations"] = ask()
    fills = mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True)
    with fake("v2"), fills:
        said["fills"] = ask()
    return said


Found = tuple[str, str | None]


@contextmanager
def on_gpu(name: str, capability: tuple[int, int] | None) -> Iterator[None]:
    """A host with such GPUs, or without any."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=capability is not None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_name", return_value=name),
    ):
        yield


def automatic(rank: int, world: int) -> dict[str, Found]:
    """What auto chooses, and what stood against DeepEP."""
    mesh = Mesh.create(MeshShape(1, world, world), nodes=(0,) * world)

    def ask(
        payload: Any,
        gpu: tuple[int, int] | None,
        *,
        group: str = "cuda:nccl",
        name: str = "NVIDIA H800",
        **options: Any,
    ) -> Found:
        with (
            on_gpu(name, gpu),
            mock.patch.object(dist, "get_backend_config", return_value=group),
        ):
            d = dispatcher("auto", mesh, num_experts=E, payload=payload, **options)
            chosen = d.version if isinstance(d, deep_ep.DeepEP) else d.name
            return chosen, deep_ep.usable(mesh, d.layout, d.options)

    found = {"absent": ask("bf16", (9, 0))}
    with fake("v2"):
        found["fits"] = ask("bf16", (9, 0))
        found["exact"] = ask("exact", (9, 0))
        found["LogFMT"] = ask("logfmt8", (9, 0))
        found["old GPU"] = ask("bf16", (7, 5))
        found["gloo"] = ask("bf16", (9, 0), group="cpu:gloo,cuda:gloo")
        found["no GPU"] = ask("bf16", None)
        found["PCIe"] = ask("bf16", (9, 0), name="NVIDIA H100 PCIe")
        found["sizes"] = ask("bf16", (9, 0), hidden=7168, top_k=8)
        found["columns"] = ask("bf16", (9, 0), hidden=128)
        found["choices"] = ask("bf16", (9, 0), top_k=33)
        found["compiled for others"] = ask("bf16", (8, 6))
    for version in ("v1", "v2"):
        with fake(version, sm90=False):
            found[f"{version} on an older GPU"] = ask("bf16", (8, 6), hidden=128)
            found[f"{version} FP8 on an older GPU"] = ask("fp8", (8, 6))
    with fake("v2"):
        delattr(sys.modules["deep_ep"], "Buffer")
        found["no V1"] = ask("bf16", (8, 6))
    return found
