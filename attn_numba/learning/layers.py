"""The plain layers of a sequence model and their gradients: embeddings, norm, products with weights, the MLP.

A layer holds its `parameters`, a dict of arrays that may be written in place. ``forward`` returns the result and what
``vjp`` needs to give the gradient by the input, and those of the parameters under their names. Sizes: `B` sequences,
`L` tokens of each, `C` numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MLP", "Features", "Linear", "Norm", "Table", "dropped", "normalize", "normalize_vjp", "prefixed", "rows"]

Array = NDArray[Any]
EPSILON = 1e-6  # added to the mean square of a state
QUIET = 0.1  # how large states of ids start: norms make up for it, and a rare word needs few steps to become another


def rows(x: Array) -> Array:
    """Return states as one matrix: one product over all of them, where NumPy would make B small ones.

    Parameters
    ----------
    x : array (..., size)
        States.

    Returns
    -------
    array (rows, size)
        The same in two axes.
    """
    return x.reshape(-1, x.shape[-1])


def prefixed(name: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays of a part of a model under the names that they have in the whole of it."""
    return {f"{name}.{key}": array for key, array in arrays.items()}


def normalize(x: Array) -> tuple[Array, Array]:
    """Return states divided by the root of their mean square, and that root.

    Parameters
    ----------
    x : array (B, L, C)
        States.

    Returns
    -------
    normal : array (B, L, C)
        States of mean square 1.
    size : array (B, L, 1)
        What they were divided by: ``sqrt(mean(x**2) + 1e-6)``.

    References
    ----------
    B. Zhang and R. Sennrich (2019), "Root mean square layer normalization", equation 4.

    Examples
    --------
    >>> normal, size = normalize(np.array([[[3.0, 4.0]]]))
    >>> size.round(3).item(), normal.round(3).tolist()
    (3.536, [[[0.849, 1.131]]])
    """
    size = np.sqrt(np.einsum("blc,blc->bl", x, x)[..., None] / x.dtype.type(x.shape[-1]) + x.dtype.type(EPSILON))
    return x / size, size


def normalize_vjp(dout: Array, normal: Array, size: Array, gain: Array) -> tuple[Array, Array]:
    """Return the gradients by states and by a gain from that by normalized states times the gain.

    Parameters
    ----------
    dout : array (B, L, C)
        Gradient by ``normal * gain``.
    normal, size : array (B, L, C), (B, L, 1)
        What `normalize` returned.
    gain : array (C,)
        The gain.

    Returns
    -------
    dx : array (B, L, C)
        Gradient by the states.
    dgain : array (C,)
        Gradient by the gain.
    """
    dnormal = dout * gain
    along = np.einsum("blc,blc->bl", dnormal, normal)[..., None] / normal.dtype.type(normal.shape[-1])
    return (dnormal - normal * along) / size, np.einsum("blc,blc->c", dout, normal)


def dropped(x: Array, rate: float, generator: np.random.Generator | None) -> tuple[Array, Array | None]:
    """Return `x` with a share `rate` of its numbers 0 and the others made larger, and the factors.

    Without a generator, which is to say outside training, `x` stays as it is and there are no factors.

    References
    ----------
    N. Srivastava et al. (2014), "Dropout: a simple way to prevent neural networks from overfitting", section 10.
    """
    if generator is None or rate == 0:
        return x, None
    factors = (generator.random(x.shape, dtype=np.float32) >= rate).astype(x.dtype)
    factors /= x.dtype.type(1 - rate)
    return x * factors, factors


