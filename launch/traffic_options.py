"""What `counterflow traffic` is asked for, checked before anything is counted."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import Output, check_outputs

if TYPE_CHECKING:
    from ..comm.cost import Links
    from ..comm.dispatch.layout import ExpertLayout
    from ..comm.traffic_sizes import RowSizes

MADE_UP = ("random", "balanced", "hot")
# A matrix of so many ranks, and so many chosen experts, take about 2 GB.
MOST_RANKS = 2048
MOST_CHOICES = 1 << 25
MOST_EXPERTS = 1 << 16
MOST_HIDDEN = 1 << 20
MOST_NUMBER = (1 << 31) - 1  # of what has no narrower limit

# DeepSeek-V3's (arXiv 2412.19437): 256 experts, 8 a token, on 8 nodes of which a token sees 4.
_RANKS, _RANKS_PER_NODE, _TOKENS, _HIDDEN = 64, 8, 4096, 7168
_EXPERTS, _TOP_K, _GROUPS, _NODE_LIMIT = 256, 8, 8, 4
_CHUNKS = 4  # as in comm.dispatcher
_SUFFIXES = {"--matrix": (), "--plot": (".svg", ".png")}
_TARGETS = ("flat", "dedup", "two_hop", "two_hop:1", "two_hop:2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; the defaults are DeepSeek-V3's."""
    add = parser.add_argument
    add(
        "--routing",
        metavar="HOW|FILE.npy",
        help="random (as V3's router chooses, by random logits), balanced, hot (all tokens to the "
        "same experts), or chosen experts: integers [ranks, tokens, k] or [tokens, k], -1 for none",
    )
    add("--ranks", metavar="R", help=f"expert-parallel ranks ({_RANKS})")
    add("--ranks-per-node", metavar="N", help=f"ranks of a node ({_RANKS_PER_NODE})")
    add("--tokens", metavar="T", help=f"tokens of a rank ({_TOKENS:,})")
    add("--experts", metavar="E", help=f"routed experts ({_EXPERTS})")
    add("--top-k", metavar="K", help=f"experts a token ({_TOP_K})")
    add("--groups", metavar="G", help=f"groups of experts, for the choice ({_GROUPS})")
    add(
        "--node-limit",
        metavar="M",
        help=f"groups that a token chooses from; tokens on more nodes are counted ({_NODE_LIMIT})",
    )
    add("--skew", metavar="S", help="of random: 0 even, 1 popularity varies as tokens do (0)")
    add("--seed", metavar="N", help="of random (0)")
    add("--layout", metavar="FILE", help="JSON list of the expert in each slot, rank by rank")
    add("--hidden", metavar="D", help=f"elements of a row ({_HIDDEN})")
    add(
        "--payload",
        metavar="NAME",
        help="bf16, fp32, or logfmt10; fp8 or logfmt8 to the experts and bf16 back (bf16)",
    )
    add(
        "--links",
        metavar="NAME|TEXT",
        help="h800, or inside=GB/s,across=GB/s,inside_us=US,across_us=US of a rank (h800)",
    )
    add("--chunks", metavar="C", help=f"pieces in which two hops overlap ({_CHUNKS})")
    add(
        "--phase",
        metavar="NAME",
        help="of the files and matrices: dispatch(F), combine(F), dispatch(B) or combine(B) "
        "(dispatch(F))",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE", help="draw the bytes, rank by rank and node by node: .svg, .png")
    add("--matrix", metavar="FILE", help="write bytes, rank by rank, for nccl-tests' alltoallv")
    add(
        "--matrix-of",
        metavar="BACKEND",
        help=f"of --matrix: {', '.join(_TARGETS)}; :1 is the hop across nodes in a dispatch "
        "(two_hop)",
    )


@dataclass(frozen=True)
class Options:
    """What the command is asked for.

    Attributes:
        routing: one of MADE_UP, or None where a file has it.
        file: the file, or None.
        ranks, tokens, top_k: None: the file says.
        ranks_per_node, groups, node_limit, skew, seed, chunks: as the user sees them.
        layout: which expert each slot has, or None: contiguous.
        experts: logical experts.
        sizes: of rows.
        links: of a rank.
        phase: whose bytes are written, drawn and shown as matrices.
        matrix_of: backend and, if not all of it, number of the hop from 1 up.
        json: whether asked for.
        outputs: files to write.
    """

    routing: str | None
    file: Path | None
    ranks: int | None
    tokens: int | None
    top_k: int | None
    ranks_per_node: int
    groups: int
    node_limit: int
    skew: float
    seed: int
    layout: tuple[int, ...] | None
    experts: int
    sizes: RowSizes
    links: Links
    chunks: int
    phase: str
    matrix_of: tuple[str, int | None]
    json: bool
    outputs: tuple[Output, ...]

    @property
    def checked_limit(self) -> int | None:
        """The nodes that a token should not go beyond; None where it may choose from all groups."""
        free = self.routing in ("random", "balanced") and self.node_limit == self.groups
        return None if free else self.node_limit

    def layout_on(self, ranks: int) -> ExpertLayout:
        """The layout, on so many ranks.

        Raises:
            ValueError: slots or experts that do not divide.
        """
        from ..comm.dispatch.layout import ExpertLayout

        if self.layout is None:
            return ExpertLayout.contiguous(self.experts, ranks)
        return ExpertLayout(self.experts, ranks, self.layout)


def read_options(parsed: argparse.Namespace) -> Options:
    """The options that a command line gives.

    Raises:
        ValueError: one of them, or two together, make no sense.
        OSError: a file cannot be read.
    """
    from ..comm.traffic_sizes import PHASES, PayloadSizes, RowSizes

    routing, file = _routing(parsed.routing)
    outputs = _outputs(parsed)
    inputs = {"--routing": file, "--layout": Path(parsed.layout) if parsed.layout else None}
    check_outputs(outputs, {flag: path for flag, path in inputs.items() if path is not None})
    _check_together(parsed, routing)
    layout = None if parsed.layout is None else _slots(Path(parsed.layout))
    groups = _whole("--groups", parsed.groups) or _GROUPS
    experts = _whole("--experts", parsed.experts)
    if experts is None:
        experts = _EXPERTS if layout is None else max(layout) + 1
    phase = parsed.phase or "dispatch(F)"
    if phase not in PHASES:
        raise ValueError(f"--phase {phase}: use one of {', '.join(PHASES)}")
    made_up = file is None
    options = Options(
        routing=routing,
        file=file,
        ranks=_whole("--ranks", parsed.ranks) or (_RANKS if made_up else None),
        tokens=_whole("--tokens", parsed.tokens, least=0, default=_TOKENS if made_up else None),
        top_k=_whole("--top-k", parsed.top_k) or (_TOP_K if made_up else None),
        ranks_per_node=_whole("--ranks-per-node", parsed.ranks_per_node) or _RANKS_PER_NODE,
        groups=groups,
        node_limit=_whole("--node-limit", parsed.node_limit)
        or (min(groups, _NODE_LIMIT) if made_up else _NODE_LIMIT),
        skew=_skew(parsed.skew),
        seed=_whole("--seed", parsed.seed, least=0, default=0) or 0,
        layout=layout,
        experts=experts,
        sizes=RowSizes(
            PayloadSizes.named(parsed.payload or "bf16"),
            _whole("--hidden", parsed.hidden, most=MOST_HIDDEN) or _HIDDEN,
        ),
        links=_links(parsed.links or "h800"),
        chunks=_whole("--chunks", parsed.chunks) or _CHUNKS,
        phase=phase,
        matrix_of=_matrix_of(parsed.matrix_of),
        json=parsed.json,
        outputs=tuple(outputs),
    )
    check_number(options.ranks or 1, (options.tokens or 1) * (options.top_k or 1), experts)
    return options


def check_number(ranks: int, choices_per_rank: int, experts: int) -> None:
    """Raise ValueError for what would exhaust the memory, or has more experts than can be named."""
    for number, what, most in (
        (ranks, "ranks", MOST_RANKS),
        (ranks * choices_per_rank, "chosen experts (ranks x tokens x top-k)", MOST_CHOICES),
        (experts, "experts", MOST_EXPERTS),
    ):
        if number > most:
            raise ValueError(f"{number:,} {what} are more than this command takes, {most:,}")


def _routing(text: str | None) -> tuple[str | None, Path | None]:
    if text is None or text in MADE_UP:
        return text or MADE_UP[0], None
    if not text.lower().endswith(".npy"):
        raise ValueError(f"--routing {text!r}: use {', '.join(MADE_UP)} or a file ending in .npy")
    return None, Path(text)


def _outputs(parsed: argparse.Namespace) -> list[Output]:
    given = {flag: getattr(parsed, flag[2:]) for flag in _SUFFIXES}
    for flag, text in given.items():
        if text in ("", "-"):
            raise ValueError(f"{flag} {text!r}: the name of a file is needed")
    if given["--plot"] and not find_spec("matplotlib"):
        raise ValueError(
            f"--plot {parsed.plot}: needs matplotlib: pip install 'counterflow[plots]'"
        )
    if parsed.matrix_of is not None and parsed.matrix is None:
        raise ValueError("--matrix-of goes with --matrix FILE")
    return [Output(f, Path(p), _SUFFIXES[f]) for f, p in given.items() if p is not None]


def _check_together(parsed: argparse.Namespace, routing: str | None) -> None:
    for flag, value, kinds in (
        ("--skew", parsed.skew, ("random",)),
        ("--seed", parsed.seed, ("random",)),
        ("--groups", parsed.groups, MADE_UP[:2]),
    ):
        if value is not None and routing not in kinds:
            shown = "a file" if routing is None else routing
            raise ValueError(
                f"{flag} goes with --routing {' or '.join(kinds)}; with {shown} it has no meaning"
            )


def _slots(path: Path) -> tuple[int, ...]:
    try:
        slots = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--layout {path}: is no JSON: {error}") from None
    if not (isinstance(slots, list) and slots and all(type(e) is int for e in slots)):
        raise ValueError(
            f"--layout {path}: must be a list of whole numbers, the expert of each slot, rank by "
            "rank, such as [0, 1, 2, 0]"
        )
    if min(slots) < 0 or max(slots) >= MOST_EXPERTS or len(slots) > MOST_EXPERTS:
        raise ValueError(
            f"--layout {path}: experts and slots are from 0 up to {MOST_EXPERTS - 1}, got "
            f"{len(slots)} slots with experts {min(slots)}..{max(slots)}"
        )
    return tuple(slots)


def _matrix_of(text: str | None) -> tuple[str, int | None]:
    if text is None:
        return "two_hop", None
    if text not in _TARGETS:
        raise ValueError(f"--matrix-of {text!r}: use one of {', '.join(_TARGETS)}")
    backend, _, hop = text.partition(":")
    return backend, int(hop) if hop else None


def _links(text: str) -> Links:
    from ..comm.cost import Links

    try:
        return Links.parse(text)
    except ValueError as error:
        raise ValueError(f"--links: {error}") from None


def _whole(
    flag: str,
    text: str | None,
    least: int = 1,
    default: int | None = None,
    most: int = MOST_NUMBER,
) -> int | None:
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{flag} must be a whole number from {least} up, got {text!r}")
    if number > most:
        raise ValueError(f"{flag} can be {most:,} at most, got {text!r}")
    return number


def _skew(text: str | None) -> float:
    from ..comm.traffic_synthetic import MOST_SKEW

    try:
        skew = float(text or 0)
    except ValueError:
        skew = math.nan
    if not 0 <= skew <= MOST_SKEW:
        raise ValueError(f"--skew must be a number from 0 to {MOST_SKEW:g}, got {text!r}")
    return skew
