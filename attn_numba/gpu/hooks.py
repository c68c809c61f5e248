"""The rules of a call as functions for the device, made of the rules' formulas.

A formula (`rules/formula.py`) becomes the text of a Python function, one operation a line and none twice, which Numba
compiles into the kernels that call it and the simulator runs as it is. Integers have 32 bits, floats the accumulator's
type. Formulas of masks are computed exactly as written; in those of modifiers a division by a number that is the same
for all queries and keys of a head becomes a product with its reciprocal.

All parameters travel as one tuple `p`: numbers by value, and for each array the address of its elements and its strides
in elements, 0 on broadcast axes. So they lie where a kernel reads them at no cost, new parameters compile nothing, and
an array of any shape is read where it lies. What a formula says of a head alone is computed once, by `fixed`, and
passed on as the tuple `f`; its first two numbers are the positions of query row 0 and of key row 0.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.target import device, language, parameter_type, types
from attn_numba.problem import Problem
from attn_numba.rules import Dropout, Sizes
from attn_numba.rules.chain import Derivatives, Formulas, derivatives_of, formulas_of
from attn_numba.rules.data import AnyArray
from attn_numba.rules.formula import COMPARISONS, Array, Binder, Node, lift, node, symbol
from attn_numba.rules.philox import KEY_STEPS, MULTIPLIERS, ROUNDS

ELEMENTS = {"b1": np.uint8, "i4": np.int32, "f4": np.float32, "f8": np.float64}  # as parameters hold them
ENDS = ("i0", "i1", "j0", "j1")
PAIR = "b, h, row_i, row_j, f, p"
SLOPE_PAIR = f"s, ds, {PAIR}"


class Hooks(NamedTuple):
    """Functions for the device. Rows are those of q and of k, and must be rows that are there.

    ``fixed(b, h, p)`` is the tuple `f` of the others. Of a pair, ``allowed(b, h, row_i, row_j, f, p)`` says whether it
    counts, ``plain(...)`` whether it counts and its score stays as it is, and ``score(s, b, h, row_i, row_j, f, p)`` is
    its new score. Of a tile, ``kind(b, h, row_i0, row_i1, row_j0, row_j1, f, p)`` says whether no pair is allowed (0),
    some may be (1) or all are plain (2).

    Where `unknown`, bounds alone cannot settle many a tile of kind 1, and a block may look at its pairs:
    ``look(b, h, row_i0, row_i1, row_j0, row_j1, lane, lanes, f, p)`` looks at one in so many; the answers of all lanes
    joined with ``|`` give the kind by ``answer(bits)``.

    ``words(b, h, row_i, group, f, p)`` are the four random words of the keys at positions ``4 * group`` to ``4 * group
    + 3``, ``keeps(word, f, p)`` whether a word keeps its weight, ``kept(b, h, row_i, row_j, f, p)`` whether a pair's
    weight is kept, and ``keep_factor(p)`` what kept weights are multiplied by.

    Of hooks for gradients, ``slope(s, ds, b, h, row_i, row_j, f, p)`` is the gradient by the product `s` of an allowed
    pair, before the scale, from the gradient `ds` by its final score; and ``learned[n](...)``, of the same arguments,
    that by the element which the pair reads of the n-th array of `rules.chain.Derivatives.learned`.
    """

    source: str  # the text of the functions: equal texts, the same functions
    number: str  # the type of scores
    masks: bool  # else all pairs are allowed
    scores: bool  # else `score` leaves scores as they are, and they are still to be multiplied by the scale
    partial: bool  # scores are edited where they are not plain only, before they are multiplied by the scale
    unknown: bool
    drops: bool  # else no weight is dropped, and `words`, `keeps`, `kept` and `keep_factor` are None
    fixed: Callable[..., Any]
    allowed: Callable[..., Any]
    plain: Callable[..., Any]
    score: Callable[..., Any]
    kind: Callable[..., Any]
    look: Callable[..., Any]
    answer: Callable[..., Any]
    words: Callable[..., Any] | None
    keeps: Callable[..., Any] | None
    kept: Callable[..., Any] | None
    keep_factor: Callable[..., Any] | None
    slope: Callable[..., Any] | None = None  # None: the gradient is only to be multiplied by the scale
    learned: tuple[Callable[..., Any], ...] = ()


class Bound(NamedTuple):
    """The rules of one call: their functions, and the entries of `p`, whose arrays are on the host and flat."""

    hooks: Hooks
    entries: tuple[Any, ...]

    def signature(self) -> Any:
        """Return the type of `p`: a kernel's machine code depends on it and on the functions alone."""
        return types.BaseTuple.from_types(tuple(parameter_type(x) for x in self.entries))


