"""Weights, entropies, rollouts and masks as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from attn_numba.averages import CELLS, Averages, average_mask
from attn_numba.integrations.matplotlib.figures import (
    COLORS,
    LABEL_SIZE,
    SMALL_SIZE,
    TEXT_SIZE,
    Extent,
    add_legend,
    color_bar,
    legible,
    new_figure,
    overlay,
    row_numbers,
    width_of,
    wrapped,
)
from attn_numba.panels import (
    arrangement,
    check_labels,
    distinct_places,
    excluded_cells,
    largest,
    panels_of,
    pixels_of,
)
from attn_numba.rules.data import as_array
from attn_numba.sequences import unpatch

__all__ = ["MOST_PANELS", "plot_entropy", "plot_mask", "plot_rollout", "plot_weights"]

NOT_FINITE, EXCLUDED = "red", "0.85"
MASK_COLORS: dict[str, Any] = {"not allowed": EXCLUDED, "partly allowed": COLORS(0.55), "allowed": COLORS(0.2)}
PITCH = 1.35 / 72  # inches from one label to the next, for each point of their size
MOST_PANELS = 64


def plot_weights(
    weights: Any,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    mask: Any = None,
    highest: float | None = None,
    names: Sequence[str] | None = None,
    quantity: str = "weight",
    title: str = "Attention weights",
) -> Figure:
    """Return a heat map of the weights of one head, or of several side by side with one scale of colors.

    Parameters
    ----------
    weights : array (M, N) or (H, M, N), or Averages
        Weights of one head, or of at most 64; or anything else from 0 up, such as a rollout. Averages are what
        `attn_numba.averages.average_weights` makes of long sequences.
    queries, keys : sequence of str, optional
        M and N labels, such as tokens; without them, row numbers.
    mask : bool array that broadcasts to the shape of the weights, or Averages, optional
        True = may attend. What is excluded is drawn in gray, so that it differs from a weight of 0.
    highest : float, optional
        Weight at the top of the color scale, above which colors do not change; without it, the largest there is.
    names : sequence of str, optional
        H titles; without them, "head 0" and so on.
    quantity : str
        What the numbers are, for the color bar; from 0 to 1.
    title : str
        Title above all.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError
        If `weights` is not of real numbers, `mask` not of truth values, or a label no text.
    ValueError
        If shapes or the numbers of labels do not fit, there is nothing to draw or too much, a weight is negative, or
        `highest` is not above 0.

    Examples
    --------
    >>> figure = plot_weights([[1.0, 0.0], [0.25, 0.75]], mask=[[True, False], [True, True]])
    >>> figure.axes[0].get_xlabel(), figure.axes[1].get_ylabel()
    ('key', 'weight (0 to 1)')
    """
    panels = panels_of("weights", weights, (2, 3), CELLS)
    count = len(panels.values)
    if count > MOST_PANELS:
        raise ValueError(f"weights has {count} heads; needed at most {MOST_PANELS} for one picture")
    if names is None:
        names = [f"head {h}" for h in range(count)] if count > 1 else [""]
    names, top = check_labels("names", names, count, "heads"), largest(panels.values, highest)
    scale, strange = Normalize(0, top), ~np.isfinite(panels.values)
    flags = {"NaN or infinite": (strange, NOT_FINITE)}
    if (excluded := excluded_cells(mask, panels)) is not None:
        flags["excluded by the mask"] = (excluded & ~strange, EXCLUDED)

    def draw(axes: Axes, n: int, extent: Extent) -> None:
        axes.imshow(panels.values[n], cmap=COLORS, norm=scale, aspect="auto", extent=extent)
        overlay(axes, {color: flag[n] for flag, color in flags.values()}, extent)

    figure, axes = _grid(panels, names, queries, keys, title, draw)
    label = f"{quantity} (0 to 1)" if panels.cell == (1, 1) else f"mean {quantity} (0 to 1)"
    color_bar(figure, axes, scale, label, extend="max" if top < largest(panels.values) else "neither")
    add_legend(figure, {name: color for name, (flag, color) in flags.items() if flag.any()})
    return figure


def plot_entropy(entropy: Any, *, keys: int | None = None, title: str = "Entropy of the attention weights") -> Figure:
    r"""Return a table in colors of how spread out the weights of each layer and head are.

    Parameters
    ----------
    entropy : array (layers, H)
        Means over queries in nats, as `attn_numba.averages.average_entropy` makes them.
    keys : int, optional
        N. The colors then reach from 0, all weight on one key, to ``ln N``, the same weight on all of them.
    title : str
        Title of the picture.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError
        If `entropy` is not of real numbers.
    ValueError
        If it does not have two axes, is empty, negative, or larger than ``ln N``.

    Examples
    --------
    >>> plot_entropy([[0.1, 1.2], [0.7, 0.9]], keys=4).axes[1].get_ylabel()
    'entropy (nats)\nat most ln 4 = 1.39'
    """
    values = panels_of("entropy", entropy, (2,), CELLS).values[0]
    bound = math.inf if keys is None else math.log(max(keys, 1))
    if (most := values.max(where=np.isfinite(values), initial=0)) > bound + 1e-3:
        raise ValueError(f"entropy reaches {most:.4g} nats; with {keys} keys it is at most ln {keys} = {bound:.4g}")
    scale = Normalize(0, largest(values) if keys is None else bound or 1)
    layers, heads = values.shape
    figure, [[axes]] = new_figure(1, 1, (max(2.2, 0.45 * heads), max(1.6, 0.3 * layers)), title=title)
    axes.imshow(values, cmap=COLORS, norm=scale, aspect="auto")
    bad = ~np.isfinite(values)
    overlay(axes, {NOT_FINITE: bad}, (-0.5, heads - 0.5, layers - 0.5, -0.5))
    for (layer, head), value in np.ndenumerate(values):
        light = not bad[layer, head] and scale(value) > 0.6
        color = "black" if light else "white"
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    for axis, name, count in ((axes.xaxis, "head", heads), (axes.yaxis, "layer", layers)):
        axis.set_ticks(row_numbers(count, 40))
        axis.set_tick_params(labelsize=LABEL_SIZE)
        axis.set_label_text(name, fontsize=TEXT_SIZE)
    bounded = "" if keys is None else f"\nat most ln {keys} = {bound:.2f}"
    color_bar(figure, [axes], scale, f"entropy (nats){bounded}")
    add_legend(figure, {"NaN or infinite": NOT_FINITE} if bad.any() else {})
    return figure


def plot_rollout(
    relevance: Any,
    image: Any,
    size: int,
    *,
    grid: tuple[int, int] | None = None,
    title: str = "Attention rollout",
) -> Figure:
    """Return an image beside the relevance of each of its patches, drawn over it.

    Parameters
    ----------
    relevance : array (rows * columns,)
        Relevance of each patch, in the order of `attn_numba.sequences.patches`: for one query, that row of a rollout
        without the tokens that are no patches, such as ``rollout[0, 0, 1:]`` for a class token in front.
    image : array (height, width), (height, width, 1), (height, width, 3) or (height, width, 4)
        uint8, or numbers from 0 to 1; others are stretched from their least to their greatest.
    size : int
        Side of a patch, in pixels.
    grid : (int, int), optional
        Rows and columns of the patches, where they are more than the image needs; see `patches`.
    title : str
        Title of the picture.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError
        If `relevance` or `image` is not of real numbers, or `size` is no integer.
    ValueError
        If shapes do not fit, there is nothing to draw, or a relevance is negative.

    References
    ----------
    S. Abnar and W. Zuidema (2020), "Quantifying attention flow in transformers", section 3; over images: H. Chefer,
    S. Gur and L. Wolf (2021), "Transformer interpretability beyond attention visualization", section 4.

    Examples
    --------
    >>> import numpy as np
    >>> figure = plot_rollout(np.linspace(0, 1, 6), np.zeros((20, 30, 3)), 10)
    >>> figure.axes[1].images[-1].get_array().shape
    (20, 30)
    """
    pixels = pixels_of(image)
    height, width = pixels.shape[:2]
    rows, columns = grid or (-(-height // size), -(-width // size))
    values = as_array(relevance, "plot_rollout", "relevance")
    if values.shape != (rows * columns,):
        raise ValueError(f"relevance has shape {values.shape}; needed ({rows * columns},): {rows} x {columns} patches")
    values = panels_of("relevance", values[None], (2,), values.size).values[0]
    tokens = np.repeat(values.reshape(1, -1, 1), size * size, axis=2)
    spread = unpatch(tokens, size, grid=(rows, columns), shape=(height, width))[0, :, :, 0]

    side = 3.6 / max(height, width)
    figure, [[plain, over]] = new_figure(1, 2, (max(1.0, side * width), max(1.6, side * height)), title=title)
    scale = Normalize(0, largest(values))
    gray = pixels if pixels.ndim == 2 else pixels[..., :3] @ (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
    pale = 0.6 + 0.4 * gray  # so that colors over it are nearly those of the bar
    plain.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    over.imshow(pale, cmap="gray", vmin=0, vmax=1)
    over.imshow(spread, cmap=COLORS, norm=scale, alpha=0.6, interpolation="nearest")
    bad = ~np.isfinite(spread)
    overlay(over, {NOT_FINITE: bad}, (-0.5, width - 0.5, height - 0.5, -0.5))
    for axes, name in ((plain, "image"), (over, f"relevance of {rows} x {columns} patches")):
        axes.set_title(name, fontsize=TEXT_SIZE)
        axes.set_axis_off()
    color_bar(figure, [over], scale, "relevance (0 to 1)", alpha=0.6)
    add_legend(figure, {"NaN or infinite": NOT_FINITE} if bad.any() else {})
    return figure


def plot_mask(
    mask: Any,
    shape: Sequence[int],
    *,
    query_offset: Any = None,
    key_offset: Any = 0,
    places: Sequence[tuple[int, int]] | None = None,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    title: str = "Mask",
) -> Figure:
    """Return a picture of which keys each query may attend to.

    Parameters
    ----------
    mask : mask rule, bool array or None
        As `attn_numba.attention` takes it.
    shape : (B, H, M, N)
        Sequences, query heads, queries, keys.
    query_offset, key_offset : int or int array (B,), optional
        As `attn_numba.attention` takes them.
    places : sequence of (int, int), optional
        Sequence and head of each panel, at most 64. Without it there is one panel for each of the masks that differ,
        and its title names the sequences and heads that have it.
    queries, keys : sequence of str, optional
        M and N labels; without them, row numbers.
    title : str
        Title of the picture.

    Returns
    -------
    Figure

    Raises
    ------
    TypeError
        If the mask is no mask, or a label no text.
    ValueError
        If it does not fit the shape or needs a query offset, a place does not exist, there is nothing to draw, or
        there are more than 64 panels.

    Examples
    --------
    >>> import attn_numba as an
    >>> figure = plot_mask(an.Causal() & an.Padding([2, 3, 3]), (3, 8, 3, 3))
    >>> [axes.get_title() for axes in figure.axes]
    ['sequence 0', 'sequences 1 to 2']
    """
    B, H, M, N = shape
    for b, h in places or ():
        if not (0 <= b < B and 0 <= h < H):
            raise ValueError(f"places has ({b}, {h}); needed a sequence of 0 to {B - 1} and a head of 0 to {H - 1}")
    if 0 in (B, H, M, N):
        raise ValueError(f"shape is {tuple(shape)}; needed sizes of at least 1 for a picture")
    found = average_mask(mask, shape, query_offset, key_offset)
    panels = distinct_places(found) if places is None else {f"sequence {b}, head {h}": (b, h) for b, h in places}
    if not 0 < len(panels) <= MOST_PANELS:
        raise ValueError(f"there are {len(panels)} panels; needed 1 to {MOST_PANELS}: choose some by places")
    values = np.stack([found.at(*place).values for place in panels.values()])
    codes = np.digitize(values, [float(np.finfo(np.float32).tiny), 1.0])  # 0 nothing, 1 a part, 2 all of a cell
    colors = ListedColormap(list(MASK_COLORS.values()))

    def draw(axes: Axes, n: int, extent: Extent) -> None:
        axes.imshow(codes[n], cmap=colors, vmin=0, vmax=2, aspect="auto", extent=extent, interpolation="nearest")

    figure, _ = _grid(found._replace(values=codes), list(panels), queries, keys, title, draw)
    add_legend(figure, {name: color for code, (name, color) in enumerate(MASK_COLORS.items()) if (codes == code).any()})
    return figure


def _grid(
    panels: Averages,
    names: Sequence[str],
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
    title: str,
    draw: Callable[[Axes, int, Extent], None],
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels of queries by keys, each drawn by `draw`, and its axes."""
    (count, m, n), (M, N), cell = panels.values.shape, panels.shape, panels.cell
    rows, columns = arrangement(count)
    down, across = _Labels("queries", queries, M, N, count), _Labels("keys", keys, N, M, count)
    if cell != (1, 1):
        title += f"\naveraged over {cell[0]} x {cell[1]} (queries x keys)"
    margins = (down.longest, across.longest if across.upright else across.height)
    figure, grid = new_figure(rows, columns, (across.side, down.side), margins, title)
    extent = (-0.5, n * cell[1] - 0.5, m * cell[0] - 0.5, -0.5)  # the last cells may reach beyond the last rows
    used = []
    for place, axes in enumerate(axes for row in grid for axes in row):
        if place >= count:
            axes.remove()
            continue
        draw(axes, place, extent)
        axes.set(xlim=(-0.5, N - 0.5), ylim=(M - 0.5, -0.5))
        axes.set_title(**wrapped(names[place], across.side, TEXT_SIZE))
        across.put(axes, axes.xaxis, "key", shown=place + columns >= count)
        down.put(axes, axes.yaxis, "query", shown=place % columns == 0)
        used.append(axes)
    return figure, used


