"""Formulas: what tracing accepts and refuses, and that each reading says the same."""

import math

import numpy as np
import pytest

from attn_numba.rules import CustomMask, CustomModifier, Sizes, places_of
from attn_numba.rules.formula import Array, Binder, Node, evaluate, lift, node, range_tables, select, symbol
from attn_numba.rules.interval import check, interval

I, J, S = symbol("i"), symbol("j"), symbol("s", "float")


# --- kinds ---


@pytest.mark.parametrize(
    ("formula", "kind", "text"),
    [
        (I + 1, "int", "(i + 1)"),
        (1 - I, "int", "(1 - i)"),
        (I * 2.0, "float", "(float(i) * 2.0)"),
        (I / 2, "float", "(float(i) / float(2))"),
        (7 // J, "int", "(7 // j)"),
        (I % 3, "int", "(i % 3)"),
        (-abs(I), "int", "neg(abs(i))"),
        (np.minimum(I, 4), "int", "min(i, 4)"),
        (np.maximum(0.5, I), "float", "max(0.5, float(i))"),
        (np.abs(S), "float", "abs(s)"),
        (np.exp(I), "float", "exp(float(i))"),
        (np.sqrt(np.log(np.tanh(S))), "float", "sqrt(log(tanh(s)))"),
        (np.float32(2) * S, "float", "(2.0 * s)"),
        (np.int64(2) + I, "int", "(2 + i)"),
        (np.array(3) < I, "bool", "(3 < i)"),
        (I == J, "bool", "(i == j)"),
        (I != 0.5, "bool", "(float(i) != 0.5)"),
        ((I < J) & ~(J >= 4) | (I > 2), "bool", "(((i < j) & ~((j >= 4))) | (i > 2))"),
        (np.logical_or(I < J, np.logical_not(I <= 1)), "bool", "((i < j) | ~((i <= 1)))"),
        ((I < J) * 3, "int", "(int((i < j)) * 3)"),
        ((I < J) == (J < 4), "bool", "(int((i < j)) == int((j < 4)))"),
        (select(I < J, 1, 2.5), "float", "select((i < j), float(1), 2.5)"),
    ],
)
def test_nodes(formula, kind, text):
    assert formula.kind == kind
    assert repr(formula) == text


def test_long_formulas_have_short_names():
    x = I
    for _ in range(200):
        x = x + x * 2
    text = repr(x)
    assert len(text) < 10_000
    assert text.startswith("t0 = (i + (i * 2)); t1 = (t0 + (t0 * 2)); ")


def test_what_is_certain_costs_nothing():
    a = I < J
    assert (a & True) is a
    assert (True & a) is a
    assert (a | False) is a
    assert (a & False).data is False
    assert (True | a).data is True
    assert (~lift(True)).data is False


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: 1 if I < J else 2, "may not branch: use &"),
        (lambda: I < J and J < 3, "may not branch"),
        (lambda: not I < J, "may not branch"),
        (lambda: min(I, J), "numpy.minimum"),
        (lambda: 0 < I < J, "may not branch"),
        (lambda: I in (1, 2), "may not branch"),
        (lambda: int(I), r"may not use int\(\)"),
        (lambda: float(S), "numpy.exp"),
        (lambda: math.exp(S), "math module"),
        (lambda: [10, 20][I], "as an index.*params"),
        (lambda: np.arange(3)[I], "as an index|index"),
        (lambda: range(I), "as an index"),
        (lambda: list(I), "may not loop"),
        (lambda: I[0], "only arrays in params"),
        (lambda: I**2, r"x \* x"),
        (lambda: 2**I, r"x \* x"),
        (lambda: np.sin(S), "may not use numpy.sin"),
        (lambda: np.where(I < J, S, 0), "may not use numpy.where"),
        (lambda: np.clip(I, 0, 3), "may not use numpy"),
        (lambda: np.add.reduce(S), "may not use numpy.add.reduce"),
        (lambda: np.exp(S, where=True), "may not use numpy.exp with options"),
        (lambda: I + np.arange(3), "pass arrays in params"),
        (lambda: I + "1", "got str"),
        (lambda: I + None, "got NoneType"),
        (lambda: I & J, "& joins comparisons; got int and int"),
        (lambda: (I < J) | 1, "got bool and int"),
        (lambda: ~I, "~ joins comparisons"),
        (lambda: (I < J) + (J < 2), r"ambiguous.*multiply by 1"),
        (lambda: Array(0, np.dtype(float), 2)[I], "2 axes needs 2 indices in a rule; 1 given"),
        (lambda: Array(0, np.dtype(float), 1)[:], "may not slice"),
        (lambda: Array(0, np.dtype(float), 1)[I / 2], "index must be an integer.*//"),
        (lambda: list(Array(0, np.dtype(float), 1)), "may not loop over an array"),
    ],
)
def test_what_a_rule_may_not_do(use, message):
    with pytest.raises(TypeError, match=message):
        use()


