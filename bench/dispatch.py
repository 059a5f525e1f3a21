"""Bytes and time of expert-parallel dispatch and combine between hosts.

    python -m bench.dispatch [--hosts 2 4] [--link-mbit 100] [--tokens 1024] [--repeats 3]

Hosts are network namespaces on this machine (bench/hosts.py), ranks are processes in them. Each
host's link is shaped to a rate low enough that bytes, not this machine's cores, take most of the
time; with FP8 the cores take more, as a CPU has to convert each number. The loopback, over which
ranks of one host talk, is as fast as it goes, and then shaped to the ratio of NVLink to InfiniBand
in DeepSeek-V3's cluster. Routing is V3's: 8 experts a token, in at most 4 of 8 groups. All
contenders run in the same processes, in turns; a time is the slowest rank's, from a common start to
the end of the combine, the exchange of counts included.

Bytes are counted at the hosts' interfaces, headers included. The limit is what the busiest
direction of the busiest link needs for the bytes that passed it. Also measured: what the host works
out before a dispatch, at V3's size, without communication (bench/preprocess.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterflow.comm import Dispatcher
from counterflow.comm.dispatch.payload import Payload
from tests.cases_dispatch_bytes import (
    Sizes,
    Way,
    crossing_rows,
    make,
    mesh_of_hosts,
    routing,
)
from tests.cases_hosts import Seen, counted, send_and_receive, timed
from tests.ranks import RankPool

from . import preprocess
from .hosts import Host, network, why_not
from .machine import write_result

WAYS = (
    Way("flat", "exact"),
    Way("dedup", "exact"),
    Way("two_hop", "exact"),
    Way("two_hop", "fp8"),
)
FLAT, DEDUP, TWO_HOP, TWO_HOP_FP8 = WAYS
OPERATIONS = SPREAD, GATHER = ("dispatch", "combine")
LOCAL_RATIO = 3.2  # 160 GB/s of NVLink to 50 of InfiniBand (arXiv 2412.19437, section 3.2.2)

MOST_BYTES = 1.05  # two_hop's bytes / (tokens x distinct remote nodes x row)
MOST_FP8 = 0.55  # bytes of an FP8 dispatch / of a BF16 one
MOST_TIME = 1.5  # two_hop's time / limit
LEAST_SPEED_UP = 2.0  # time of flat / of two_hop
MOST_PREPROCESS_MS = 5.0
PREPROCESS_RANKS, PREPROCESS_SIZES = 64, Sizes(num_experts=256, tokens=4096, hidden=0)


class Network(NamedTuple):
    """What is to be built: hosts, ranks on each, and rates (None: not shaped)."""

    hosts: int
    ranks_per_host: int
    link_mbit: float
    local_mbit: float | None

    @property
    def world(self) -> int:
        return self.hosts * self.ranks_per_host

    def seconds(self, num_bytes: float) -> float:
        """That a link needs for these bytes."""
        return num_bytes * 8 / (self.link_mbit * 1e6)


def once(d: Dispatcher[Any], x_TD: Tensor, route: Sequence[Tensor]) -> None:
    out = d.dispatch(x_TD, *route)
    d.combine(out.rows_ND, out.handle)


def case(rank: int, world: int, net: Network, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """What one rank measures: bytes of its host by way and operation, seconds by way."""
    route = routing(rank, sizes)
    x_TD = torch.randn(sizes.tokens, sizes.hidden).bfloat16()
    mesh = mesh_of_hosts(world, net.ranks_per_host)
    made = {way: make(way, mesh, sizes) for way in WAYS}
    seen: dict[Way, dict[str, Seen]] = {}
    times: dict[Way, list[float]] = {way: [] for way in WAYS}
    with torch.no_grad():
        for way, d in made.items():  # this warms up as well
            out, spread = counted(lambda d=d: d.dispatch(x_TD, *route))
            _, gather = counted(lambda d=d, out=out: d.combine(out.rows_ND, out.handle))
            seen[way] = {SPREAD: spread, GATHER: gather}
        for turn in range(repeats):
            # Another one begins each round, as what ran before leaves its traces.
            for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
                times[way].append(timed(lambda way=way: once(made[way], x_TD, route)))
    return {"seen": seen, "times_s": times, "bandwidth_mbit": bandwidths(rank, net)}


def bandwidths(rank: int, net: Network) -> dict[str, float]:
    """Payload that a host's link and its loopback carry, Mbit/s: a plain transfer, all at once.

    Over the links each rank sends to the rank of its index on the next host; over the loopbacks to
    the next rank of its host. Through a loopback passes what all ranks of the host send.
    """
    n, g = net.hosts, net.ranks_per_host
    around = [(r, (r + g) % (n * g)) for r in range(n * g)]
    inside = [(r, r // g * g + (r + 1) % g) for r in range(n * g)]
    amount = int(net.link_mbit * 1e6 / 8 / g)  # a second's worth of the link
    found: dict[str, float] = {}
    for name, pairs in {"link": around, "loopback": inside}.items():
        if any(source == target for source, target in pairs):
            continue  # one rank a host
        send_and_receive(rank, pairs, amount)
        seconds = timed(lambda pairs=pairs: send_and_receive(rank, pairs, amount))
        found[name] = g * amount * 8 / seconds / 1e6
    return found


def summary(net: Network, sizes: Sizes, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks measured, as one record; ways go by their names.

    Of each way: bytes that crossed, by operation, and their ratios to flat's, to dedup's, and to
    the rows that have to cross; seconds; the limit and the ratio to it; how much faster than flat,
    as the median of what each round says.
    """
    experts = [routing(rank, sizes).experts_TK for rank in range(net.world)]
    rows = crossing_rows(experts, net.ranks_per_host, sizes.num_experts)
    seen = [of_rank["seen"] for of_rank in found[:: net.ranks_per_host]]  # one rank of each host
    times: dict[Way, list[float]] = found[0]["times_s"]
    sent = {
        way: {op: sum(host[way][op].link.tx_bytes for host in seen) for op in OPERATIONS}
        for way in WAYS
    }

    def record(way: Way) -> dict[str, Any]:
        needed = {op: rows[way.name] * row_bytes(way, op, sizes) for op in OPERATIONS}
        links = {op: [host[way][op].link for host in seen] for op in OPERATIONS}
        busiest = {op: max(max(x.tx_bytes, x.rx_bytes) for x in links[op]) for op in OPERATIONS}
        limit_s = net.seconds(sum(busiest.values()))
        median_s = statistics.median(times[way])
        return {
            "bytes": sent[way],
            "loopback_bytes": {
                op: sum(host[way][op].loopback.tx_bytes for host in seen) for op in OPERATIONS
            },
            "to_flat": _ratios(sent[way], sent[FLAT]),
            "to_dedup": _ratios(sent[way], sent[DEDUP]),
            "to_rows": _ratios(sent[way], needed),
            "seconds": {"median": median_s, "min": min(times[way]), "all": times[way]},
            "limit_s": limit_s,
            "to_limit": median_s / limit_s,
            "speed_up": statistics.median(
                flat / own for flat, own in zip(times[FLAT], times[way], strict=True)
            ),
        }

    return {
        **net._asdict(),
        **sizes._asdict(),
        "bandwidth_mbit": found[0]["bandwidth_mbit"],
        "rows_crossing": rows,
        "fp8_to_bf16": sent[TWO_HOP_FP8][SPREAD] / sent[TWO_HOP][SPREAD],
        "ways": {str(way): record(way) for way in WAYS},
    }


