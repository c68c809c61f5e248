"""Checks of the general CUDA kernels of gradients in the simulator; each runs in a process of its own."""

import contextlib
import re
import time

import numpy as np
import pytest

import attn_numba as an
import cases
import general_checks
from attn_numba import problem, reference
from attn_numba.gpu import backward_general, backward_rows, backward_rules, backward_sums, engine, gradients, maps
from attn_numba.gpu.hooks import bind
from attn_numba.gpu.kept import Kept
from attn_numba.gpu.tiles import Tile
from attn_numba.rules import Sizes, as_modifiers, places_of
from general_checks import OF_ALL, RULES, SIZES, WIDE, apart, built
from hook_checks import problem_of, some_places, with_fault

HIGH = Tile(8, 4, 4, 4, 4, 2, 2)
SMALL = Sizes(2, 4, 2, 5, 7, 3, 2)
SLOPED = an.CustomModifier(
    lambda s, b, h, i, j, p: s * np.exp(-p[0] * abs(i - j)) + np.log(1.0 + abs(j)),
    params=(0.02,),
    slope=lambda s, b, h, i, j, p: np.exp(-p[0] * abs(i - j)),
)


def twice(rng, z):
    bias = an.Bias(rng.standard_normal(z.N))
    return [bias, an.SoftCap(2.0), bias]


def two_by_pair(rng, z):
    bias = cases.bias("MN")(rng, z)
    return [bias, an.SoftCap(2.0), cases.bias("HMN", excluded=0.2)(rng, z), bias]


def heat_by_head(rng, z):
    return an.Temperature(rng.random((z.H, 1)) + 0.3)


def hidden_keys(rng, z):
    return cases.dense(0.6, "BN")(rng, z)


def hidden_rows(rng, z):
    array = rng.random((z.B, 1, z.M, z.N)) < 0.6
    array[:, :, 1::3] = False
    return array


ADDED = {  # beside those of the forward pass: name -> sizes, and arguments as `general_checks.RULES` has them
    "CustomModifier": (SIZES, {"modifiers": SLOPED, "query_offset": 0}),
    "long rows": (Sizes(1, 1, 1, 1, 3, 29, 1), {}),  # those of the forward pass take minutes here
    "Bias of one number": (SMALL, {"modifiers": lambda rng, z: [an.Bias(0.3), an.SoftCap(1.5)]}),
    "Bias by key": (SMALL, {"modifiers": cases.bias("N")}),
    "Bias by head and key": (SMALL, {"modifiers": lambda rng, z: an.Bias(rng.standard_normal((z.H, 1, z.N)))}),
    "Bias by query": (SMALL, {"modifiers": lambda rng, z: [an.Bias(rng.standard_normal((z.M, 1))), an.SoftCap(2.0)]}),
    "Bias for all heads": (SMALL, {"modifiers": cases.bias("MN")}),
    "Bias by sequence": (SMALL, {"modifiers": lambda rng, z: an.Bias(rng.standard_normal((z.B, 1, z.M, z.N)))}),
    "a rule twice": (SMALL, {"modifiers": twice}),
    "two by pair": (SMALL, {"modifiers": two_by_pair}),
    "Temperature by head": (SMALL, {"modifiers": heat_by_head}),
    "AdaptiveSpan": (SIZES._replace(N=19), {"modifiers": an.AdaptiveSpan(7.3, 3.0), "query_offset": 1}),
    "grouped": (SMALL, {"mask": an.Causal(), "query_offset": 2, "dropout": an.Dropout(0.3, 1)}),
    "sink by sequence": (SMALL, {"normalizer": an.Softmax([[0.1], [0.7]])}),
    "Bilinear, one for all": (SMALL, {"score": cases.bilinear()}),
    "Additive, one for all": (SMALL, {"score": cases.additive, "modifiers": an.SoftCap(2.0)}),
    "queries without keys": (SMALL, {"mask": hidden_rows}),
    "Cosine, hidden NaN": (SIZES, {"mask": hidden_keys, "score": an.Cosine(), "scale": 3.0}),
    "Bilinear, hidden NaN": (SIZES, {"mask": hidden_keys, "score": cases.bilinear("H")}),
    "Additive, hidden NaN": (SIZES, {"mask": hidden_keys, "score": cases.additive}),
    "queries without keys, Bilinear": (SMALL, {"mask": hidden_rows, "score": cases.bilinear()}),
    "no queries": (SIZES._replace(M=0), {"modifiers": lambda rng, z: an.Bias(rng.standard_normal((z.H, 1, z.N)))}),
    "no queries, Additive": (SIZES._replace(M=0), {"score": cases.additive_by_head}),
    "no keys, sink": (SIZES._replace(N=0), {"normalizer": an.Softmax(0.25), "score": cases.bilinear("H")}),
    "no sequences": (SIZES._replace(B=0), {"modifiers": an.ALiBi([0.5, 0.1]), "query_offset": 0}),
}  # fmt: skip
CASES = RULES | ADDED
WITHOUT_SLOPE = ("CustomModifier, table",)
LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 0.0, "float64": 0.0}
OF_ONE = ("modifiers in order", "Causal", "grouped", "Bias by key", "queries without keys")
IN_16_BITS = ("plain", "grouped", "strides", "Cosine", "Bilinear, one for all", "hidden NaN", "queries without keys")
IN_64_BITS = ("plain", "sink", "modifiers in order", "two by pair", "Additive", "grouped")


