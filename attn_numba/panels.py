"""What pictures are made of, checked and brought into one form; nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_numba.averages import Averages, average, means
from attn_numba.rules.data import AnyArray, as_array, real_number

__all__ = ["arrangement", "check_labels", "distinct_places", "excluded_cells", "largest", "panels_of", "pixels_of"]

LONGEST_LABEL = 40  # characters; longer ones are shortened


def panels_of(name: str, numbers: Any, axes: tuple[int, ...], cells: int) -> Averages:
    """Return what is to be drawn in colors, averaged if it is large.

    Parameters
    ----------
    name : str
        Name of the argument, for messages.
    numbers : array or Averages
        (M, N) for one panel, (panels, M, N) for several; not negative. Averages stay as they are.
    axes : tuple of int
        How many axes it may have: 2, 3.
    cells : int
        As for `average`, of one panel; half as many where there are several.

    Returns
    -------
    Averages
        Of (panels, m, n).

    Raises
    ------
    TypeError
        If `numbers` are no real numbers.
    ValueError
        If they have another number of axes, there are none, or one is negative.
    """
    if not isinstance(numbers, Averages):
        array = as_array(numbers, "plot", name)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"{name} has dtype {array.dtype}; needed real numbers")
        if array.ndim < 2:
            numbers = Averages(array, (0, 0), (1, 1))
        else:
            numbers = average(array, cells if math.prod(array.shape[:-2]) == 1 else cells // 2)
    values = numbers.values
    if values.ndim not in axes:
        raise ValueError(f"{name} has shape {values.shape}; needed {' or '.join(map(str, axes))} axes")
    if values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}; there is nothing to draw")
    if (values < 0).any():
        raise ValueError(f"{name} goes down to {np.nanmin(values):.4g}; needed at least 0")
    return numbers._replace(values=values.reshape(-1, *values.shape[-2:]))


def excluded_cells(mask: Any, panels: Averages) -> AnyArray | None:
    """Return where a mask allows no pair of a cell, for each panel.

    Parameters
    ----------
    mask : bool array that broadcasts to (panels, M, N), Averages or None
        True = may attend.
    panels : Averages
        What the mask belongs to.

    Returns
    -------
    bool array (panels, m, n) or None

    Raises
    ------
    TypeError
        If the mask is not of truth values.
    ValueError
        If it does not fit the panels.
    """
    if mask is None:
        return None
    shape = panels.values.shape
    if not isinstance(mask, Averages):
        array = as_array(mask, "plot", "mask")
        if array.dtype != bool:
            raise TypeError(f"mask has dtype {array.dtype}; needed truth values, True = may attend")
        whole = (len(panels.values), *panels.shape)
        try:
            array = np.broadcast_to(array, whole)
        except ValueError:
            raise ValueError(f"mask has shape {array.shape}; needed one that broadcasts to {whole}") from None
        mask = Averages(means(array, panels.cell), panels.shape, panels.cell)
    if mask[1:] != panels[1:]:
        raise ValueError(
            f"mask is averaged over {mask.cell} of {mask.shape}; weights over {panels.cell} of {panels.shape}"
        )
    try:
        return np.broadcast_to(mask.values == 0, shape)
    except ValueError:
        raise ValueError(f"mask has averages {mask.values.shape}; weights have {shape}") from None


def check_labels(name: str, labels: Sequence[str], count: int, what: str) -> list[str]:
    """Return labels, each in one line of at most 40 characters.

    Parameters
    ----------
    name : str
        Name of the argument, for messages.
    labels : sequence of str
        The labels.
    count : int
        How many there must be.
    what : str
        What they label, for messages.

    Returns
    -------
    list of str

    Raises
    ------
    TypeError
        If one is no text.
    ValueError
        If there are more or fewer.
    """
    found = list(labels)
    for n, label in enumerate(found):
        if not isinstance(label, str):
            raise TypeError(f"{name}[{n}] is {type(label).__name__}; needed text")
    if len(found) != count:
        raise ValueError(f"{name} has {len(found)} labels; there are {count} {what}")
    return [label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…" for label in found]


def distinct_places(panels: Averages) -> dict[str, tuple[int, int]]:
    """Return one place for each panel that differs from the others, by a title that says which places look like it.

    Parameters
    ----------
    panels : Averages
        Of (B, H, m, n), size 1 for an axis on which nothing depends.

    Returns
    -------
    dict of str to (int, int)
        Title -> sequence and head; the title is empty if there is one panel only.
    """
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for place in np.ndindex(panels.values.shape[:2]):
        groups.setdefault(panels.values[place].tobytes(), []).append(place)
    if len(groups) == 1:
        return {"": (0, 0)}
    return {_title(places, panels.values.shape[:2]): places[0] for places in groups.values()}


def _title(places: Sequence[tuple[int, int]], sizes: Sequence[int]) -> str:
    sequences, heads = (sorted(set(axis)) for axis in zip(*places, strict=True))
    if len(sequences) * len(heads) != len(places):
        (b, h), others = places[0], len(places) - 1
        return f"sequence {b}, head {h} and {others} more"
    named = zip(("sequence", "head"), (sequences, heads), sizes, strict=True)
    return ", ".join(_counted(word, numbers) for word, numbers, size in named if size > 1)


def _counted(word: str, numbers: Sequence[int]) -> str:
    """Return ``head 3``, ``heads 0 to 7``, ``heads 0, 2, 5`` or ``heads 0, 2, ... 9``."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return f"{word} {first}"
    if last - first + 1 == len(numbers):
        return f"{word}s {first} to {last}"
    return (
        f"{word}s {', '.join(map(str, numbers))}" if len(numbers) <= 4 else f"{word}s {first}, {numbers[1]}, … {last}"
    )