def _ratios(values: dict[str, int], to: dict[str, int]) -> dict[str, float]:
    return {op: value / to[op] for op, value in values.items()}


def row_bytes(way: Way, operation: str, sizes: Sizes) -> int:
    """Of one row: its values, and their scales if it has any; without weights and indices."""
    payload = Payload(way.payload)
    if operation == GATHER:
        return sizes.hidden * payload.summed(torch.bfloat16).itemsize
    return payload.row_bytes(sizes.hidden, torch.bfloat16)


def measure(net: Network, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """One network, all ways; prints and returns what was found."""

    def seats(hosts: Sequence[Host]) -> list[Host]:
        return [host for host in hosts for _ in range(net.ranks_per_host)]

    with (
        network(net.hosts, link_mbit=net.link_mbit, local_mbit=net.local_mbit) as hosts,
        RankPool(hosts=seats(hosts)) as pool,
    ):
        found = pool.run(
            case, world=net.world, timeout_s=900.0, net=net, sizes=sizes, repeats=repeats
        )
    run = summary(net, sizes, found)
    print_run(net, sizes, run)
    return run


def print_run(net: Network, sizes: Sizes, run: dict[str, Any]) -> None:
    local = "not shaped" if net.local_mbit is None else f"{net.local_mbit:g} Mbit/s"
    bandwidth = ", ".join(f"{b:.0f} over the {name}" for name, b in run["bandwidth_mbit"].items())
    print(
        f"{net.hosts} hosts x {net.ranks_per_host} ranks, links {net.link_mbit:g} Mbit/s, in-node "
        f"{local}; plain transfers get {bandwidth}\n"
        f"{sizes.tokens} tokens a rank, {sizes.hidden} values each, {sizes.num_experts} experts\n"
        f"{'':13}{'MB dispatched':>15}{'of flat':>9}{'of dedup':>9}{'of rows':>9}"
        f"{'MB combined':>13}{'of rows':>9}{'ms':>8}{'limit':>8}{'of limit':>10}{'speed-up':>9}"
    )
    for name, way in run["ways"].items():
        print(
            f"{name:13}{way['bytes'][SPREAD] / 1e6:15.1f}{way['to_flat'][SPREAD]:9.3f}"
            f"{way['to_dedup'][SPREAD]:9.3f}{way['to_rows'][SPREAD]:9.3f}"
            f"{way['bytes'][GATHER] / 1e6:13.1f}{way['to_rows'][GATHER]:9.3f}"
            f"{way['seconds']['median'] * 1e3:8.0f}{way['limit_s'] * 1e3:8.0f}"
            f"{way['to_limit']:10.2f}{way['speed_up']:9.2f}"
        )


def measure_preprocess(repeats: int) -> dict[str, Any]:
    """`bench.preprocess` in a process of its own; prints and returns the times."""
    with RankPool() as pool:
        found = pool.run(
            preprocess.case,
            world=1,
            num_ranks=PREPROCESS_RANKS,
            ranks_per_node=8,
            sizes=PREPROCESS_SIZES,
            repeats=repeats,
        )[0]
    tokens = PREPROCESS_SIZES.tokens
    print(f"preprocessing {tokens} tokens x top 8 over {PREPROCESS_RANKS} ranks on one core")
    for name, ms in found.items():
        print(
            f"  {name:8} {ms['median']:6.2f} ms, least {ms['min']:6.2f} ms, "
            f"processor time {ms['processor_median']:6.2f} ms"
        )
    return found


def targets(runs: Sequence[dict[str, Any]], preprocess_ms: dict[str, Any]) -> dict[str, Any]:
    """The worst of all runs beside what it has to reach; printed as a table."""
    own = [run["ways"][str(TWO_HOP)] for run in runs]
    rows: dict[str, tuple[float, str, float]] = {
        "two_hop bf16: bytes / (tokens x remote nodes x row), dispatch and combine": (
            max(value for way in own for value in way["to_rows"].values()),
            "<=",
            MOST_BYTES,
        ),
        "two_hop: bytes of an fp8 dispatch / of a bf16 one": (
            max(run["fp8_to_bf16"] for run in runs),
            "<=",
            MOST_FP8,
        ),
        "two_hop bf16: time / limit": (max(way["to_limit"] for way in own), "<=", MOST_TIME),
        "two_hop bf16: time of flat / its own": (
            min(way["speed_up"] for way in own),
            ">=",
            LEAST_SPEED_UP,
        ),
        "two_hop: preprocessing, median ms": (
            preprocess_ms["two_hop"]["median"],
            "<=",
            MOST_PREPROCESS_MS,
        ),
    }
    print(f"{'worst of all networks':75} measured     target")
    found: dict[str, Any] = {}
    for name, (value, relation, target) in rows.items():
        met = value <= target if relation == "<=" else value >= target
        print(f"{name:75} {value:8.3f}  {relation} {target:<5g} {'' if met else 'missed'}")
        found[name] = {"measured": value, "relation": relation, "target": target, "met": met}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--link-mbit", type=float, default=100.0, help="of a host's link")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--hidden", type=int, default=2048, help="values of a row")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if min(options.hosts) < 2:
        parser.error(f"--hosts: nothing crosses with {min(options.hosts)}; take 2 or more")
    for name in ("ranks_per_host", "tokens", "hidden", "experts", "repeats", "link_mbit"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for hosts in options.hosts:
        ranks = hosts * options.ranks_per_host
        if options.experts % (8 * ranks) and options.experts % ranks + options.experts % 8:
            parser.error(
                f"--experts {options.experts} must divide among {ranks} ranks and 8 groups"
            )
        if 8 % hosts:
            parser.error(f"--hosts {hosts}: the router's 8 groups must divide among the hosts")
    reason = why_not()
    if reason is not None:
        sys.exit(f"bench.dispatch needs hosts in network namespaces: {reason}")
    # The hosts have addresses without names, and torch warns of that for each connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sizes = Sizes(options.experts, options.tokens, options.hidden)
    preprocess_ms = measure_preprocess(repeats=50)
    runs = [
        measure(
            Network(hosts, options.ranks_per_host, options.link_mbit, local_mbit),
            sizes,
            options.repeats,
        )
        for hosts in options.hosts
        for local_mbit in (None, LOCAL_RATIO * options.link_mbit)
    ]
    result = {
        "runs": runs,
        "preprocess_ms": preprocess_ms,
        "targets": targets(runs, preprocess_ms),
    }
    print(f"wrote {write_result('dispatch', result)}")


if __name__ == "__main__":
    main()