def test_integers_are_32_bit():
    with pytest.raises(ValueError, match="32-bit"):
        I + 2**31
    assert (I + -(2**31)).kind == "int"


# --- reading as NumPy ---


def test_evaluate_equals_the_broadcast_call():
    rng = np.random.default_rng(0)
    sizes = Sizes(2, 3, 3, 7, 9, 1, 1)
    places = places_of(sizes, [4, -3], [0, 2])
    params = (5, 0.25, rng.standard_normal((2, 20)), rng.integers(-9, 9, (3, 20)), rng.random(20) < 0.5)
    s = rng.standard_normal((2, 3, 7, 9))

    def apply(s, b, h, i, j, p):
        near = (abs(i - j) <= p[0]) & p[4][j] | (p[3][h, j] // 2 > i % 4)
        return near * s + np.tanh(s * p[1]) * p[2][b, j + 5] - np.sqrt(np.maximum(np.abs(s), p[1])) / (1 + np.exp(-s))

    modifier = CustomModifier(apply, params)
    binder = Binder()
    formula = modifier.formula(S, places_symbols(), sizes, binder)
    values = {**places._asdict(), "s": s}
    np.testing.assert_allclose(
        evaluate(formula, values, binder.params), modifier.evaluate(s, places, sizes), rtol=1e-14
    )


def places_symbols():
    from attn_numba.rules import SYMBOLS

    return SYMBOLS


def test_binding():
    binder = Binder()
    array = np.arange(6.0).reshape(2, 3)
    three, half, bound, again = binder.bind((3, 0.5, array, array))
    assert (three.kind, half.kind, bound.ndim, bound.dtype) == ("int", "float", 2, np.float64)
    assert again is bound  # the same memory is one parameter
    assert binder.params[:2] == [3, 0.5]
    assert len(binder.params) == 3
    assert bound[I, J].kind == "float"
    assert Binder().bind((np.ones(2, np.uint8), np.ones(2, bool)))[1][I].kind == "bool"


def test_ilog2_is_exact():
    x = np.arange(1, 5000)
    value = evaluate(Node("ilog2", (I,), "int"), {"i": x}, [])
    np.testing.assert_array_equal(value, [n.bit_length() - 1 for n in x.tolist()])


# --- range tables ---


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 8), (2, 2, 21), (1, 0)])
def test_range_tables(shape):
    rng = np.random.default_rng(1)
    for array in (rng.standard_normal(shape), rng.integers(0, 9, shape), rng.random(shape) < 0.5):
        least, greatest = range_tables(array)
        length = shape[-1]
        assert least.shape == (*shape[:-1], max(length, 1).bit_length(), length)
        for lo in range(length):
            for hi in range(lo, length):
                level = (hi + 1 - lo).bit_length() - 1
                at = [lo, hi + 1 - 2**level]
                np.testing.assert_array_equal(least[..., level, at].min(-1), array[..., lo : hi + 1].min(-1))
                np.testing.assert_array_equal(greatest[..., level, at].max(-1), array[..., lo : hi + 1].max(-1))


@pytest.mark.parametrize("levels", [1, 2, 4, 9])
def test_range_tables_of_few_levels(levels):
    """Exact for stretches below two to the last level; the bounds of the whole from there on."""
    array = np.random.default_rng(1).standard_normal((2, 50))
    binder = Binder()
    (p,) = binder.bind((array,))
    b, first, stop = symbol("b"), symbol("first"), symbol("stop")
    low, high = binder.range_of(p[b, J], first, stop, levels)
    assert max(x.nbytes for x in binder.params) == min(levels, 6) * array.nbytes
    for lo in range(50):
        for hi in range(lo + 1, 51):
            row = array[1, lo:hi] if hi - lo < 2 ** (levels - 1) or levels > 5 else array[1]
            values = {"b": 1, "first": lo, "stop": hi}
            assert evaluate(low, values, binder.params) == row.min()
            assert evaluate(high, values, binder.params) == row.max()