@contextlib.contextmanager
def tiles(tile, few=True):
    """Let kernels have a tile of this size, those of maps and sums few threads, and remember none of other sizes."""
    modules = backward_general, backward_rows, backward_rules
    changes = [(module, "tile_of", lambda *_: tile) for module in modules]
    changes.append((gradients, "_prepared", Kept(8)))
    if few:
        changes += [(maps, "UNIT_BLOCK", (3, 2)), (maps, "PRODUCT_BLOCK", (4, 2))]
        sizes = {"THREADS": 4, "ROWS": 2, "SIDE": 4, "DEPTH": 4}
        changes += [(backward_sums, name, size) for name, size in sizes.items()]
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def changed(change):
    """Let calls have rules with functions that are changed, and remember none of them."""
    bound, kept = engine.bind, engine._uploaded
    engine._uploaded = Kept(8)

    def wrong(*arguments):
        found = bound(*arguments)
        return found._replace(hooks=change(found.hooks))

    engine.bind = wrong
    try:
        yield
    finally:
        engine.bind, engine._uploaded = bound, kept


def made(name, dtype):
    """Return q, k, v, dout and the arguments of a case."""
    source = dict(general_checks.RULES)
    general_checks.RULES.update(ADDED)
    try:
        q, k, v, arguments = built(name, dtype)
    finally:
        general_checks.RULES.clear()
        general_checks.RULES.update(source)
    z = CASES[name][0]
    dout = np.random.default_rng(len(name) + 1).standard_normal((z.B, z.H, z.M, z.E)).astype(q.dtype)
    if name.startswith("queries without keys"):
        hidden = ~cases.allowed(z, arguments).any(3)
        assert 0 < hidden.sum() < hidden.size
        q[hidden], dout[hidden] = np.nan, np.inf
    elif name == "seen infinity":
        dout[0, 0, 1, 1] = np.inf
    return q, k, v, dout, arguments


def differentiate(arrays, tile=WIDE, **arguments):
    with tiles(tile), np.errstate(all="ignore"):
        return an.attention_vjp(*arrays, backend="cuda", **arguments)


def arrays_of(found, like=None):
    """Return all gradients of a call by name; those of rules in the order of a like one."""
    named = {"q": found.q, "k": found.k, "v": found.v}
    own = {id(rule): arrays for rule, arrays in found.learned}
    for n, (rule, arrays) in enumerate((like or found).learned):
        named |= {f"{n} {name}": own[id(rule)][name] for name in arrays}
    return named


def compared(found, expected, name, dtype):
    """Hold gradients to those of the reference in float64."""
    assert len(found.learned) == len(expected.learned), name
    found = arrays_of(found, expected)
    for key, wanted in arrays_of(expected).items():
        x = found[key].astype(np.float64)
        assert x.shape == wanted.shape, (name, key, x.shape, wanted.shape)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(x), finite, f"{name} {key}")
        finite &= np.isfinite(x)
        size = max(1.0, np.abs(wanted[finite]).max(initial=0))
        near = (1e-12 if dtype == "float64" else 2e-5) * size
        np.testing.assert_allclose(
            x[finite], wanted[finite], rtol=LAST_PLACE[dtype] / 2, atol=near, err_msg=f"{name} {key}"
        )


