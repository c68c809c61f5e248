"""Checks for a rule of one's own, and for a backend's results; the package's own tests run the same ones.

Examples
--------
>>> import numpy as np
>>> import attn_numba as an
>>> from attn_numba.testing import check_rule
>>> check_rule(an.CustomMask(lambda b, h, i, j, p: (i - j) % p[0] == 0, params=(3,)))
>>> squared = an.CustomModifier(lambda s, b, h, i, j, p: s * s, slope=lambda s, b, h, i, j, p: s)
>>> check_rule(squared)  # doctest: +ELLIPSIS
Traceback (most recent call last):
AssertionError: CustomModifier: slope is ... at s = ..., b = 0, h = 0, i = 13, j = 0; central differences give ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from attn_numba.api import attention
from attn_numba.comparison import largest_difference
from attn_numba.environment import backends
from attn_numba.gradient_checks import LAST_PLACES, check_attention_vjp
from attn_numba.reference import attention as reference_attention
from attn_numba.rules import SYMBOLS, Mask, Modifier, Places, Sizes, Softmax, as_mask, as_modifiers, places_of
from attn_numba.rules.arguments import check_normalizer, check_offsets
from attn_numba.rules.base import Rule
from attn_numba.rules.data import AnyArray
from attn_numba.rules.formula import Binder, evaluate, symbol

__all__ = ["check_attention", "check_attention_vjp", "check_rule", "check_slope", "check_tiles", "check_trace"]

SHAPES = ((2, 2, 21, 34), (1, 3, 50, 50), (1, 1, 1, 200))
TILES = 300  # tiles looked at, beside the whole and single elements
DEPTH, WIDTH = 16, 8  # head and value size of the arrays that rules are run on


def check_rule(
    rule: Any,
    sizes: Iterable[tuple[int, int, int, int]] = SHAPES,
    seed: int = 0,
    *,
    query_offset: Any = None,
    key_offset: Any = 0,
) -> None:
    """Check a mask, a modifier or a sequence of modifiers: that all readings of its formula say the same.

    Parameters
    ----------
    rule : mask, modifier, or sequence of modifiers
        What to check, alone or joined.
    sizes : sequence of (B, H, M, N), optional
        Shapes to check in: small ones, for all places are looked at. Rules that hold arrays say which shapes they fit.
    seed : int
        Of the random tiles, scores and arrays.
    query_offset, key_offset : int or int array (B,), optional
        As `attention` takes them; a query offset of None stands for ``N - M``.

    Raises
    ------
    AssertionError
        If the traced formula and the function itself differ, a tile's answer contradicts its elements, a slope is not
        the derivative, or a backend's result is not the reference's. The message says which, where, and what was
        expected.
    ValueError
        If the rule does not fit the sizes, or an index can leave its array.
    TypeError
        If it is no rule.

    Examples
    --------
    >>> import attn_numba as an
    >>> check_rule(an.Causal() & ~an.SlidingWindow(4, 0))
    >>> everything = lambda b, h, i0, i1, j0, j1, p: i0 * 0 + 2
    >>> check_rule(an.CustomMask(lambda b, h, i, j, p: j <= i, tile=everything))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: CustomMask: tile says 2 (all) of b = 0, h = 0, i = 13 to 33, j = ...; i = 13, j = 14 is not allowed
    """
    mask = as_mask(rule) if isinstance(rule, Mask) else None
    modifiers = () if mask is not None else as_modifiers(rule)
    if mask is None and not modifiers:
        raise TypeError(f"rule is {rule!r}; needed a mask, a modifier or a sequence of modifiers")
    for shape in sizes:
        B, H, M, N = shape
        whole = Sizes(B, H, 1, M, N, DEPTH, WIDTH)
        rng = np.random.default_rng(seed)
        offset = _shifted(key_offset, N - M) if query_offset is None else query_offset
        query_at, key_at = check_offsets(offset, key_offset, whole, ())
        for part in (mask, *modifiers):
            if part is not None:
                part.check(whole, query_at, key_at)
                check_trace(part, whole, query_at, key_at, rng)
        if mask is not None:
            check_tiles(mask, whole, query_at, key_at, rng)
        for modifier in modifiers:
            if modifier.differentiable:
                check_slope(modifier, whole, query_at, key_at, rng)
        q, k, v = _arrays(whole, rng)
        for backend, (available, _) in backends().items():
            if available and backend != "reference":
                rules: dict[str, Any] = {
                    "mask": mask,
                    "modifiers": modifiers,
                    "query_offset": query_at,
                    "key_offset": key_at,
                }
                check_attention(q, k, v, backend, name=_name(rule), **rules)


def check_trace(
    rule: Mask | Modifier, sizes: Sizes, query_offset: Any, key_offset: Any, rng: np.random.Generator
) -> None:
    """Check that a rule's traced formula, worked out in NumPy, is what its function gives for arrays.

    Parameters
    ----------
    rule : mask or modifier
        What to check.
    sizes : Sizes
        A small call.
    query_offset, key_offset : int or int array (B,)
        Positions of the first rows.
    rng : numpy.random.Generator
        Makes the scores.

    Raises
    ------
    AssertionError
        If they differ; the message names the first place.
    """
    places, binder, shape = places_of(sizes, query_offset, key_offset), Binder(), (sizes.B, sizes.H, sizes.M, sizes.N)
    values = dict(zip(Places._fields, places, strict=True))
    with np.errstate(all="ignore"):
        if isinstance(rule, Mask):
            function = rule.evaluate(places, sizes)
            formula = rule.formula(SYMBOLS, sizes, binder).allowed
        else:
            values["s"] = _scores(shape, rng)
            function = rule.evaluate(values["s"], places, sizes)
            formula = rule.formula(symbol("s", "float"), SYMBOLS, sizes, binder)
    traced = np.broadcast_to(evaluate(formula, values, binder.params), shape)
    function = np.broadcast_to(function, shape)
    close = np.isclose(traced, function, rtol=1e-9, atol=1e-12, equal_nan=True)  # infinities only to themselves
    if not close.all():
        at = _first(~close)
        raise AssertionError(
            f"{_name(rule)}: its formula gives {traced[at]} and its function {function[at]} at {_place(places, at)}: "
            "a rule must be the same for symbols and for arrays"
        )


def check_tiles(mask: Mask, sizes: Sizes, query_offset: Any, key_offset: Any, rng: np.random.Generator) -> None:
    """Check what a mask says of tiles, derived or written, against their elements one by one.

    Parameters
    ----------
    mask : mask
        What to check.
    sizes : Sizes
        A small call.
    query_offset, key_offset : int or int array (B,)
        Positions of the first rows.
    rng : numpy.random.Generator
        Chooses the tiles.

    Raises
    ------
    AssertionError
        If it says 0 (none) of a tile with an allowed pair, or 2 (all) of one with a pair that is not.
    """
    if 0 in sizes[:5]:
        return
    places, binder = places_of(sizes, query_offset, key_offset), Binder()
    allowed = np.broadcast_to(mask.evaluate(places, sizes), (sizes.B, sizes.H, sizes.M, sizes.N))
    formula = mask.formula(SYMBOLS, sizes, binder)
    b, h, (i0, i1), (j0, j1) = _tiles(sizes, rng)
    offsets = [np.broadcast_to(np.asarray(x, np.int32), (sizes.B,))[b] for x in (query_offset, key_offset)]
    ends = dict(zip(("row_i0", "row_i1", "row_j0", "row_j1"), (i0, i1, j0, j1), strict=True))
    values = {"b": b, "h": h, **ends, **{name[4:]: x + offsets[name[4] == "j"] for name, x in ends.items()}}
    answers = (evaluate(f, values, binder.params) for f in (formula.certain, formula.possible))
    all_of, some = (np.broadcast_to(x, b.shape) for x in answers)
    counts = _summed(allowed)
    seen = counts[b, h, i1, j1] - counts[b, h, i0, j1] - counts[b, h, i1, j0] + counts[b, h, i0, j0]
    _require_none(mask, all_of & (seen < (i1 - i0) * (j1 - j0)), "2 (all)", ~allowed, values)
    _require_none(mask, ~some & ~all_of & (seen > 0), "0 (none)", allowed, values)


def _require_none(mask: Mask, wrong: AnyArray, answer: str, elements: AnyArray, values: dict[str, AnyArray]) -> None:
    """Raise an error about the first wrong tile, naming one of the `elements` that contradict it."""
    if not wrong.any():
        return
    tile = {name: int(x[np.argmax(wrong)]) for name, x in values.items()}
    rows, columns = (slice(tile[f"row_{x}0"], tile[f"row_{x}1"]) for x in "ij")
    i, j = _first(elements[tile["b"], tile["h"], rows, columns])
    where = ", ".join(f"{x} = {tile[x + '0']} to {tile[x + '1'] - 1}" for x in "ij")
    raise AssertionError(
        f"{_name(mask)}: tile says {answer} of b = {tile['b']}, h = {tile['h']}, {where}; "
        f"i = {tile['i0'] + i}, j = {tile['j0'] + j} is {'not allowed' if answer[0] == '2' else 'allowed'}"
    )


def check_slope(modifier: Modifier, sizes: Sizes, query_offset: Any, key_offset: Any, rng: np.random.Generator) -> None:
    """Check a modifier's slope against central differences in float64.

    Parameters
    ----------
    modifier : modifier with a slope
        What to check.
    sizes : Sizes
        A small call.
    query_offset, key_offset : int or int array (B,)
        Positions of the first rows.
    rng : numpy.random.Generator
        Makes the scores.

    Raises
    ------
    AssertionError
        If they differ; the message names the worst place.
    """
    assert modifier.differentiable, f"{_name(modifier)} has no slope"
    places, shape = places_of(sizes, query_offset, key_offset), (sizes.B, sizes.H, sizes.M, sizes.N)
    if 0 in shape:
        return
    s = 2 * rng.standard_normal(shape)
    step = 1e-5
    with np.errstate(all="ignore"):
        above, below = (modifier.evaluate(s + d, places, sizes) for d in (step, -step))
        measured = (above - below) / (2 * step)
        given = modifier.derivatives(s, places, sizes)
        comparable = np.isfinite(measured)  # where the score is infinite (an excluded key) there is nothing to measure
        wrong = comparable & ~(np.abs(measured - given) <= 1e-5 * (1 + np.abs(measured)))
    if wrong.any():
        at = _first(wrong)
        raise AssertionError(
            f"{_name(modifier)}: slope is {given[at]:.4g} at s = {s[at]:.4g}, {_place(places, at)}; "
            f"central differences give {measured[at]:.4g}"
        )


def check_attention(
    q: Any, k: Any, v: Any, backend: str = "auto", *, name: str = "attention", last_places: int = 4, **rules: Any
) -> None:
    """Check a backend's output, lse (of a softmax) and weights against the reference in float64.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries.
    k : array (B, Hk, N, D)
        Keys.
    v : array (B, Hk, N, E)
        Values.
    backend : str
        Whom to check.
    name : str
        Of what is checked, for messages.
    last_places : int
        Units in the last place of the largest element that are allowed beside the reference's own error.
    **rules
        The other arguments of `attention`.

    Raises
    ------
    AssertionError
        If a result errs more than twice what the reference errs when it computes in the dtype of q, plus the units in
        the last place; or is not finite where it should be, or the other way round.
    """
    asked = {"return_lse": isinstance(check_normalizer(rules.get("normalizer")), Softmax), "return_weights": True}
    wide = [np.asarray(x).astype(np.float64) for x in (q, k, v)]
    q = np.asarray(q)
    exact = reference_attention(*wide, **rules, **asked)
    errors = _rounding_errors(exact, wide, {**rules, **asked}, q.dtype.name)
    out = np.full(exact.out.shape, np.nan, q.dtype)
    found = attention(q, k, v, **rules, backend=backend, out=out, **asked)
    assert found.out is out, f"{name}: {backend} does not return the array it was given as out"
    accumulator = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
    for part, result, expected, rounding in zip(exact._fields, found, exact, errors, strict=True):
        label = f"{name}: {part} of {backend} in {q.dtype.name}"
        wanted = q.dtype if part == "out" else accumulator
        assert result.dtype == wanted, f"{label} has dtype {result.dtype}; needed {wanted}"
        assert result.shape == expected.shape, f"{label} has shape {result.shape}; needed {expected.shape}"
        if part == "lse":  # a row without keys: minus infinity and nothing else
            empty = expected == -np.inf
            assert (result[empty] == -np.inf).all(), f"{label} is not minus infinity for rows without keys"
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
        tolerance = 2 * rounding + last_places * LAST_PLACES[wanted.name] * largest
        difference = largest_difference(result, expected)
        if not difference <= tolerance:
            at = _worst(result, expected)
            raise AssertionError(
                f"{label} is {result[at]} at {at}, the reference {expected[at]}: {difference:.3g} away, "
                f"{tolerance:.3g} is allowed"
            )


def _rounding_errors(exact: Any, arrays: list[AnyArray], rules: dict[str, Any], dtype: str) -> list[float]:
    """Return how much the reference errs in a dtype: of out, lse and weights, the largest error of an element.

    There is nothing above float64 to measure it by: it is taken to err as float32 does on nearly the same numbers, in
    the ratio of their last places, and that is counted twice, for the exact result errs too.
    """
    if dtype != "float64":
        rounded = reference_attention(*arrays, **rules, compute_dtype=dtype)
        return [_finite_difference(*x) for x in zip(rounded, exact, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = [x.astype(np.float32).astype(np.float64) for x in arrays]
    errors = _rounding_errors(reference_attention(*narrow, **rules), narrow, rules, "float32")
    return [2 * error * LAST_PLACES["float64"] / LAST_PLACES["float32"] for error in errors]


def _finite_difference(result: AnyArray, expected: AnyArray) -> float:
    """Return the largest difference among elements that are finite in both."""
    both = np.isfinite(result) & np.isfinite(expected)
    return float(np.abs(result[both] - expected[both]).max(initial=0.0))


def _worst(result: AnyArray, expected: AnyArray) -> tuple[int, ...]:
    """Return where two arrays differ most: first of all where only one of them is finite."""
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(np.abs(result.astype(np.float64) - expected), nan=-1.0)
    error[np.isfinite(result) != np.isfinite(expected)] = np.inf
    return tuple(int(n) for n in np.unravel_index(np.argmax(error), error.shape))


def _arrays(sizes: Sizes, rng: np.random.Generator) -> list[AnyArray]:
    B, H, Hk, M, N, D, E = sizes
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, E))]


def _scores(shape: Sequence[int], rng: np.random.Generator) -> AnyArray:
    """Scores of all magnitudes, some of them 0."""
    s = rng.standard_normal(tuple(shape)) * 10.0 ** rng.integers(-3, 3, tuple(shape))
    s[rng.random(tuple(shape)) < 0.05] = 0.0
    return s


def _tiles(sizes: Sizes, rng: np.random.Generator) -> tuple[AnyArray, AnyArray, list[AnyArray], list[AnyArray]]:
    """Tiles (b, h, rows, keys) of all sizes: the whole first, then aligned and random ones; ends as int32 arrays."""
    count = TILES + 1
    b, h = (rng.integers(0, n, count, dtype=np.int32) for n in sizes[:2])
    axes = []
    for length in (sizes.M, sizes.N):
        size = np.minimum(2 ** rng.integers(0, max(length, 1).bit_length() + 1, count), length)
        first = rng.integers(0, length - size + 1)
        first = np.where(rng.random(count) < 0.3, first // size * size, first)
        first[0], size[0] = 0, length
        axes.append([first.astype(np.int32), (first + size).astype(np.int32)])
    b[0] = h[0] = 0
    return b, h, axes[0], axes[1]


def _summed(allowed: AnyArray) -> AnyArray:
    """How many of ``allowed[b, h, :i, :j]`` hold, for every i and j."""
    counts = np.zeros((*allowed.shape[:2], allowed.shape[2] + 1, allowed.shape[3] + 1), np.int64)
    counts[..., 1:, 1:] = allowed.cumsum(2, dtype=np.int64).cumsum(3)
    return counts


def _shifted(offset: Any, by: int) -> Any:
    return offset + by if isinstance(offset, int) else np.asarray(offset) + by


def _first(found: AnyArray) -> tuple[int, ...]:
    return tuple(int(n) for n in np.argwhere(found)[0])


def _place(places: Places, at: tuple[int, ...]) -> str:
    """Name the element's sequence, head and positions."""
    b, h, row_i, row_j = at
    i, j = (np.broadcast_to(x, (b + 1, *x.shape[1:]))[b].ravel()[n] for x, n in ((places.i, row_i), (places.j, row_j)))
    return f"b = {b}, h = {h}, i = {i}, j = {j}"


def _name(rule: Any) -> str:
    return type(rule).__name__ if isinstance(rule, Rule) else " then ".join(type(part).__name__ for part in rule)
