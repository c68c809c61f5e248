"""Modifiers: a new score for a score, applied in the order given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.base import Mask, Rule, as_mask
from attn_numba.rules.data import (
    AnyArray,
    custom_params,
    fitted,
    floats,
    real_number,
    require_function,
    require_kind,
)
from attn_numba.rules.dropout import Dropout
from attn_numba.rules.formula import Binder, Node, Param, cast, lift, select, symbol
from attn_numba.rules.places import SYMBOLS, Places, Sizes

__all__ = [
    "ALiBi",
    "Bias",
    "CustomModifier",
    "Modifier",
    "ReplaceExcluded",
    "SoftCap",
    "Temperature",
    "as_modifiers",
]


class Modifier(Rule):
    """A rule that makes a new score of a score.

    A modifier of one's own is a `CustomModifier`. A subclass gives static functions: ``apply(s, b, h, i, j, p)``, the
    new score; ``slope(s, b, h, i, j, p)``, its derivative by `s`; where the rule also excludes keys,
    ``excludes(b, h, i, j, p)``; and where it leaves scores as they are, ``neutral(b, h, i, j, p)``, so that `apply` is
    asked elsewhere only. Kernels change nothing in a tile that all modifiers of a call leave as it is. A rule whose
    array has a gradient names it, `learned`, and gives ``learned_slope(s, b, h, i, j, p)``, the derivative of the new
    score by the element of that array which this place reads.

    Attributes
    ----------
    learned : (str, str) or None
        Name of the array that has a gradient, and the axes it broadcasts to, such as ``("slopes", "H")``.
    softmax_only : bool
        Whether the rule has a meaning for weights that are exponentials of scores, and for no others.
    """

    apply: Callable[..., Any]
    slope: Callable[..., Any] | None = None
    excludes: ClassVar[Callable[..., Any] | None] = None
    neutral: ClassVar[Callable[..., Any] | None] = None
    learned: ClassVar[tuple[str, str] | None] = None
    learned_slope: ClassVar[Callable[..., Any] | None] = None
    softmax_only: ClassVar[bool] = False

    @property
    def differentiable(self) -> bool:
        """Whether the derivative of the new score by the old one is known."""
        return self.slope is not None

    def evaluate(self, s: AnyArray, places: Places, sizes: Sizes) -> AnyArray:
        """Return the new scores (B, H, M, N), in the dtype of `s`; float arrays are read in that dtype too."""
        p = tuple(_in_dtype(x, s.dtype) for x in self.arguments(sizes))
        result = np.asarray(self.apply(s, *self._at(places), p)).astype(s.dtype, copy=False)
        return result if self.neutral is None else np.where(self.neutral(*self._at(places), p), s, result)

    def excluded(self, places: Places, sizes: Sizes) -> AnyArray | None:
        """Return which keys are excluded whatever follows (broadcasts to (B, H, M, N)), or None if never any."""
        if self.excludes is None:
            return None
        return np.asarray(self.excludes(*self._at(places), self.arguments(sizes)))

    def formula(self, s: Node, places: Places, sizes: Sizes, binder: Binder) -> Node:
        """Return the formula of the new score; the parameters are appended to `binder`."""
        p = binder.bind(self.arguments(sizes))
        result = cast(self.apply(s, *self._at(places), p), "float")
        return result if self.neutral is None else select(self.neutral(*self._at(places), p), s, result)

    def exclusion(self, places: Places, sizes: Sizes, binder: Binder) -> Node | None:
        """Return the formula of `excluded`, or None."""
        if self.excludes is None:
            return None
        return lift(self.excludes(*self._at(places), binder.bind(self.arguments(sizes))))

    def neutrality(self, places: Places, sizes: Sizes, binder: Binder) -> Node | None:
        """Return the formula of whether a score stays as it is, bit for bit; None if that is not known."""
        if self.neutral is None:
            return None
        return lift(self.neutral(*self._at(places), binder.bind(self.arguments(sizes))))

    def derivatives(self, s: AnyArray, places: Places, sizes: Sizes) -> AnyArray:
        """Return the derivatives of the new scores by the scores `s` (B, H, M, N), in their dtype and shape."""
        return self._derivative_array(self.slope, 1.0, s, places, sizes)

    def learned_derivatives(self, s: AnyArray, places: Places, sizes: Sizes) -> AnyArray:
        """Return the derivatives of the new scores by the elements of the learned array, (B, H, M, N)."""
        return self._derivative_array(self.learned_slope, 0.0, s, places, sizes)

    def derivative_formula(self, s: Node, places: Places, sizes: Sizes, binder: Binder) -> Node:
        """Return the formula of `derivatives`; the parameters are appended to `binder`."""
        return self._derivative_node(self.slope, 1.0, s, places, sizes, binder)

    def learned_derivative_formula(self, s: Node, places: Places, sizes: Sizes, binder: Binder) -> Node:
        """Return the formula of `learned_derivatives`; the parameters are appended to `binder`."""
        return self._derivative_node(self.learned_slope, 0.0, s, places, sizes, binder)

    def _derivative_array(self, function: Any, unchanged: float, s: AnyArray, places: Places, sizes: Sizes) -> AnyArray:
        """Return a derivative in NumPy; `unchanged` is what it is where the rule leaves the score as it is."""
        p = tuple(_in_dtype(x, s.dtype) for x in self.arguments(sizes))
        result = np.broadcast_to(np.asarray(function(s, *self._at(places), p), s.dtype), s.shape)
        if self.neutral is None:
            return result
        return np.where(self.neutral(*self._at(places), p), s.dtype.type(unchanged), result)

    def _derivative_node(
        self, function: Any, unchanged: float, s: Node, places: Places, sizes: Sizes, binder: Binder
    ) -> Node:
        p = binder.bind(self.arguments(sizes))
        result = cast(function(s, *self._at(places), p), "float")
        if self.neutral is None or (result.op == "const" and result.data == unchanged):
            return result
        return select(self.neutral(*self._at(places), p), unchanged, result)


def _in_dtype(param: Param, dtype: np.dtype[Any]) -> Param:
    is_real = isinstance(param, np.ndarray) and param.dtype.kind == "f"
    return param.astype(dtype, copy=False) if is_real else param  # type: ignore[union-attr]


@dataclass(frozen=True, eq=False)
class SoftCap(Modifier):
    """Keep scores within plus and minus `cap`: ``cap * tanh(s / cap)``.

    Parameters
    ----------
    cap : float
        Bound of the new score, above 0.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is not above 0, or not finite.

    References
    ----------
    Gemma Team (2024), "Gemma 2: improving open language models at a practical size", section 2 ("logit
    soft-capping").
    """

    cap: float

    def __post_init__(self) -> None:
        cap = real_number("SoftCap", "cap", self.cap)
        if not 0 < cap < np.inf:
            raise ValueError(f"SoftCap: cap is {cap}; needed a finite number above 0")
        object.__setattr__(self, "cap", cap)

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (self.cap,)

    @staticmethod
    def apply(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return p[0] * np.tanh(s / p[0])

    @staticmethod
    def slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        t = np.tanh(s / p[0])
        return 1 - t * t


@dataclass(frozen=True, eq=False)
class Bias(Modifier):
    """Add an array to the scores: ``s + array[b, h, i, j]``; `i` and `j` are rows.

    Minus infinity excludes the key, whatever follows.

    Parameters
    ----------
    array : array, broadcasts to (B, H, M, N)
        What to add.

    Raises
    ------
    TypeError
        If these are not real numbers.
    ValueError
        If the array has more than four axes or does not fit the call.

    References
    ----------
    C. Raffel et al. (2020), "Exploring the limits of transfer learning with a unified text-to-text transformer",
    section 2.1.
    """

    array: AnyArray
    learned: ClassVar[tuple[str, str]] = ("array", "BHMN")

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", floats("Bias", "array", self.array, 4))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (fitted("Bias", "array", self.array, "BHMN", sizes),)

    @staticmethod
    def apply(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return s + p[0][b, h, i, j]

    @staticmethod
    def slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return 1.0

    @staticmethod
    def learned_slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return 1.0

    @staticmethod
    def excludes(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return p[0][b, h, i, j] == -np.inf


@dataclass(frozen=True, eq=False)
class ALiBi(Modifier):
    """Lower the score in proportion to distance: ``s - slopes[h] * abs(i - j)``. Positional.

    Parameters
    ----------
    slopes : float or float array (H,)
        Score per position, one for each query head.

    Raises
    ------
    TypeError
        If these are not real numbers.
    ValueError
        If they do not fit the number of heads.

    References
    ----------
    O. Press, N. A. Smith and M. Lewis (2022), "Train short, test long: attention with linear biases enables input
    length extrapolation", section 3.
    """

    slopes: Any
    positional: ClassVar[bool] = True
    learned: ClassVar[tuple[str, str]] = ("slopes", "H")

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes", floats("ALiBi", "slopes", self.slopes, 1))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (fitted("ALiBi", "slopes", self.slopes, "H", sizes),)

    @staticmethod
    def apply(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return s - p[0][h] * abs(i - j)

    @staticmethod
    def slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return 1.0

    @staticmethod
    def learned_slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return -1.0 * abs(i - j)


@dataclass(frozen=True, eq=False)
class Temperature(Modifier):
    """Divide the scores of a query: ``s / t[b, h, i]``; `i` is a row.

    Parameters
    ----------
    t : float or array, broadcasts to (B, H, M)
        Temperature; above 1 evens the weights out.

    Raises
    ------
    TypeError
        If these are not real numbers.
    ValueError
        If they do not fit the call.

    References
    ----------
    G. Hinton, O. Vinyals and J. Dean (2015), "Distilling the knowledge in a neural network", section 2.
    """

    t: Any
    learned: ClassVar[tuple[str, str]] = ("t", "BHM")

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", floats("Temperature", "t", self.t, 3))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (fitted("Temperature", "t", self.t, "BHM", sizes),)

    @staticmethod
    def apply(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return s / p[0][b, h, i]

    @staticmethod
    def slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return 1.0 / p[0][b, h, i]

    @staticmethod
    def learned_slope(s: Any, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return -s / (p[0][b, h, i] * p[0][b, h, i])


@dataclass(frozen=True, eq=False)
class ReplaceExcluded(Modifier):
    """Put a number in place of the scores a mask does not allow; these keys stay in the sum.

    This is the fill by a large negative number of older code: where a row has nothing else, its weights come out
    even. The scores of keys that a row should not see at all are a matter for the call's `mask`.

    Parameters
    ----------
    mask : mask rule or bool array
        Where it allows, the score stays.
    value : float
        The score elsewhere.

    Raises
    ------
    TypeError
        If `mask` is no mask or `value` no number.
    ValueError
        If `value` is NaN.

    References
    ----------
    Ours in name; the fill is common, for example J. Devlin et al. (2019), "BERT", in the authors' code.
    """

    mask: Any
    value: float

    def __post_init__(self) -> None:
        mask = as_mask(self.mask, "ReplaceExcluded: mask", keep=True)
        if mask is None:
            raise TypeError("ReplaceExcluded: mask is None; needed a mask rule or a boolean array")
        value = real_number("ReplaceExcluded", "value", self.value)
        if np.isnan(value):
            raise ValueError("ReplaceExcluded: value is NaN; needed a number")
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "value", value)

    def leaves(self) -> Iterator[Rule]:
        yield self
        yield from self.mask.leaves()

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (self.value,)

    def evaluate(self, s: AnyArray, places: Places, sizes: Sizes) -> AnyArray:
        return np.where(self.mask.evaluate(places, sizes), s, np.asarray(self.value, s.dtype))

    @property
    def differentiable(self) -> bool:
        return True

    def derivatives(self, s: AnyArray, places: Places, sizes: Sizes) -> AnyArray:
        return np.broadcast_to(self.mask.evaluate(places, sizes), s.shape).astype(s.dtype)

    def derivative_formula(self, s: Node, places: Places, sizes: Sizes, binder: Binder) -> Node:
        return select(self.mask.formula(places, sizes, binder).allowed, 1.0, 0.0)

    def formula(self, s: Node, places: Places, sizes: Sizes, binder: Binder) -> Node:
        (value,) = binder.bind(self.arguments(sizes))
        return select(self.mask.formula(places, sizes, binder).allowed, s, value)


@dataclass(frozen=True, eq=False)
class CustomModifier(Modifier):
    """Change the score by a plain Python function. Positional.

    The function is called once with symbols, here, and its formula compiled; so it may not branch. It may use
    operators, indexing into `p`, and NumPy's ``exp log tanh sqrt abs minimum maximum``.

    Parameters
    ----------
    apply : function ``(s, b, h, i, j, p) -> float``
        New score for score `s` of query position `i` and key position `j` in sequence `b` and query head `h`.
    params : tuple of numbers and arrays, optional
        What `p` holds: a number is used as ``p[n]``, an array as ``p[n][b, j]``, one index for each axis.
    slope : function ``(s, b, h, i, j, p) -> float``, optional
        Derivative of `apply` by `s`; needed for gradients.

    Raises
    ------
    TypeError
        If a function branches, uses what a rule may not use, or does not return a number.
    ValueError
        In a call, if an index can leave its array.

    Examples
    --------
    >>> decay = CustomModifier(lambda s, b, h, i, j, p: s * np.exp(-p[0] * abs(i - j)), params=(0.01,))

    References
    ----------
    Ours; the idea of a score as a function of indices is that of J. Dong et al. (2024), "Flex attention".
    """

    apply: Callable[..., Any]
    params: tuple[Any, ...] = ()
    slope: Callable[..., Any] | None = None
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", custom_params("CustomModifier", self.params))
        p = Binder().bind(self.params)
        for name, function in (("apply", self.apply), ("slope", self.slope)):
            if function is not None or name == "apply":
                require_function("CustomModifier", name, function)
                result = function(symbol("s", "float"), *self._at(SYMBOLS), p)  # type: ignore[misc]
                require_kind("CustomModifier", name, result, ("float", "int"))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return self.params

    def _formulas(self, p: tuple[Any, ...]) -> Iterator[Node]:
        for function in (self.apply, self.slope):
            if function is not None:
                yield cast(function(symbol("s", "float"), *self._at(SYMBOLS), p), "float")


def as_modifiers(x: object) -> tuple[Modifier, ...]:
    """Return the modifiers of a call as a tuple: None, one modifier, or a sequence of them.

    Raises
    ------
    TypeError
        If it is anything else; the message names the cure.
    """
    if x is None:
        return ()
    given = (x,) if isinstance(x, Modifier) else tuple(x) if isinstance(x, (tuple, list)) else (x,)
    for n, modifier in enumerate(given):
        if isinstance(modifier, Modifier):
            continue
        name = f"modifiers[{n}]" if isinstance(x, (tuple, list)) else "modifiers"
        what = f"{name} is {type(modifier).__name__}; needed a modifier"
        if isinstance(modifier, Dropout):
            raise TypeError(f"{what}: pass it as dropout=")
        if isinstance(modifier, Mask):
            raise TypeError(f"{what}: pass a mask as mask=")
        if isinstance(modifier, type):
            raise TypeError(f"{name} is the class {modifier.__name__}; needed {modifier.__name__}(...)")
        if hasattr(modifier, "__array__"):
            raise TypeError(f"{what}: wrap an array to add to the scores, Bias(array)")
        if callable(modifier):
            raise TypeError(f"{what}: wrap a function, CustomModifier(function)")
        raise TypeError(what)
    return given