def agree(name, dtype, title="", **other):
    """Hold the kernels to the reference in one case."""
    *arrays, arguments = made(name, dtype)
    arguments |= other
    with np.errstate(all="ignore"):
        expected = reference.attention_vjp(*(x.astype(np.float64) for x in arrays), **arguments)
    if name == "strides":
        arrays = list(map(apart, arrays))
    tile = HIGH if name in ("Causal", "strides", "Dense, whole tiles", "Bias by key") else WIDE
    begin = time.perf_counter()
    found = differentiate(arrays, tile, **arguments)
    assert [x.shape for x in (found.q, found.k, found.v)] == [x.shape for x in arrays[:3]]
    assert {x.dtype for x in (found.q, found.k, found.v)} == {arrays[0].dtype}
    compared(found, expected, f"{title} {name}", dtype)
    print(title, dtype, name, f"{time.perf_counter() - begin:.1f} s", flush=True)


def check_rules(part, parts):
    """Hold every rule to the reference, in float32 and softmax."""
    for name in [x for x in CASES if x not in WITHOUT_SLOPE][part::parts]:
        agree(name, "float32")


def check_normalizers(part, parts):
    chosen = [(title, name) for title in general_checks.NORMALIZERS for name in (*OF_ALL, *OF_ONE)]
    for title, name in chosen[part::parts]:
        agree(name, "float32", title, normalizer=general_checks.NORMALIZERS[title])


def check_dtypes():
    for name in IN_64_BITS:
        agree(name, "float64")
    agree("Causal", "float64", "Entmax15", normalizer=an.Entmax15())
    for dtype in ("float16", "bfloat16"):
        for name in IN_16_BITS:
            agree(name, dtype)


def check_precision():
    """Against float64 the kernels err at most twice as much as the reference in their dtype, by the norm of errors."""
    for dtype in ("float32", "float16", "bfloat16"):
        for name in ("modifiers in order", "grouped", "sink"):
            *arrays, arguments = made(name, dtype)
            wide = [x.astype(np.float64) for x in arrays]
            exact = reference.attention_vjp(*wide, **arguments)
            same = reference.attention_vjp(*arrays, **arguments, compute_dtype=dtype)
            found = arrays_of(differentiate(arrays, **arguments), exact)
            exact, same = arrays_of(exact), arrays_of(same)
            for key, wanted in exact.items():
                if np.abs(wanted).max() < 1e-9:  # by a law: it has no error to scale by
                    continue
                allowed = 2 * np.linalg.norm(same[key] - wanted) + 1e-6 * np.linalg.norm(wanted)
                error = np.linalg.norm(found[key].astype(np.float64) - wanted)
                assert error <= allowed, (dtype, name, key, error, allowed)
                print(dtype, name, key, error / allowed, flush=True)


# --- bits, and what must not reach them ---


def check_bits():
    """A row alone, in a batch, without what it does not see, and with what it does not see changed: the same bits."""
    rng = np.random.default_rng(0)
    shapes = (2, 2, 6, 3), (2, 1, 20, 3), (2, 1, 20, 4), (2, 2, 6, 4)
    q, k, v, dout = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    bias = an.Bias(rng.standard_normal((6, 20)))
    rule = {"mask": an.Causal(), "query_offset": 9}
    whole = differentiate((q, k, v, dout), **rule)
    again = differentiate((q, k, v, dout), **rule)
    for x, y in zip(arrays_of(whole).values(), arrays_of(again).values(), strict=True):
        np.testing.assert_array_equal(x, y)
    loud = [x.copy() for x in (q, k, v, dout)]
    loud[1][:, :, 15:], loud[2][:, :, 15:] = np.nan, np.inf
    hidden = differentiate(loud, **rule)
    for name in "qkv":
        np.testing.assert_array_equal(getattr(whole, name), getattr(hidden, name), name)
    assert not hidden.k[:, :, 15:].any()
    assert not hidden.v[:, :, 15:].any()
    print("what is hidden")
    alone = differentiate((q[1:], k[1:], v[1:], dout[1:]), **rule)
    for name in "qkv":
        np.testing.assert_array_equal(getattr(whole, name)[1:], getattr(alone, name), name)
    print("a sequence alone")
    one = differentiate((q[1:, 1:, 5:], k[1:], v[1:], dout[1:, 1:, 5:]), mask=an.Causal(), query_offset=14)
    np.testing.assert_array_equal(whole.q[1, 1, 5], one.q[0, 0, 0])
    print("a query alone")
    looked = np.arange(20) <= np.arange(9, 15)[:, None]
    other = differentiate((q, k, v, dout), mask=an.Dense(looked))
    for name in "qkv":
        np.testing.assert_array_equal(getattr(whole, name), getattr(other, name), name)
    print("looked at")
    quiet = np.ones((6, 20), bool)
    quiet[3], quiet[:, 4] = False, False
    results = []
    for bad in (0.0, np.nan):
        arrays = [x.copy() for x in (q, k, v, dout)]
        arrays[0][:, :, 3], arrays[3][:, :, 3], arrays[1][:, :, 4], arrays[2][:, :, 4] = bad, bad, bad, bad
        results.append(arrays_of(differentiate(arrays, mask=quiet, modifiers=bias, normalizer=an.Softmax(0.5))))
    for key, x in results[0].items():
        np.testing.assert_array_equal(x, results[1][key], key)
    assert not results[1]["q"][:, :, 3].any()
    assert not results[1]["k"][:, :, 4].any()
    print("what nobody sees")


