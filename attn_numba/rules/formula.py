"""The formula of a rule, and what can be read from it without a compiler.

A rule is a plain function without branches, so calling it once with symbols in place of numbers gives its whole
formula: a tree of `Node`. The tree is then read in several ways: as NumPy (`evaluate`), as bounds over a tile of
queries and keys (`interval`), as a check that no array index can leave its array (`check`), and, elsewhere, as code
for one machine or another.

Integers of a formula are 32-bit, floats are whatever type the reader computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np

COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
LOGICAL = ("&", "|", "~")
REAL = ("/", "exp", "log", "tanh", "sqrt")
INT_LOW, INT_HIGH = -(2**31), 2**31 - 1
QUERY_LEVELS = 8  # of range tables along queries: exact for up to 127 rows; kernels ask for up to 64 together
TABLE_LIMIT = 2**27  # bytes of range tables, 2 log2(N) times the size of their array; larger ones are not made

UFUNCS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "floor_divide": "//",
    "remainder": "%",
    "negative": "neg",
    "absolute": "abs",
    "fabs": "abs",
    "minimum": "min",
    "maximum": "max",
    "sqrt": "sqrt",
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
    "bitwise_and": "&",
    "logical_and": "&",
    "bitwise_or": "|",
    "logical_or": "|",
    "invert": "~",
    "logical_not": "~",
}
NUMPY: dict[str, Callable[..., Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "//": np.floor_divide,
    "%": np.remainder,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
    "&": np.logical_and,
    "|": np.logical_or,
    "~": np.logical_not,
    "select": np.where,
    "ilog2": lambda x: np.frexp(x)[1] - 1,
}


def _unary(op: str) -> Callable[[Node], Node]:
    return lambda self: node(op, self)


def _binary(op: str) -> tuple[Callable[[Node, object], Node], Callable[[Node, object], Node]]:
    """Return the methods of an operator, with the node on the left and on the right."""
    return lambda self, other: node(op, self, other), lambda self, other: node(op, other, self)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Node:
    """A number of a rule that is not known yet: an operation on other such numbers.

    Attributes
    ----------
    op : str
        ``const`` (`data` is the number), ``symbol`` (`data` is its name), ``number`` (`data` is its place in the list
        of parameters), ``load`` (`data` is an `Array`, `args` its indices), ``cast`` (to `kind`), ``select``
        (condition, then, else), ``ilog2`` (the floor of the base-2 logarithm of a positive integer) or the name of an
        operator.
    args : tuple of Node
        Operands.
    kind : {"int", "float", "bool"}
        Type of the value.
    data : object
        See `op`.
    """

    op: str
    args: tuple[Node, ...] = ()
    kind: str = "float"
    data: Any = None

    def __repr__(self) -> str:
        return _text(self)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: object, **options: object) -> Node:
        if method != "__call__" or ufunc.__name__ not in UFUNCS or options:
            used = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
            raise TypeError(
                f"a rule may not use numpy.{used}{' with options' if options else ''}: "
                "it has operators and numpy's exp, log, tanh, sqrt, abs, minimum and maximum"
            )
        return node(UFUNCS[ufunc.__name__], *args)

    def __array_function__(self, function: Callable[..., Any], *_: object) -> NoReturn:
        raise TypeError(
            f"a rule may not use numpy.{function.__name__}: "
            "it has operators and numpy's exp, log, tanh, sqrt, abs, minimum and maximum"
        )

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "a rule may not make an array of its arguments: pass arrays in params and index them, p[0][b, j]"
        )

    def __bool__(self) -> NoReturn:
        raise TypeError("a rule may not branch: use & | ~ and numpy.minimum, not if, and, or, not, min")

    def __int__(self) -> NoReturn:
        raise TypeError("a rule may not use int(): its integers stay integers under + - * // %")

    def __float__(self) -> NoReturn:
        raise TypeError("a rule may not use float() or the math module: use numpy.exp, numpy.sqrt; / makes a float")

    def __index__(self) -> NoReturn:
        raise TypeError(
            "a rule may not use its arguments as an index: pass the array in params and index it, p[0][b, j]"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError("a rule may not loop over its arguments: each is one number")

    def __getitem__(self, _: object) -> NoReturn:
        raise TypeError(
            "a rule may not index a number: only arrays in params have indices, one for each axis, p[0][b, j]"
        )

    def __pow__(self, _: object) -> NoReturn:
        raise TypeError("a rule may not use **: write x * x, or numpy.exp(y * numpy.log(x))")

    __rpow__ = __pow__
    __hash__ = object.__hash__

    __neg__ = _unary("neg")
    __abs__ = _unary("abs")
    __invert__ = _unary("~")
    __add__, __radd__ = _binary("+")
    __sub__, __rsub__ = _binary("-")
    __mul__, __rmul__ = _binary("*")
    __truediv__, __rtruediv__ = _binary("/")
    __floordiv__, __rfloordiv__ = _binary("//")
    __mod__, __rmod__ = _binary("%")
    __and__, __rand__ = _binary("&")
    __or__, __ror__ = _binary("|")
    __lt__, __gt__ = _binary("<")[0], _binary(">")[0]
    __le__, __ge__ = _binary("<=")[0], _binary(">=")[0]
    __eq__, __ne__ = _binary("==")[0], _binary("!=")[0]  # type: ignore[assignment]


def _text(formula: Node) -> str:
    """Return the formula in words; what is used more than once is named, so the length is that of the formula."""
    uses: dict[int, int] = {}

    def count(x: Node) -> None:
        uses[id(x)] = uses.get(id(x), 0) + 1
        if uses[id(x)] == 1:
            for a in x.args:
                count(a)

    names: dict[int, str] = {}
    definitions: list[str] = []

    def text(x: Node) -> str:
        if id(x) in names:
            return names[id(x)]
        words = _operation(x, [text(a) for a in x.args])
        if uses[id(x)] > 1 and x.args:
            names[id(x)] = f"t{len(names)}"
            definitions.append(f"{names[id(x)]} = {words}")
            return names[id(x)]
        return words

    count(formula)
    result = text(formula)
    return "; ".join([*definitions, result])


def _operation(x: Node, args: list[str]) -> str:
    if x.op in ("const", "symbol"):
        return str(x.data)
    if x.op == "number":
        return f"p{x.data}"
    if x.op == "load":
        return f"p{x.data.n}[{', '.join(args)}]"
    if x.op == "cast":
        return f"{x.kind}({args[0]})"
    if len(args) == 2 and not x.op.isalpha():
        return f"({args[0]} {x.op} {args[1]})"
    return f"{x.op}({', '.join(args)})"


@dataclass(frozen=True)
class Array:
    """An array parameter of a formula; indexing it, one index for each axis, makes a ``load`` node.

    Attributes
    ----------
    n : int
        Its place in the list of parameters.
    dtype : numpy.dtype
        Type of its elements.
    ndim : int
        Number of its axes.
    """

    n: int
    dtype: np.dtype[Any]
    ndim: int

    def __getitem__(self, index: object) -> Node:
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) != self.ndim:
            raise TypeError(f"an array with {self.ndim} axes needs {self.ndim} indices in a rule; {len(indices)} given")
        if any(isinstance(x, (slice, type(None), type(...))) for x in indices):
            raise TypeError("a rule may not slice an array: give one index for each axis")
        args = tuple(lift(x) for x in indices)
        if any(x.kind != "int" for x in args):
            raise TypeError(
                f"an index must be an integer; got {', '.join(x.kind for x in args)}: divide with //, not /"
            )
        return Node("load", args, _kind_of(self.dtype), self)

    def __iter__(self) -> NoReturn:
        raise TypeError("a rule may not loop over an array: index it, one index for each axis")


Param: TypeAlias = "int | float | np.ndarray[Any, Any]"


def _kind_of(dtype: np.dtype[Any]) -> str:
    return {"b": "bool", "i": "int", "u": "int"}.get(dtype.kind, "float")


def lift(x: object) -> Node:
    """Return `x` as a node: nodes as they are, numbers as constants.

    Raises
    ------
    TypeError
        If `x` is neither a node nor a number.
    ValueError
        If `x` is an integer beyond 32 bits.
    """
    if isinstance(x, Node):
        return x
    if isinstance(x, np.ndarray) and x.ndim == 0:
        x = x.item()
    if isinstance(x, (bool, np.bool_)):
        return Node("const", kind="bool", data=bool(x))
    if isinstance(x, (int, np.integer)):
        if not INT_LOW <= x <= INT_HIGH:
            raise ValueError(f"integers of a rule are 32-bit; got {x}: write it as a float")
        return Node("const", kind="int", data=int(x))
    if isinstance(x, (float, np.floating)):
        return Node("const", kind="float", data=float(x))
    raise TypeError(
        f"a rule computes with numbers; got {type(x).__name__}: pass arrays in params and index them, p[0][b, j]"
    )


def symbol(name: str, kind: str = "int") -> Node:
    """Return the symbol called `name`."""
    return Node("symbol", kind=kind, data=name)


def cast(x: object, kind: str) -> Node:
    """Return `x` as a node of the given kind."""
    x = lift(x)
    return x if x.kind == kind else Node("cast", (x,), kind)


def node(op: str, *operands: object) -> Node:
    """Return the node of an operator applied to numbers or nodes; integers stay integers, mixed operands become floats.

    Raises
    ------
    TypeError
        If the operator has no meaning for these kinds.
    """
    args = tuple(lift(x) for x in operands)
    kinds = {x.kind for x in args}
    if op in LOGICAL:
        if kinds != {"bool"}:
            raise TypeError(
                f"{op} joins comparisons; got {' and '.join(x.kind for x in args)} (comparisons need parentheses)"
            )
        return _simplified(Node(op, args, "bool"))
    if kinds == {"bool"} and op not in COMPARISONS:
        raise TypeError(f"{op} of truth values is ambiguous: join them with & | ~, or multiply by 1 to count")
    kind = "float" if "float" in kinds or op in REAL else "int"
    return Node(op, tuple(cast(x, kind) for x in args), "bool" if op in COMPARISONS else kind)


def select(condition: object, then: object, otherwise: object) -> Node:
    """Return the node that is `then` where the condition holds, else `otherwise`."""
    condition, then, otherwise = lift(condition), lift(then), lift(otherwise)
    kind = then.kind if then.kind == otherwise.kind else "float" if "float" in (then.kind, otherwise.kind) else "int"
    return Node("select", (condition, cast(then, kind), cast(otherwise, kind)), kind)


def _simplified(x: Node) -> Node:
    """`& | ~` with the constants True and False worked out, so that what is certain costs nothing at run time."""
    if x.op == "~":
        return lift(not x.args[0].data) if x.args[0].op == "const" else x
    a, b = x.args
    if a.op == "const":
        a, b = b, a
    if b.op != "const":
        return x
    return a if b.data == (x.op == "&") else b


class Binder:
    """The flat list of parameters of one call, and the symbols that stand for them in its formulas.

    Attributes
    ----------
    params : list
        Python ints, Python floats and NumPy arrays, in the order bound.
    query_levels : int or None
        Levels of range tables along queries at most; None for all of them.
    """

    def __init__(self, query_levels: int | None = QUERY_LEVELS) -> None:
        self.query_levels = query_levels
        self.params: list[Param] = []
        self._bound: dict[tuple[Any, ...], Array] = {}
        self._tables: dict[tuple[int, int | None], tuple[Array, Array]] = {}
        self._powers: Array | None = None

    def bind(self, params: tuple[Param, ...]) -> tuple[Any, ...]:
        """Append parameters; return a node for each number and an `Array` for each array (bound before or not)."""
        return tuple(self._array(x) if isinstance(x, np.ndarray) else self._number(x) for x in params)

    def _number(self, param: int | float) -> Node:
        self.params.append(param)
        return Node("number", kind="float" if isinstance(param, float) else "int", data=len(self.params) - 1)

    def _array(self, param: np.ndarray[Any, Any]) -> Array:
        memory = (param.__array_interface__["data"][0], param.shape, param.strides, param.dtype)
        if memory not in self._bound:
            self.params.append(param)
            self._bound[memory] = Array(len(self.params) - 1, param.dtype, param.ndim)
        return self._bound[memory]

    def range_of(self, load: Node, first: Node, stop: Node, levels: int | None = None) -> tuple[Node, Node] | None:
        """Return the least and the greatest of an array's elements whose last index goes from `first` to `stop - 1`.

        The other indices are those of `load`. None if the array is too large to keep tables for. With so many `levels`,
        a stretch of ``2**(levels - 1)`` and more has the bounds of the whole axis: tables of less memory and time.
        """
        array: Array = load.data
        data = self.params[array.n]
        assert isinstance(data, np.ndarray)
        if 2 * _core(data).nbytes * _level_count(data.shape[-1], levels) > TABLE_LIMIT:
            return None
        if (array.n, levels) not in self._tables:
            minima, maxima = self.bind(range_tables(data, levels))
            self._tables[array.n, levels] = minima, maxima
        if self._powers is None:
            (self._powers,) = self.bind((_POWERS,))
        level = Node("ilog2", (stop - first,), "int")
        if levels is not None:
            level = node("min", level, levels - 1)
        second = stop - self._powers[level]
        tables = self._tables[array.n, levels]
        low, high = ([table[(*load.args[:-1], level, at)] for at in (first, second)] for table in tables)
        return _least(*low), _greatest(*high)


_POWERS = 2 ** np.arange(31, dtype=np.int32)


def _level_count(length: int, levels: int | None) -> int:
    whole = max(length, 1).bit_length()
    return whole if levels is None else min(whole, levels)


def range_tables(
    array: np.ndarray[Any, Any], levels: int | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return sparse tables for the least and greatest element of any stretch of the last axis.

    Parameters
    ----------
    array : array (..., N)
        Numbers or truth values.
    levels : int, optional
        Levels to make at most; where there would be more, the last one holds the extremes of the whole axis.

    Returns
    -------
    minima, maxima : array (..., levels, N)
        Level l at n is the least (greatest) of ``array[..., n : n + 2**l]``, so the least of any stretch from `lo` to
        `hi` (included) is that of two overlapping ones: ``min(minima[..., l, lo], minima[..., l, hi + 1 - 2**l])``
        with ``l = ilog2(hi + 1 - lo)``.

    References
    ----------
    M. A. Bender and M. Farach-Colton (2000), "The LCA problem revisited", section 3.
    """
    length = array.shape[-1]
    count = _level_count(length, levels)
    core = _core(array)
    tables = []
    for extreme in (np.minimum, np.maximum):
        table = np.empty((*core.shape[:-1], count, length), array.dtype)
        table[..., 0, :] = core
        for level in range(1, count):
            half = 2 ** (level - 1)
            below, here = table[..., level - 1, :], table[..., level, :]
            here[..., length - half :] = below[..., length - half :]
            extreme(below[..., : length - half], below[..., half:], out=here[..., : length - half])
        if count < _level_count(length, None):
            table[..., -1, :] = extreme.reduce(core, axis=-1, keepdims=True)
        tables.append(np.broadcast_to(table, (*array.shape[:-1], count, length)))
    return tables[0], tables[1]


