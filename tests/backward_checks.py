"""The tensor-core kernels of gradients, emulated, against the reference in float64 on the same numbers of 16 bits."""

from __future__ import annotations

import numpy as np

import attn_numba as an
import emulated_block
import emulator
import tensor_checks
from attn_numba import problem as problems
from attn_numba.gpu import backward_mma, backward_mma_facts
from attn_numba.gpu.hooks import bind
from attn_numba.reference import attention_vjp
from attn_numba.rules.data import gathered
from tensor_checks import BAD, Flat, Place

RESULTS = ("q", "k", "v")
MANY = {**tensor_checks.MANY, "D": 16}
ONE_HEAD = {**MANY, "B": 1, "H": 1}
# Of masks alone, which meet these kernels by the hooks that the forward pass has, the others do.
LEFT_OUT = {
    "causal, starts together", "window on both sides", "neighborhood", "documents", "prefix", "block sparse",
}  # fmt: skip
LAST_PLACE = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def small(work):
    """Return the sizes of tiles of 16 lines and as few rows as a kernel can have."""
    return work._replace(rows=32, threads=64, row_tiles=1, lines=16)


def real(work):
    """Return the sizes that a kernel has on a card."""
    return work


def run(q, k, v, dout, dtype, *, sizes=small, edit=None, hooks=None, results=None, changes=None, **rules):
    """Return dq, dk, dv (float32) and the facts of emulated kernels.

    Parameters
    ----------
    q, k, v, dout : array of uint16
        Bits of the numbers.
    dtype : str
        "bfloat16" or "float16".
    sizes : function (work) -> work, optional
        Changes the sizes of a block's work.
    edit : function (kind, arguments) -> arguments, optional
        A fault in a kernel's parameters.
    hooks : function (kind, hooks) -> hooks, optional
        A fault in its rules.
    results : arrays of uint16, optional
        Where dq, dk and dv go.
    changes : dict, optional
        Faults in instructions.
    **rules : object
        Of `attention`.
    """
    call = problems.check(Place(q, dtype), Place(k, dtype), Place(v, dtype), read=problems.device_view, **rules)
    assert not backward_mma.refusal(call, Place(dout, dtype), (9, 0))
    bound = bind(call, gradients=True)
    z = call.sizes
    if results is None:
        results = [np.full(x.shape, 0x7FFF, np.uint16) for x in (q, k, v)]
    facts = np.full((z.B, z.H, z.M, backward_mma_facts.FACTS), np.nan, np.float32)
    sink = None
    if call.normalizer.sink is not None:
        sink = Flat(np.broadcast_to(np.asarray(call.normalizer.sink, np.float64), (z.B, z.H)))
    entries = tuple(Flat(x) if isinstance(x, np.ndarray) else x for x in bound.entries)
    given_dout, told = Place(dout, dtype), Place(facts, "float32")
    places = [Place(x, dtype) for x in results]
    used = python_numbers(bound.hooks)

    def start(kind, work, make, grid, given, inputs, outputs):
        given = [0 if x is None else x.pointer if isinstance(x, Place) else x for x in given]
        given = [tuple(map(int, x)) if isinstance(x, tuple) and x is not entries else x for x in given]
        given = [x.item() if isinstance(x, np.generic) else x for x in given]
        given = given if edit is None else edit(kind, given)
        kernel = make(work, used if hooks is None else hooks(kind, used))
        emulated_block.launch(kernel, grid, work.threads, work.shared, given, inputs, outputs)

    with emulator.installed(**(changes or {})):
        work = sizes(backward_mma_facts.work_for(call))
        given = backward_mma_facts.arguments(call, entries, given_dout, told, sink)
        make = lambda work, hooks: backward_mma_facts.make(work, hooks, sink is not None)  # noqa: E731
        start("facts", work, make, backward_mma_facts.grid(call, work), given, (q, k, v, dout), (facts,))
        for kind, part in (("queries", slice(0, 1)), ("keys", slice(1, 3))):
            work, found = sizes(backward_mma.work_for(kind, call)), results[part]
            given = backward_mma.arguments(kind, call, entries, given_dout, told, *places[part])
            grid = backward_mma.grid(kind, call, work)
            start(kind, work, backward_mma.make, grid, given, (q, k, v, dout, facts), found)
    return *(emulator.numbers_of(x, dtype) for x in results), facts


def python_numbers(hooks):
    """Return hooks whose numbers are Python's."""
    changed = {"score": lambda *a: float(hooks.score(*a)), "kind": lambda *a: int(hooks.kind(*a))}
    if hooks.slope is not None:
        changed["slope"] = lambda *a: float(hooks.slope(*a))
    return hooks._replace(**changed)


