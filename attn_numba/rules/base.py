"""What all rules share, and how masks are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np

from attn_numba.rules.data import AnyArray, as_array, fitted, frozen
from attn_numba.rules.formula import Binder, Node, Param, lift, symbol
from attn_numba.rules.interval import check, interval, known
from attn_numba.rules.places import Places, Sizes


class MaskFormula(NamedTuple):
    """A mask as truth values: of an element, certainly of all and possibly of some elements of a tile."""

    allowed: Node
    certain: Node
    possible: Node


class Rule:
    """What masks and modifiers share.

    Attributes
    ----------
    positional : bool
        Whether `i` and `j` are positions for this rule; else they are rows of q and of k.
    """

    positional: ClassVar[bool] = False
    __array_ufunc__ = None  # so that `array & rule` asks the rule

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        """Return the parameters of the rule's function in a call of these sizes.

        Raises
        ------
        ValueError
            If an array of the rule does not fit the sizes; the message names rule and argument.
        """
        return ()

    def leaves(self) -> Iterator[Rule]:
        """Yield the rules this one is made of."""
        yield self

    @property
    def uses_positions(self) -> bool:
        """Whether the rule or a rule inside it sees positions and so needs offsets."""
        return any(leaf.positional for leaf in self.leaves())

    def _at(self, places: Places) -> tuple[Any, Any, Any, Any]:
        """Return the places as this rule's functions take them: b, h, i, j."""
        i, j = (places.i, places.j) if self.positional else (places.row_i, places.row_j)
        return places.b, places.h, i, j

    def check(self, sizes: Sizes, query_offset: Any = 0, key_offset: Any = 0) -> None:
        """Check the rule against one call: the shapes of its arrays, and that none of its indices can leave them.

        Parameters
        ----------
        sizes : Sizes
            Sizes of the call.
        query_offset, key_offset : int or int array (B,)
            Position of query row 0 and of key row 0.

        Raises
        ------
        ValueError
            If an array does not fit, an index can leave its array, a divisor can be zero or an integer exceeds 32
            bits.
        """
        empty = 0 in (sizes.B, sizes.H, sizes.M, sizes.N)
        for leaf in self.leaves():
            arguments = leaf.arguments(sizes)
            if empty:
                continue
            ranges = ranges_of(sizes, query_offset, key_offset)
            leaf._check_places(ranges)
            binder = Binder()
            for formula in leaf._formulas(binder.bind(arguments)):
                check(formula, ranges, binder.params, type(leaf).__name__)

    def _formulas(self, p: tuple[Any, ...]) -> Iterator[Node]:
        """Yield the formulas to check; none if the rule itself makes sure that they cannot go wrong."""
        yield from ()

    def _check_places(self, ranges: dict[str, tuple[int, int]]) -> None:
        """Check what a rule demands of the places themselves."""


def ranges_of(sizes: Sizes, query_offset: Any, key_offset: Any) -> dict[str, tuple[int, int]]:
    """Return first and last value of each symbol in a call, and of the ends of its tiles."""
    ranges = {"b": (0, sizes.B - 1), "h": (0, sizes.H - 1)}
    for name, length, offset in (("i", sizes.M, query_offset), ("j", sizes.N, key_offset)):
        first, last = int(np.min(offset)), int(np.max(offset)) + length - 1
        ranges[name], ranges[f"row_{name}"] = (first, last), (0, length - 1)
        ranges[f"{name}0"], ranges[f"{name}1"] = (first, last), (first + 1, last + 1)
    return ranges


