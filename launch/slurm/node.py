"""`counterflow node`: what srun starts on each node of a job, and what starts that node's ranks.

Every node finds the same order of all nodes from the same facts; see `roll_call` for how they meet.
A mistake that all nodes find is told by one of them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..life.status import BAD_NODE, DONE, FAILED, MISTAKE, STOPPED
from ..preflight.nodes import note_bad_nodes
from ..settings import ConfigError
from .address import (
    PortTakenError,
    addresses_of,
    derived_port,
    head_address,
    interface_towards,
    open_port,
)
from .hostlist import is_host_name
from .options import Request, flags, parse, wants_help
from .order import digest
from .placement import ORDER
from .roll_call import (
    Meeting,
    NotThereError,
    Present,
    await_meeting,
    await_nodes,
    await_port,
    await_statuses,
    call_meeting,
    call_port,
    leave_status,
    require_one_order,
    say_present,
)
from .site import AFTER_S, NodeConfig, Site, find_site
from .topology import lowest_switches

if TYPE_CHECKING:
    from ..config import Config

USAGE = "counterflow node [options] -- train [CONFIG.toml] [--dotted.key VALUE ...]"
_LAST_S = 60.0  # nodes that end well wait so long for the others
_QUIET_S = 5.0
AGAIN = "again"  # the file that asks the job's script to queue the job again


def run(arguments: Sequence[str]) -> int:
    """The command; the exit status is returned."""
    if wants_help(arguments):
        print(_help())
        return DONE
    from ..life.stop import hold

    hold()  # until the ranks' launcher listens; Slurm may ask to stop at any time
    try:
        request = parse(arguments, NodeConfig(), {}, USAGE)
        config = _load(request.train)
        site = find_site(request.config, config)
    except NotThereError as error:
        return _fail(error)
    except (ValueError, OSError) as error:
        return _tell_once(error, _folder_given(arguments))
    try:
        status = _start(site, config, request)
    except NotThereError as error:
        status = _name_missing(site, error)
    except PortTakenError as error:
        status = _fail(error)
        (site.folder / AGAIN).touch()
    except (ValueError, OSError) as error:
        # What the whole job has, such as a full disk, is told by the head, whose end ends the rest.
        leave_status(site.folder, site.node, _status_of(error))
        if site.node_rank:
            time.sleep(_QUIET_S)
        status = _fail(error)
    except Exception:
        leave_status(site.folder, site.node, FAILED)
        raise
    return _leave(site, status)


def _start(site: Site, config: Config, request: Request[NodeConfig]) -> int:
    """Meet the other nodes, and start this one's ranks; their exit status."""
    from ...comm.topology import this_machine

    interface, limit_s = request.config.interface, request.config.limit_s(config)
    machine = this_machine()
    present = Present(machine.host, machine.boot, digest(site.order), site.token)
    say_present(site.folder, site.node, present)
    if site.node_rank == 0:
        try:
            meeting = _meet(site, config, interface, limit_s)
        except NotThereError as error:
            meeting = Meeting(site.token, status=_name_missing(site, error))
        except (ValueError, OSError) as error:
            meeting = Meeting(site.token, status=_fail(error))
        call_meeting(site.folder, meeting)
    else:
        # The head waits for the last of us first.
        after_s = AFTER_S * min(site.node_rank, 2)
        meeting = await_meeting(site.folder, site.head, site.token, timeout_s=limit_s + after_s)
    if meeting.status:
        return meeting.status
    _set_environment(site, meeting, interface, os.environ)
    return _look_and_train(site, config, request, meeting)


def _look_and_train(
    site: Site, config: Config, request: Request[NodeConfig], meeting: Meeting
) -> int:
    """Preflight, then training, as this node's ranks; their exit status."""
    from ..life.nodes import Nodes
    from ..preflight.run import before_training
    from ..torchrun import choose_device, set_threads, start
    from .resolved import gpus_wanted, resolved_path

    nodes = None
    missing: list[int] = []  # node ranks that did not come when ranks were to start
    if len(site.order) > 1:
        run_id = "/".join(site.folder.parts[-2:])  # job and start
        nodes = Nodes(len(site.order), site.node_rank, meeting.address, run_id)

    def start_preflight(arguments: Sequence[str], *, nproc: int) -> int:
        port = meeting.preflight_port
        with _lost_port(site, config, preflight=True):
            return start(
                arguments,
                nproc=nproc,
                port=port,
                nodes=nodes,
                timeout_s=config.run.timeout_s,
                nothing_to_lose=True,
                on_missing=missing.extend,
            )

    status = before_training(
        config,
        resolved_path(config, site.folder),
        nproc=site.per_node,
        gpus_wanted=gpus_wanted(config, site.per_node),
        environ=os.environ,
        num_nodes=len(site.order),
        head=site.node == site.head,
        start=start_preflight,
    )
    if status != DONE:
        return _note_missing(site, missing) or status
    set_threads(choose_device(config.run.device, site.per_node), site.per_node)
    limit_s = request.config.limit_s(config)
    port = _training_port(site, config, besides=meeting.preflight_port, limit_s=limit_s)
    with _lost_port(site, config):
        status = start(
            ["train", *request.train],
            nproc=site.per_node,
            port=port,
            nodes=nodes,
            max_restarts=config.run.max_restarts,
            folder=config.run.path,
            grace_s=config.checkpoint.grace_s if config.checkpoint.enabled else 0.0,
            timeout_s=config.run.timeout_s,
            on_missing=missing.extend,
        )
    return _note_missing(site, missing) or status