class _Labels:
    """The labels along one side of the panels, and how long that side is for them (in inches)."""

    def __init__(self, name: str, labels: Sequence[str] | None, count: int, others: int, panels: int) -> None:
        self.count, self.labels, self.size = count, None, LABEL_SIZE
        if labels is None:
            self.side = max(1.2, min((4.5 if panels == 1 else 2.0) * min(1, count / others), 0.5 * count))
            self.longest, self.height, self.upright = 0.4, 0.2, False
            return
        self.labels, self.family = legible(check_labels(name, labels, count, name))
        self.side = min(max(count * LABEL_SIZE * PITCH, 1.2), 10 if panels == 1 else 4)
        if count * LABEL_SIZE * PITCH > self.side:
            self.size = SMALL_SIZE
        self.longest = max(width_of(label, self.size, self.family) for label in self.labels)
        self.height, self.upright = self.size / 72, max(map(len, self.labels)) > 1

    def put(self, axes: Axes, axis: Any, title: str, shown: bool) -> None:
        """Put the labels along an axis, every so many that they do not touch, or row numbers if there are none."""
        if self.labels is None:
            ticks = row_numbers(self.count, min(10, 2.5 * self.side))
            texts, style = [str(n) for n in ticks], {}
        else:
            ticks = list(range(0, self.count, math.ceil(self.count * self.size * PITCH / self.side - 1e-9)))
            texts, style = [self.labels[n] for n in ticks], {"fontfamily": self.family, "parse_math": False}
            if axis is axes.xaxis and self.upright:
                style["rotation"] = 90
        axis.set_ticks(ticks, labels=texts if shown else [""] * len(ticks), fontsize=self.size, **style)
        if shown:
            axis.set_label_text(title, fontsize=TEXT_SIZE)
