"""Tables for a terminal; needs the package ``rich``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output, columns of numbers aligned right and the others left.

    Parameters
    ----------
    title : str
        The line above the table.
    columns : sequence of str
        The headings.
    rows : sequence of sequence of str
        One text per column.
    """
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = any(row[number][:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file or a pipe has no width to fold to
        console.width = 200
    console.print(table)
