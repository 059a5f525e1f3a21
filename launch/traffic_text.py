"""What `counterflow traffic` prints for people."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..comm.dispatch.balance import imbalance
from ..comm.matrix_file import buffer_bytes
from ..comm.traffic import across_nodes
from .tables import Table, print_table, widest_that_fits

if TYPE_CHECKING:
    from .traffic_command import Answer

# Columns that go, one after the other, where there is too little room.
_FIRST_TO_GO = (
    "all sent",
    "row",
    "worst rank",
    "combine ms",
    "inside/token",
    "time vs flat",
    "bytes vs flat",
)
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def print_answer(answer: Answer) -> None:
    """Print what is routed, where tokens go, and what each backend sends for it."""
    _fill(_about(answer))
    _print_nodes(answer)
    print()
    _print_backends(answer)


def print_written(answer: Answer) -> None:
    """Say what was written, and how nccl-tests takes it."""
    for output in answer.options.outputs:
        print(f"wrote {output.path}")
        if output.flag == "--matrix":
            size = buffer_bytes(answer.bytes_of(*answer.options.matrix_of))
            path = shlex.quote(str(output.path))
            print(f"  NCCL_TESTS_ALLTOALLV_MATRIX_FILE={path} alltoallv_perf -b {size} -e {size}")


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as bandwidths are: 14.3 kB."""
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.4g} {name}"
    return f"{num_bytes:.4g} B"


def describe(answer: Answer) -> str:
    """What is routed, without the payload."""
    options, routes = answer.options, answer.routes
    grid, top_k = routes.grid, routes.slots_TK.shape[1]
    tokens = len(routes.source_T) // grid.num_ranks
    if options.file is not None:
        kind = str(options.file)
    elif options.routing == "random":
        skew = f", skew {options.skew:g}" if options.skew else ""
        kind = f"random routing (seed {options.seed}{skew})"
    else:
        kind = f"{options.routing} routing"
    copies = routes.layout.num_slots - routes.layout.num_experts
    parts = [
        f"{kind}: {grid.num_ranks} ranks on {grid.num_nodes} nodes",
        f"{tokens:,} tokens each",
        f"top {top_k} of {options.experts} experts"
        + (f" in {options.node_limit} of {options.groups} groups" if _grouped(answer) else ""),
    ]
    if copies:
        parts.append(f"{copies} of {routes.layout.num_slots} slots redundant")
    return ", ".join(parts)


def _about(answer: Answer) -> str:
    sizes = answer.options.sizes
    return f"{describe(answer)}; rows of {sizes.hidden} in {sizes.payload.name}"


def _grouped(answer: Answer) -> bool:
    return answer.options.routing in ("random", "balanced") and answer.options.groups > 1


def _print_nodes(answer: Answer) -> None:
    routes, limit = answer.routes, answer.options.checked_limit
    counts, tokens = np.bincount(routes.nodes_per_token), len(routes.source_T)
    body = [[str(n), f"{c:,}", f"{c / tokens:.2%}"] for n, c in enumerate(counts.tolist()) if c]
    print()
    if tokens:
        print_table("nodes that a token's experts are on", ["nodes", "tokens", "share"], body)
        away = routes.remote_nodes_per_token.mean()
        _fill(
            f"mean {routes.nodes_per_token.mean():.3f} nodes, {away:.3f} of them not its own; mean "
            f"{routes.ranks_per_token.mean():.3f} ranks, at most {routes.ranks_per_token.max()}"
        )
    else:
        _fill("there are no tokens, so nothing is sent")
    if limit is not None:
        _fill(f"tokens beyond the node limit of {limit}: {len(routes.beyond(limit)):,}")
    for name, rows in (("rank", routes.rows_per_rank), ("expert slot", routes.rows_per_slot)):
        _fill(
            f"rows per {name}: mean {rows.mean():,.1f}, most {rows.max():,} "
            f"({imbalance(rows):.3f} x the mean)"
        )


def _print_backends(answer: Answer) -> None:
    options = answer.options
    links = options.links
    title = (
        f"dispatch(F) and combine(F), of links {links.name} ({links.inside_gbps:g} GB/s inside "
        f"nodes, {links.across_gbps:g} across), hops in {answer.pieces} "
        f"piece{'s' * (answer.pieces > 1)}"
    )
    head, body = widest_that_fits(
        [_backends(answer, *_FIRST_TO_GO[:count]) for count in range(len(_FIRST_TO_GO) + 1)]
    )
    print_table(title, head, body, names=1)
    for backend, costs in answer.costs.items():
        cost = costs["dispatch(F)"]
        _fill(f"{backend}: dispatch is bound by {_bound(cost.bound_by)}")


def _bound(text: str) -> str:
    return "nothing, for nothing is sent" if text == "nothing is sent" else text


def _backends(answer: Answer, *left_out: str) -> Table:
    options, grid = answer.options, answer.routes.grid
    tokens = max(1, len(answer.routes.source_T))
    away = across_nodes(grid)
    sent = {
        name: traffic.rank_bytes("dispatch(F)", options.sizes)
        for name, traffic in answer.traffics.items()
    }
    across = {name: int(matrix[away].sum()) for name, matrix in sent.items()}
    inside = {name: int(matrix[~away].sum()) for name, matrix in sent.items()}
    dispatch = {name: costs["dispatch(F)"].ms for name, costs in answer.costs.items()}
    combine = {name: costs["combine(F)"].ms for name, costs in answer.costs.items()}
    both = {name: dispatch[name] + combine[name] for name in sent}

    def record(name: str) -> str:
        return size(answer.traffics[name].record_bytes("dispatch(F)", options.sizes))

    cells: dict[str, Callable[[str], str]] = {
        "backend": str,
        "row": record,
        "across/token": lambda name: size(across[name] / tokens),
        "inside/token": lambda name: size(inside[name] / tokens),
        "bytes vs flat": lambda name: _ratio(across[name], across["flat"]),
        "all sent": lambda name: size(across[name] + inside[name]),
        "worst rank": lambda name: size(int(sent[name].sum(axis=1).max())),
        "dispatch ms": lambda name: f"{dispatch[name]:.3f}",
        "combine ms": lambda name: f"{combine[name]:.3f}",
        "time vs flat": lambda name: _ratio(both[name], both["flat"]),
    }
    shown = {name: cell for name, cell in cells.items() if name not in left_out}
    return list(shown), [[cell(name) for cell in shown.values()] for name in sent]


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.3f}" if other else "-"


def _fill(text: str) -> None:
    print(textwrap.fill(text, shutil.get_terminal_size().columns))
