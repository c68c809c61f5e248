"""Bounds of a formula: over a tile of queries and keys, and over a whole problem.

`interval` turns a formula of elements into two formulas of a tile, its least and greatest value there; for a truth
value these are "true of every element" and "true of some element, as far as known". That answers NONE, SOME or ALL
for a tile of any mask without anyone writing it down. `check` evaluates the same bounds over a whole problem, before
it runs.

Both ends are computed by the operations of the formula itself. Rounding is monotone, so they hold in any precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from attn_numba.rules.formula import (
    COMPARISONS,
    INT_HIGH,
    INT_LOW,
    Binder,
    Node,
    Param,
    cast,
    evaluate,
    lift,
    node,
    select,
    symbol,
)

# None stands for "nothing is known"; a float end that turns out NaN when evaluated says the same of both ends.
Bounds: TypeAlias = "tuple[Node | None, Node | None]"

UNKNOWN: Bounds = (None, None)
EITHER: Bounds = (lift(False), lift(True))
TILE = {name: (symbol(f"{name}0"), symbol(f"{name}1") - 1) for name in ("i", "j", "row_i", "row_j")}


def interval(formula: Node, binder: Binder | None = None) -> Bounds:
    """Return the bounds of a formula over the tile of queries i0 to i1 - 1 and keys j0 to j1 - 1.

    Parameters
    ----------
    formula : Node
        A formula of the symbols ``b h i j row_i row_j s``.
    binder : Binder, optional
        Where the arrays of the formula are bound; with it, reads along a row of an array are bounded through range
        tables.

    Returns
    -------
    low, high : Node or None
        Formulas of ``b h`` and of the ends ``i0 i1 j0 j1 row_i0 row_i1 row_j0 row_j1``; None where nothing is known.
        For a truth value: certainly true, possibly true (never None).
    """

    def row(load: Node, indices: tuple[Bounds, ...]) -> Bounds:
        last = load.args[-1]
        if binder is not None and last.op == "symbol" and last.data in TILE and all(_is_point(x) for x in indices[:-1]):
            levels = binder.query_levels if last.data[-1] == "i" else None
            return binder.range_of(load, symbol(f"{last.data}0"), symbol(f"{last.data}1"), levels) or UNKNOWN
        return UNKNOWN

    return Reader(TILE, row).bounds(formula)


def known(bounds: Bounds) -> tuple[Node, Node]:
    """Return bounds that are both there, as those of a truth value always are."""
    low, high = bounds
    assert low is not None
    assert high is not None
    return low, high


class Reader:
    """Bounds of formulas, given the bounds of their symbols.

    Parameters
    ----------
    symbols : dict of str to (Node, Node)
        Bounds of the symbols that vary; the others are points.
    load : function (Node, bounds of its indices) -> bounds
        Bounds of a ``load`` whose indices vary.
    """

    def __init__(self, symbols: Mapping[str, Bounds], load: Callable[[Node, tuple[Bounds, ...]], Bounds]) -> None:
        self.symbols = {"s": UNKNOWN, **symbols}
        self.load = load
        self.read: dict[int, tuple[Node, Bounds]] = {}  # with the node itself, so that its id stays its own

    def bounds(self, x: Node) -> Bounds:
        if id(x) not in self.read:
            self.read[id(x)] = x, self._read(x)
        return self.read[id(x)][1]

    def _read(self, x: Node) -> Bounds:
        if x.op == "symbol":
            return self.symbols.get(x.data, (x, x))
        args = tuple(self.bounds(a) for a in x.args)
        if all(_is_point(a) for a in args):
            ends = tuple(low for low, _ in args if low is not None)
            same = x if all(a is b for a, b in zip(ends, x.args, strict=True)) else Node(x.op, ends, x.kind, x.data)
            return same, same
        result = self.load(x, args) if x.op == "load" else _combined(x, args)
        if x.kind == "bool":
            return tuple(b if a is None else a for a, b in zip(result, EITHER, strict=True))  # type: ignore[return-value]
        if x.kind == "float" and (result[0] is None or result[1] is None):
            return UNKNOWN  # half a bound would say nothing of NaN
        return result


def _is_point(x: Bounds) -> bool:
    return x[0] is not None and x[0] is x[1]


def _combined(x: Node, args: tuple[Bounds, ...]) -> Bounds:
    """Bounds of an operation some of whose operands vary."""
    if x.op == "select":
        return _chosen(x.kind, *args)
    if x.op == "min":
        return _extreme("min", [a[0] for a in args], [a[1] for a in args])
    if x.op == "max":
        high, low = _extreme("max", [a[1] for a in args], [a[0] for a in args])
        return low, high
    if x.op == "abs":
        low, high = args[0]
        below = node("neg", high) if high is not None else None
        known = [e for e in (low, below) if e is not None]
        least = known[0] if len(known) == 1 else node("max", *known) if known else None
        zero = 0 if x.kind == "int" else 0.0
        return (
            node("max", least, zero) if least is not None else lift(zero),
            node("max", -low, high) if low is not None and high is not None else None,
        )
    if x.op == "neg":
        low, high = args[0]
        return -high if high is not None else None, -low if low is not None else None
    if x.op in COMPARISONS and any(e is None for a in args for e in a):
        return _one_sided(x.op, args)
    if x.op in ("+", "-"):
        (a, b), (c, d) = args
        if x.op == "-":
            c, d = d, c
        low = node(x.op, a, c) if a is not None and c is not None else None
        high = node(x.op, b, d) if b is not None and d is not None else None
        return _settled(x.kind, low, high)
    if any(e is None for a in args for e in a):
        return UNKNOWN
    return _bounded(x, [(low, high) for low, high in args if low is not None and high is not None])


def _bounded(x: Node, ends: list[tuple[Node, Node]]) -> Bounds:
    """Bounds of an operation all of whose operands have both ends."""
    if x.op in COMPARISONS:
        return _compared(x.op, ends[0], ends[1])
    if x.op in ("&", "|"):
        return node(x.op, ends[0][0], ends[1][0]), node(x.op, ends[0][1], ends[1][1])
    if x.op == "~":
        return ~ends[0][1], ~ends[0][0]
    if x.op == "cast":
        return cast(ends[0][0], x.kind), cast(ends[0][1], x.kind)
    if x.op == "sqrt":
        return node("sqrt", ends[0][0]), node("sqrt", ends[0][1])
    if x.op == "*":
        return _product(x, ends)
    if x.op in ("/", "//"):
        return _quotient(x, ends[0], ends[1])
    if x.op == "%" and x.kind == "int":
        return _remainder(ends[0], ends[1])
    return UNKNOWN  # exp, log, tanh: compiled versions are approximations and need not be monotone


def _extreme(op: str, lows: list[Node | None], highs: list[Node | None]) -> Bounds:
    """Bounds of ``min``: the least of the lows if all are known, and of the known highs; ``max`` mirrors it."""
    known = [h for h in highs if h is not None]
    low = node(op, *lows) if all(e is not None for e in lows) else None
    return low, (node(op, *known) if len(known) == 2 else known[0] if known else None)


def _chosen(kind: str, condition: Bounds, then: Bounds, otherwise: Bounds) -> Bounds:
    certain, possible = known(condition)
    if any(e is None for x in (then, otherwise) for e in x):
        return UNKNOWN
    (a, b), (c, d) = known(then), known(otherwise)
    if kind == "bool":
        return (certain & a) | (~possible & c) | (a & c), (possible & b) | (~certain & d)
    return (
        select(certain, a, select(possible, node("min", a, c), c)),
        select(certain, b, select(possible, node("max", b, d), d)),
    )


def _compared(op: str, x: tuple[Node, Node], y: tuple[Node, Node]) -> Bounds:
    """Compare bounds: certain if true between the worst ends, possible unless its opposite is certain.

    A NaN end compares false with everything, so nothing is certain and all is possible; a NaN in the other end of the
    two is caught by requiring that ends be in order.
    """
    if op == "!=":
        certain, possible = known(_compared("==", x, y))
        return ~possible, ~certain
    if op in (">", ">="):
        return _compared({">": "<", ">=": "<="}[op], y, x)
    if op == "==":
        certain = (x[0] == y[1]) & (x[1] == y[0])
        possible = ~(x[0] > y[1]) & ~(y[0] > x[1])
    else:
        certain = node(op, x[1], y[0])
        possible = ~node({"<": ">=", "<=": ">"}[op], x[0], y[1])
    for low, high in (x, y):
        if low.kind == "float" and low is not high:
            certain = certain & (low <= high)
    return certain, possible


def _one_sided(op: str, args: tuple[Bounds, ...]) -> Bounds:
    """Compare integers of which some ends are unknown."""
    (a, b), (c, d) = args
    if op in (">", ">="):
        (a, b), (c, d), op = (c, d), (a, b), {">": "<", ">=": "<="}[op]
    apart = [node(">", low, high) for low, high in ((a, d), (c, b)) if low is not None and high is not None]
    if op in ("==", "!="):
        equal = ~apart[0] if apart else lift(True)
        return (lift(False), equal) if op == "==" else (~equal, lift(True))
    certain = node(op, b, c) if b is not None and c is not None else lift(False)
    possible = node(op, a, d) if a is not None and d is not None else lift(True)
    return certain, possible


def _settled(kind: str, low: Node | None, high: Node | None) -> Bounds:
    """Bounds as they are, but NaN for an infinite float: between infinite ends a NaN may hide (0 * inf, inf - inf)."""
    if kind != "float" or low is None or high is None:
        return low, high
    return low + (low - low), high + (high - high)


def _product(x: Node, ends: list[tuple[Node, Node]]) -> Bounds:
    if x.args[0] is x.args[1]:  # a square
        low, high = known(_combined(Node("abs", x.args[:1], x.kind), (ends[0],)))
        return _settled(x.kind, low * low, high * high)
    return _hull(x, ends[0], ends[1])


def _hull(x: Node, a: tuple[Node, Node], b: tuple[Node, Node]) -> Bounds:
    """Bounds of an operation monotone in each operand: the extremes over the corners."""
    corners = [node(x.op, p, q) for p in a for q in (b if b[0] is not b[1] else b[:1])]
    low = high = corners[0]
    for corner in corners[1:]:
        low, high = node("min", low, corner), node("max", high, corner)
    return _settled(x.kind, low, high)


def _quotient(x: Node, a: tuple[Node, Node], b: tuple[Node, Node]) -> Bounds:
    """Bounds of ``/`` and ``//``: the corners if the divisor keeps its sign, else all that is possible."""
    if b[0] is b[1]:
        return _hull(x, a, b)
    signed = (b[0] > 0) | (b[1] < 0)
    one = 1 if x.kind == "int" else 1.0
    low, high = known(_hull(x, a, (select(signed, b[0], one), select(signed, b[1], one))))
    if x.kind == "float":
        return select(signed, low, float("nan")), select(signed, high, float("nan"))
    most = node("max", node("abs", a[0]), node("abs", a[1]))  # |a // b| is at most |a|
    return select(signed, low, -most), select(signed, high, most)