class Norm:
    """Divide each state by the root of its mean square, and multiply it by a learned gain.

    Parameters
    ----------
    size : int
        C.
    dtype : dtype
        Of the gain, which starts at 1.
    """

    def __init__(self, size: int, dtype: Any) -> None:
        self.parameters = {"gain": np.ones(size, dtype)}

    def forward(self, x: Array) -> tuple[Array, tuple[Array, Array]]:
        """Return the states ``(B, L, C)``, and what `vjp` needs."""
        normal, size = normalize(x)
        return normal * self.parameters["gain"], (normal, size)

    def vjp(self, dout: Array, saved: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the gradients by the states and by the parameters."""
        dx, dgain = normalize_vjp(dout, *saved, self.parameters["gain"])
        return dx, {"gain": dgain}


class Linear:
    """Multiply states by a matrix and add a bias.

    Parameters
    ----------
    inputs, outputs : int
        Sizes of a state before and after.
    dtype : dtype
        Of the parameters.
    generator : numpy.random.Generator
        Draws the matrix, normal with mean square ``gain / inputs``; the bias starts at 0.
    gain : float
        By how much the result starts larger than the input, as mean squares.
    """

    def __init__(
        self, inputs: int, outputs: int, dtype: Any, generator: np.random.Generator, gain: float = 1.0
    ) -> None:
        weight = generator.standard_normal((inputs, outputs)) * (gain / inputs) ** 0.5
        self.parameters = {"weight": weight.astype(dtype), "bias": np.zeros(outputs, dtype)}

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return the result ``(..., outputs)``, and what `vjp` needs."""
        weight = self.parameters["weight"]
        out = rows(x) @ weight
        out += self.parameters["bias"]
        return out.reshape(*x.shape[:-1], weight.shape[1]), x

    def vjp(self, dout: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        """Return the gradients by the states and by the parameters."""
        flat = rows(dout)
        found = {"weight": rows(x).T @ flat, "bias": flat.sum(axis=0)}
        return (flat @ self.parameters["weight"].T).reshape(x.shape), found


class MLP:
    """Two products with weights and between them the square of what is above 0.

    Parameters
    ----------
    size : int
        C, of the states that come in and go out.
    expansion : int
        How many times larger a state is inside.
    dtype : dtype
        Of the parameters.
    generator : numpy.random.Generator
        Draws the matrices, see `Linear`.
    gain : float
        That of the second product.

    References
    ----------
    D. So et al. (2021), "Primer: searching for efficient transformers for language modeling", section 4.2.
    """

    def __init__(
        self, size: int, expansion: int, dtype: Any, generator: np.random.Generator, gain: float = 1.0
    ) -> None:
        self.up = Linear(size, expansion * size, dtype, generator)
        self.down = Linear(expansion * size, size, dtype, generator, gain)
        self.parameters = prefixed("up", self.up.parameters) | prefixed("down", self.down.parameters)

    def forward(self, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        """Return the result ``(B, L, C)``, and what `vjp` needs."""
        inner, _ = self.up.forward(x)
        np.maximum(inner, 0, out=inner)
        square = inner * inner
        out, _ = self.down.forward(square)
        return out, (x, inner, square)

    def vjp(self, dout: Array, saved: tuple[Array, Array, Array]) -> tuple[Array, dict[str, Array]]:
        """Return the gradients by the states and by the parameters."""
        x, inner, square = saved
        dsquare, down = self.down.vjp(dout, square)
        dsquare *= inner  # which is 0 where nothing comes through
        dsquare *= 2
        dx, up = self.up.vjp(dsquare, x)
        return dx, prefixed("up", up) | prefixed("down", down)


class Table:
    """Look up a learned state for each token id; an id that is none of the table's becomes 0.

    Parameters
    ----------
    count : int
        Rows of the table: the ids from 0 to ``count - 1``.
    size : int
        C.
    dtype : dtype
        Of the table.
    generator : numpy.random.Generator
        Draws the table, normal, with deviation 0.1.
    """

    def __init__(self, count: int, size: int, dtype: Any, generator: np.random.Generator) -> None:
        self.parameters = {"table": (QUIET * generator.standard_normal((count, size))).astype(dtype)}

    def forward(self, ids: Array) -> tuple[Array, Array]:
        """Return the states ``(B, L, C)`` of ids ``(B, L)``, and what `vjp` needs."""
        table = self.parameters["table"]
        known = (ids >= 0) & (ids < len(table))
        states = table[np.where(known, ids, 0)]
        states[~known] = 0
        return states, ids

    def vjp(self, dout: Array, ids: Array) -> tuple[None, dict[str, Array]]:
        """Return no gradient by the ids, and that by the table."""
        from scipy.sparse import csr_array

        # A row of the table gets the sum over its places, in their order: a product with ones there.
        flat, count = ids.reshape(-1), len(self.parameters["table"])
        places = np.flatnonzero((flat >= 0) & (flat < count))
        ones = np.ones(len(places), dout.dtype)
        sums = csr_array((ones, (flat[places], places)), shape=(count, flat.size)) @ rows(dout)
        return None, {"table": sums}


class Features:
    """Make a token of each number of a row: ``x_f w_f + b_f``, each feature with its own weights.

    Parameters
    ----------
    count : int
        Number of features.
    size : int
        C.
    dtype : dtype
        Of the parameters.
    generator : numpy.random.Generator
        Draws weights and biases, normal.

    References
    ----------
    Y. Gorishniy et al. (2021), "Revisiting deep learning models for tabular data", section 3.3.
    """

    def __init__(self, count: int, size: int, dtype: Any, generator: np.random.Generator) -> None:
        drawn = generator.standard_normal((2, count, size)).astype(dtype)
        self.parameters = {"weight": drawn[0], "bias": drawn[1]}

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return the states ``(B, features, C)`` of numbers ``(B, features)``, and what `vjp` needs."""
        out = x[..., None] * self.parameters["weight"]
        out += self.parameters["bias"]
        return out, x

    def vjp(self, dout: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        """Return the gradients by the numbers and by the parameters."""
        found = {"weight": np.einsum("bf,bfc->fc", x, dout), "bias": dout.sum(axis=0)}
        return np.einsum("bfc,fc->bf", dout, self.parameters["weight"]), found