def arrays(rng, dtype, B, H, Hk, M, N, D, E=None):
    """Return the bits of random q, k, v and dout."""
    E = D if E is None else E
    dout = emulator.bits_of(rng.standard_normal((B, H, M, E)), dtype)
    return *tensor_checks.arrays(rng, dtype, B, H, Hk, M, N, D, E), dout


def expected(q, k, v, dout, dtype, **rules):
    """Return the reference's gradients in float64, and those that it computes in a dtype of 16 bits."""
    numbers = [emulator.numbers_of(x, dtype).astype(np.float64) for x in (q, k, v, dout)]
    return attention_vjp(*numbers, **rules), attention_vjp(*numbers, compute_dtype=dtype, **rules)


def failure(found, exact, rounded, dtype):
    """Return what is wrong with gradients: more than twice the reference's error and some last places; or nothing."""
    for name, result in zip(RESULTS, found[:3], strict=True):
        wanted, near = getattr(exact, name), getattr(rounded, name)
        error = np.abs(result - wanted).max()
        allowed = 2 * np.abs(near - wanted).max() + 4 * LAST_PLACE[dtype] * np.abs(wanted).max()
        if not error <= allowed:
            return f"d{name} errs by {error:.2e} where {allowed:.2e} is allowed"
        norm, own = np.linalg.norm(result - wanted), np.linalg.norm(near - wanted)
        allowed = 2 * own + LAST_PLACE[dtype] * np.linalg.norm(wanted)
        if not norm <= allowed:
            return f"d{name} errs by a norm of {norm:.2e} where {allowed:.2e} is allowed"
    return ""


def check(*bits, sizes=small, results=None, **rules):
    """Hold the kernels to the reference; return the largest relative error of a gradient's norm."""
    found, (exact, rounded) = run(*bits, sizes=sizes, results=results, **rules), expected(*bits, **rules)
    said = failure(found, exact, rounded, bits[-1])
    assert not said, said
    normalizer = rules.get("normalizer")
    if normalizer is not None:
        of_sink = found[3][..., 3].astype(np.float64).sum(axis=2)
        most = 1e-4 * np.abs(found[3][..., 3]).sum() + 1e-12
        wanted = exact.of(normalizer)
        assert np.abs(gathered(of_sink, wanted.shape) - wanted).max() <= most
    pairs = [(x, getattr(exact, name)) for name, x in zip(RESULTS, found[:3], strict=True)]
    return max(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30) for x, y in pairs)


def check_rules():
    """Hold the kernels to the reference for every kind of rule, in one dtype or the other."""
    rng = np.random.default_rng(3)
    for n, (rule, arguments) in enumerate(rules(rng)):
        if rule in LEFT_OUT:
            continue
        dtype = ("bfloat16", "float16")[n % 2]
        print(rule, f"{check(*arrays(rng, dtype, **MANY), dtype, **arguments):.1e}", flush=True)


def rules(rng):
    """Yield for every kind of rule its name and arguments; those of a custom modifier with its slope."""
    for name, arguments in tensor_checks.rules(rng):
        modifiers = arguments.get("modifiers")
        if isinstance(modifiers, an.CustomModifier):
            slope = lambda s, b, h, i, j, p: np.exp(-p[0] * abs(i - j))  # noqa: E731
            modifiers = an.CustomModifier(modifiers.apply, modifiers.params, slope)
            arguments = {**arguments, "modifiers": modifiers}
        yield name, arguments
    spans = an.AdaptiveSpan(rng.uniform(24, 30, (2, 2, 20)), 6.5)  # within it a score stays as it is
    yield "adaptive span, whole tiles", {"modifiers": spans, "query_offset": 20}


# --- sizes, strides ---

SIZES = [
    (1, 1, 1, 1, 1, 32, 32), (1, 1, 1, 1, 40, 64, 64), (1, 1, 1, 17, 16, 96, 96), (1, 1, 1, 33, 31, 128, 128),
    (2, 4, 2, 5, 33, 64, 64), (1, 3, 1, 9, 20, 40, 24), (1, 1, 1, 16, 20, 64, 128), (1, 1, 1, 12, 20, 128, 32),
    (2, 4, 2, 2, 18, 8, 8),
]  # fmt: skip


