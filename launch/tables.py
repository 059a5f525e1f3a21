"""Tables for terminals: as wide as there is room, by rich or plainly where it is missing."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

# Spaces between columns.
_BETWEEN = 2

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def print_table(
    title: str, head: Sequence[str], body: Sequence[Sequence[str]], *, names: int = 0
) -> None:
    """Print a table of texts, by rich, or plainly where it is missing.

    Args:
        title: above it.
        head: of the columns.
        body: its rows.
        names: so many first columns hold names and stand to the left, the others to the right.
    """
    print(textwrap.fill(title, shutil.get_terminal_size().columns))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = _widths(head, body)
        for row in [head, *body]:
            texts = [
                text.ljust(width) if i < names else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            print((" " * _BETWEEN).join(texts).rstrip())
        return
    table = Table(box=None, pad_edge=False, padding=(0, _BETWEEN, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < names else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console = Console(markup=False, emoji=False, highlight=False)  # names are no markup
    if not console.is_terminal:  # a file or a pipe has room for all
        console.width = max(console.width, sum(_widths(head, body)) + _BETWEEN * len(head))
    console.print(table)


def widest_that_fits(tables: Sequence[Table]) -> Table:
    """The first of `tables`, given from the fullest to the barest, that the terminal has room for.

    The last one where none fits.
    """
    columns = shutil.get_terminal_size().columns
    for head, body in tables:
        if sum(width + _BETWEEN for width in _widths(head, body)) - _BETWEEN <= columns:
            return head, body
    return tables[-1]


def _widths(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