def _meet(site: Site, config: Config, interface: str, limit_s: float) -> Meeting:
    """On the head: see that all nodes are there and agree; where they meet."""
    from .resolved import write_resolved

    found = await_nodes(site.folder, site.order, site.token, timeout_s=limit_s)
    require_one_order(found)
    own = found[site.node].machine
    others = [name for name in site.order if name != site.node]
    address = head_address(
        [site.node, socket.gethostname()],
        others,
        interface=interface,
        one_machine=all(not own.surely_differs(found[name].machine) for name in others),
    )
    switches = lowest_switches(site.switches)
    order = [{"node": node, "switch": switches.get(node, "")} for node in site.order]
    text = json.dumps({"per_node": site.per_node, "order": order}, indent=1)
    (site.folder / "order.json").write_text(text + "\n", encoding="utf-8")
    write_resolved(config, site.folder)
    if config.run.port:
        open_port(config.run.port, config.run.port)  # a mistake: before the nodes are looked at
    return Meeting(
        site.token, address, open_port(0, derived_port(os.environ), besides=config.run.port)
    )


def _training_port(site: Site, config: Config, *, besides: int, limit_s: float) -> int:
    """Where the ranks meet; the head chooses it now, so that nothing takes it before they do."""
    if site.node_rank:
        return await_port(site.folder, site.head, site.token, timeout_s=limit_s)
    port = open_port(config.run.port, derived_port(os.environ), besides=besides)
    call_port(site.folder, site.token, port)
    return port


@contextmanager
def _lost_port(site: Site, config: Config, *, preflight: bool = False) -> Iterator[None]:
    """A port that the head has chosen itself and then lost is no mistake of a person's."""
    try:
        yield
    except ConfigError as error:
        if site.node_rank or (config.run.port and not preflight):
            raise
        raise PortTakenError(str(error)) from None


def _set_environment(
    site: Site, meeting: Meeting, interface: str, environ: MutableMapping[str, str]
) -> None:
    """What the ranks of this node are to find in their environment."""
    environ[ORDER] = str(site.folder / "order.json")
    if interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environ[name] = environ.get(name) or interface  # a person's own choice counts
    elif meeting.address != "127.0.0.1" and "GLOO_SOCKET_IFNAME" not in environ:
        # gloo listens where its host's name leads, which in vain is the loopback on some systems.
        own = addresses_of(socket.gethostname())
        if not own or own[0].startswith("127."):
            towards = interface_towards(meeting.address)
            if towards:
                environ["GLOO_SOCKET_IFNAME"] = towards


def _load(train: Sequence[str]) -> Config:
    from ..cli import split_arguments
    from ..config import load

    return load(*split_arguments(train))


def _leave(site: Site, status: int) -> int:
    """Leave the status for the job's script; nodes that end well end together."""
    try:
        leave_status(site.folder, site.node, status)
        if status in (DONE, STOPPED):
            is_head = site.node_rank == 0
            await_statuses(
                site.folder, len(site.order), site.token, is_head=is_head, timeout_s=_LAST_S
            )
    except OSError as error:
        _fail(error)
    return status


def _folder_given(arguments: Sequence[str]) -> Path | None:
    """The folder as the job's script gives it, even among arguments that cannot be read."""
    given = (text.removeprefix("--folder=") for text in arguments if text.startswith("--folder="))
    return next((Path(text) for text in given), None)


def _tell_once(error: Exception, folder: Path | None) -> int:
    """A mistake that every node finds is told by the first one, whose end ends the others.

    What only another node finds is told by that, a moment later. The job's script learns of it at
    once: Slurm may end this process before it has waited.
    """
    node = os.environ.get("SLURMD_NODENAME", "")
    if folder is not None and is_host_name(node):
        with suppress(OSError):
            leave_status(folder, node, _status_of(error))
    if os.environ.get("SLURM_PROCID", "0") != "0":
        time.sleep(_QUIET_S)
    return _fail(error)


def _name_missing(site: Site, error: NotThereError) -> int:
    """Say that nodes are missing; those of a few are to be done without, by the job's script.

    Of a missing head the next node tells, and the rest are silent.
    """
    if site.node_rank > 1:
        return FAILED
    _fail(error)
    return _note_bad(site, error.nodes) or FAILED


def _note_missing(site: Site, ranks: Sequence[int]) -> int:
    """Have nodes left out that came to the roll call and not to the start; 0 if there are none."""
    return _note_bad(site, [site.order[rank] for rank in ranks])


def _note_bad(site: Site, names: Sequence[str]) -> int:
    """Note fewer than half of the nodes as bad; the status that follows, 0 if none was noted."""
    if not names or 2 * len(names) >= len(site.order):
        return 0
    note_bad_nodes(names, os.environ)
    return BAD_NODE


def _status_of(error: Exception) -> int:
    """A disk or a node at fault is no mistake of a person's."""
    return MISTAKE if isinstance(error, ValueError) else FAILED


def _fail(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'the system'}: {error.strerror or error}"
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    sys.stderr.write(f"counterflow: error: node {name}: {text}\n")  # in one write
    return FAILED if isinstance(error, PortTakenError) else _status_of(error)


def _help() -> str:
    return "\n".join(
        [
            f"usage: {USAGE}",
            "",
            "Starts the ranks of one node of a Slurm job. `counterflow launch slurm` starts it; in",
            "a script of your own, srun does, once a node: srun --ntasks-per-node=1 counterflow",
            "node -- train CONFIG.toml (docs/slurm.md).",
            "",
            *flags(NodeConfig(), {}),
        ]
    )