def check_sizes():
    """Hold the kernels to the reference for head sizes, ragged ends and grouped heads, causal and not."""
    rng = np.random.default_rng(4)
    for n, sizes in enumerate(SIZES):
        dtype = ("bfloat16", "float16")[n // 2 % 2]
        causal = {"mask": an.Causal(), "query_offset": max(0, sizes[4] - sizes[3])} if n % 2 else {}
        print(sizes, dtype, f"{check(*arrays(rng, dtype, *sizes), dtype, **causal):.1e}")


def check_strides():
    """Hold the kernels to the reference for arrays that lie in other ways, results among them, and for real tiles."""
    rng, dtype = np.random.default_rng(5), "float16"
    bits = arrays(rng, dtype, 1, 2, 1, 20, 24, 16)

    def swapped(x):
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)

    def spaced(x):
        wide = np.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 8), 0x7FFF, np.uint16)
        wide[:, :, ::2, 8:] = x
        return wide[:, :, ::2, 8:]

    def backward(x):
        return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]

    plain = run(*bits, dtype)
    for way in (swapped, spaced, backward):
        results = [way(np.full(x.shape, 0x7FFF, np.uint16)) for x in bits[:3]]
        check(*map(way, bits), dtype, results=results)
        for found, wanted in zip(results, plain[:3], strict=True):
            np.testing.assert_array_equal(emulator.numbers_of(found, dtype), wanted)
        print(way.__name__)
    for n, size in enumerate((64, 128)):
        dtype = ("bfloat16", "float16")[n % 2]
        bits = arrays(rng, dtype, 1, 1, 1, 70, 70, size)
        print("real tiles", size, f"{check(*bits, dtype, sizes=real, mask=an.Causal()):.1e}")


# --- accuracy ---


def check_accuracy():
    """Values with much in common, which gradients by scores do not see: the mean gradient has to be exact for that."""
    rng = np.random.default_rng(9)
    for dtype, common, scale in (("bfloat16", 20.0, 0.5), ("float16", 20.0, 0.5), ("bfloat16", 0.0, 1.0)):
        q, k, v, dout = arrays(rng, dtype, 1, 1, 1, 32, 48, 16)
        v = emulator.bits_of(emulator.numbers_of(v, dtype) + common, dtype)
        print(dtype, common, f"{check(q, k, v, dout, dtype, scale=scale):.1e}")
    fill = an.ReplaceExcluded(an.SlidingWindow(2, 0), -1e9)  # rows of which nothing is left but equal scores
    bits = arrays(rng, "float16", 1, 1, 1, 20, 24, 16)
    print("filled rows", f"{check(*bits, 'float16', modifiers=fill, query_offset=30):.1e}")


# --- numbers that are not finite ---


def same_bits(before, after):
    np.testing.assert_array_equal(np.asarray(before).view(np.uint32), np.asarray(after).view(np.uint32))