def _core(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what differs of an array: leading axes of stride 0 (broadcast) cut to length 1."""
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides[:-1])]


def _least(a: Node, b: Node) -> Node:
    return a & b if a.kind == "bool" else node("min", a, b)


def _greatest(a: Node, b: Node) -> Node:
    return a | b if a.kind == "bool" else node("max", a, b)


# --- readings ---


def evaluate(formula: Node, values: Mapping[str, Any], params: list[Param]) -> Any:
    """Return the value of a formula, computed in NumPy by broadcasting.

    Parameters
    ----------
    formula : Node
        The formula.
    values : dict of str to array or number
        What each symbol stands for.
    params : list
        The parameters, as `Binder.params` holds them.
    """
    known: dict[int, Any] = {}

    def value(x: Node) -> Any:
        if id(x) not in known:
            known[id(x)] = compute(x)
        return known[id(x)]

    def compute(x: Node) -> Any:
        if x.op == "const":
            return x.data
        if x.op == "symbol":
            return values[x.data]
        if x.op == "number":
            return params[x.data]
        args = [value(a) for a in x.args]
        if x.op == "load":
            array = params[x.data.n]
            assert isinstance(array, np.ndarray)
            return array[tuple(args)]
        if x.op == "cast":
            return np.asarray(args[0]).astype(np.int32 if x.kind == "int" else np.float64)
        return NUMPY[x.op](*args)

    with np.errstate(all="ignore"):
        return value(formula)
