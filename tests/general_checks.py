"""Checks of the general CUDA kernel in the simulator, on tiny shapes; each runs in a process of its own."""

import numpy as np

import attn_numba as an
import cases
from attn_numba import reference, rules
from attn_numba.gpu import forward_general as general, tiles
from attn_numba.gpu.hooks import bind
from attn_numba.gpu.launch import ready
from attn_numba.problem import check
from attn_numba.rules import Dot, Sizes, Softmax
from hook_checks import with_fault

WIDE = tiles.Tile(8, 8, 4, 4, 4, 4, 2)  # four threads: what takes time in the simulator is waiting for each other
SMALL = tiles.Tile(4, 8, 4, 4, 2, 4, 2)
SIZES = Sizes(B=1, H=2, Hk=2, M=5, N=11, D=3, E=3)
TWO = SIZES._replace(B=2, H=1, Hk=1)


def seen_by_some(rng, z):
    array = rng.random((z.B, z.H, z.M, z.N)) < 0.5
    array[:, :, ::3] = False
    return array


def block_sparse(rng, z):
    return an.BlockSparse(rng.random((z.B, z.H, 3, 4)) < 0.5, (2, 3))


def random_documents(rng, z):
    return an.SameDocument(rng.integers(0, 3, (z.B, z.M)), rng.integers(0, 3, (z.B, z.N)))


def whole_tiles(rng, z):
    """Tiles of keys that are seen by none and by all, which bounds do not tell."""
    seen = np.zeros((z.B, z.H, z.M, z.N), bool)
    seen[:, 0, :, :8], seen[:, 1, :, 8:] = True, rng.random((z.B, z.M, z.N - 8)) < 0.5
    return seen


def temperature(rng, z):
    return an.Temperature(rng.random((z.B, z.H, z.M)) + 0.2)


def several(rng, z):
    return [an.SoftCap(3.0), cases.bias()(rng, z), temperature(rng, z), an.ALiBi([0.5, 0.1])]


