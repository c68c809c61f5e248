"""A progress bar on standard error; needs the package ``tqdm``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(label: str, total: int, hidden: bool = False, unit: str = "pair") -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs, if standard error is a terminal.

    Parameters
    ----------
    label : str
        What stands before the bar.
    total : int
        How many query-key pairs, or others, there are to do; 0 if nobody knows.
    hidden : bool
        Draw nothing, terminal or not.
    unit : str
        What is counted.

    Yields
    ------
    callable
        Takes the number done since it was last called.
    """
    with tqdm(desc=label, total=total or None, unit=unit, unit_scale=True, disable=hidden or None, leave=False) as bar:
        yield bar.update
