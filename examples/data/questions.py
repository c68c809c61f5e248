"""Questions about pictures: rows of handwritten digits, and "which digit is left of the 7 ?"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .parts import Part

FRAMES = (  # the last one is the simple one: to answer it, there is nothing to find first
    "which digit is left of the 0 ?",
    "which digit is right of the 0 ?",
    "which digit is at place number 0 ?",
)
LEFT, RIGHT, AT_PLACE = range(3)
WORDS = (*sorted({word for frame in FRAMES for word in frame.split()} - {"0", "?"}), *"0123456789", "?")
IDS = {word: number for number, word in enumerate(WORDS)}
NAMED = 6  # place in a question of the number that it names
ANSWERS = 10


@dataclass(frozen=True)
class Questions:
    """Pictures, a question about each, and the answers.

    Attributes
    ----------
    images : float32 array (n, height, row * width)
        Rows of digits side by side.
    words : int array (n, 8)
        Places in `WORDS`.
    answers : int array (n,)
        The digit asked for, 0 to 9.
    digits : int array (n, row)
        What a row shows, from left to right; all different.
    """

    images: NDArray[np.float32]
    words: NDArray[np.int64]
    answers: NDArray[np.int64]
    digits: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.answers)


def ask(
    part: Part, count: int, generator: np.random.Generator, *, row: int = 5, simple: float = 0.0, shift: int = 0
) -> Questions:
    """Return questions about rows made of the images of a part.

    Parameters
    ----------
    part : Part
        Square images of the digits 0 to 9.
    count : int
        n, how many.
    generator : numpy.random.Generator
        Draws the digits, their images, and what is asked: any digit of the row that has a neighbor on the side.
    row : int
        Digits in a row, 1 to 9; of a single one it is only asked which digit is at place number 1.
    simple : float
        Share of the questions, 0 to 1, that ask which digit is at a place, counted from 1.
    shift : int
        Each image is moved by up to so many pixels along either axis.
    """
    digits = generator.permuted(np.tile(np.arange(10), (count, 1)), axis=1)[:, :row]
    simply = generator.random(count) < (simple if row > 1 else 1.0)
    kind = np.where(simply, AT_PLACE, generator.integers(LEFT, RIGHT + 1, count))
    place = (generator.random(count) * np.where(simply, row, row - 1)).astype(int)
    samples, following = np.arange(count), np.minimum(place + 1, row - 1)
    here, beside = digits[samples, place], digits[samples, following]
    named = np.choose(kind, [beside, here, place + 1])
    answers = np.where(kind == RIGHT, beside, here)
    words = np.array([[IDS[word] for word in frame.split()] for frame in FRAMES])[kind]
    words[:, NAMED] += named
    return Questions(_rows(part, digits, generator, shift), words, answers, digits)


def _rows(part: Part, digits: NDArray[np.int64], generator: np.random.Generator, shift: int) -> NDArray[np.float32]:
    """Return one picture for each row of digits, of images drawn for them."""
    images, labels = np.asarray(part.inputs, np.float32), part.labels
    order, counts = np.argsort(labels, kind="stable"), np.bincount(labels, minlength=10)
    starts, side = np.cumsum(counts) - counts, images.shape[1]
    cells = images[order[starts[digits] + (generator.random(digits.shape) * counts[digits]).astype(int)]]
    around = [(0, 0), (0, 0), (shift, shift), (shift, shift)]
    cells = np.pad(cells, around, constant_values=images.min())  # the paper around the digits
    down, along = generator.integers(0, 2 * shift + 1, (2, *digits.shape))[..., None] + np.arange(side)
    sample, place = np.ix_(*map(np.arange, digits.shape))
    cells = cells[sample[..., None, None], place[..., None, None], down[..., :, None], along[..., None, :]]
    return cells.swapaxes(1, 2).reshape(len(digits), side, -1)
