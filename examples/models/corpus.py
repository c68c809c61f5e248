"""English text that every Python brings along: the help pages of its own language reference.

`help("topics")` reads them from `pydoc_data.topics`. Pages repeat each other's paragraphs, so each paragraph is kept
where it first occurs only: what is held out would else have been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
DEVELOPMENT, HELD_OUT = 0.05, 0.05  # shares of the text, at its end and in this order

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """A text in numbers, and where its parts begin.

    Attributes
    ----------
    alphabet : str
        The characters of the training part in order, and last one that stands for all others; a token is a place here.
    tokens : array (length,)
        The whole text.
    development, held_out : int
        Where these two parts begin; the text up to `development` is for training.
    """

    alphabet: str
    tokens: Tokens
    development: int
    held_out: int

    @property
    def training(self) -> Tokens:
        """The tokens to learn from, `(development,)`."""
        return self.tokens[: self.development]

    def spell(self, tokens: Tokens) -> str:
        """Return the text of tokens `(count,)`."""
        return "".join(self.alphabet[token] for token in tokens)


def read() -> str:
    """Return the help pages in alphabetical order, each paragraph once; about half a million characters."""
    paragraphs = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def split(text: str) -> Corpus:
    """Return a text as tokens in three contiguous parts, the alphabet taken from the first."""
    development = int(len(text) * (1 - DEVELOPMENT - HELD_OUT))
    alphabet = "".join(sorted(set(text[:development]) - {UNKNOWN})) + UNKNOWN
    number = {character: place for place, character in enumerate(alphabet)}
    tokens = np.array([number.get(character, len(alphabet) - 1) for character in text])
    return Corpus(alphabet, tokens, development, int(len(text) * (1 - HELD_OUT)))
