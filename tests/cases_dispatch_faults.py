"""What the other ranks see when one dies, stops answering, or has wrong input."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from counterflow.comm import CommError, Dispatcher, ExpertLayout
from counterflow.parallel.mesh import Mesh

from .cases_dispatch import Batch, E, K, Setting, batch, on_meshes
from .told import hear, part, tell

OPERATIONS = ("dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)")


class Seen(NamedTuple):
    """What a rank saw.

    Attributes:
        error: text of the CommError, or of what else.
        peers: whom it names.
        seconds: how long it took from the operation before.
        again: text of the error of the next start.
    """

    error: str
    peers: tuple[int, ...]
    seconds: float
    again: str


def whole_pass(d: Dispatcher[Any], given: Batch, before: Callable[[str], None]) -> None:
    """All four operations; `before` is called with the name of each."""
    before("dispatch(F)")
    out = d.dispatch(given.x_TD.requires_grad_(), given.experts_TK, given.weights_TK)
    out.rows_ND.register_hook(lambda _: before("dispatch(B)"))
    rows_ND = out.rows_ND * out.weights_N[:, None]
    before("combine(F)")
    y_TD = d.combine(rows_ND, out.handle)
    before("combine(B)")
    y_TD.backward(given.grad_TD)


class AbsentError(Exception):
    """Raised on the rank that does not take part."""


def stops(d: Dispatcher[Any], given: Batch, stop: Callable[[str], None]) -> Seen | None:
    """A pass that `stop` ends on one rank; what the others see of it."""
    began = time.monotonic()

    def before(name: str) -> None:
        nonlocal began
        dist.barrier()  # a rank that is only late is not silent
        began = time.monotonic()
        stop(name)

    try:
        whole_pass(d, given, before)
    except AbsentError:
        return None
    except CommError as error:
        seconds = time.monotonic() - began
        return Seen(str(error), error.peers, seconds, start_again(d, given))
    return Seen("no error", (), 0.0, "")


def start_again(d: Dispatcher[Any], given: Batch) -> str:
    """How a dispatch after a failure ends."""
    try:
        d.dispatch(given.x_TD.detach(), given.experts_TK, given.weights_TK)
    except CommError as error:
        return str(error)
    return "no error"


def dies(rank: int, world: int, setting: Setting, operation: str, limit_s: float) -> None:
    """The last rank dies just before `operation`, for which the others wait by then; they raise."""
    mesh = setting.mesh()
    whole_pass(setting.make(mesh), batch(rank, "even"), lambda _: None)  # all is set up
    d = setting.make(mesh, timeout_s=limit_s)
    with ExitStack() as until_the_end:

        def stop(name: str) -> None:
            if name != operation:
                return
            if rank == world - 1:
                hear(*(f"rank {other} waits" for other in range(world - 1)))
                # What they have sent each other arrives: otherwise who fails first, and closes its
                # connections, would itself be gone for another. Nothing here sees it arrive.
                time.sleep(0.2)
                os._exit(1)
            until_the_end.enter_context(telling_of_the_first_wait(f"rank {rank} waits"))

        whole_pass(d, batch(rank, "even"), stop)


@contextmanager
def telling_of_the_first_wait(what: str) -> Iterator[None]:
    """Within this context the first wait for a message tells `what`; all before it is sent."""
    real, told = dist.Work.wait, False

    def wait(work: dist.Work, *limit: Any) -> bool:
        nonlocal told
        if not told:
            told = True
            tell(what)
        return real(work, *limit)

    with mock.patch.object(dist.Work, "wait", wait):
        yield


def is_gone(rank: int, world: int, setting: Setting, limit_s: float) -> None:
    """The last rank has died when the others start; these stay until each of them has failed."""
    mesh = setting.mesh()
    whole_pass(setting.make(mesh), batch(rank, "even"), lambda _: None)  # all is set up
    d = setting.make(mesh, timeout_s=limit_s)
    dist.barrier()
    if rank == world - 1:
        os._exit(1)
    time.sleep(0.5)  # gloo has noticed by then; it says so only to whoever starts something
    try:
        d.dispatch(*batch(rank, "even")[:3])
    finally:
        part(rank, world - 1)


def is_silent(rank: int, world: int, setting: Setting, limit_s: float) -> dict[str, Seen | None]:
    """By operation: the last rank takes part no more from there on; each on groups of its own."""
    # The groups' own limit is far away: the dispatcher's ends the wait.
    shape, nodes = setting.shape, setting.nodes
    meshes = [Mesh.create(shape, nodes=nodes, timeout_s=60 * limit_s) for _ in range(5)]
    made = [setting.make(mesh, timeout_s=limit_s) for mesh in meshes[1:]]
    found = {}
    whole_pass(setting.make(meshes[0]), batch(rank, "even"), lambda _: None)  # all is set up
    for operation, d in zip(OPERATIONS, made, strict=True):

        def stop(name: str, operation: str = operation) -> None:
            if rank == world - 1 and name == operation:
                raise AbsentError

        found[operation] = stops(d, batch(rank, "even"), stop)
        dist.barrier()  # until then the silent rank stays
    return found


def refused(d: Dispatcher[Any], given: Batch) -> tuple[str, float]:
    """The ValueError of a dispatch and the seconds until it came."""
    began = time.monotonic()
    try:
        d.dispatch(given.x_TD, given.experts_TK, given.weights_TK)
    except ValueError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def strange_index(
    rank: int, world: int, settings: Sequence[Setting]
) -> list[list[tuple[str, float]]]:
    """By setting: rank 2 alone names an expert that is not there; then all is well again."""
    found = []
    for setting, mesh in on_meshes(settings):
        d = setting.make(mesh)
        found.append([])
        for strange in (E, -2, 0):
            given = batch(rank, "even")
            if rank == 2:
                given.experts_TK[3, 1] = strange
            found[-1].append(refused(d, given))
    return found


def too_many_nodes(rank: int, world: int, settings: Sequence[Setting]) -> list[tuple[str, float]]:
    """By setting: a token of rank 1 reaches two nodes, the others' one."""
    found = []
    for setting, mesh in on_meshes(settings):
        d = replace(setting, node_limit=1).make(mesh)
        given = batch(rank, "even")
        given.experts_TK.fill_(0)
        if rank == 1:
            given.experts_TK[4] = torch.tensor([0, 0, E - 1])
        found.append(refused(d, given))
    return found