def check_isolation():
    """Where no query looks may be anything: no bit changes. What some look at reaches nobody else."""
    rng = np.random.default_rng(6)
    mask = rng.random((20, 40)) < 0.4
    mask[:, [3, 17, 30]] = False
    mask[[5, 11]] = False
    for dtype, rule in (
        ("float16", {"mask": an.Dense(mask)}),
        ("bfloat16", {"mask": an.Dense(mask), "modifiers": an.SoftCap(2.0), "dropout": an.Dropout(0.3, 1)}),
        ("bfloat16", {"modifiers": an.Bias(np.where(mask, 0.5, -np.inf))}),
    ):
        q, k, v, dout = arrays(rng, dtype, **ONE_HEAD)
        if "dropout" in rule:
            rule["query_offset"] = 0
        clean = run(q, k, v, dout, dtype, **rule)
        for n, j in enumerate((3, 17, 30)):
            k[0, :, j], v[0, :, j, n % 3 :: 2] = BAD[dtype][n % 4], BAD[dtype][(n + 1) % 4]
        q[0, :, 5], dout[0, :, 5, ::3], dout[0, :, 11] = BAD[dtype][0], BAD[dtype][1], BAD[dtype][2]
        for before, after in zip(clean, run(q, k, v, dout, dtype, **rule), strict=True):
            same_bits(before, after)
        assert not clean[0][0, 0, 5].any()
        print("hidden", dtype, *rule)
    fill = np.zeros(40)
    fill[[3, 17]] = -np.inf
    least = an.CustomModifier(lambda s, b, h, i, j, p: s + p[0][j], (fill,), lambda s, b, h, i, j, p: 1.0)
    q, k, v, dout = arrays(rng, dtype, **ONE_HEAD)
    clean = run(q, k, v, dout, dtype, modifiers=least, query_offset=0)
    v[0, :, 3], v[0, :, 17] = BAD[dtype][0], BAD[dtype][1]
    for before, after in zip(clean, run(q, k, v, dout, dtype, modifiers=least, query_offset=0), strict=True):
        same_bits(before, after)
    print("hidden by scores of minus infinity")

    rule = {"mask": an.Causal(), "query_offset": 20}
    dtype = "bfloat16"
    q, k, v, dout = arrays(rng, dtype, **ONE_HEAD)
    clean = run(q, k, v, dout, dtype, **rule)
    queries, keys = np.arange(20), np.arange(40)
    for name, row in (("q", 6), ("k", 28), ("v", 28), ("dout", 6)):
        given = {"q": q.copy(), "k": k.copy(), "v": v.copy(), "dout": dout.copy()}
        given[name][0, 0, row, 3] = BAD[dtype][0]
        spoiled_queries = queries >= row - 20 if name in "kv" else queries == row
        spoiled_keys = keys <= (39 if name in "kv" else row + 20)
        wanted = [np.broadcast_to(x[:, None], (len(x), 16)) for x in (spoiled_queries, spoiled_keys, spoiled_keys)]
        if name == "v":
            wanted[2] = np.zeros((40, 16), bool)  # weights know nothing of values
        if name == "dout":
            wanted[2] = spoiled_keys[:, None] & (np.arange(16) == 3)
        for before, after, where in zip(clean, run(*given.values(), dtype, **rule), wanted, strict=False):
            np.testing.assert_array_equal(np.isfinite(after[0, 0]), ~where)
            same_bits(before[0, 0][~where], after[0, 0][~where])
        print("seen in", name)

    rule = {"mask": an.Causal() & an.Padding([66]), "sizes": real}
    q, k, v, dout = arrays(rng, dtype, 1, 1, 1, 70, 70, 64)
    clean = run(q, k, v, dout, dtype, **rule)
    k[0, 0, 66:], v[0, 0, 67, 3], dout[0, 0, 60, 7] = BAD[dtype][:3]
    after = run(q, k, v, dout, dtype, **rule)
    seeing = np.arange(70)[:, None] <= 60
    seven = np.arange(64) == 7
    for before, found, where in zip(clean, after, (np.arange(70)[:, None] == 60, seeing, seeing & seven), strict=False):
        where = np.broadcast_to(where, (70, 64))
        np.testing.assert_array_equal(np.isfinite(found[0, 0]), ~where)
        same_bits(before[0, 0][~where], found[0, 0][~where])
    print("real tiles")


# --- order ---


def check_bits():
    """The bits of a row depend on nothing beside it: batch, heads, other rows, and what it does not see."""
    rng, dtype = np.random.default_rng(8), "bfloat16"
    q, k, v, dout = arrays(rng, dtype, 2, 2, 1, 37, 24, 16)
    rule = {"mask": an.Causal(), "modifiers": an.SoftCap(2.0)}
    whole = run(q, k, v, dout, dtype, query_offset=3, **rule)
    for before, after in zip(whole, run(q, k, v, dout, dtype, query_offset=3, **rule), strict=True):
        same_bits(before, after)
    print("again")
    alone = run(q[1:], k[1:], v[1:], dout[1:], dtype, query_offset=3, **rule)
    for before, after in zip(whole, alone, strict=True):
        same_bits(before[1:], after)
    print("alone")
    later = run(q[:, :, 20:], k, v, dout[:, :, 20:], dtype, query_offset=23, **rule)
    for n in (0, 3):
        same_bits(whole[n][:, :, 20:], later[n])
    print("later rows")
    fewer = run(q, k[:, :, :20], v[:, :, :20], dout, dtype, query_offset=-17, **rule)
    more = run(q, k, v, dout, dtype, query_offset=-17, **rule)
    for before, after in zip(more, fewer, strict=True):
        same_bits(before[:, :, : after.shape[2]], after)
    print("seen keys")