RULES = {  # name -> sizes, and arguments of `attention`: functions among them are called with (rng, sizes)
    "plain": (SIZES, {}),
    "Causal": (SIZES, {"mask": an.Causal(), "query_offset": 6}),
    "Causal, offsets by sequence": (
        TWO,
        {"mask": an.Causal(), "query_offset": np.array([9, -2]), "key_offset": np.array([-1, 2])},
    ),
    "SlidingWindow": (SIZES, {"mask": an.SlidingWindow(2, 1), "query_offset": 3}),
    "Neighborhood": (SIZES._replace(M=12, N=12), {"mask": an.Neighborhood((3, 4), 3)}),
    "Padding": (TWO, {"mask": an.Padding([9, 4], key_starts=[2, 0], query_lengths=[5, 3])}),
    "Padding, nothing": (TWO, {"mask": an.Padding([0, 11])}),
    "SameDocument": (SIZES, {"mask": random_documents}),
    "PrefixLM": (SIZES, {"mask": an.PrefixLM(4), "query_offset": 2}),
    "BlockSparse": (SIZES, {"mask": block_sparse}),
    "Dense": (SIZES, {"mask": cases.dense()}),
    "Dense, whole tiles": (SIZES, {"mask": whole_tiles}),
    "boolean array, empty rows": (SIZES, {"mask": seen_by_some}),
    "CustomMask": (SIZES, {"mask": cases.custom_table, "query_offset": 0}),
    "CustomMask, own tile": (
        SIZES,
        {
            "mask": an.CustomMask(
                lambda b, h, i, j, p: j < p[0] + (i - i),
                params=(7,),
                tile=lambda b, h, i0, i1, j0, j1, p: (j0 < p[0]) * 1 + (j1 <= p[0]) * 1,
            ),
            "query_offset": 0,
        },
    ),
    "mask & mask": (SIZES, {"mask": an.Causal() & an.SlidingWindow(5, 5) & an.Padding(9), "query_offset": 5}),
    "mask | array": (
        SIZES,
        {"mask": lambda rng, z: an.Causal() | (rng.random((z.H, 1, z.N)) < 0.2), "query_offset": 1},
    ),
    "~mask": (SIZES, {"mask": ~an.SlidingWindow(1, 2), "query_offset": 4}),
    "SoftCap": (SIZES, {"modifiers": an.SoftCap(1.5)}),
    "Bias": (SIZES, {"modifiers": cases.bias("HMN")}),
    "Bias minus infinity": (SIZES, {"modifiers": cases.bias("HMN", excluded=0.5)}),
    "Bias minus infinity for whole rows": (SIZES, {"modifiers": cases.bias("HM", excluded=0.5)}),
    "ALiBi": (SIZES, {"modifiers": cases.slopes, "query_offset": 2}),
    "Temperature": (SIZES, {"modifiers": temperature}),
    "ReplaceExcluded": (SIZES, {"modifiers": an.ReplaceExcluded(an.SlidingWindow(3, 1), -2.5), "query_offset": 4}),
    "CustomModifier": (SIZES, {"modifiers": cases.DECAY, "query_offset": 0}),
    "CustomModifier, table": (SIZES, {"modifiers": cases.custom_relative, "query_offset": 0}),
    "AdaptiveSpan": (SIZES._replace(N=19), {"modifiers": an.AdaptiveSpan(7.5, 3.0), "query_offset": 1}),
    "AdaptiveSpan (BHM), causal": (
        SIZES,
        {"modifiers": cases.span(6, ramp=2.5), "mask": an.Causal(), "query_offset": 6},
    ),
    "modifiers in order": (SIZES, {"modifiers": several, "mask": an.Causal(), "query_offset": 6}),
    "scale 0": (SIZES, {"scale": 0.0, "mask": an.Causal(), "query_offset": 4}),
    "scale negative": (SIZES, {"scale": -0.7}),
    "Dropout": (SIZES, {"dropout": an.Dropout(0.4, 3), "query_offset": 0}),
    "Dropout by sequence, offsets": (
        TWO,
        {
            "dropout": an.Dropout(0.5, [2**40 + 7, 3]),
            "query_offset": np.array([-3, 41]),
            "key_offset": 2,
            "mask": seen_by_some,
        },
    ),
    "sink": (SIZES, {"normalizer": an.Softmax(sink=[-1.0, 60.0])}),
    "sink, empty rows": (SIZES, {"normalizer": an.Softmax(sink=0.5), "mask": seen_by_some}),
    "sink minus infinity": (SIZES, {"normalizer": an.Softmax(-np.inf), "mask": seen_by_some}),
    "Dot": (SIZES, {"score": an.Dot()}),
    "Cosine": (SIZES, {"score": an.Cosine(), "scale": 3.0}),
    "Bilinear": (SIZES, {"score": cases.bilinear("H"), "scale": 3.0}),
    "Additive": (SIZES, {"score": cases.additive_by_head, "mask": an.Causal(), "query_offset": 6}),
    "grouped heads": (SIZES._replace(H=4, N=5), {"mask": an.Causal(), "query_offset": 1}),
    "no keys": (SIZES._replace(N=0), {}),
    "no keys, sink": (SIZES._replace(N=0), {"normalizer": an.Softmax(0.25)}),
    "one of all": (SIZES._replace(H=1, Hk=1, M=1, N=1, D=1, E=1), {}),
    "long rows": (Sizes(1, 1, 1, 1, 3, 265, 1), {}),
    "more values than a tile": (SIZES._replace(H=1, Hk=1, M=3, N=5, E=6), {}),
    "strides": (SIZES, {"mask": an.Causal(), "query_offset": 6}),
    "hidden NaN": (SIZES, {"mask": lambda rng, z: cases.dense(0.6, "BN")(rng, z)}),
    "hidden NaN behind a bias": (
        SIZES,
        {"modifiers": lambda rng, z: [cases.bias("BN", excluded=0.4)(rng, z), an.SoftCap(4.0)]},
    ),
    "seen NaN": (SIZES, {"mask": seen_by_some}),
    "seen infinity": (SIZES, {"mask": seen_by_some}),
    "NaN behind a dropped weight": (SIZES, {"dropout": an.Dropout(0.6, 5), "query_offset": 0}),
    "huge scores": (SIZES, {}),
}  # fmt: skip
OF_ALL = ("plain", "boolean array, empty rows", "Bias minus infinity", "Dropout", "hidden NaN", "seen NaN", "no keys")
OF_ONE = ("Causal", "Dense, whole tiles", "Additive", "modifiers in order", "huge scores", "more values than a tile")
OF_EACH = {"Sparsemax": OF_ALL, "Entmax15": OF_ALL, "DoubleSoftmax": (*OF_ALL, *OF_ONE)}  # the last one walks least
IN_16_BITS = ("plain", "Causal", "strides", "Cosine", "seen NaN", "hidden NaN")
IN_64_BITS = ("plain", "sink", "modifiers in order", "Dropout", "long rows", "seen infinity", "Additive")
NORMALIZERS = {"Sparsemax": an.Sparsemax(), "Entmax15": an.Entmax15(), "DoubleSoftmax": an.DoubleSoftmax()}
LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 0.0, "float64": 0.0}


