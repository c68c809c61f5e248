"""JapaneseVowels: who of nine men says /ae/.

Each recording is a sequence of 7 to 29 frames of 12 LPC cepstrum coefficients; 270 are for training, 370 for the test.

References
----------
M. Kudo, J. Toyama and M. Shimbo (1999), "Multidimensional curve classification using passing-through regions".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.weights import Wheel, obtain

from .parts import Data, Part, expect

WHEEL = Wheel(
    project="aeon",
    version="1.6.0",
    size=6_421_000,
    folder="aeon/datasets/data/JapaneseVowels",
    files={
        "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
        "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
    },
    kind="data",
)


def japanese_vowels(given: Path | None = None) -> Data:
    """Return the recordings, each `(L, 12)` float64 with L from 7 to 29, in the official parts.

    Parameters
    ----------
    given : Path, optional
        The wheel or a folder with its two files, where there is no network.
    """
    (training, names), (test, others) = (read(path) for path in obtain(WHEEL, given))
    expect(names == others, f"{WHEEL.requirement} has classes {names} and {others}")
    return Data(training, test, names)


def read(path: Path) -> tuple[Part, tuple[str, ...]]:
    """Return the samples of a file in the format ts, and the classes that its header names."""
    header, _, body = path.read_text().partition("@data\n")
    [line] = [line for line in header.splitlines() if line.startswith("@classLabel true ")] or [""]
    names = tuple(line.split()[2:])
    expect(bool(names), f"{path} names no classes")
    inputs: list[NDArray[np.float64]] = []
    labels = []
    for sample in body.splitlines():
        *channels, label = sample.split(":")
        inputs.append(np.array([channel.split(",") for channel in channels], dtype=np.float64).T.copy())
        labels.append(names.index(label.strip()))
    return Part(inputs, np.array(labels)), names
