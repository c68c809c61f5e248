"""Every mask against a table written by hand, and every tile answer against the elements of the tile."""

import itertools
import pickle

import numpy as np
import pytest

from attn_numba import rules
from attn_numba.rules import (
    SYMBOLS,
    BlockSparse,
    Causal,
    CustomMask,
    Dense,
    Mask,
    Neighborhood,
    Padding,
    PrefixLM,
    SameDocument,
    Sizes,
    SlidingWindow,
    as_mask,
    places_of,
)
from attn_numba.rules.formula import Binder, evaluate

B, H, M, N = 2, 3, 9, 12
SIZES = Sizes(B, H, 1, M, N, 4, 4)
QUERY_OFFSET, KEY_OFFSET = (3, -2), (0, 1)
RNG = np.random.default_rng(7)
DENSE = RNG.random((B, H, M, N)) < 0.6
BLOCKS = RNG.random((B, H, 3, 3)) < 0.5
QUERY_IDS = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 5], [4, 4, 3, 3, 3, 9, 9, 1, 1]])
KEY_IDS = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 5, 5, 5, 7], [3, 4, 3, 4, 4, 9, 9, 9, 9, 1, 0, 0]])
TABLE = RNG.integers(0, 4, (B, 24))
COST = RNG.random((H, 24))