def built(name, dtype):
    """Return q, k, v and the arguments of `attention` of a case."""
    z, arguments = RULES[name]
    rng = np.random.default_rng(len(name))
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    q, k, v = (rng.standard_normal(s) for s in ((z.B, z.H, z.M, z.D), (z.B, z.Hk, z.N, z.D), (z.B, z.Hk, z.N, z.E)))
    arguments = {key: x(rng, z) if callable(x) else x for key, x in arguments.items()}
    if "hidden" in name:
        hidden = ~cases.allowed(z, arguments).any(2)
        assert 0 < hidden.sum() < hidden.size
        for n, (b, h, j) in enumerate(np.argwhere(hidden)):
            k[b, h, j], v[b, h, j, n % z.E :] = [np.nan, np.inf, -np.inf][n % 3], [np.inf, np.nan][n % 2]
    elif name == "seen NaN":
        k[:, :, 1, 0], v[:, :, 7, 1], q[0, 1, 4, 0] = np.nan, np.nan, np.nan
    elif name == "seen infinity":
        v[:, :, 9, 2] = -np.inf
    elif name == "NaN behind a dropped weight":
        v[:, :, 5, 1] = np.nan
    elif name == "huge scores":
        k[:, :, 3] *= 1e18
        k[:, :, 8] *= -1e18
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), arguments


def apart(x):
    """Return an equal array whose heads and rows change places in memory, and whose columns have gaps."""
    return np.repeat(x.swapaxes(1, 2), 2, axis=3)[..., ::2].swapaxes(1, 2)


def bits(x):
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def attend(q, k, v, tile=WIDE, change=None, **arguments):
    """Return output, lse, stats and weights of the kernel; those that a normalizer does not have are None."""
    problem = check(q, k, v, **arguments)
    bound, z = bind(problem), problem.sizes
    if change is not None:
        bound = bound._replace(hooks=change(bound.hooks))
    softmax, number = isinstance(problem.normalizer, Softmax), problem.accumulator
    mapped = problem._replace(q=bits(problem.q), k=bits(problem.k), v=bits(problem.v))
    if not isinstance(problem.score, Dot):
        q, k = problem.score.mapped(*(x.astype(number) for x in (problem.q, problem.k)))
        score = Dot() if problem.score.dots else problem.score
        mapped = mapped._replace(q=q, k=k, score=score, sizes=z._replace(D=q.shape[-1]))
    out = np.full((z.B, z.H, z.M, z.E), 7, problem.q.dtype)
    lse, stats, weights = (np.full((z.B, z.H, z.M, *n), 7, number) for n in ((), (2,), (z.N,)))
    if not softmax:
        lse = stats = None
    sink = getattr(problem.normalizer, "sink", None)
    if sink is not None:
        sink = np.ascontiguousarray(problem.normalizer.sink_array(z))
    chosen, general.tile_of = general.tile_of, lambda problem: tile
    try:
        program = general.program(mapped, bound, lse=softmax, stats=softmax, weights=not softmax)
        grid = general.grid(mapped)
    finally:
        general.tile_of = chosen
    units = general.units_of(mapped)
    given = general.arguments(mapped, bound.entries, bits(out), lse, stats, sink, None if softmax else weights, units)
    assert general.refusal(mapped, (5, 0)) == ""
    assert len(given) == len(program.signature)
    if 0 not in grid:
        ready(program, None).start(grid, None, given)
    return out, lse, stats, None if softmax else weights


def agree(name, dtype, change=None, **other):
    """Hold the kernel to the reference in one case."""
    q, k, v, arguments = built(name, dtype)
    arguments |= other
    softmax = isinstance(arguments.get("normalizer", Softmax()), Softmax)
    with np.errstate(all="ignore"):
        expected = reference.attention(
            *(x.astype(np.float64) for x in (q, k, v)), return_weights=True, return_lse=softmax, **arguments
        )
        if name == "strides":
            q, k, v = map(apart, (q, k, v))
        tile = SMALL if name in ("Causal", "strides", "Dense, whole tiles") else WIDE
        out, lse, stats, weights = attend(q, k, v, tile, change, **arguments)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == "float64" else {"rtol": 3e-5, "atol": 3e-6}
    out = out.astype(np.float64)
    found = np.isfinite(expected.out)
    np.testing.assert_array_equal(np.isfinite(out), found, name)
    coarse = {"rtol": tolerance["rtol"] + LAST_PLACE[dtype] / 2, "atol": tolerance["atol"]}
    np.testing.assert_allclose(out[found], expected.out[found], err_msg=name, **coarse)
    if not softmax:
        np.testing.assert_allclose(weights, expected.weights, err_msg=name, **tolerance)
        return
    np.testing.assert_allclose(lse, expected.lse, err_msg=name, **tolerance)
    if expected.weights.shape[-1] == 0:
        np.testing.assert_array_equal(stats, np.broadcast_to([-np.inf, 0], stats.shape), name)
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.where(expected.weights.any(-1), np.log(expected.weights.max(-1)) + expected.lse, -np.inf)
        inverse = np.where(top == -np.inf, 0, np.exp(top - expected.lse))
    spoiled = np.isnan(expected.lse)
    if name != "sink":  # weights beside a sink far above them lose the last places
        np.testing.assert_allclose(stats[..., 0][~spoiled], top[~spoiled], err_msg=name, **tolerance)
    np.testing.assert_allclose(stats[..., 1], np.where(spoiled, np.nan, inverse), err_msg=name, **tolerance)


def check_rules(part, parts):
    """Hold every rule to the reference, in float32 and softmax."""
    for name in list(RULES)[part::parts]:
        agree(name, "float32")
        print(name)


def check_normalizers():
    for title, normalizer in NORMALIZERS.items():
        for name in OF_EACH[title]:
            agree(name, "float32", normalizer=normalizer)
            print(title, name)


def check_dtypes():
    for name in IN_64_BITS:
        agree(name, "float64")
        print("float64", name)
    agree("Causal", "float64", normalizer=an.Entmax15())
    for dtype in ("float16", "bfloat16"):
        for name in IN_16_BITS:
            agree(name, dtype)
            print(dtype, name)


FAULTS = (  # name, case, text of the rules, what stands there instead
    ("query offset ignored", "Causal", "row_i + f[0]", "row_i + int32(0)"),
    ("mask off by one", "Causal", " <= ", " < "),
    ("tile wrongly skipped", "Causal", "(int32(1) if", "(int32(1) if False and"),
    ("tile wrongly whole", "SlidingWindow", "int32(2) if", "int32(2) if True or"),
    ("wrong head", "Bias", "int64(h) * p[", "int64(0) * p["),
    ("counter of another group", "Dropout", "j >> 2", "j >> 1"),
)


def find_faults():
    """Plant faults in the rules, one at a time: the cases find each."""
    for title, name, old, new in FAULTS:
        try:
            agree(name, "float32", change=lambda hooks, old=old, new=new: with_fault(hooks, old, new))
        except AssertionError:
            print(title)
        else:
            raise AssertionError(f"not found: {title}")


def rules_in_use():
    """Return the types of all rules in the cases."""
    found = {type(x) for x in NORMALIZERS.values()}
    for z, arguments in RULES.values():
        rng = np.random.default_rng(0)
        built_ones = {key: x(rng, z) if callable(x) else x for key, x in arguments.items()}
        found |= {type(x) for x in cases.rules_of(built_ones)}
    return found


def check_coverage():
    """Check that every public rule is in a case."""
    kinds = (rules.Mask, rules.Modifier, rules.Score, rules.Normalizer)
    public = [getattr(rules, name) for name in rules.__all__]
    wanted = {x for x in public if isinstance(x, type) and issubclass(x, (*kinds, rules.Dropout))} - set(kinds)
    assert len(wanted) > 20
    assert wanted <= rules_in_use() | {rules.Softmax}, wanted - rules_in_use()


def check_bits():
    """A row alone, in a batch, without what it does not see, and with what it does not see changed: the same bits."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 2, 6, 3), (2, 1, 20, 3), (2, 1, 20, 4)))
    rule = {"mask": an.Causal(), "query_offset": 9}
    at = np.s_[1, 1, 5]  # a row that sees keys up to 14

    def held(results, place):
        return [np.atleast_1d(x[place]) for x in results[:3]]

    whole = held(attend(q, k, v, SMALL, **rule), at)
    dense = np.arange(20) <= np.arange(9, 15)[:, None]
    loud = k.copy(), v.copy()
    loud[0][1, :, 15:], loud[1][1, :, 15:] = np.nan, np.inf
    others = {
        "what is hidden": held(attend(q, *loud, SMALL, **rule), at),
        "alone": held(attend(q[1:, 1:, 5:6], k[1:], v[1:], SMALL, mask=an.Causal(), query_offset=14), np.s_[0, 0, 0]),
        "fewer keys": held(attend(q[1:], k[1:, :, :15], v[1:, :, :15], SMALL, **rule), np.s_[0, 1, 5]),
        "no tile skipped": held(attend(q, k, v, SMALL, mask=~~an.CustomMask(unbounded), query_offset=9), at),
        "looked at": held(attend(q, k, v, SMALL, mask=an.Dense(dense)), at),
    }
    for name, other in others.items():
        for x, y in zip(other, whole, strict=True):
            np.testing.assert_array_equal(x, y, name)
        print(name)


def unbounded(b, h, i, j, p):
    """Causal, in a way that says nothing of a tile by its bounds."""
    return (i - j) // (abs(i - j) + 1) >= 0


def check_real_tiles():
    """One row in the tiles that cards get."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 2)).astype(np.float32) for n in (1, 3, 3))
    expected = reference.attention(q, k, v, return_lse=True)
    tile = general.tile_of(check(q, k, v))
    for x, y in zip(attend(q, k, v, tile)[:2], expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    print(tile)


def check_elements():
    """Numbers of 16 bits to float32 and back, by their bits."""
    import ml_dtypes

    from attn_numba.gpu.elements import reader, writer

    rng = np.random.default_rng(0)
    for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        halves = np.arange(0, 2**16, 7, dtype=np.uint16)
        with np.errstate(all="ignore"):
            numbers = halves.view(dtype).astype(np.float32)
            read = [reader(name)(x) for x in halves]
            np.testing.assert_array_equal(read, numbers)
            between = [np.nextafter(numbers, np.float32(np.inf)), (numbers[:-1] + numbers[1:]) / 2]
            wide = np.concatenate([numbers, *between, rng.integers(0, 2**32, 999, np.uint32).view(np.float32)])
            written = np.array([writer(name)(x) for x in wide])
            np.testing.assert_array_equal(written.view(dtype).astype(np.float32), wide.astype(dtype).astype(np.float32))
        print(name)