def test_tables_of_a_broadcast_array_take_no_more():
    array = np.broadcast_to(np.arange(8), (1000, 1, 8))
    least, _ = range_tables(array)
    assert least.shape == (1000, 1, 4, 8)
    assert least.strides[0] == 0


def test_too_large_arrays_get_no_tables():
    binder = Binder()
    (p,) = binder.bind((np.broadcast_to(np.zeros(1), (2**20, 2**10)).reshape(-1)[: 2**22],))
    assert interval(p[J], binder) == (None, None)


def test_reads_along_a_row_are_bounded_exactly():
    rng = np.random.default_rng(2)
    array = rng.standard_normal((3, 50))
    binder = Binder()
    (p,) = binder.bind((array,))
    low, high = interval(p[symbol("b"), J], binder)
    for _ in range(200):
        b, j0 = int(rng.integers(3)), int(rng.integers(50))
        j1 = int(rng.integers(j0 + 1, 51))
        values = {"b": b, "j0": j0, "j1": j1}
        assert evaluate(low, values, binder.params) == array[b, j0:j1].min()
        assert evaluate(high, values, binder.params) == array[b, j0:j1].max()
    assert interval(p[symbol("b"), J], None) == (None, None)
    assert interval(p[symbol("b"), J + 1], binder) == (None, None)


# --- intervals of numbers ---

INTEGERS = [
    I + J, I - J, I * J, (I - J) * (I - J), -I, abs(I - J), I // 3, I // -4, I % 5, I % -3, (I + J) // 7 % 3,
    np.minimum(I, J), np.maximum(I - 3, -J), I // (abs(J) + 1), (I * I) % 11, select(I < J, I, 2 * J),
    select(I % 2 == 0, 5, J), (I < J) * 3 + (J > 2) * I, I // (J - 4), abs(I) - abs(J), -5 // (I * 2 + 1),
    I % (J - 20), I % (abs(J) + 1),
]  # fmt: skip
FLOATS = [
    I * 0.3, I / (abs(J) + 1.5), I / 4 - J / 3, np.sqrt(abs(I - J) * 1.0), abs(I - 2.5) * (J - 0.5), (I * 0.1) // 0.25,
    np.minimum(I * 0.5, J), select(I < J, I * 0.5, J / 3), (I - 0.5) / (2.0 * J - 1),
]  # fmt: skip


@pytest.mark.parametrize("formula", INTEGERS + FLOATS, ids=repr)
def test_interval_encloses(formula):
    rng = np.random.default_rng(3)
    low, high = interval(formula)
    for _ in range(100):
        i0, j0 = (int(x) for x in rng.integers(-12, 12, 2))
        i1, j1 = i0 + int(rng.integers(1, 9)), j0 + int(rng.integers(1, 9))
        ends = {"i0": i0, "i1": i1, "j0": j0, "j1": j1}
        elements = evaluate(formula, {"i": np.arange(i0, i1)[:, None], "j": np.arange(j0, j1)}, [])
        least, greatest = evaluate(low, ends, []), evaluate(high, ends, [])
        if formula.kind == "int" or not np.isnan([least, greatest]).any():
            assert least <= np.min(elements), ends
            assert greatest >= np.max(elements), ends