def pixels_of(image: Any) -> AnyArray:
    """Return an image as numbers from 0 to 1.

    Parameters
    ----------
    image : array (height, width) or (height, width, channels)
        1, 3 or 4 channels; uint8, or numbers from 0 to 1, or others, which are stretched from their least to their
        greatest.

    Returns
    -------
    float array (height, width), (height, width, 3) or (height, width, 4)

    Raises
    ------
    TypeError
        If it is not of real numbers.
    ValueError
        If it has another shape or no pixel, or holds NaN or infinity.
    """
    array = as_array(image, "plot", "image")
    if array.dtype.kind not in "iuf":
        raise TypeError(f"image has dtype {array.dtype}; needed real numbers")
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"image has shape {array.shape}; needed (height, width) or (height, width, 1, 3 or 4)")
    pixels = np.array(array, np.float64) / (255 if array.dtype == np.uint8 else 1)
    if not np.isfinite(pixels).all():
        raise ValueError("image holds NaN or infinity")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        pixels = (pixels - low) / ((high - low) or 1)
    return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels


def largest(values: AnyArray, highest: float | None = None) -> float:
    """Return the number at the top of a scale of colors.

    Parameters
    ----------
    values : array
        What is drawn.
    highest : float, optional
        The number asked for; without it, the largest of the finite values, or 1 if none is above 0.

    Returns
    -------
    float

    Raises
    ------
    TypeError
        If `highest` is no number.
    ValueError
        If it is not above 0.
    """
    if highest is None:
        return float(values.max(where=np.isfinite(values), initial=0)) or 1.0
    number = real_number("plot", "highest", highest)
    if not 0 < number < math.inf:
        raise ValueError(f"highest is {number}; needed a number above 0")
    return number


def arrangement(count: int) -> tuple[int, int]:
    """Return the rows and columns of a grid of panels, about as wide as it is high.

    Parameters
    ----------
    count : int
        How many panels, at least 1.

    Returns
    -------
    (int, int)

    Examples
    --------
    >>> [arrangement(count) for count in (1, 2, 5, 9, 12)]
    [(1, 1), (1, 2), (2, 3), (3, 3), (3, 4)]
    """
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns
