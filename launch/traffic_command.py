"""`counterflow traffic`: which rank sends how much to which in an expert-parallel exchange."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outputs import Output, write_whole
from .traffic_options import Options, check_number, read_options

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..comm.cost import Cost
    from ..comm.traffic import Matrix, Routes, Traffic


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        options: what was asked for.
        routes: the routing.
        pieces: in which hops overlap.
        traffics: what each backend sends, by name.
        costs: by backend, what each phase costs.
    """

    options: Options
    routes: Routes
    pieces: int
    traffics: dict[str, Traffic]
    costs: dict[str, dict[str, Cost]]

    def bytes_of(self, backend: str, hop: int | None = None) -> Matrix:
        """[R, R] bytes sent in the chosen phase, in all hops, or in the one that a dispatch takes
        as its first (1) or second (2)."""
        options, traffic = self.options, self.traffics[backend]
        if hop is None:
            return traffic.rank_bytes(options.phase, options.sizes)
        sent = traffic.hop_bytes(options.phase, options.sizes)
        from ..comm.traffic_sizes import PHASES

        return (sent if PHASES[options.phase].spread else sent[::-1])[hop - 1]


def run(parsed: argparse.Namespace) -> int:
    """Run the command; the exit status is returned.

    Raises:
        ValueError: one of the user's mistakes.
        OSError: a file cannot be read or written.
    """
    answer = _answer(read_options(parsed))
    options = answer.options
    for output in options.outputs:
        write_whole(output.path, _writer(output, answer))
    if options.json:
        from .traffic_json import to_json

        print(json.dumps(to_json(answer), allow_nan=False))
    else:
        from .traffic_text import print_answer, print_written

        print_answer(answer)
        print_written(answer)
    return 0


def _answer(options: Options) -> Answer:
    from ..comm.cost import phase_costs
    from ..comm.dispatch.grid import NodeGrid
    from ..comm.dispatch.sizes import num_pieces
    from ..comm.traffic import BACKENDS, route

    experts = _made_up(options) if options.file is None else _from_file(options, options.file)
    ranks = len(experts)
    if ranks % options.ranks_per_node:
        raise ValueError(
            f"{ranks} ranks do not divide into nodes of {options.ranks_per_node}; change --ranks "
            "or --ranks-per-node"
        )
    grid = NodeGrid.of([rank // options.ranks_per_node for rank in range(ranks)])
    layout = options.layout_on(ranks)
    check_number(ranks, 1, layout.num_slots)
    routes = route(experts, layout, grid)
    pieces = num_pieces(experts.shape[1], options.chunks)  # of any rank, as all have as many
    traffics = {backend: routes.traffic(backend) for backend in BACKENDS}
    costs = {
        backend: phase_costs(traffic, options.sizes, options.links, chunks=pieces)
        for backend, traffic in traffics.items()
    }
    return Answer(options, routes, pieces, traffics, costs)


def _made_up(options: Options) -> npt.NDArray[Any]:
    from ..comm import traffic_synthetic as synthetic

    assert options.ranks is not None
    assert options.tokens is not None
    assert options.top_k is not None
    options.layout_on(options.ranks)  # before the long work
    sizes = {"num_ranks": options.ranks, "num_tokens": options.tokens}
    if options.routing == "hot":
        return synthetic.hot_routing(synthetic.Choice(options.experts, options.top_k), **sizes)
    choice = synthetic.Choice(options.experts, options.top_k, options.groups, options.node_limit)
    if options.routing == "balanced":
        return synthetic.balanced_routing(choice, **sizes)
    return synthetic.random_routing(choice, **sizes, skew=options.skew, seed=options.seed)


def _from_file(options: Options, path: Path) -> npt.NDArray[Any]:
    """The experts of each rank, [T, K] each.

    Raises:
        ValueError: it holds something else, or not what other options say.
    """
    import numpy as np
    from numpy.lib.format import open_memmap

    try:
        # Mapped, so that what is far too large is refused by its header alone.
        with np.errstate(over="raise"):
            experts = open_memmap(path, mode="r")
    except (ValueError, EOFError, ArithmeticError):
        raise ValueError(
            f"--routing {path}: is no array of numbers, whole and as numpy.save writes it (.npy)"
        ) from None
    if experts.ndim not in (2, 3) or experts.dtype.kind not in "iu" or experts.shape[-1] < 1:
        raise ValueError(
            f"--routing {path}: must be integers [ranks, tokens, k] or [tokens, k], got "
            f"{list(experts.shape)} of {experts.dtype}"
        )
    ranks = options.ranks
    if experts.ndim == 2:
        ranks = ranks or 64
        if len(experts) % ranks:
            raise ValueError(
                f"--routing {path}: {len(experts)} tokens do not divide among {ranks} ranks; give "
                "--ranks, or an array [ranks, tokens, k] filled up with -1"
            )
        experts = experts.reshape(ranks, -1, experts.shape[1])
    for flag, given, found in (
        ("--ranks", ranks, experts.shape[0]),
        ("--tokens", options.tokens, experts.shape[1]),
        ("--top-k", options.top_k, experts.shape[2]),
    ):
        if given is not None and given != found:
            raise ValueError(f"{flag} is {given}, but {path} has {found}")
    check_number(experts.shape[0], experts.shape[1] * experts.shape[2], options.experts)
    return experts


def _writer(output: Output, answer: Answer) -> Callable[[Path], object]:
    if output.flag == "--plot":
        from .traffic_plot import save_picture

        return lambda path: save_picture(answer, path)
    from ..comm.matrix_file import to_text

    matrix = answer.bytes_of(*answer.options.matrix_of)
    return lambda path: path.write_text(to_text(matrix), encoding="ascii")