class Mask(Rule):
    """A rule that says which keys a query may attend to; masks join with ``&``, ``|`` and ``~``.

    A mask of one's own is a `CustomMask`. A subclass gives `allowed`, a static function ``allowed(b, h, i, j, p)`` of
    operators and NumPy's ``exp log tanh sqrt abs minimum maximum``, where `p` is what `arguments` returns; and, if
    the bounds that `interval` reads from it are too wide, ``tile(b, h, i0, i1, j0, j1, p)`` which answers 0 (no pair
    of the tile is allowed), 1 (some) or 2 (all).
    """

    allowed: Callable[..., Any]
    tile: Callable[..., Any] | None = None

    @property
    def run_count(self) -> int:
        """Number of stretches that `run` lists for each query; 0 if it lists none."""
        return 0

    def run(self, b: Any, h: Any, i: Any, n: Any, p: Any) -> tuple[Any, Any]:
        """Return first and end of stretch n of the keys of query i; `run_count` of them hold all it may attend to.

        Only for masks whose queries see a fixed number of short stretches, in ascending order; `run_count` is 0 for
        others.
        """
        raise NotImplementedError(f"{type(self).__name__} does not list its keys in stretches")

    def evaluate(self, places: Places, sizes: Sizes) -> AnyArray:
        """Return whether each place is allowed: a boolean array that broadcasts to (B, H, M, N)."""
        p = tuple(
            x if isinstance(x, np.ndarray) else np.asarray(x)[()] for x in self.arguments(sizes)
        )  # ~ of NumPy's truth
        return np.asarray(self.allowed(*self._at(places), p))

    def formula(self, places: Places, sizes: Sizes, binder: Binder) -> MaskFormula:
        """Return the mask's formulas; its parameters are appended to `binder`."""
        p = binder.bind(self.arguments(sizes))
        allowed = lift(self.allowed(*self._at(places), p))
        if self.tile is None:
            return MaskFormula(allowed, *known(interval(allowed, binder)))
        answer = lift(self.tile(places.b, places.h, *self._tile_symbols(), p))
        return MaskFormula(allowed, answer == 2, answer > 0)

    def _tile_symbols(self) -> tuple[Node, ...]:
        prefix = "" if self.positional else "row_"
        return tuple(symbol(prefix + end) for end in ("i0", "i1", "j0", "j1"))

    def __and__(self, other: object) -> Mask:
        return AllOf(_joined(AllOf, self, _operand("&", other)))

    def __rand__(self, other: object) -> Mask:
        return AllOf(_joined(AllOf, _operand("&", other), self))

    def __or__(self, other: object) -> Mask:
        return AnyOf(_joined(AnyOf, self, _operand("|", other)))

    def __ror__(self, other: object) -> Mask:
        return AnyOf(_joined(AnyOf, _operand("|", other), self))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError("a mask has no truth value: use & | ~, not and, or, not")


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Allow what a boolean array says.

    Parameters
    ----------
    array : bool array, broadcasts to (B, H, M, N)
        True where the query (row of q) may attend to the key (row of k).

    Raises
    ------
    TypeError
        If the array is not boolean.
    ValueError
        If it has more than four axes.

    References
    ----------
    The boolean mask of A. Vaswani et al. (2017), "Attention is all you need", section 3.2.3, as an array.

    Examples
    --------
    >>> import numpy as np
    >>> Dense(np.eye(2, dtype=bool)) | Dense(np.array([True, False]))
    AnyOf(Dense(array=array([[ True, False],
           [False,  True]])), Dense(array=array([ True, False])))
    """

    array: AnyArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", as_array(self.array, "Dense", "array"))
        self._require()
        object.__setattr__(self, "array", frozen(self.array))

    @classmethod
    def borrowing(cls, array: AnyArray) -> Dense:
        """Return the mask of an array without a copy, for one call; the array stays its owner's."""
        mask = object.__new__(cls)
        object.__setattr__(mask, "array", array)
        mask._require()
        return mask

    def _require(self) -> None:
        _require_boolean(self.array, "Dense: array")
        if self.array.ndim > 4:
            raise ValueError(f"Dense: array has {self.array.ndim} axes; needed at most 4, (B, H, M, N)")

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (fitted("Dense", "array", self.array, "BHMN", sizes),)

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return p[0][b, h, i, j]


class _Joined(Mask):
    """Masks joined into one."""

    def __init__(self, masks: tuple[Mask, ...]) -> None:
        object.__setattr__(self, "masks", masks)

    masks: tuple[Mask, ...]

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.masks))})"

    def leaves(self) -> Iterator[Rule]:
        for mask in self.masks:
            yield from mask.leaves()