_made: dict[tuple[str, str], Hooks] = {}
_lock = threading.Lock()


def bind(problem: Problem, gradients: bool = False) -> Bound:
    """Return the rules of a call as functions for the device and their parameters; `gradients`, with derivatives."""
    sizes, binder = problem.sizes, Binder()
    offsets = (problem.query_offset, problem.key_offset)  # not bound, for binding one array twice binds it once
    binder.params += [np.ascontiguousarray(np.broadcast_to(np.asarray(x, np.int32), (sizes.B,))) for x in offsets]
    formulas = formulas_of(problem.mask, problem.modifiers, problem.scale, sizes, binder)
    slopes = None
    if gradients and problem.modifiers:
        slopes = derivatives_of(problem.modifiers, problem.scale, sizes, binder)
    first_drop = None
    if problem.dropout is not None and problem.dropout.rate > 0:
        first_drop = len(binder.params)
        binder.params += _dropout_parameters(problem.dropout, sizes)
    number = problem.accumulator
    params = [_settled(x, number) if isinstance(x, np.ndarray) else x for x in binder.params]
    source = _source(formulas, slopes, params, first_drop)
    with _lock:
        key = (source, number.name)
        if key not in _made:
            _made[key] = _make(source, number, formulas, first_drop is not None)
        return Bound(_made[key], _entries(params, number))


# --- parameters ---


def _settled(array: AnyArray, number: np.dtype[Any]) -> AnyArray:
    """Return an array of plain elements whose axes are contiguous, those of stride 0 apart.

    Floats are never wider than those that scores are computed in: numbers of 64 bits are slow on most cards.
    """
    kind = array.dtype.kind
    wanted: np.dtype[Any]
    if kind == "b":
        wanted = np.dtype(np.bool_)
    elif kind in "iu":
        wanted = np.dtype(np.int32)
    else:
        wanted = np.dtype(np.float32 if array.dtype == np.float32 else number)
    return np.broadcast_to(np.ascontiguousarray(_core(array), wanted), array.shape)


def _core(array: AnyArray) -> np.ndarray:
    """Return what differs of an array: axes of stride 0 (broadcast) cut to length 1."""
    return array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]


def _is_shared(array: AnyArray) -> bool:
    """Whether the last axis has one element for all."""
    return array.strides[-1] == 0 and array.shape[-1] > 1


def _layout(params: list[Any]) -> list[int]:
    """Return the place in `p` of each parameter: of a number, or of the elements of an array; strides follow these."""
    places, at = [], 0
    for param in params:
        places.append(at)
        at += max(1, param.ndim) if isinstance(param, np.ndarray) else 1
    return places