def unlike_sizes(rank: int, world: int) -> list[str]:
    """What the factory says to nodes that two_hop cannot use."""
    said = []
    for nodes in ((0, 0, 0, 1), (0, 1, 1, 0)):
        setting = Setting("two_hop", nodes)
        mesh = setting.mesh()
        try:
            setting.make(mesh)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
        # All ranks refused alike, so that what they make next works.
        given = batch(rank, "even")
        out = replace(setting, name="dedup").make(mesh).dispatch(*given[:3])
        assert out.handle.num_tokens * K == given.experts_TK.numel()
    return said


# What rank 1 does wrong, as its own error says it.
MISTAKES = (
    "weights_TK of ep rank 1 holds nan at token 0, choice 0",
    r"weights_TK must be \[T, K\]",
    r"x_TD must be \[T, D\]",
    "experts_TK must be int64",
)


def mistaken(mistake: int) -> Batch:
    """Rank 1's batch with one of MISTAKES in it."""
    given = batch(1, "even")
    if mistake == 0:
        given.weights_TK[0, 0] = torch.nan
    elif mistake == 1:
        given = given._replace(weights_TK=given.weights_TK[:, :-1])
    elif mistake == 2:
        given = given._replace(x_TD=given.x_TD[:-1])
    else:
        given = given._replace(experts_TK=given.experts_TK.int())
    return given


def refuses_alone(rank: int, world: int, setting: Setting) -> list[tuple[str, float]]:
    """Rank 1 alone makes each mistake; after each, all dispatch as they should."""
    d = setting.make(setting.mesh())
    found = []
    for mistake in range(len(MISTAKES)):
        found.append(refused(d, mistaken(mistake) if rank == 1 else batch(rank, "even")))
        found.append(refused(d, batch(rank, "even")))
    return found


def differ(rank: int, world: int, setting: Setting) -> list[str]:
    """Rank 1's tensors are in one respect unlike the others'."""
    d = setting.make(setting.mesh())
    given = batch(rank, "even")
    x_TD, experts_TK, weights_TK = given.x_TD, given.experts_TK, given.weights_TK
    unlike = [
        given._replace(experts_TK=experts_TK[:, :2], weights_TK=weights_TK[:, :2]),
        given._replace(x_TD=torch.cat([x_TD, x_TD[:, :1]], dim=1)),
        given._replace(x_TD=x_TD.float()),
        given._replace(weights_TK=weights_TK.float()),
        given._replace(x_TD=x_TD.clone().requires_grad_()),
    ]
    return [refused(d, other if rank == 1 else given)[0] for other in unlike]


def skips(rank: int, world: int, setting: Setting, limit_s: float) -> str | None:
    """Rank 1 leaves out a combine and goes on with the next dispatch."""
    d = setting.make(setting.mesh(), timeout_s=limit_s)
    given = batch(rank, "even")
    out = d.dispatch(*given[:3])
    try:
        if rank == 0:
            d.combine(out.rows_ND, out.handle)
        else:
            d.dispatch(*given[:3])
    except CommError as error:
        dist.barrier()
        return str(error) if rank == 0 else None
    return "no error"


def foreign_handle(rank: int, world: int) -> list[str]:
    """What comes of a flat dispatcher's handle in another one; the lane goes on after that."""
    mesh = Setting("flat", (0,) * world).mesh()
    flat, dedup = (Setting(name, (0,) * world).make(mesh) for name in ("flat", "dedup"))
    given = batch(rank, "even")
    out = flat.dispatch(*given[:3])
    wrong: list[Callable[[], object]] = [
        lambda: dedup.dispatch(*given[:3], out.handle),
        lambda: dedup.combine(out.rows_ND, out.handle),
        lambda: dedup.start_dispatch_backward(out.rows_ND, None, out.handle),
        lambda: dedup.start_combine_backward(given.x_TD, out.handle),
    ]
    said = []
    for use in wrong:
        try:
            use()
        except ValueError as error:
            said.append(str(error))
    again = dedup.dispatch(*given[:3])
    assert again.handle.owner is dedup
    return said


def unlike_options(rank: int, world: int) -> list[str]:
    """What the factory says where rank 2 alone asks for another payload, layout or backend."""
    setting = Setting("dedup", (0,) * world)
    mesh = setting.mesh()
    others = (
        replace(setting, payload="bf16"),
        replace(setting, layout=ExpertLayout(E, world, tuple(reversed(range(E))))),
        replace(setting, name="flat"),
    )
    said = []
    for other in others:
        try:
            (other if rank == 2 else setting).make(mesh)
        except ValueError as error:
            said.append(str(error))
    return said
