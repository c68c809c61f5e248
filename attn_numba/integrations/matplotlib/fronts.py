"""What models score against what they cost, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from attn_numba.integrations.matplotlib.figures import COLORS, LABEL_SIZE, TEXT_SIZE, new_figure, wrapped
from attn_numba.rules.data import AnyArray, as_array

__all__ = ["plot_front"]

WIDTH, HEIGHT = 5.4, 3.4  # of the axes, in inches
MOST_NAMED = 24  # points of a front that are named
OTHERS = "0.6"


def plot_front(
    costs: Any,
    scores: Any,
    front: Sequence[int],
    *,
    deviations: Any = None,
    labels: Sequence[str] | None = None,
    cost: str = "cost",
    unit: str = "",
    score: str = "score",
    title: str = "Score against cost",
) -> Figure:
    """Return a picture of scores against costs in which the best for each cost are joined and named.

    Parameters
    ----------
    costs, scores : array (n,)
        What each model costs and scores. Costs above 0 that differ by more than 10 times get a logarithmic axis.
    front : sequence of int
        Which of the n models no other beats in both (V. Pareto's front), such as `Search.front` finds them.
    deviations : array (n,), optional
        Standard deviations of the scores, drawn as bars.
    labels : sequence of str, optional
        n names; those of the front are shown in the order of their costs, of more than 24 some. Without them, "model 0"
        and so on.
    cost : str
        What the costs are of, for the axis.
    unit : str
        Of the costs, such as "s".
    score : str
        What the scores are, for the axis.
    title : str
        Title of the picture.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError
        If numbers are not real, or a label is no text.
    ValueError
        If there is no model, numbers are not finite or not one for each model, a deviation is negative, or `front`
        is empty, or names a model twice or one that does not exist.

    Examples
    --------
    >>> figure = plot_front([100, 200, 400], [0.8, 0.95, 0.9], [0, 1], labels=["small", "middle", "large"])
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['small', 'middle', 'others']
    """
    x = _numbers("costs", costs)
    y = _numbers("scores", scores, len(x))
    bars = None if deviations is None else _numbers("deviations", deviations, len(x))
    if bars is not None and (bars < 0).any():
        raise ValueError(f"deviations has {bars.min():.4g}; needed 0 and more")
    names = [f"model {n}" for n in range(len(x))] if labels is None else labels
    if len(names) != len(x):
        raise ValueError(f"labels has {len(names)} texts; there are {len(x)} models")
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"labels has {strange[0]!r}; needed text")
    ordered = sorted(_front(front, len(x)), key=lambda n: (x[n], y[n]))
    others = sorted(set(range(len(x))) - set(ordered))

    places = np.linspace(0, len(ordered) - 1, min(len(ordered), MOST_NAMED)).round().astype(int)
    lines = [wrapped(names[ordered[place]], WIDTH, LABEL_SIZE) for place in places]
    rows = sum(line["label"].count("\n") + 1 for line in lines) + bool(others)
    figure, [[axes]] = new_figure(1, 1, (WIDTH, HEIGHT), (0.4, 0.2 + rows * 1.6 * LABEL_SIZE / 72), title)
    if bars is not None:
        axes.errorbar(x, y, bars, fmt="none", ecolor=OTHERS, elinewidth=0.8, capsize=2, zorder=1)
    axes.step(x[ordered], y[ordered], where="post", color="black", linewidth=0.8, zorder=2)
    shades = COLORS(np.linspace(0, 0.95, len(ordered)))
    points = [axes.scatter(x[n], y[n], s=42, color=shade, zorder=4) for n, shade in zip(ordered, shades, strict=True)]
    points, texts = [points[place] for place in places], [line["label"] for line in lines]
    if others:
        points.append(axes.scatter(x[others], y[others], s=14, color=OTHERS, zorder=3))
        texts.append("others")
    legend = figure.legend(points, texts, loc="outside lower center", frameon=False, fontsize=LABEL_SIZE)
    for text, line in zip(legend.get_texts(), lines, strict=False):
        text.set(fontfamily=line["fontfamily"], parse_math=False)

    if x.min() > 0 and x.max() > 10 * x.min():
        axes.set_xscale("log")
        decades = np.log10(x.max() / x.min())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=10))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(unit, sep="" if not unit else " "))
    axes.tick_params(labelsize=LABEL_SIZE)
    axes.set_xlabel(cost, fontsize=TEXT_SIZE)
    axes.set_ylabel(score, fontsize=TEXT_SIZE)
    axes.grid(linewidth=0.3)
    return figure


def _numbers(name: str, numbers: Any, count: int | None = None) -> AnyArray:
    """Return finite numbers, one for each model."""
    values = as_array(numbers, "plot_front", name)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"{name} has dtype {values.dtype}; needed real numbers")
    if values.ndim != 1 or not values.size or count not in (None, values.size):
        raise ValueError(f"{name} has shape {values.shape}; needed ({'models' if count is None else count},)")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinity; needed finite numbers")
    return values.astype(np.float64)


def _front(front: Sequence[int], count: int) -> list[int]:
    """Return the indices of a front, checked."""
    found = [int(n) for n in front]
    if strange := [n for n in found if not 0 <= n < count]:
        raise ValueError(f"front has {strange[0]}; needed 0 to {count - 1}")
    if len(set(found)) < len(found):
        raise ValueError(f"front has {found}; needed each model once")
    if not found:
        raise ValueError("front is empty; needed at least one model")
    return found