def _entries(params: list[Any], number: np.dtype[Any]) -> tuple[Any, ...]:
    entries: list[Any] = []
    for param in params:
        if isinstance(param, np.ndarray):
            flat = np.ascontiguousarray(_core(param)).reshape(-1)
            entries.append(flat.view(ELEMENTS[flat.dtype.str[1:]]))
            steps = [0 if n == 1 else s // param.itemsize for s, n in zip(param.strides, param.shape, strict=True)]
            entries += [np.int64(x) for x in steps[:-1]]
        else:
            entries.append(np.dtype(number).type(param) if isinstance(param, float) else np.int32(param))
    return tuple(entries)


def _dropout_parameters(dropout: Dropout, sizes: Sizes) -> list[Any]:
    """Return the hook's six parameters.

    They are the key words (B, 2), whether b counts, the last word that is dropped, ``1 / (1 - rate)``, and what is
    counted from: a sequence and a head.
    """
    keys = dropout.keys(sizes).view(np.int32)
    last = np.uint32(dropout.threshold - 1).view(np.int32)
    return [keys, 0 if dropout.by_sequence else 1, int(last), 1.0 / (1.0 - dropout.rate), *dropout.first]


# --- formulas as text ---


class _Fixed:
    """What is computed once for a head: formulas of b and h, each with its place in `f`."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self._places = {repr(x): n for n, x in enumerate(nodes)}
        self._is_fixed: dict[int, tuple[Node, bool]] = {}

    def place(self, x: Node) -> int:
        text = repr(x)
        if text not in self._places:
            self._places[text] = len(self.nodes)
            self.nodes.append(x)
        return self._places[text]

    def holds(self, x: Node) -> bool:
        """Whether a formula is the same for all queries and keys of a head."""
        if id(x) not in self._is_fixed:
            same = x.data in ("b", "h") if x.op == "symbol" else all(self.holds(a) for a in x.args)
            self._is_fixed[id(x)] = x, same
        return self._is_fixed[id(x)][1]


class _Writer:
    """Writes the body of one function.

    Parameters
    ----------
    params : list
        Settled parameters.
    fixed : _Fixed, optional
        Where to leave what is the same for a head; without it, it is computed here.
    exact : bool
        Whether divisions stay divisions.
    """

    def __init__(self, params: list[Any], fixed: _Fixed | None = None, exact: bool = True) -> None:
        self.params, self.places, self.fixed, self.exact = params, _layout(params), fixed, exact
        self.lines: list[str] = []
        self._names: dict[str, str] = {}
        self._done: dict[int, tuple[Node, str]] = {}  # with the node itself, so that its id stays its own

    def value(self, x: Node) -> str:
        """Return the name or number that a formula's value has here."""
        if id(x) not in self._done:
            self._done[id(x)] = x, self._write(x)
        return self._done[id(x)][1]

    def name(self, text: str) -> str:
        """Return the name of the value of an expression."""
        if text not in self._names:
            self._names[text] = f"t{len(self._names)}"
            self.lines.append(f"{self._names[text]} = {text}")
        return self._names[text]

    def _write(self, x: Node) -> str:
        if x.op == "const":
            return self.name(_literal(x)) if x.kind == "float" else _literal(x)
        if x.op == "number":
            return f"p[{self.places[x.data]}]"
        if x.op == "symbol":
            return self._symbol(x.data)
        if self.fixed is not None and self.fixed.holds(x):
            return f"f[{self.fixed.place(x)}]"
        if x.op == "/" and not self.exact and self.fixed is not None and self.fixed.holds(x.args[1]):
            return self.value(node("*", x.args[0], node("/", 1.0, x.args[1])))
        args = [self.value(a) for a in x.args]
        return self.name(self._load(x, args) if x.op == "load" else self._operation(x, args))

    def _symbol(self, name: str) -> str:
        if name[0] in "ij":
            return self.name(f"int32(row_{name} + f[{0 if name[0] == 'i' else 1}])")
        return name

    def _load(self, x: Node, indices: list[str]) -> str:
        array, at = self.params[x.data.n], self.places[x.data.n]
        terms = [f"int64({index}) * p[{at + 1 + axis}]" for axis, index in enumerate(indices[:-1])]
        if indices and not _is_shared(array):
            terms.append(f"int64({indices[-1]})")
        element = f"p[{at}][{' + '.join(terms) or '0'}]"
        if x.kind == "bool":
            return f"{element} != 0"
        return f"{'int32' if x.kind == 'int' else 'number'}({element})"

    def _operation(self, x: Node, args: list[str]) -> str:
        op, kind = x.op, x.args[0].kind
        if op == "cast":
            return _cast(args[0], kind, x.kind)
        if op == "select":
            return "{1} if {0} else {2}".format(*args)
        if op == "~":
            return f"not {args[0]}"
        if op in COMPARISONS or op in ("&", "|"):
            return f"{args[0]} {op} {args[1]}"
        return _of_integers(x, args) if kind == "int" else self._of_floats(op, args)

    def _of_floats(self, op: str, args: list[str]) -> str:
        if op == "*" and self.exact:
            return f"number(product({', '.join(args)}))"
        if op in ("+", "-", "*", "/"):
            return f"{args[0]} {op} {args[1]}"
        if op == "neg":
            return f"-{args[0]}"
        names = {"//": "floor_divide", "%": "remainder", "abs": "absolute", "min": "minimum", "max": "maximum"}
        return f"number({names.get(op, op)}({', '.join(args)}))"


def _literal(x: Node) -> str:
    if x.kind == "bool":
        return str(bool(x.data))
    if x.kind == "int":
        return f"int32({int(x.data)})"
    value = float(x.data)
    if math.isnan(value):
        return "number(NAN)"
    if math.isinf(value):
        return f"number({'-' if value < 0 else ''}INF)"
    return f"number({value!r})"


def _cast(x: str, kind: str, to: str) -> str:
    if kind == "bool":
        return f"number(1.0) if {x} else number(0.0)" if to == "float" else f"int32(1) if {x} else int32(0)"
    if kind == "int" and to == "float":
        return f"number({x})"
    raise NotImplementedError(f"no cast from {kind} to {to} in a rule")


def _of_integers(x: Node, args: list[str]) -> str:
    op = x.op
    if op in ("+", "-", "*"):
        return f"int32({args[0]} {op} {args[1]})"
    if op == "neg":
        return f"int32(-{args[0]})"
    if op == "abs":
        return f"{args[0]} if {args[0]} >= int32(0) else int32(-{args[0]})"
    if op in ("min", "max"):
        return f"{args[0]} if {args[0]} {'<' if op == 'min' else '>'} {args[1]} else {args[1]}"
    if op == "ilog2":
        return f"ilog2({args[0]})"
    if op in ("//", "%"):
        divisor = x.args[1]
        if divisor.op == "const" and divisor.data > 0 and divisor.data & (divisor.data - 1) == 0:
            bits = int(divisor.data).bit_length() - 1
            return f"int32({args[0]} >> {bits})" if op == "//" else f"int32({args[0]} & {int(divisor.data) - 1})"
        return f"{'int_divide' if op == '//' else 'int_remainder'}({args[0]}, {args[1]})"
    raise NotImplementedError(f"no integer {op} in a rule")


# --- functions ---

LOOK = """
def look(b, h, row_i0, row_i1, row_j0, row_j1, lane, lanes, f, p):
    width = int32(row_j1 - row_j0)
    count = int32(int32(row_i1 - row_i0) * width)
    bits = int32(0)
    for n in range(lane, count, lanes):
        row_i = int32(row_i0 + int_divide(int32(n), width))
        row_j = int32(row_j0 + int_remainder(int32(n), width))
        if allowed(b, h, row_i, row_j, f, p):
            bits = int32(bits | 1)
        if not plain(b, h, row_i, row_j, f, p):
            bits = int32(bits | 2)
    return bits


def answer(bits):
    if bits & 1 == 0:
        return int32(0)
    return int32(2) if bits == 1 else int32(1)
"""

WORDS = f"""
def words(b, h, row_i, group, f, p):
    c0, c1 = unsigned(int32(b * p[COUNTS] + p[SEQUENCE])), unsigned(int32(h + p[HEAD]))
    c2, c3 = unsigned(int32(row_i + f[0])), unsigned(int32(group))
    k0, k1 = unsigned(f[LOW]), unsigned(f[HIGH])
    for _ in range({ROUNDS}):
        even, odd = uint64(c0) * uint64({int(MULTIPLIERS[0])}), uint64(c2) * uint64({int(MULTIPLIERS[1])})
        c0 = uint32(uint32(odd >> uint64(32)) ^ c1 ^ k0)
        c2 = uint32(uint32(even >> uint64(32)) ^ c3 ^ k1)
        c1, c3 = uint32(odd & uint64(0xFFFFFFFF)), uint32(even & uint64(0xFFFFFFFF))
        k0 = uint32((uint64(k0) + uint64({int(KEY_STEPS[0])})) & uint64(0xFFFFFFFF))
        k1 = uint32((uint64(k1) + uint64({int(KEY_STEPS[1])})) & uint64(0xFFFFFFFF))
    return c0, c1, c2, c3


def keeps(word, f, p):
    return word > unsigned(p[LAST])


def kept({PAIR}):
    j = int32(row_j + f[1])
    w0, w1, w2, w3 = words(b, h, row_i, int32(j >> 2), f, p)
    n = int32(j & 3)
    return keeps((w0 if n == 0 else w1) if n < 2 else (w2 if n == 2 else w3), f, p)


def keep_factor(p):
    return p[FACTOR]
"""


def _function(name: str, arguments: str, lines: list[str], result: str) -> str:
    return "\n    ".join([f"\ndef {name}({arguments}):", *lines, f"return {result}"]) + "\n"


def _source(formulas: Formulas, slopes: Derivatives | None, params: list[Any], first_drop: int | None) -> str:
    """Return the text of the functions: each is defined before those that call it."""
    seen, plain, score, _ = formulas
    b = symbol("b")
    offsets = [Node("load", (b,), "int", Array(n, np.dtype(np.int32), 1)) for n in (0, 1)]
    fixed = _Fixed(offsets)
    functions = []
    yes = lift(True)
    pairs = {
        "allowed": (PAIR, yes if seen is None else seen.allowed),
        "plain": (PAIR, yes if plain is None else plain),
        "score": (f"s, {PAIR}", symbol("s", "float") if score is None else score),
    }
    if slopes is not None:
        pairs["slope"] = SLOPE_PAIR, slopes.score
        pairs |= {f"learned_{n}": (SLOPE_PAIR, formula) for n, (_, formula) in enumerate(slopes.learned)}
    for name, (arguments, formula) in pairs.items():
        writer = _Writer(params, fixed, exact=arguments == PAIR)
        result = writer.value(formula)
        functions.append(_function(name, arguments, writer.lines, result))
    writer = _Writer(params, fixed)
    some, all_of = (writer.value(x) for x in ((seen.possible, seen.certain) if seen is not None else (yes, yes)))
    result = f"int32(2) if {all_of} else (int32(1) if {some} else int32(0))"
    rows = ", ".join(f"row_{end}" for end in ENDS)
    functions += [_function("kind", f"b, h, {rows}, f, p", writer.lines, result), LOOK]
    if first_drop is not None:
        keys = Array(first_drop, np.dtype(np.int32), 2)
        low, high = (fixed.place(Node("load", (b, lift(n)), "int", keys)) for n in (0, 1))
        names = ("COUNTS", "LAST", "FACTOR", "SEQUENCE", "HEAD")
        at = dict(zip(names, _layout(params)[first_drop + 1 :], strict=True))
        text = WORDS
        for word, n in {"LOW": low, "HIGH": high, **at}.items():
            text = text.replace(f"[{word}]", f"[{n}]")
        functions.append(text)
    head = _Writer(params)
    values = [head.value(x) for x in fixed.nodes]
    return "\n".join([_function("fixed", "b, h, p", head.lines, f"({', '.join(values)})"), *functions]).lstrip()


ORDER = ("fixed", "allowed", "plain", "score", "kind", "look", "answer", "words", "keeps", "kept", "keep_factor")


def _make(source: str, number: np.dtype[Any], formulas: Formulas, drops: bool) -> Hooks:
    """Return the functions of a text, each compiled for those that call it."""
    names = language(number)
    exec(compile(source, "<rules>", "exec"), names)
    learned = [name for name in names if name.startswith("learned_")]
    for name in (*ORDER, "slope", *learned):
        if name in names:
            names[name] = device(names[name])
    seen = formulas.seen
    return Hooks(
        source=source,
        number=np.dtype(number).name,
        masks=seen is not None,
        scores=formulas.score is not None,
        partial=formulas.partial,
        unknown=seen is not None and (_says(seen.certain, False) or _says(seen.possible, True)),
        drops=drops,
        **{name: names.get(name) for name in (*ORDER, "slope")},  # type: ignore[arg-type]
        learned=tuple(names[name] for name in learned),
    )


def _says(x: Node, value: bool) -> bool:
    """Whether a formula is a constant of that value: bounds that say nothing."""
    return x.op == "const" and bool(x.data) == value