BOOLEANS = [
    select(I < J, I > 2, J < 3), select(I % 3 == 0, J > 0, I < 0), ~select(J < I, I % 2 == 0, J % 3 == 1),
    (I * J > 5) | (I // 3 == J // 2), (I != J) & ~(I + J == 4), (I == J) | (I > 2 * J),
    ((I < J) * 2 + (J > 1) * 1) >= 2,
]  # fmt: skip


@pytest.mark.parametrize("formula", BOOLEANS, ids=repr)
def test_certain_and_possible(formula):
    rng = np.random.default_rng(4)
    certain, possible = interval(formula)
    for n in range(300):
        i0, j0 = (int(x) for x in rng.integers(-9, 9, 2))
        i1, j1 = (x + int(rng.integers(1, 3 if n % 2 else 9)) for x in (i0, j0))
        ends = {"i0": i0, "i1": i1, "j0": j0, "j1": j1}
        elements = evaluate(formula, {"i": np.arange(i0, i1)[:, None], "j": np.arange(j0, j1)}, [])
        elements = np.broadcast_to(elements, (i1 - i0, j1 - j0))
        assert not evaluate(certain, ends, []) or elements.all(), ends
        assert evaluate(possible, ends, []) or not elements.any(), ends
        if elements.size == 1:
            assert evaluate(certain, ends, []) == evaluate(possible, ends, []) == elements.item()


def test_exact_intervals():
    ends = {"i0": -3, "i1": 5, "j0": 2, "j1": 4}  # i from -3 to 4, j from 2 to 3
    for formula, expected in (
        (I + J, (-1, 7)), (I - J, (-6, 2)), (I * J, (-9, 12)), (abs(I), (0, 4)),
        (abs(J), (2, 3)), (I // 2, (-2, 2)), (J % 5, (2, 3)), (I % 5, (0, 4)), (np.minimum(I, J), (-3, 3)),
        (I * I, (0, 16)), (J % 2, (0, 1)), ((I + 3) % 100, (0, 7)),
    ):  # fmt: skip
        low, high = interval(formula)
        assert (int(evaluate(low, ends, [])), int(evaluate(high, ends, []))) == expected, formula


def test_nan_is_never_certain():
    """sqrt of a negative number is NaN, and a comparison with NaN is false: such a tile is neither ALL nor NONE."""
    x = np.sqrt((I - 4) * 1.0)
    for formula in (x < 100, x >= 0, x == x, ~(x < 0), x - x <= 0):
        certain, possible = interval(formula)
        ends = {"i0": 0, "i1": 9}
        assert not evaluate(certain, ends, [])
        assert evaluate(possible, ends, [])


def test_approximate_functions_are_unknown():
    for function in (np.exp, np.log, np.tanh):
        assert interval(function(I * 0.5)) == (None, None)
        assert interval(select(I < J, function(I * 0.5), 0.0)) == (None, None)
        certain, possible = interval(function(I * 0.5) < 1e30)
        assert (certain.data, possible.data) == (False, True)
        point = function(symbol("b") * 0.5)
        assert interval(point) == (point, point) or interval(point)[0] is point


# --- check ---

RANGES = {"b": (0, 1), "h": (0, 2), "i": (-4, 10), "j": (0, 7), "row_i": (0, 14), "row_j": (0, 7)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p[0][symbol("b"), J], None),
        (lambda p: p[0][symbol("b"), abs(I) % 8], None),
        (lambda p: p[0][0, np.minimum(np.maximum(I, 0), 7)], None),
        (lambda p: p[0][1, p[1][J]], None),
        (lambda p: p[0][symbol("b"), I], "from -4 to 10, axis 1 has 8"),
        (lambda p: p[0][symbol("h"), J], "from 0 to 2, axis 0 has 2"),
        (lambda p: p[0][symbol("b"), J - 1], "from -1 to 6"),
        (lambda p: p[0][0, 8 + 0 * I], "from 8 to 8"),
        (lambda p: p[0][1, p[1][J] + 1], "from 1 to 8"),
        (lambda p: I % (J - 3), "can be zero"),
        (lambda p: I // (J + 1), None),
        (lambda p: J * 2**29, "beyond 32 bits"),
        (lambda p: p[2][J] + 0, "beyond 32 bits"),
    ],
)
def test_check(make, message):
    binder = Binder()
    p = binder.bind((np.ones((2, 8)), np.arange(8), np.full(8, 2**33)))
    formula = make(p)
    if message is None:
        return check(formula, RANGES, binder.params, "Rule")
    with pytest.raises(ValueError, match=f"^Rule .*{message}"):
        check(formula, RANGES, binder.params, "Rule")


def test_errors_appear_when_the_rule_is_made():
    with pytest.raises(TypeError, match="may not branch"):
        CustomMask(lambda b, h, i, j, p: True if j < i else False)  # noqa: SIM210
    with pytest.raises(TypeError, match="2 axes needs 2 indices"):
        CustomMask(lambda b, h, i, j, p: p[0][b][j] > 0, params=(np.ones((2, 3)),))
    with pytest.raises(TypeError, match="apply returns bool; needed float or int"):
        CustomModifier(lambda s, b, h, i, j, p: j < i)
    with pytest.raises(IndexError):
        CustomMask(lambda b, h, i, j, p: j < p[0])


def test_nodes_are_immutable():
    with pytest.raises(AttributeError):
        I.op = "const"
    assert node("+", I, 1).args[1].data == 1