class AllOf(_Joined):
    """Allow what every one of several masks allows; ``a & b`` makes it."""

    def evaluate(self, places: Places, sizes: Sizes) -> AnyArray:
        result = self.masks[0].evaluate(places, sizes)
        for mask in self.masks[1:]:
            result = result & mask.evaluate(places, sizes)
        return result

    def formula(self, places: Places, sizes: Sizes, binder: Binder) -> MaskFormula:
        result = self.masks[0].formula(places, sizes, binder)
        for mask in self.masks[1:]:
            other = mask.formula(places, sizes, binder)
            result = MaskFormula(*(a & b for a, b in zip(result, other, strict=True)))
        return result


class AnyOf(_Joined):
    """Allow what at least one of several masks allows; ``a | b`` makes it."""

    def evaluate(self, places: Places, sizes: Sizes) -> AnyArray:
        result = self.masks[0].evaluate(places, sizes)
        for mask in self.masks[1:]:
            result = result | mask.evaluate(places, sizes)
        return result

    def formula(self, places: Places, sizes: Sizes, binder: Binder) -> MaskFormula:
        result = self.masks[0].formula(places, sizes, binder)
        for mask in self.masks[1:]:
            other = mask.formula(places, sizes, binder)
            result = MaskFormula(*(a | b for a, b in zip(result, other, strict=True)))
        return result


@dataclass(frozen=True, eq=False)
class Not(Mask):
    """Allow what another mask does not; ``~a`` makes it."""

    mask: Mask

    def leaves(self) -> Iterator[Rule]:
        yield from self.mask.leaves()

    def evaluate(self, places: Places, sizes: Sizes) -> AnyArray:
        return ~self.mask.evaluate(places, sizes)

    def formula(self, places: Places, sizes: Sizes, binder: Binder) -> MaskFormula:
        allowed, certain, possible = self.mask.formula(places, sizes, binder)
        return MaskFormula(~allowed, ~possible, ~certain)


def _joined(kind: type[_Joined], *masks: Mask) -> tuple[Mask, ...]:
    """Operands of the same kind are taken apart: ``a & b & c`` is one mask of three."""
    return tuple(part for mask in masks for part in (mask.masks if isinstance(mask, kind) else (mask,)))


def _operand(sign: str, x: object) -> Mask:
    mask = as_mask(x, f"the other side of {sign}", keep=True)
    if mask is None:
        raise TypeError(f"the other side of {sign} is None; needed a mask rule or a boolean array")
    return mask


def as_mask(x: object, name: str = "mask", keep: bool = False) -> Mask | None:
    """Return a mask for what a call may be given as one: None, a mask rule, or a boolean array.

    Parameters
    ----------
    x : object
        What was given.
    name : str
        What to call it in messages.
    keep : bool
        Whether the mask outlives the call, so that an array must be copied.

    Raises
    ------
    TypeError
        If it is anything else; the message names the cure.
    """
    if x is None or isinstance(x, Mask):
        return x
    if isinstance(x, Rule):
        raise TypeError(f"{name} is a modifier, {type(x).__name__}: pass it as modifiers=")
    if isinstance(x, type):
        raise TypeError(f"{name} is the class {x.__name__}; needed a mask, {x.__name__}(...)")
    if callable(x) and not hasattr(x, "__array__"):
        raise TypeError(f"{name} is a function: wrap it, CustomMask({getattr(x, '__name__', 'function')})")
    if isinstance(x, (bool, int, float, str, bytes)):
        raise TypeError(f"{name} is {x!r}; needed a mask rule such as Causal(), or a boolean array")
    array = as_array(x, name)
    _require_boolean(array, name)
    return Dense(array) if keep else Dense.borrowing(array)


def _require_boolean(array: AnyArray, name: str) -> None:
    if array.dtype == np.bool_:
        return
    what = f"{name} has dtype {array.dtype}; needed a boolean array, True = may attend"
    if array.dtype.kind in "iu":
        raise TypeError(
            f"{what}: pass m.astype(bool) (nonzero = may attend), or modifiers=Bias(m) to add it to the scores"
        )
    raise TypeError(f"{what}: pass modifiers=Bias(m) to add it to the scores, or m.astype(bool) (nonzero = may attend)")