def check_skipping():
    """Of either side only those tiles are read that some row of the other sees."""
    rng, dtype = np.random.default_rng(7), "bfloat16"
    q, k, v, dout = arrays(rng, dtype, 1, 1, 1, 96, 96, 16)
    read = {}

    def copy16(to, source, count):
        if count:
            block = emulated_block.getcurrent().block
            read.setdefault((id(block.launch), block.index[0]), set()).add(int(source))
        emulator.copy16(to, source, count)

    launches = []

    def keep(kind, given):
        launches.append(kind)
        return given

    run(q, k, v, dout, dtype, mask=an.SlidingWindow(8, 0), changes={"copy16": copy16}, edit=keep)
    assert launches == ["facts", "queries", "keys"]
    for array in (q, k, v, dout):
        first = array.__array_interface__["data"][0]
        most = max(len({(at - first) // 512 for at in x if first <= at < first + array.nbytes}) for x in read.values())
        assert most <= 4, most  # of six tiles: a block's own two, or those and their neighbors on both sides
    print(len(read))


# --- faults ---


class WithoutBarriers(emulated_block.Cuda):
    """The barriers that only order memory are left out."""

    @staticmethod
    def syncthreads():
        pass


def changed(kinds, place, value):
    """Return an edit of a parameter of some kernels: its place from the end."""
    return lambda kind, given: [*given[:place], value(given[place]), *given[place + 1 :]] if kind in kinds else given


def replaced(kinds, change):
    return lambda kind, hooks: change(hooks) if kind in kinds else hooks


M, N, H, GROUP, SCALE, FACTOR = (n - 7 for n in range(6))  # places of parameters, counted from the end
STRIDES = -8


def faults():
    """Yield names of faults and how each is put into a run."""
    both = ("queries", "keys")
    yield "swizzle", {"changes": {"copy16": tensor_checks.without_swizzle}}
    yield "missing wait for copies", {"changes": {"copy_wait0": lambda: None}}
    yield "missing barriers", {"changes": {"module_of_cuda": WithoutBarriers}}
    yield "transposed load", {"changes": {"load_matrices_transposed": emulator.INSTRUCTIONS["load_matrices"]}}
    yield "lanes exchanged", {"changes": {"shuffle_xor": lambda x, mask: emulator.shuffle_xor(x, 4 * mask)}}
    yield "halves exchanged", {"changes": {"pack_float16": lambda a, b: emulator.pack_float16(b, a)}}

    def next_fact(at):
        return emulator.load_shared_floats(at + 16 if at % 32 == 0 else at - 16)

    yield "facts of another query", {"changes": {"load_shared_floats": next_fact}}
    for kind in ("facts", *both):
        only = (kind,)
        yield f"{kind}: mask off by one", {"hooks": replaced(only, without_last_key)}
        yield (
            f"{kind}: tile wrongly skipped",
            {"hooks": replaced(only, lambda x: x._replace(kind=lambda *a: 0 if 16 in (a[2], a[4]) else x.kind(*a)))},
        )
        yield (
            f"{kind}: tiles wrongly whole",
            {"hooks": replaced(only, lambda x: x._replace(kind=lambda *a: 2))},
        )
        yield (
            f"{kind}: offset ignored",
            {"hooks": replaced(only, lambda x: x._replace(fixed=lambda b, h, p: (0, *x.fixed(b, h, p)[1:])))},
        )
        yield f"{kind}: no head group", {"edit": changed(only, GROUP, lambda group: 1)}
        yield f"{kind}: one key too few", {"edit": changed(only, N, lambda n: n - 1)}
        yield f"{kind}: one query too few", {"edit": changed(only, M, lambda n: n - 1)}
        yield f"{kind}: one query too many", {"edit": changed(only, M, lambda n: n + 1)}
        yield f"{kind}: factor", {"edit": changed(only, FACTOR, lambda x: 1.1 * x)}
        yield f"{kind}: rows lie elsewhere", {"edit": changed(only, STRIDES, lambda s: (*s[:11], s[11] + 16, *s[12:]))}
    for kind in both:
        yield f"{kind}: scale", {"edit": changed((kind,), SCALE, lambda x: 1.1 * x)}
    yield "no mean", {"changes": {"load_shared_floats": without_mean}}


def without_last_key(hooks):
    return hooks._replace(allowed=lambda b, h, i, j, f, p: hooks.allowed(b, h, i, j - 1, f, p))


def without_mean(at):
    return (*emulator.load_shared_floats(at)[:2], 0.0, 0.0)


def find_faults():
    """Assert that sound kernels pass, and that each fault is caught: by a result or on its way there."""
    rng, dtype = np.random.default_rng(8), "float16"
    rule = {"mask": an.Causal(), "query_offset": 27, "key_offset": 2}
    bits = *arrays(rng, dtype, 1, 2, 1, 20, 40, 16), dtype
    wanted = expected(*bits, **rule)

    def outcome(**fault):
        try:
            return failure(run(*bits, **rule, **fault), *wanted, dtype)
        except emulated_block.Fault as error_met:
            return str(error_met)

    assert outcome() == ""
    for fault, how in faults():
        said = outcome(**how)
        assert said, f"the fault {fault!r} was not caught"
        print(f"{fault}: {said}")
