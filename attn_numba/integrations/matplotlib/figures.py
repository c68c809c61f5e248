"""What all pictures share: figures as large as their labels need, legends and color bars, text, files."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from attn_numba import files
from attn_numba.rules.data import AnyArray

__all__ = [
    "COLORS",
    "LABEL_SIZE",
    "SMALL_SIZE",
    "SUFFIXES",
    "TEXT_SIZE",
    "Extent",
    "add_legend",
    "color_bar",
    "legible",
    "new_figure",
    "overlay",
    "row_numbers",
    "save",
    "width_of",
    "wrapped",
]

SUFFIXES = (".png", ".svg", ".pdf")
DPI = 150
COLORS = colormaps["viridis"]  # from dark to light, in steps that look equal; neither gray nor red occur in it
TITLE_SIZE, TEXT_SIZE, LABEL_SIZE, SMALL_SIZE = 11, 9, 8, 6  # points

Extent = tuple[float, float, float, float]


def save(figure: Figure, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a figure to a file, whole or not at all; the same figure makes the same bytes.

    Parameters
    ----------
    figure : Figure
        Any figure of matplotlib.
    path : str or Path
        Where to: ``.png``, ``.svg`` or ``.pdf``.
    overwrite : bool
        Whether a file that exists may be replaced.

    Raises
    ------
    ValueError
        The suffix is another.
    FileExistsError
        The file exists and `overwrite` is False.
    OSError
        It cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "entropy.png"
    >>> save(Figure(), path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    kind = Path(path).suffix
    no_date: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind, {})

    def write(part: Path, file: IO[bytes]) -> None:
        with rc_context({"svg.hashsalt": "attn_numba"}):  # else the names inside an SVG file are random
            figure.savefig(file, format=kind[1:], dpi=DPI, metadata=no_date)

    files.write_whole(path, write, overwrite, SUFFIXES)


def row_numbers(count: int, most: float) -> list[int]:
    """Return round numbers below a count, at most about so many."""
    locator = MaxNLocator(max(1, int(most)), integer=True, steps=[1, 2, 5, 10])
    return [int(n) for n in locator.tick_values(0, count - 1) if 0 <= n < count and n == int(n)]


def new_figure(
    rows: int, columns: int, panel: tuple[float, float], margins: tuple[float, float] = (0.4, 0.2), title: str = ""
) -> tuple[Figure, AnyArray]:
    """Return a figure with room for its panels, labels, title and color bar (inches), and its axes (rows, columns)."""
    width = max(4.0, columns * (panel[0] + 0.15) + margins[0] + 1.6)
    heading = wrapped(title, width, TITLE_SIZE)
    height = rows * (panel[1] + 0.35) + margins[1] + 0.2 * heading["label"].count("\n") + 1.1
    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading.pop("label"), **heading)
    return figure, figure.subplots(rows, columns, squeeze=False)


def overlay(axes: Axes, flags: Mapping[str, AnyArray], extent: Extent) -> None:
    """Draw cells that are flagged in the color of the flag and leave the others as they are."""
    cells = np.zeros((*next(iter(flags.values())).shape, 4))
    for color, flag in flags.items():
        cells[flag] = to_rgba(color)
    if cells.any():
        axes.imshow(cells, aspect=axes.get_aspect(), extent=extent, interpolation="nearest")


def color_bar(figure: Figure, axes: Sequence[Axes], scale: Normalize, label: str, **options: Any) -> None:
    """Put a bar beside axes that says which number each color is."""
    bar = figure.colorbar(ScalarMappable(scale, COLORS), ax=axes, aspect=40, **options)
    bar.set_label(label, fontsize=TEXT_SIZE)
    bar.ax.tick_params(labelsize=LABEL_SIZE)
    bar.ax.yaxis.get_offset_text().set_fontsize(LABEL_SIZE)


def add_legend(figure: Figure, colors: Mapping[str, Any]) -> None:
    """Say below a figure what its colors mean, where there are any to be told of."""
    patches = [Patch(facecolor=color, edgecolor="black", linewidth=0.5, label=name) for name, color in colors.items()]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=TEXT_SIZE)


def wrapped(text: str, width: float, size: float) -> dict[str, Any]:
    """Return a title as matplotlib takes it: in lines that fit a width in inches, in fonts that have its letters."""
    lines, family = legible(text.split("\n"))
    fitting = []
    for line in lines:
        characters = len(line) * (width - 0.3) / max(width_of(line, size, family), 1e-3)
        fitting += textwrap.wrap(line, max(8, int(characters))) or [""]
    return {"label": "\n".join(fitting), "fontsize": size, "fontfamily": family, "parse_math": False}


def width_of(text: str, size: float, family: Sequence[str]) -> float:
    """Return the width of a line of text in inches."""
    font = font_manager.FontProperties(family=list(family), size=size)
    canvas = FigureCanvasAgg(Figure(dpi=DPI))
    return canvas.get_renderer().get_text_width_height_descent(text, font, ismath=False)[0] / DPI


def legible(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return texts as installed fonts can draw them, and these fonts; what none can draw becomes its escape."""
    families = list(font_manager.FontProperties().get_family())
    drawn = _characters(font_manager.findfont(font_manager.FontProperties()))
    missing = {ord(c) for text in texts for c in text if c.isprintable()} - drawn
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if not missing:
            break
        plain = entry.style == entry.variant == "normal" and entry.weight in (400, "normal", "regular")
        if plain and "Last Resort" not in entry.name and (found := missing & _characters(entry.fname)):
            families.append(entry.name)
            missing -= found
    kept = [[c if c.isprintable() and ord(c) not in missing else _escape(c) for c in text] for text in texts]
    return ["".join(characters) for characters in kept], families


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """Return the codes of the characters that the font of a file can draw."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a font that cannot be read draws nothing
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