def _remainder(a: tuple[Node, Node], b: tuple[Node, Node]) -> Bounds:
    """Bounds of ``%``: the ends' own remainders where all quotients are one, else the range of the divisor."""
    least, most = node("min", b[0] + 1, 0), node("max", b[1] - 1, 0)
    if b[0] is not b[1]:
        return least, most
    same = a[0] // b[0] == a[1] // b[0]
    return select(same, a[0] % b[0], least), select(same, a[1] % b[0], most)


def reader_over(ranges: Mapping[str, tuple[int, int]], params: list[Param]) -> Reader:
    """Return a reader of bounds over a whole problem, in which an array lies between its least and greatest element.

    Parameters
    ----------
    ranges : dict of str to (int, int)
        First and last value of each symbol.
    params : list
        The parameters, as `Binder.params` holds them; they may still be appended to.
    """

    def whole(load: Node, _: tuple[Bounds, ...]) -> Bounds:
        array = np.asarray(params[load.data.n])
        array = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]
        return Node("const", kind=load.kind, data=array.min()), Node("const", kind=load.kind, data=array.max())

    def constants(low: int, high: int) -> Bounds:
        first = Node("const", kind="int", data=np.int64(low))
        return first, first if low == high else Node("const", kind="int", data=np.int64(high))

    return Reader({key: constants(*ends) for key, ends in ranges.items()}, whole)