def nearest(x, y, length, size, dilation):
    """The rule of neighborhood attention on one axis, by counting: y is one of the `size` nearest of its group."""
    if x % dilation != y % dilation:
        return False
    group = [c for c in range(length) if c % dilation == x % dilation]
    at = group.index(x)
    windows = [group[s : s + size] for s in range(len(group) - size + 1)]
    # the window in which x lies closest to the middle; an even one has one more key before x than after it
    best = min(windows, key=lambda w: abs(group.index(w[0]) + size // 2 - at))
    return y in best


def on_grid(position, shape):
    return [int(c) for c in np.unravel_index(position, shape)]


# name: (mask, whether (b, h, row i, row j, position i, position j) is allowed)
TRUTH = {
    "Causal": (Causal(), lambda b, h, r, c, i, j: j <= i),
    "SlidingWindow both": (SlidingWindow(3, 2), lambda b, h, r, c, i, j: i - 3 <= j <= i + 2),
    "SlidingWindow left": (SlidingWindow(4, 0), lambda b, h, r, c, i, j: j in range(i - 4, i + 1)),
    "SlidingWindow open left": (SlidingWindow(-1, 1), lambda b, h, r, c, i, j: j - i < 2),
    "SlidingWindow open right": (SlidingWindow(0, -1), lambda b, h, r, c, i, j: j >= i),
    "SlidingWindow open": (SlidingWindow(-1, -1), lambda b, h, r, c, i, j: True),
    "SlidingWindow wide": (SlidingWindow(2**40, 0), lambda b, h, r, c, i, j: j <= i),
    "Padding": (Padding([5, 12]), lambda b, h, r, c, i, j: c < (5, 12)[b]),
    "Padding one length": (Padding(7), lambda b, h, r, c, i, j: c < 7),
    "Padding all": (
        Padding([5, 0], key_starts=[2, 0], query_lengths=[9, 4]),
        lambda b, h, r, c, i, j: (2, 0)[b] <= c < (5, 0)[b] and r < (9, 4)[b],
    ),
    "SameDocument": (
        SameDocument(QUERY_IDS, KEY_IDS),
        lambda b, h, r, c, i, j: int(QUERY_IDS[b, r]) == int(KEY_IDS[b, c]),
    ),
    "SameDocument shared": (
        SameDocument(QUERY_IDS[0], KEY_IDS[1]),
        lambda b, h, r, c, i, j: int(QUERY_IDS[0, r]) == int(KEY_IDS[1, c]),
    ),
    "PrefixLM": (PrefixLM([4, 2]), lambda b, h, r, c, i, j: j <= i or j < (4, 2)[b]),
    "PrefixLM one length": (PrefixLM(6), lambda b, h, r, c, i, j: j <= i or j < 6),
    "BlockSparse": (BlockSparse(BLOCKS, (3, 4)), lambda b, h, r, c, i, j: BLOCKS[b, h, r // 3, c // 4]),
    "BlockSparse heads alike": (
        BlockSparse(BLOCKS[:, :1], (4, 5)),
        lambda b, h, r, c, i, j: BLOCKS[b, 0, r // 4, c // 5],
    ),
    "BlockSparse square": (BlockSparse(BLOCKS[0, 0], (3, 4)), lambda b, h, r, c, i, j: BLOCKS[0, 0, r // 3, c // 4]),
    "BlockSparse one row": (BlockSparse(BLOCKS[:, :, :1], 4), lambda b, h, r, c, i, j: BLOCKS[b, h, 0, c // 4]),
    "BlockSparse one column": (BlockSparse(BLOCKS[..., 1:2], 3), lambda b, h, r, c, i, j: BLOCKS[b, h, r // 3, 1]),
    "Dense": (Dense(DENSE), lambda b, h, r, c, i, j: DENSE[b, h, r, c]),
    "Dense (M, N)": (Dense(DENSE[0, 0]), lambda b, h, r, c, i, j: DENSE[0, 0, r, c]),
    "Dense keys": (Dense(DENSE[0, 0, 0]), lambda b, h, r, c, i, j: DENSE[0, 0, 0, c]),
    "Dense queries": (Dense(DENSE[..., :1]), lambda b, h, r, c, i, j: DENSE[b, h, r, 0]),
    "CustomMask": (
        CustomMask(lambda b, h, i, j, p: (i // p[0] == j // p[0]) | (p[1][b, j + 2] > 2), params=(4, TABLE)),
        lambda b, h, r, c, i, j: i // 4 == j // 4 or TABLE[b, j + 2] > 2,
    ),
    "CustomMask float": (
        CustomMask(lambda b, h, i, j, p: np.sqrt(np.abs(i - j)) * p[0] < 1 + p[1][h, j], params=(0.75, COST)),
        lambda b, h, r, c, i, j: abs(i - j) ** 0.5 * 0.75 < 1 + COST[h, j],
    ),
    "CustomMask remainder": (
        CustomMask(lambda b, h, i, j, p: ((j - i) % 3 == 0) & ~(j > i + 4)),
        lambda b, h, r, c, i, j: (j - i) % 3 == 0 and j <= i + 4,
    ),
    "AllOf": (
        Causal() & SlidingWindow(3, 3) & Padding([6, 9]),
        lambda b, h, r, c, i, j: i - 3 <= j <= i and c < (6, 9)[b],
    ),
    "AnyOf": (SlidingWindow(1, 1) | Padding([2, 3]), lambda b, h, r, c, i, j: abs(i - j) <= 1 or c < (2, 3)[b]),
    "Not": (~Causal(), lambda b, h, r, c, i, j: j > i),
    "array & rule": (DENSE & Causal(), lambda b, h, r, c, i, j: DENSE[b, h, r, c] and j <= i),
    "rule | array": (Causal() | DENSE[0], lambda b, h, r, c, i, j: DENSE[0, h, r, c] or j <= i),
    "nested": (
        ~(Causal() & ~Padding([4, 12])) & (SlidingWindow(2, 5) | DENSE),
        lambda b, h, r, c, i, j: (j > i or c < (4, 12)[b]) and (i - 2 <= j <= i + 5 or DENSE[b, h, r, c]),
    ),
}
# name: (mask, grid); M = N = the grid, no offsets
GRIDS = {
    "1-D": (Neighborhood(13, 5), (13,), (5,), (1,)),
    "1-D even": (Neighborhood(11, 4), (11,), (4,), (1,)),
    "1-D dilated": (Neighborhood((14,), (3,), (4,)), (14,), (3,), (4,)),
    "1-D whole": (Neighborhood(6, 6), (6,), (6,), (1,)),
    "2-D": (Neighborhood((5, 6), 3), (5, 6), (3, 3), (1, 1)),
    "2-D mixed": (Neighborhood((5, 7), (2, 3), (2, 1)), (5, 7), (2, 3), (2, 1)),
    "2-D dilated": (Neighborhood((6, 7), (2, 3), (3, 2)), (6, 7), (2, 3), (3, 2)),
    "3-D": (Neighborhood((3, 4, 5), (3, 2, 3)), (3, 4, 5), (3, 2, 3), (1, 1, 1)),
    "3-D dilated": (Neighborhood((2, 4, 5), (1, 2, 2), (2, 1, 2)), (2, 4, 5), (1, 2, 2), (2, 1, 2)),
}


def table_of(allowed, query_offset=QUERY_OFFSET, key_offset=KEY_OFFSET, shape=(B, H, M, N)):
    """The truth table, one element at a time."""
    table = np.zeros(shape, bool)
    for b, h, r, c in itertools.product(*map(range, shape)):
        table[b, h, r, c] = allowed(b, h, r, c, r + query_offset[b], c + key_offset[b])
    return table


def evaluated(mask, sizes=SIZES, query_offset=QUERY_OFFSET, key_offset=KEY_OFFSET):
    places = places_of(sizes, query_offset, key_offset)
    shape = (sizes.B, sizes.H, sizes.M, sizes.N)
    return np.broadcast_to(mask.evaluate(places, sizes), shape)


def tile_ends(i0, i1, j0, j1, query_offset, key_offset):
    """What the symbols of a tile stand for."""
    return {
        "row_i0": i0, "row_i1": i1, "row_j0": j0, "row_j1": j1,
        "i0": i0 + query_offset, "i1": i1 + query_offset, "j0": j0 + key_offset, "j1": j1 + key_offset,
    }  # fmt: skip


def check_tiles(mask, table, sizes, query_offset, key_offset, exact, tiles=150, seed=0):
    """Compare the answers for random tiles with the elements; return the share of answers as sharp as can be."""
    rng = np.random.default_rng(seed)
    binder = Binder()
    formula = mask.formula(SYMBOLS, sizes, binder)
    sharp = 0
    for n in range(tiles):
        b, h = int(rng.integers(sizes.B)), int(rng.integers(sizes.H))
        i0, j0 = int(rng.integers(sizes.M)), int(rng.integers(sizes.N))
        most = 3 if n % 2 else max(sizes.M, sizes.N)  # small tiles and large ones
        i1 = int(rng.integers(i0 + 1, min(sizes.M, i0 + most) + 1))
        j1 = int(rng.integers(j0 + 1, min(sizes.N, j0 + most) + 1))
        values = {"b": b, "h": h, **tile_ends(i0, i1, j0, j1, query_offset[b], key_offset[b])}
        certain = bool(evaluate(formula.certain, values, binder.params))
        possible = bool(evaluate(formula.possible, values, binder.params))
        elements = table[b, h, i0:i1, j0:j1]
        assert not certain or elements.all(), values
        assert possible or not elements.any(), values
        right = certain == bool(elements.all()) and possible == bool(elements.any())
        assert right or not exact, values
        sharp += right
    return sharp / tiles


EXACT = {  # tile answers of these are exact: NONE, SOME and ALL are just what the elements say
    "Causal", "SlidingWindow both", "SlidingWindow left", "SlidingWindow open left", "SlidingWindow open right",
    "SlidingWindow open", "SlidingWindow wide", "Padding", "Padding one length", "Padding all", "PrefixLM",
    "PrefixLM one length", "BlockSparse", "BlockSparse heads alike", "BlockSparse square", "BlockSparse one row",
    "BlockSparse one column", "Not",
}  # fmt: skip


@pytest.mark.parametrize("name", TRUTH)
def test_mask_is_its_table(name):
    mask, allowed = TRUTH[name]
    mask.check(SIZES, QUERY_OFFSET, KEY_OFFSET)
    table = table_of(allowed)
    assert table.any()
    result = evaluated(mask)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, table)


@pytest.mark.parametrize("name", TRUTH)
def test_formula_is_its_table(name):
    mask, allowed = TRUTH[name]
    binder = Binder()
    formula = mask.formula(SYMBOLS, SIZES, binder)
    places = places_of(SIZES, QUERY_OFFSET, KEY_OFFSET)
    result = evaluate(formula.allowed, places._asdict(), binder.params)
    np.testing.assert_array_equal(np.broadcast_to(result, (B, H, M, N)), table_of(allowed))


@pytest.mark.parametrize("name", TRUTH)
def test_tile_answers(name):
    mask, allowed = TRUTH[name]
    check_tiles(mask, table_of(allowed), SIZES, QUERY_OFFSET, KEY_OFFSET, exact=name in EXACT)


@pytest.mark.parametrize("name", GRIDS)
def test_neighborhood(name):
    mask, shape, size, dilation = GRIDS[name]
    count = int(np.prod(shape))
    sizes = Sizes(1, 1, 1, count, count, 4, 4)

    def allowed(b, h, r, c, i, j):
        axes = zip(on_grid(i, shape), on_grid(j, shape), shape, size, dilation, strict=True)
        return all(nearest(*axis) for axis in axes)

    table = table_of(allowed, (0,), (0,), (1, 1, count, count))
    assert (table.sum(-1) == np.prod(size)).all()  # every query sees exactly size keys
    mask.check(sizes)
    np.testing.assert_array_equal(evaluated(mask, sizes, 0, 0), table)
    check_tiles(mask, table, sizes, (0,), (0,), exact=len(shape) == 1 and dilation == (1,))


@pytest.mark.parametrize(
    "mask",
    [
        Neighborhood((5, 9), 3),
        Neighborhood((5, 13), (2, 4)),
        Neighborhood((9, 10), (3, 2), (2, 1)),
        Neighborhood((3, 4, 10), (2, 3, 3)),
        Neighborhood((4, 6, 9), (2, 3, 2), (2, 2, 1)),
    ],
    ids=repr,
)
def test_neighborhood_in_stretches(mask):
    """The stretches of each query hold just the keys it may attend to, in ascending order."""
    count = int(np.prod(mask.shape))
    sizes = Sizes(1, 1, 1, count, count, 4, 4)
    table = evaluated(mask, sizes, 0, 0)[0, 0]
    assert mask.run_count == np.prod(mask.size[:-1])
    for i in range(count):
        keys = []
        for n in range(mask.run_count):
            first, end = mask.run(0, 0, i, n, mask.arguments(sizes))
            keys += range(int(first), int(end))
        assert keys == np.flatnonzero(table[i]).tolist()


@pytest.mark.parametrize(
    "mask", [Neighborhood(30, 3), Neighborhood((9, 9), 2, (1, 2)), Neighborhood((9, 9), 4), Causal()]
)
def test_masks_that_are_no_short_stretches(mask):
    assert mask.run_count == 0


def test_neighborhood_tiles_of_whole_grid_rows_are_sharp():
    mask = Neighborhood((8, 8), 3)
    sizes = Sizes(1, 1, 1, 64, 64, 4, 4)
    binder = Binder()
    formula = mask.formula(SYMBOLS, sizes, binder)
    table = evaluated(mask, sizes, 0, 0)[0, 0]
    for i0, j0 in itertools.product(range(0, 64, 8), range(0, 64, 4)):
        values = {"b": 0, "h": 0, **tile_ends(i0, i0 + 8, j0, j0 + 4, 0, 0)}
        possible = bool(evaluate(formula.possible, values, binder.params))
        assert possible == table[i0 : i0 + 8, j0 : j0 + 4].any()


def test_documents_that_lie_together_are_skipped():
    ids = np.repeat([3, 1, 4, 2, 9], [5, 7, 4, 6, 10])
    sizes = Sizes(1, 1, 1, 32, 32, 4, 4)
    table = (ids[:, None] == ids)[None, None]
    share = check_tiles(SameDocument(ids), table, sizes, (0,), (0,), exact=False, tiles=300)
    assert share > 0.9
    ordered = np.sort(ids)
    check_tiles(SameDocument(ordered), (ordered[:, None] == ordered)[None, None], sizes, (0,), (0,), exact=True)


def test_custom_tile_is_used():
    def tile(b, h, i0, i1, j0, j1, p):
        return (j1 <= p[0]) * 2 + ((j0 < p[0]) & (j1 > p[0])) * 1

    mask = CustomMask(lambda b, h, i, j, p: j < p[0], params=(5,), tile=tile)
    binder = Binder()
    formula = mask.formula(SYMBOLS, SIZES, binder)
    assert repr(formula.possible) == "(((int((j1 <= p0)) * 2) + (int(((j0 < p0) & (j1 > p0))) * 1)) > 0)"
    table = np.broadcast_to(np.arange(N) < 5, (B, H, M, N))
    check_tiles(mask, table, SIZES, (0, 0), (0, 0), exact=True)


def test_float_bounds_hold_in_random_formulas():
    """Masks with float arithmetic, one-sided operations, squares, divisors of both signs: bounds must hold."""
    p = (3, 0.37, RNG.standard_normal((B, 40)), RNG.integers(-3, 4, 40))
    functions = [
        lambda b, h, i, j, p: (i - j) * (i - j) + p[0] < 30,
        lambda b, h, i, j, p: p[1] * (i - 4) * (j - 3) <= 2.5,
        lambda b, h, i, j, p: (i - 4) / (j - 5.5) > p[1],
        lambda b, h, i, j, p: (i + 7) // (j % 4 + 1) == 3,
        lambda b, h, i, j, p: i // (2 * j - 9) == -1,
        lambda b, h, i, j, p: np.sqrt((i - 5) * 1.0) < 2,
        lambda b, h, i, j, p: ~(np.sqrt((i - 5) * 1.0) >= 2),
        lambda b, h, i, j, p: np.exp(-p[1] * abs(i - j)) > 0.3,
        lambda b, h, i, j, p: np.minimum(p[3][(i + j) % 40], 2) <= np.maximum(i, j) - 4,
        lambda b, h, i, j, p: np.maximum(p[3][(i + j) % 40], 0) != np.minimum(i, 0),
        lambda b, h, i, j, p: p[2][b, j + 5] + p[1] * i > 1,
        lambda b, h, i, j, p: abs(p[2][b, j] - p[1]) < abs(-i) * 0.2,
        lambda b, h, i, j, p: (abs(p[3][(i * 3 + j) % 40]) > 1) == (i < j),
        lambda b, h, i, j, p: -(i % -p[0]) >= j % p[0],
        lambda b, h, i, j, p: (j * 0.1) % 0.25 < 0.1,
        lambda b, h, i, j, p: np.log(i + 3.0) * np.tanh(j * p[1]) < 1,
        lambda b, h, i, j, p: (p[3][j] != 2) & (p[3][j] >= -1) & ~(p[3][i] == p[3][j]),
    ]
    offsets = (2, 0), (4, 1)
    places = places_of(SIZES, *offsets)
    for n, function in enumerate(functions):
        mask = CustomMask(function, params=p)
        with np.errstate(all="ignore"):
            table = np.broadcast_to(mask.evaluate(places, SIZES), (B, H, M, N))
        check_tiles(mask, table, SIZES, *offsets, exact=False, tiles=300, seed=n)


# --- laws ---


def test_laws_of_joining():
    a, b, c = SlidingWindow(2, 3), Padding([5, 9]), Dense(DENSE)
    same = [
        (a & b, b & a), (a | b, b | a), (~~a, a), (~(a & b), ~a | ~b), (~(a | b), ~a & ~b),
        ((a & b) & c, a & (b & c)), (a & (b | c), (a & b) | (a & c)), (a & DENSE, a & c), (DENSE | a, c | a),
        (a & ~a, Dense(np.array(False))), (a | ~a, Dense(np.array(True))),
    ]  # fmt: skip
    for left, right in same:
        np.testing.assert_array_equal(evaluated(left), evaluated(right))


def test_joined_masks_know_whether_they_use_positions():
    assert (Causal() & Padding(3)).uses_positions
    assert not (Padding(3) | ~Dense(DENSE)).uses_positions
    assert [type(leaf) for leaf in (~Causal() & (Padding(3) | DENSE)).leaves()] == [Causal, Padding, Dense]


# --- what rules are ---


def test_rules_are_immutable():
    given = np.ones((M, N), bool)
    mask = Dense(given)
    given[:] = False
    assert evaluated(mask).all()
    with pytest.raises(ValueError, match="read-only"):
        mask.array[0, 0] = False
    with pytest.raises(AttributeError):
        mask.array = given
    with pytest.raises(AttributeError):
        (Causal() & mask).masks = ()


def test_an_array_given_to_a_call_is_not_copied():
    given = np.ones((M, N), bool)
    assert as_mask(given).array is given
    assert (Causal() & given).masks[1].array is not given
    assert rules.ReplaceExcluded(given, 0.0).mask.array is not given


@pytest.mark.parametrize("name", [name for name in TRUTH if "Custom" not in name])
def test_rules_travel_between_processes(name):
    mask, _ = TRUTH[name]
    np.testing.assert_array_equal(evaluated(pickle.loads(pickle.dumps(mask))), evaluated(mask))


def test_broadcast_arrays_take_no_memory():
    wide = np.broadcast_to(np.zeros((1, 1, M, N), bool), (B, H, M, N))
    (array,) = Dense(wide).arguments(SIZES)
    assert array.strides[:2] == (0, 0)


@pytest.mark.parametrize("use", [bool, lambda m: m and m, lambda m: not m, lambda m: [1] if m else []])
def test_truth_value_is_an_error(use):
    with pytest.raises(TypeError, match="use &"):
        use(Causal())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 3)), r"modifiers=Bias\(m\).*m.astype\(bool\)"),
        (np.zeros((3, 3), np.float32), r"modifiers=Bias\(m\)"),
        (np.ones((3, 3), int), r"m.astype\(bool\)"),
        (np.ones((3, 3), np.uint8), r"m.astype\(bool\).*Bias"),
        (True, "needed a mask rule"),
        ("causal", "needed a mask rule"),
        (Causal, r"the class Causal.*Causal\(...\)"),
        (lambda b, h, i, j, p: j <= i, "CustomMask"),
        (rules.ALiBi(0.5), "modifiers="),
        (object(), "dtype object"),
    ],
)
def test_what_is_no_mask(given, message):
    with pytest.raises(TypeError, match=message):
        as_mask(given)
    with pytest.raises(TypeError, match=message):
        Causal() & given


def test_none_is_no_operand():
    assert as_mask(None) is None
    with pytest.raises(TypeError, match="None"):
        Causal() | None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SlidingWindow(-2, 0), ValueError, "left is -2"),
        (lambda: SlidingWindow(1.5, 0), TypeError, "left is float; needed an integer"),
        (lambda: SlidingWindow(True, 0), TypeError, "left is True"),
        (lambda: Padding([1.0, 2.0]), TypeError, "key_lengths has dtype float64"),
        (lambda: Padding([[1]]), ValueError, r"key_lengths has shape \(1, 1\)"),
        (lambda: Padding(None), TypeError, "key_lengths"),
        (lambda: SameDocument([0.5]), TypeError, "query_ids has dtype float64"),
        (lambda: PrefixLM("x"), TypeError, "prefix_lengths"),
        (lambda: BlockSparse(np.ones((2, 2)), 4), TypeError, "blocks has dtype float64"),
        (lambda: BlockSparse(np.ones((2, 2), bool), 0), ValueError, "tile is 0"),
        (lambda: BlockSparse(np.ones((2, 2), bool), (1, 2, 3)), ValueError, "one integer or two"),
        (lambda: BlockSparse(np.ones(2, bool), 4), ValueError, "2 to 4 axes"),
        (lambda: Dense(np.ones((2, 2))), TypeError, "Dense: array has dtype float64"),
        (lambda: Dense(np.ones((1, 1, 1, 1, 1), bool)), ValueError, "5 axes"),
        (lambda: Neighborhood((4, 4, 4, 4), 2), ValueError, "1 to 3 axes"),
        (lambda: Neighborhood((4, 4), 5), ValueError, "spans more than an axis of length 4"),
        (lambda: Neighborhood((8, 8), 3, 3), ValueError, "size 3 with dilation 3"),
        (lambda: Neighborhood((8, 8), (3, 3, 3)), ValueError, "one for each axis"),
        (lambda: Neighborhood((8, 8), 0), ValueError, "at least 1"),
        (lambda: Neighborhood((8.0, 8), 3), TypeError, "shape is float"),
        (lambda: CustomMask(3), TypeError, "allowed is int; needed a function"),
        (lambda: CustomMask(lambda b, h, i, j, p: i - j), TypeError, "allowed returns int; needed bool"),
        (lambda: CustomMask(lambda b, h, i, j, p: None), TypeError, "allowed returns nothing"),
        (lambda: CustomMask(lambda b, h, i, j, p: j <= i, params=3), TypeError, "params is int; needed a tuple"),
        (lambda: CustomMask(lambda b, h, i, j, p: j <= i, params=("x",)), TypeError, r"params\[0\]"),
        (lambda: CustomMask(lambda b, h, i, j, p: j <= i, params=(1j,)), TypeError, r"params\[0\] is complex"),
        (
            lambda: CustomMask(lambda b, h, i, j, p: j <= i, params=([[1], [2, 3]],)),
            TypeError,
            "does not make an array",
        ),
        (lambda: CustomMask(lambda b, h, i, j, p: j <= i, params=(True,)), TypeError, "pass 1 and compare"),
        (lambda: CustomMask(lambda b, h, i, j, p: j <= i, params=(2**40,)), ValueError, "32-bit"),
        (lambda: CustomMask(lambda b, h, i, j, p: j <= i, tile=lambda *a: True), TypeError, "tile returns bool"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Padding([1, 2, 3]), r"Padding: key_lengths has shape \(3,\); needed one that broadcasts to \(B,\) = \(2,\)"),
        (Padding(4, query_lengths=[1, 2, 3]), "Padding: query_lengths"),
        (PrefixLM([1, 2, 3]), "PrefixLM: prefix_lengths"),
        (SameDocument(QUERY_IDS[:, :5], KEY_IDS), r"SameDocument: query_ids .*\(B, M\) = \(2, 9\)"),
        (SameDocument(QUERY_IDS), r"SameDocument: query_ids, for keys too, .*\(B, N\) = \(2, 12\)"),
        (Dense(DENSE[..., :5]), r"Dense: array has shape \(2, 3, 9, 5\); needed .* \(2, 3, 9, 12\)"),
        (BlockSparse(BLOCKS, 4), None),
        (BlockSparse(BLOCKS, 3), r"BlockSparse: blocks has shape \(2, 3, 3, 3\); needed .*\(2, 3, 3, 4\)"),
        (BlockSparse(BLOCKS, 2), r"BlockSparse: blocks .*\(2, 3, 5, 6\)"),
        (Neighborhood((3, 3), 3), r"Neighborhood: key positions go from 0 to 11; grid \(3, 3\) has 0 to 8"),
        (
            CustomMask(lambda b, h, i, j, p: p[0][b, j] > 0, params=(TABLE[:, :11],)),
            "reads index j .* from 0 to 11, axis 1 has 11",
        ),
        (CustomMask(lambda b, h, i, j, p: p[0][b, i - 1] > 0, params=(TABLE,)), "from -1 to 7"),
        (CustomMask(lambda b, h, i, j, p: i // j > 0), "divides by j, which can be zero: it goes from 0 to 11"),
        (CustomMask(lambda b, h, i, j, p: i * 2**30 > 0), "beyond 32 bits"),
        (Causal() & ~Padding([1, 2, 3]), "Padding: key_lengths"),
    ],
)
def test_what_does_not_fit_a_call(mask, message):
    if message is None:
        return mask.check(SIZES)
    with pytest.raises(ValueError, match=message):
        mask.check(SIZES)


def test_ids_beyond_32_bits():
    huge = np.array([2**40, 2**40, -(2**50), 2**40 + 2**32])
    mask = SameDocument(huge)
    sizes = Sizes(1, 1, 1, 4, 4, 1, 1)
    np.testing.assert_array_equal(evaluated(mask, sizes, 0, 0)[0, 0], huge[:, None] == huge)


def test_lists_and_scalars_are_arrays():
    np.testing.assert_array_equal(
        evaluated(as_mask([True] * 5 + [False] * 7)), np.broadcast_to(np.arange(N) < 5, (B, H, M, N))
    )
    assert isinstance([True] * 12 & Causal(), Mask)