def check_seen():
    """NaN in a value reaches what depends on it, and nothing else."""
    rng = np.random.default_rng(1)
    q, k, v, dout = (rng.standard_normal((1, 2, 6, 3)).astype(np.float32) for _ in range(4))
    v[0, 1, 2, 1] = np.nan  # seen by queries 2 to 5 of head 1, in the gradients by their scores
    found = differentiate((q, k, v, dout), mask=an.Causal())
    spoiled = np.isnan(found.q).any(-1)
    np.testing.assert_array_equal(spoiled, [[[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]])
    np.testing.assert_array_equal(np.isnan(found.k).any(-1), [[[0] * 6, [1] * 6]])
    assert np.isfinite(found.v).all()
    v[0, 1, 2, 1] = 0
    q[0, 0, 2] = np.nan
    found = differentiate((q, k, v, dout), mask=an.Causal(), normalizer=an.Sparsemax())
    np.testing.assert_array_equal(np.isnan(found.q).any(-1), [[[0, 0, 1, 0, 0, 0], [0] * 6]])
    np.testing.assert_array_equal(np.isnan(found.k).any(-1), [[[1, 1, 1, 0, 0, 0], [0] * 6]])
    q[0, 0, 2], k[0, 0, 3] = 0, np.nan  # its scores are replaced, and so have gradients of 0; it is seen all the same
    found = differentiate((q, k, v, dout), modifiers=an.ReplaceExcluded(np.arange(6) != 3, -1.0))
    np.testing.assert_array_equal(np.isnan(found.q).any(-1), [[[1] * 6, [0] * 6]])
    assert np.isfinite(found.k).all()
    print("seen")


# --- saved, and faults that must be found ---


def check_saved():
    q, k, v, dout, arguments = made("sink", "float32")
    for rules in ({"mask": an.Causal(), "query_offset": 6}, arguments):
        saved = reference.attention(q, k, v, return_lse=True, **rules)
        found, plain = (differentiate((q, k, v, dout), **rules, saved=x) for x in (saved, None))
        for x, y in zip(arrays_of(found).values(), arrays_of(plain).values(), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
        wrong = saved.lse.copy()
        wrong[0, 1, 3] += 0.2
        for lse, at in ((wrong, "(0, 1, 3)"), (np.full_like(wrong, -np.inf), "(0, 0, 0)")):
            with pytest.raises(ValueError, match=re.escape(f" at {at}, and") + ".* of another call"):
                differentiate((q, k, v, dout), **rules, saved=(saved.out, lse))
    empty = {"mask": np.arange(5)[:, None] % 2 == np.ones(11)}
    saved = reference.attention(q, k, v, return_lse=True, **empty)
    assert not differentiate((q, k, v, dout), **empty, saved=saved).q[:, :, ::2].any()
    print("saved")


FAULTS = (  # name, case, text of the rules, what stands there instead
    ("query offset ignored", "Causal", "row_i + f[0]", "row_i + int32(0)"),
    ("mask off by one", "Causal", " <= ", " < "),
    ("tile wrongly skipped", "Causal", "(int32(1) if", "(int32(1) if False and"),
    ("tile wrongly whole", "SlidingWindow", "int32(2) if", "int32(2) if True or"),
    ("wrong head", "Bias by head and key", "int64(h) * p[", "int64(0) * p["),
    ("counter of another group", "Dropout", "j >> 2", "j >> 1"),
)


def slope_lost(hooks):
    """Return rules whose derivative by the score is the scale alone."""
    return hooks._replace(slope=lambda s, ds, b, h, i, j, f, p: ds * np.float32(3**-0.5))


def learned_lost(hooks):
    """Return rules whose derivatives by an array are that by the score."""
    return hooks._replace(learned=tuple(lambda s, ds, *_: ds for _ in hooks.learned))


def find_faults():
    """Plant faults in the rules, one at a time: the cases find each."""
    changes = [
        (title, name, lambda hooks, old=old, new=new: with_fault(hooks, old, new)) for title, name, old, new in FAULTS
    ]
    changes += [("slope lost", "SoftCap", slope_lost), ("derivative lost", "Temperature", learned_lost)]
    for title, name, change in changes:
        try:
            with changed(change):
                agree(name, "float32")
        except AssertionError:
            print("found", title)
        else:
            raise AssertionError(f"not found: {title}")


# --- the rules' derivatives ---


def check_derivatives(dtype):
    """Hold the functions of every case's rules to the rules' own derivatives, step by step."""
    count = 0
    for case in cases.CASES:
        z, modifiers = case.sizes, as_modifiers(case.kwargs().get("modifiers"))
        if not modifiers or 0 in (z.B, z.H, z.M, z.N) or not all(x.differentiable for x in modifiers):
            continue
        call = problem_of(case, dtype)
        bound = bind(call, True)
        rng = np.random.default_rng(5)
        raw, ds = (rng.standard_normal((z.B, z.H, z.M, z.N)).astype(dtype) for _ in range(2))
        places = places_of(z, call.query_offset, call.key_offset)
        scores, allowed = [raw.astype(np.float64) * call.scale], np.ones(raw.shape, bool)
        with np.errstate(all="ignore"):
            for modifier in call.modifiers:
                excluded = modifier.excluded(places, z)
                allowed &= True if excluded is None else ~excluded
                scores.append(modifier.evaluate(scores[-1], places, z))
            gradient, learned = ds.astype(np.float64), {}
            for n in reversed(range(len(call.modifiers))):
                modifier = call.modifiers[n]
                if modifier.learned is not None:
                    learned[n] = gradient * modifier.learned_derivatives(scores[n], places, z)
                gradient = gradient * modifier.derivatives(scores[n], places, z)
        assert len(bound.hooks.learned) == len(learned), case.name
        tolerance = 1e-11 if dtype == "float64" else 2e-5
        p = bound.entries
        for place in some_places(rng, z, 40):
            if not allowed[place]:
                continue
            b, h, i, j = (np.int32(x) for x in place)
            at = (raw[place], ds[place], b, h, i, j, bound.hooks.fixed(b, h, p), p)
            wanted = [gradient[place] * call.scale, *(learned[n][place] for n in sorted(learned))]
            for n, function in enumerate((bound.hooks.slope, *bound.hooks.learned)):
                value = function(*at)
                assert np.dtype(type(value)) == np.dtype(dtype), (case.name, type(value))
                np.testing.assert_allclose(value, wanted[n], tolerance, tolerance, err_msg=f"{case.name} {place} {n}")
        count += 1
    print(count)


def check_plain_hooks():
    """Hooks for the forward pass have no derivatives, and those of a call without modifiers are the same for both."""
    x = np.zeros((1, 2, 5, 4), np.float32)
    call = problem.check(x, x, x, mask=an.Causal())
    assert bind(call).hooks is bind(call, True).hooks
    call = problem.check(x, x, x, modifiers=an.SoftCap(2.0))
    plain, sloped = bind(call).hooks, bind(call, True).hooks
    assert (plain.slope, plain.learned) == (None, ())
    assert sloped.slope is not None
    assert "def slope" in sloped.source


def check_real_tiles():
    """A query in the tiles that cards get, and the kernels of maps and sums with the threads they have there."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, n, 2)).astype(np.float32) for n in (1, 3, 3, 1))
    expected = reference.attention_vjp(q, k, v, dout)
    call = problem.check(q, k, v)
    with np.errstate(all="ignore"):
        found = an.attention_vjp(q, k, v, dout, backend="cuda")
    for name in "qkv":
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    *arrays, arguments = made("Bilinear", "float32")
    expected = reference.attention_vjp(*(x.astype(np.float64) for x in arrays), **arguments)
    with tiles(WIDE, few=False):
        found = an.attention_vjp(*arrays, backend="cuda", **arguments)
    compared(found, expected, "Bilinear", "float32")
    print(backward_general.tile_of(call, 2), backward_rows.tile_of(call))