def check(formula: Node, ranges: Mapping[str, tuple[int, int]], params: list[Param], name: str) -> None:
    """Check that no index of a formula leaves its array, no divisor is zero and no integer exceeds 32 bits.

    Parameters
    ----------
    formula : Node
        The formula of a rule.
    ranges : dict of str to (int, int)
        First and last value of each of the symbols ``b h i j row_i row_j`` over the whole problem.
    params : list
        The parameters, as `Binder.params` holds them.
    name : str
        Name of the rule, for the message.

    Raises
    ------
    ValueError
        If one of these can happen, as far as the bounds tell.
    """
    reader = reader_over(ranges, params)
    done: set[int] = set()

    def ends_of(x: Node) -> tuple[int, int]:
        low, high = known(reader.bounds(x))
        return int(evaluate(low, {}, params)), int(evaluate(high, {}, params))

    def visit(x: Node) -> None:
        if id(x) in done:
            return
        done.add(id(x))
        for a in x.args:
            visit(a)
        if x.op == "load":
            array = np.asarray(params[x.data.n])
            for axis, index in enumerate(x.args):
                low, high = ends_of(index)
                if low < 0 or high >= array.shape[axis]:
                    raise ValueError(
                        f"{name} reads index {index!r} of an array {array.shape}: it goes from {low} to {high}, "
                        f"axis {axis} has {array.shape[axis]}"
                    )
        if x.kind == "int":
            if x.op in ("//", "%"):
                low, high = ends_of(x.args[1])
                if low <= 0 <= high:
                    raise ValueError(
                        f"{name} divides by {x.args[1]!r}, which can be zero: it goes from {low} to {high}"
                    )
            low, high = ends_of(x)
            if low < INT_LOW or high > INT_HIGH:
                raise ValueError(f"{name} computes {x!r}: it goes from {low} to {high}, beyond 32 bits")

    visit(formula)
