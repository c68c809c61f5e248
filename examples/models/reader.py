"""A model that answers a question about a picture: words attend to each other and to patches of the picture.

References
----------
J.-B. Alayrac et al. (2022), "Flamingo: a visual language model for few-shot learning" (cross-attention between the
layers of a text model). A. Dosovitskiy et al. (2021), "An image is worth 16x16 words" (patches as tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_numba.learning import MLP, Block, Linear, Norm, Rules, Table, cross_entropy, gathered, sinusoids
from attn_numba.sequences import patches

Array = NDArray[Any]
SMALL = 0.1  # mean square of what a block adds at first, and deviation of words


@dataclass(frozen=True)
class Config:
    """Sizes of a reader.

    Attributes
    ----------
    words, outputs : int
        Words that there are, and answers.
    patches : int
        Most patches of a picture.
    patch : int
        Side of a patch, in pixels.
    hidden_size, heads : int
        Of all blocks.
    layers : int
        Pairs of blocks in which words attend to each other, and then to patches.
    """

    words: int
    outputs: int
    patches: int
    patch: int = 28
    hidden_size: int = 64
    heads: int = 4
    layers: int = 2


def beside(count: int, heads: int) -> NDArray[np.bool_]:
    """Return a mask (heads, count, count): half of the heads see the patch to the left, the others to the right."""
    left = np.eye(count, k=-1, dtype=bool)
    return np.where(np.arange(heads)[:, None, None] < heads // 2, left, left.T)


class Reader:
    """The model and its gradient.

    A patch becomes a state by a product with weights and an MLP, and learns of its neighbors in one block; then words
    attend to the patches. The answer is read off the state of the last word.

    Parameters
    ----------
    config : Config
        Its sizes.
    seed : int
        Of the initial parameters.
    dtype : str
        float32 or float64.

    Attributes
    ----------
    parameters : dict of str to array
        Of all parts, under their names.
    """

    def __init__(self, config: Config, seed: int = 0, dtype: str = "float32") -> None:
        self.config, self.dtype = config, np.dtype(dtype)
        size, rules, generator = config.hidden_size, Rules(config.heads), np.random.default_rng(seed)
        self.place = generator.standard_normal((config.patches, size)).astype(dtype)
        self.parts: dict[str, Any] = {
            "see": Linear(config.patch**2, size, dtype, generator),
            "seen": Norm(size, dtype),
            "recognize": MLP(size, 4, dtype, generator),
            "look": Block(size, rules, dtype, generator, gain=SMALL),
            "read": Table(config.words, size, dtype, generator),
        }
        for n in range(config.layers):
            self.parts[f"think.{n}"] = Block(size, rules, dtype, generator, gain=SMALL)
            self.parts[f"ask.{n}"] = Block(size, rules, dtype, generator, gain=SMALL, context_size=size)
        self.parts |= {"norm": Norm(size, dtype), "answer": Linear(size, config.outputs, dtype, generator, gain=0.0)}
        self.parameters = {"place": self.place} | gathered(self.parts)

    def forward(self, images: Array, words: Array, weights: bool = False) -> tuple[Array, dict[str, Any]]:
        """Return logits (B, outputs) of the answers, and what `vjp` needs.

        Parameters
        ----------
        images : array (B, height, width)
            Pictures, of mean 0 and deviation 1; one patch high.
        words : int array (B, M)
            The questions.
        weights : bool
            Whether to keep the weights of attention; `looked_at` reads them.
        """
        kept: dict[str, Any] = {}

        def through(name: str, x: Array, *rest: Any, **options: Any) -> Array:
            out, kept[name] = self.parts[name].forward(x, *rest, **options)
            return out

        tokens = patches(images[..., None], self.config.patch).tokens.astype(self.dtype)
        picture = through("see", tokens)
        picture = picture + through("recognize", through("seen", picture)) + self.place[: tokens.shape[1]]
        picture = through("look", picture, beside(tokens.shape[1], self.config.heads))
        positions = SMALL * sinusoids(words.shape[1], self.config.hidden_size)
        text = through("read", words) + positions.astype(self.dtype)
        for n in range(self.config.layers):
            text = through(f"think.{n}", text)
            text = through(f"ask.{n}", text, context=picture, weights=weights)
        logits = through("answer", through("norm", text[:, -1:]))
        return logits[:, 0], kept | {"shape": text.shape}

    def vjp(self, dlogits: Array, kept: dict[str, Any]) -> dict[str, Array]:
        """Return the gradients by the parameters, from that by the logits and what `forward` kept."""
        found: dict[str, Array] = {}

        def back(name: str, dout: Array) -> tuple[Any, ...]:
            *inputs, gradients = self.parts[name].vjp(dout, kept[name])
            found.update({f"{name}.{key}": array for key, array in gradients.items()})
            return tuple(inputs)

        dtext, dpicture = np.zeros(kept["shape"], self.dtype), np.zeros((), self.dtype)
        (dstates,) = back("answer", dlogits[:, None])
        (dtext[:, -1:],) = back("norm", dstates)
        for n in reversed(range(self.config.layers)):
            dtext, dcontext = back(f"ask.{n}", dtext)
            dtext, _ = back(f"think.{n}", dtext)
            dpicture = dpicture + dcontext
        back("read", dtext)
        dpicture, _ = back("look", dpicture)
        found["place"] = np.zeros_like(self.place)
        found["place"][: dpicture.shape[1]] = dpicture.sum(axis=0)
        (dstates,) = back("recognize", dpicture)
        (dseen,) = back("seen", dstates)
        back("see", dpicture + dseen)
        return {name: found[name] for name in self.parameters}

    def gradients(self, images: Array, words: Array, answers: Array) -> tuple[float, dict[str, Array]]:
        """Return the mean cross-entropy of some questions, in nats, and its gradient by every parameter."""
        logits, kept = self.forward(images, words)
        loss, dlogits = cross_entropy(logits, answers, np.full(len(answers), 1 / len(answers)))
        return loss, self.vjp(dlogits, kept)

    def looked_at(self, kept: dict[str, Any]) -> list[Array]:
        """Return the weights (B, H, M, N) of words over patches, layer by layer, of what `forward` kept."""
        return [kept[f"ask.{n}"][1][0].weights for n in range(self.config.layers)]
