"""`counterflow plan`: how long a step will take, what it needs, and which layout is best."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .outputs import Output, write_whole
from .plan_options import TOML_HEADER, PlanOptions, read_options
from .simulate_progress import Progress

if TYPE_CHECKING:
    from ..predict.calibration import Calibration
    from ..predict.layout import Layout
    from .plan_answer import Answer, Searched
    from .plan_inputs import Inputs

_SOURCES = {"trace": "the trace", "measured": "measurements", "datasheet": "the data sheet of"}


_WHOLE = "the whole step"


class _Predicting(Progress):
    """Says where there is no terminal, once it takes long, also when the search has ended."""

    _said = False

    def tell(self, name: str) -> None:
        super().tell(name)
        if self._said and name == _WHOLE:
            self._line("now every rank of the layout one by one")

    def _say(self) -> None:
        self._said = True
        self._line("this takes a while")

    def _line(self, text: str) -> None:
        print(f"counterflow: predicting; {text}", file=sys.stderr, flush=True)


def run(parsed: argparse.Namespace) -> int:
    """Run the command; the exit status is returned.

    Raises:
        ValueError: one of the user's mistakes.
    """
    options = read_options(parsed)
    with _Predicting() as progress:
        progress.tell("reading")
        answer = _answer(options, progress.tell)
        for output in options.outputs:
            progress.tell(f"writing {output.path.name}")
            _write(output, answer)
    if options.json:
        from .plan_json import to_json

        print(json.dumps(to_json(answer), allow_nan=False))
    else:
        from .plan_text import print_answer, print_written

        print_answer(answer)
        print_written(answer, options.outputs)
    return 0


def _answer(options: PlanOptions, tell: Callable[[str], None]) -> Answer:
    from ..predict.memory import saved
    from ..predict.step import predict
    from .plan_answer import Answer
    from .plan_inputs import read_inputs

    inputs = read_inputs(options)
    searched: Searched | None = None
    searched: Searched | None = None
    if inputs.config is not None:
        from .plan_layout import layout_of

        layout, given = layout_of(inputs.config), str(options.config)
        _require_ranks(options, layout.world_size)
    else:
        asked = options.on(inputs.cluster)
        _require_ranks(options, asked.gpus)
        if options.search:
            from .plan_search import find_best

            searched = find_best(asked, inputs, options.top, tell)
            layout, given = searched.best[0].layout, "the search"
        else:
            layout, given = asked.layout(), "the options"
    if searched is None:
        _require_possible(inputs, layout)
    tell(_WHOLE)
    found = predict(
        inputs.model,
        inputs.cluster,
        layout,
        inputs.calibration,
        routing=inputs.routing,
        jitter=inputs.jitter,
        seed=options.seed,
    )
    device = "cuda" if inputs.cluster.gpu.num_sms else "cpu"
    return Answer(
        found,
        inputs.model_name,
        _calibrated(inputs.calibration),
        searched,
        saved(inputs.model, layout, found.result.plan, device=device),
        given,
    )


def _require_ranks(options: PlanOptions, world_size: int) -> None:
    """Raise ValueError for a straggler that is no rank."""
    for rank, slower in options.stragglers:
        if rank >= world_size:
            raise ValueError(
                f"--stragglers {rank}:{slower:g}: there is no rank {rank} of {world_size}, "
                f"0..{world_size - 1}"
            )


def _require_possible(inputs: Inputs, layout: Layout) -> None:
    """Raise ValueError for a layout that cannot exist; one that needs too much memory can."""
    from ..predict.feasible import why_not_shape

    reason = why_not_shape(inputs.model, inputs.cluster, layout)
    if reason is not None:
        raise ValueError(f"this layout cannot be: {reason}")


def _calibrated(calibration: Calibration) -> str:
    return f"{_SOURCES[calibration.source]} {calibration.name}"


def _write(output: Output, answer: Answer) -> None:
    """Write a file.

    Raises:
        ValueError: it cannot be written.
    """
    text = _written(output, answer)
    try:
        write_whole(output.path, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{output.flag} {output.path}: cannot be written ({error.strerror or error}); name a "
            "file in another folder"
        ) from None


def _written(output: Output, answer: Answer) -> str:
    """What a file holds."""
    if output.flag == "--html":
        from .plan_page import to_html

        return to_html(answer)
    if output.flag == "--simulated":
        from .plan_simulation import simulation

        return json.dumps(simulation(answer.prediction), allow_nan=False) + "\n"
    from .config import Config, RunConfig
    from .plan_layout import config_of
    from .plan_words import does_not_fit
    from .settings import to_toml

    found = answer.prediction
    base = Config(run=RunConfig(name=output.path.stem))
    config = config_of(found.layout, found.model, base)
    about = f"a step of {found.step_ms:.6g} ms was predicted on {found.cluster.name}"
    lines = [f"{TOML_HEADER}: {about}."]
    if answer.over_bytes:
        lines.append(f"# Beware: {does_not_fit(answer)}.")
    return "\n".join([*lines, "", to_toml(config)])
