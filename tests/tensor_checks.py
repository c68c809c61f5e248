"""The kernels for the tensor cores, emulated, against the reference in float64 on the same numbers of 16 bits."""

from __future__ import annotations

import numpy as np

import attn_numba as an
import emulated_block
import emulator
from attn_numba import problem as problems
from attn_numba.gpu import forward_mma, forward_wgmma
from attn_numba.gpu.hooks import bind
from attn_numba.reference import attention

KERNELS = {"mma": forward_mma, "wgmma": forward_wgmma}
BOUNDS = {"bfloat16": 3e-3, "float16": 4e-4}  # of the norm of the error, relative


class Named:
    """A dtype that NumPy does not have."""

    def __init__(self, name):
        self.name, self.itemsize, self.kind = name, 2, "V"


class Place:
    """Where numbers of 16 bits lie."""

    def __init__(self, bits, dtype):
        self.bits, self.dtype = bits, Named(dtype)
        self.pointer = bits.__array_interface__["data"][0]
        self.shape, self.strides, self.ndim = bits.shape, bits.strides, bits.ndim


class Flat:
    """A parameter's array, by address: an index outside of it is an error."""

    def __init__(self, array):
        self.numbers = np.asarray(array).ravel().tolist()

    def __getitem__(self, n):
        emulated_block.require(0 <= n < len(self.numbers), f"element {n} of a parameter of {len(self.numbers)}")
        return self.numbers[int(n)]


def small(name, problem):
    """Return a layout with tiles of 16 keys and as few rows as the kernel can have."""
    layout = KERNELS[name].layout_for(problem)
    if name == "wgmma":
        return layout._replace(rows=64, threads=128, keys=16)
    return layout._replace(rows=32, threads=64, row_tiles=1, keys=16)


def real(name, q, k, v, dtype):
    """Return the layout that the kernel has on a card."""
    call = problems.check(*(Place(x, dtype) for x in (q, k, v)), read=problems.device_view)
    return KERNELS[name].layout_for(call)


def run(name, q, k, v, dtype, *, layout=None, edit=None, hooks=None, out=None, changes=None, **rules):
    """Return the output (float32), the log-sum-exp and the rows' (top, inverse) of an emulated kernel.

    Parameters
    ----------
    name : str
        "mma" or "wgmma".
    q, k, v : array of uint16
        Bits of the numbers.
    dtype : str
        "bfloat16" or "float16".
    layout : Layout, optional
        Sizes of a block's work; the smallest ones without it.
    edit : function (arguments) -> arguments, optional
        A fault in the kernel's parameters.
    hooks : function (hooks) -> hooks, optional
        A fault in its rules.
    out : array of uint16, optional
        Where the output goes.
    changes : dict, optional
        Faults in instructions.
    **rules : object
        Of `attention`.
    """
    module = KERNELS[name]
    call = problems.check(Place(q, dtype), Place(k, dtype), Place(v, dtype), read=problems.device_view, **rules)
    assert not module.refusal(call, (9, 0))
    bound = bind(call)
    z = call.sizes
    if out is None:
        out = np.full((z.B, z.H, z.M, z.E), 0x7FFF, np.uint16)
    lse, stats = (np.full(shape, np.nan, np.float32) for shape in ((z.B, z.H, z.M), (z.B, z.H, z.M, 2)))
    layout = small(name, call) if layout is None else layout
    sink = None
    if call.normalizer.sink is not None:
        sink = np.ascontiguousarray(np.broadcast_to(np.asarray(call.normalizer.sink, np.float64), (z.B, z.H)))
    entries = tuple(Flat(x) if isinstance(x, np.ndarray) else x for x in bound.entries)
    places = [*(Place(x, dtype) for x in (out,)), *(Place(x, "float32") for x in (lse, stats))]
    given = list(module.arguments(call, entries, *places, None if sink is None else Flat(sink)))
    given[:6] = [0 if x is None else x.pointer for x in given[:6]]
    given[7:14] = [tuple(map(int, given[7])), *map(int, given[8:12]), *map(float, given[12:14])]
    if edit is not None:
        given = edit(given)
    used = python_numbers(bound.hooks)
    if hooks is not None:
        used = hooks(used)
    with emulator.installed(**(changes or {})):
        kernel = module.make(layout, used)
        emulated_block.launch(
            kernel, module.grid_of(call, layout), layout.threads, layout.shared, given, (q, k, v), (out, lse, stats)
        )
    return emulator.numbers_of(out, dtype), lse, stats


def python_numbers(hooks):
    """Return hooks whose scores are Python's numbers."""
    return hooks._replace(score=lambda *a: float(hooks.score(*a)), kind=lambda *a: int(hooks.kind(*a)))


def arrays(rng, dtype, B, H, Hk, M, N, D, E=None):
    """Return the bits of random q, k and v."""
    shapes = ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, D if E is None else E))
    return [emulator.bits_of(rng.standard_normal(shape), dtype) for shape in shapes]


def expected(q, k, v, dtype, **rules):
    """Return the reference's output and log-sum-exp."""
    numbers = [emulator.numbers_of(x, dtype).astype(np.float64) for x in (q, k, v)]
    return attention(*numbers, return_lse=True, **rules)


def error(found, wanted):
    """Return the relative error of an output; infinite if it is not finite where it should be."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    if not np.isfinite(found).all():
        return np.inf
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def check(name, q, k, v, dtype, *, layout=None, out=None, **rules):
    """Hold a kernel to the reference; return the error of its output."""
    found, lse, stats = run(name, q, k, v, dtype, layout=layout, out=out, **rules)
    wanted = expected(q, k, v, dtype, **rules)
    if np.linalg.norm(wanted.out) == 0:
        assert not found.any()
        e = 0.0
    else:
        e = error(found, wanted.out)
    assert e <= BOUNDS[dtype], f"{name} {dtype}: relative error {e:.2e}"
    none = np.isneginf(wanted.lse)
    np.testing.assert_array_equal(np.isneginf(lse), none)
    np.testing.assert_allclose(lse[~none], wanted.lse[~none], rtol=1e-5, atol=2e-5)
    with np.errstate(divide="ignore"):
        again = stats[..., 0] - np.log(stats[..., 1])  # 1 / inverse is the sum of exp(s - top), sink included
    np.testing.assert_allclose(again[~none], lse[~none], rtol=1e-5, atol=2e-5)
    assert not stats[none][:, 1].any()
    return e


# --- every rule, every size ---

MANY = {"B": 2, "H": 2, "Hk": 1, "M": 20, "N": 40, "D": 32}
ONE_HEAD = {**MANY, "H": 1}


def rules(rng):
    """Yield for every kind of rule its name and arguments of `attention`, for the sizes `MANY`."""
    positions = {"query_offset": 20}
    yield "full", {}
    yield "causal", {"mask": an.Causal(), **positions}
    yield "causal, starts together", {"mask": an.Causal(), "query_offset": 0}
    yield "causal, everything in the future", {"mask": an.Causal(), "query_offset": -30}
    yield "offsets by sequence", {"mask": an.Causal(), "query_offset": [3, 25], "key_offset": [-5, 1]}
    yield "sliding window", {"mask": an.SlidingWindow(7, 0), **positions}
    yield "window on both sides", {"mask": an.SlidingWindow(3, 5), **positions}
    yield "neighborhood", {"mask": an.Neighborhood((5, 8), 3), "query_offset": 7}
    yield "padding", {"mask": an.Padding([33, 16], key_starts=[2, 0], query_lengths=[20, 7])}
    yield "an empty sequence", {"mask": an.Padding([0, 40])}
    yield "documents", {"mask": an.SameDocument(np.arange(20) // 6, np.arange(40) // 11)}
    yield "prefix", {"mask": an.PrefixLM([5, 30]), "query_offset": 3}
    yield "block sparse", {"mask": an.BlockSparse(rng.random((2, 2, 5, 5)) < 0.4, (4, 8))}
    yield "dense", {"mask": an.Dense(rng.random((2, 2, 20, 40)) < 0.5)}
    table = rng.integers(0, 6, (2, 60))
    strides = an.CustomMask(lambda b, h, i, j, p: ((i - j) % p[0] == 0) | (p[1][b, j] < 2), (3, table))
    yield "custom mask", {"mask": strides, "query_offset": 5}
    yield "masks joined", {"mask": ~(an.Causal() & an.Padding([9, 30])) | an.SlidingWindow(2, 2), **positions}
    yield "soft cap", {"modifiers": an.SoftCap(1.5), "scale": 0.5}
    yield "bias", {"modifiers": an.Bias(rng.standard_normal((2, 20, 40)).astype(np.float32))}
    excluded = np.where(rng.random((2, 20, 40)) < 0.5, -np.inf, 0.25)
    excluded[:, 3] = -np.inf
    yield "bias of minus infinity", {"modifiers": an.Bias(excluded)}
    yield "alibi", {"modifiers": an.ALiBi([0.5, 0.0625]), **positions}
    yield "temperature", {"modifiers": an.Temperature(rng.random((2, 2, 20)) + 0.3)}
    yield "adaptive span", {"modifiers": an.AdaptiveSpan(rng.uniform(-8, 20, (2, 2, 20)), 6.5), **positions}
    yield "replaced scores", {"modifiers": an.ReplaceExcluded(an.SlidingWindow(6, 1), -1.5), **positions}
    decay = an.CustomModifier(lambda s, b, h, i, j, p: s * np.exp(-p[0] * abs(i - j)) + p[1][h, j], (0.1, table / 6))
    yield "custom modifier", {"modifiers": decay, "query_offset": 4}
    yield (
        "all together",
        {
            "mask": an.Causal() & an.SlidingWindow(25, 0),
            "modifiers": [an.SoftCap(3.0), an.ALiBi([0.25, 0.03])],
            "normalizer": an.Softmax([0.3, -1.0]),
            "dropout": an.Dropout(0.3, 5),
            **positions,
        },
    )
    yield "sink", {"normalizer": an.Softmax(0.5)}
    yield "sink by sequence and head", {"normalizer": an.Softmax(rng.standard_normal((2, 2))), "scale": -0.2}
    yield "sink above all, empty rows", {"normalizer": an.Softmax(6.0), "mask": an.Padding([0, 17])}
    yield "sink of minus infinity", {"normalizer": an.Softmax(-np.inf), "mask": an.Padding([0, 17])}
    yield "dropout", {"dropout": an.Dropout(0.4, 2**40 + 7), "query_offset": 0}
    yield (
        "dropout by sequence",
        {"dropout": an.Dropout(0.5, np.array([9, 2**63], np.uint64)), "query_offset": [3, -4], "key_offset": 2},
    )
    yield "scale 0", {"scale": 0.0}


def check_rules(name):
    """Hold a kernel to the reference for every kind of rule, in one dtype or the other."""
    rng = np.random.default_rng(3)
    for n, (rule, arguments) in enumerate(rules(rng)):
        dtype = ("bfloat16", "float16")[n % 2]
        print(rule, f"{check(name, *arrays(rng, dtype, **MANY), dtype, **arguments):.1e}")


SIZES = [
    (1, 1, 1, 1, 1, 32, 32), (1, 1, 1, 1, 40, 64, 64), (1, 1, 1, 17, 16, 96, 96), (1, 1, 1, 65, 31, 128, 128),
    (1, 1, 1, 33, 17, 256, 256), (2, 4, 2, 5, 33, 64, 64), (1, 3, 1, 9, 20, 40, 24), (1, 1, 1, 16, 48, 64, 128),
    (1, 1, 1, 16, 20, 256, 32), (1, 1, 1, 12, 20, 32, 96), (3, 6, 2, 2, 18, 8, 8), (1, 1, 1, 70, 9, 64, 64),
]  # fmt: skip


def check_sizes(name):
    """Hold a kernel to the reference for head sizes, ragged ends and grouped heads, causal and not."""
    rng = np.random.default_rng(4)
    for n, sizes in enumerate(SIZES):
        dtype = ("bfloat16", "float16")[n // 2 % 2]
        causal = {"mask": an.Causal(), "query_offset": max(0, sizes[4] - sizes[3])} if n % 2 else {}
        print(sizes, dtype, f"{check(name, *arrays(rng, dtype, *sizes), dtype, **causal):.1e}")


def check_strides(name):
    """Hold a kernel to the reference for arrays that lie in other ways, results among them, and for its real tiles."""
    rng, dtype = np.random.default_rng(5), "float16"
    q, k, v = arrays(rng, dtype, **MANY)

    def swapped(x):
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)

    def spaced(x):
        wide = np.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 8), 0x7FFF, np.uint16)
        wide[:, :, ::2, 8:] = x
        return wide[:, :, ::2, 8:]

    def backward(x):
        return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]

    plain, _, _ = run(name, q, k, v, dtype)
    for way in (swapped, spaced, backward):
        out = way(np.full(q.shape, 0x7FFF, np.uint16))
        check(name, way(q), way(k), way(v), dtype, out=out)
        np.testing.assert_array_equal(emulator.numbers_of(out, dtype), plain)
        print(way.__name__)
    for n, (D, E) in enumerate(((64, 64), (128, 128), (256, 40))):
        dtype = ("bfloat16", "float16")[n % 2]
        q, k, v = arrays(rng, dtype, 1, 1, 1, 70, 150, D, E)
        rule = {"mask": an.Causal(), "query_offset": 75}
        e = check(name, q, k, v, dtype, layout=real(name, q, k, v, dtype), **rule)
        print("real tiles", D, E, f"{e:.1e}")


# --- numbers that are not finite ---

BAD = {"bfloat16": [0x7FC0, 0x7F80, 0xFF80, 0x7F7F], "float16": [0x7E00, 0x7C00, 0xFC00, 0x7BFF]}


def check_isolation(name):
    """Where no query looks may be anything: no bit changes. What some look at reaches nobody else."""
    rng = np.random.default_rng(6)
    mask = rng.random((20, 40)) < 0.4
    mask[:, [3, 17, 30]] = False
    mask[5] = False
    for dtype, rule, hidden in (
        ("bfloat16", {"mask": an.Padding([33, 16])}, [np.arange(33, 40), np.arange(16, 40)]),
        ("float16", {"mask": an.Dense(mask)}, [[3, 17, 30]] * 2),
        ("bfloat16", {"mask": an.Dense(mask), "modifiers": an.SoftCap(2.0)}, [[3, 17, 30]] * 2),
        ("float16", {"modifiers": an.Bias(np.where(mask, 0.5, -np.inf))}, [[3, 17, 30]] * 2),
    ):
        q, k, v = arrays(rng, dtype, **ONE_HEAD)
        clean = run(name, q, k, v, dtype, **rule)
        for b, keys in enumerate(hidden):
            for n, j in enumerate(keys):
                k[b, :, j], v[b, :, j, n % 3 :: 2] = BAD[dtype][n % 4], BAD[dtype][(n + 1) % 4]
        for before, after in zip(clean, run(name, q, k, v, dtype, **rule), strict=True):
            np.testing.assert_array_equal(before.view(np.uint32), after.view(np.uint32))
        print("hidden", dtype, *rule)

    rule = {"mask": an.Causal(), "query_offset": 20}
    for dtype in ("bfloat16", "float16"):
        q, k, v = arrays(rng, dtype, **ONE_HEAD)
        clean = run(name, q, k, v, dtype, **rule)[0]
        bad_v = v.copy()
        bad_v[0, 0, 25, 3], bad_v[0, 0, 38, 8], bad_v[1, 0, 2, 31] = BAD[dtype][:3]
        found = run(name, q, k, bad_v, dtype, **rule)[0]
        spoiled = np.zeros(found.shape, bool)
        spoiled[0, :, 5:, 3] = spoiled[0, :, 18:, 8] = spoiled[1, :, :, 31] = True
        np.testing.assert_array_equal(np.isfinite(found), ~spoiled)
        np.testing.assert_array_equal(found[~spoiled], clean[~spoiled])
        bad_k = k.copy()
        bad_k[1, 0, 30, 5] = BAD[dtype][0]
        found, lse, _ = run(name, q, bad_k, v, dtype, **rule)
        spoiled = np.zeros(found.shape, bool)
        spoiled[1, :, 10:] = True
        np.testing.assert_array_equal(np.isfinite(found), ~spoiled)
        np.testing.assert_array_equal(np.isfinite(lse), ~spoiled[..., 0])
        np.testing.assert_array_equal(found[~spoiled], clean[~spoiled])
        print("seen", dtype)

    q, k, v = arrays(rng, dtype, 1, 1, 1, 70, 150, 64)
    v[0, 0, 90, 7] = v[0, 0, 148, 63] = BAD[dtype][0]
    found = run(name, q, k, v, dtype, layout=real(name, q, k, v, dtype), mask=an.Causal(), query_offset=80)[0]
    spoiled = np.zeros(found.shape, bool)
    spoiled[0, 0, 10:, 7] = spoiled[0, 0, 68:, 63] = True
    np.testing.assert_array_equal(np.isfinite(found), ~spoiled)
    print("seen, real tiles")


def check_skipping(name):
    """Of keys and values only those tiles are read that some row sees."""
    rng, dtype = np.random.default_rng(7), "bfloat16"
    q, k, v = arrays(rng, dtype, 1, 1, 1, 16, 96, 32)
    read = set()

    def copy16(to, source, count):
        if count:
            read.add(int(source))
        emulator.copy16(to, source, count)

    run(name, q, k, v, dtype, mask=an.SlidingWindow(8, 0), query_offset=40, changes={"copy16": copy16})
    for array in (k, v):
        first = array.__array_interface__["data"][0]
        rows = {(at - first) // 64 for at in read if first <= at < first + array.nbytes}
        assert rows == set(range(32, 64)), sorted(rows)
    print(len(read))


def check_bits(name):
    """The bits of a row depend on nothing beside it: batch, heads, rows before it, and keys that it does not see."""
    rng, dtype = np.random.default_rng(8), "bfloat16"
    q, k, v = arrays(rng, dtype, 2, 2, 1, 37, 53, 32)
    rule = {"mask": an.Causal(), "modifiers": an.SoftCap(2.0)}
    whole = run(name, q, k, v, dtype, query_offset=10, **rule)
    parts = {
        "alone": (np.s_[1:, 1:], run(name, q[1:, 1:], k[1:], v[1:], dtype, query_offset=10, **rule)),
        "later rows": (np.s_[:, :, 20:], run(name, q[:, :, 20:], k, v, dtype, query_offset=30, **rule)),
        "seen keys": (
            np.s_[:, :, :30],
            run(name, q[:, :, :30], k[:, :, :40], v[:, :, :40], dtype, query_offset=10, **rule),
        ),
    }
    for label, (part, found) in parts.items():
        for before, after in zip(whole, found, strict=True):
            np.testing.assert_array_equal(before[part].view(np.uint32), after.view(np.uint32))
        print(label)


# --- faults ---


def without_swizzle(to, source, count):
    to = int(to)
    at = to - emulated_block.FIRST
    emulator.copy16(to ^ ((at >> 7 & 7) << 4), source, count)


def with_offsets(change):
    """Return a `gemm` whose steps along the right factor, where it is the values, are changed."""

    def gemm(N, steps, offsets_a, offsets_b, a_in_registers=False, **form):
        if not a_in_registers:
            offsets_b = [change(n) for n in offsets_b]
        return emulator.gemm(N, steps, offsets_a, offsets_b, a_in_registers, **form)

    return gemm


def without_transposition(N, steps, offsets_a, offsets_b, a_in_registers=False, transposed_b=False, **form):
    return emulator.gemm(N, steps, offsets_a, offsets_b, a_in_registers, False, **form)


def without_first_fence():
    if emulated_block.getcurrent().index:
        emulator.fence_async()


class WithoutBarriers(emulated_block.Cuda):
    """The barriers that only order memory are left out."""

    @staticmethod
    def syncthreads():
        pass


def changed(place, value):
    return lambda given: [*given[:place], value(given[place]), *given[place + 1 :]]


def faults(name):
    """Yield names of faults and how each is put into a run."""
    yield "swizzle", {"changes": {"copy16": without_swizzle}}
    yield "missing wait for copies", {"changes": {"copy_wait0": lambda: None}}
    yield "missing barriers", {"changes": {"module_of_cuda": WithoutBarriers}}
    if name == "mma":
        yield "transposed load", {"changes": {"load_matrices_transposed": emulator.INSTRUCTIONS["load_matrices"]}}
    else:
        yield "descriptor offset", {"changes": {"gemm": with_offsets(lambda n: n // 2)}}
        yield "descriptor offset by 16 bytes", {"changes": {"gemm": with_offsets(lambda n: n + 1 if n else n)}}
        yield "transposed load", {"changes": {"gemm": without_transposition}}
        yield "missing wait for products", {"changes": {"wgmma_wait": lambda count, keep: lambda sums: None}}
        yield (
            "waiting for too few products",
            {"changes": {"wgmma_wait": lambda count, keep: emulator.wgmma_wait(count, keep + 1)}},
        )
        yield "missing fence", {"changes": {"fence_async": lambda: None}}
        yield "missing fence of one thread", {"changes": {"fence_async": without_first_fence}}
    yield (
        "mask off by one",
        {"hooks": lambda x: x._replace(allowed=lambda b, h, i, j, f, p: x.allowed(b, h, i, j - 1, f, p))},
    )
    yield (
        "mask off by one query",
        {"hooks": lambda x: x._replace(allowed=lambda b, h, i, j, f, p: x.allowed(b, h, i - 1, j, f, p))},
    )
    yield "tile wrongly skipped", {"hooks": lambda x: x._replace(kind=lambda *a: 0 if a[4] == 16 else x.kind(*a))}
    yield "tile wrongly whole", {"hooks": lambda x: x._replace(kind=lambda *a: 2 if a[4] == 16 else x.kind(*a))}
    yield "offset ignored", {"hooks": lambda x: x._replace(fixed=lambda b, h, p: (0, *x.fixed(b, h, p)[1:]))}
    yield "key offset ignored", {"hooks": lambda x: x._replace(fixed=lambda b, h, p: offset_of_keys(x.fixed(b, h, p)))}
    yield "wrong head group", {"edit": changed(11, lambda group: 2 * group)}
    yield "no head group", {"edit": changed(11, lambda group: 1)}
    yield "one key too many", {"edit": changed(9, lambda N: N + 1)}
    yield "one key too few", {"edit": changed(9, lambda N: N - 1)}
    yield "one query too many", {"edit": changed(8, lambda M: M + 1)}
    yield "values lie elsewhere", {"edit": changed(7, lambda s: (*s[:8], s[8] + 16, *s[9:]))}
    yield "lanes exchanged", {"changes": {"shuffle_xor": lambda x, mask: emulator.shuffle_xor(x, 4 * mask)}}


def offset_of_keys(fixed):
    return (fixed[0], 0, *fixed[2:])


def find_faults(name):
    """Assert that a sound kernel passes, and that each fault is caught: by its result or on its way there."""
    rng, dtype = np.random.default_rng(8), "bfloat16"
    rule = {"mask": an.Causal(), "query_offset": 22, "key_offset": 2}
    q, k, v = arrays(rng, dtype, 1, 4, 2, 20, 40, 64)
    wanted = expected(q, k, v, dtype, **rule)

    def outcome(**fault):
        try:
            found, _, _ = run(name, q, k, v, dtype, **rule, **fault)
        except emulated_block.Fault as error_met:
            return str(error_met)
        e = error(found, wanted.out)
        return f"relative error {e:.1e}" if e > BOUNDS[dtype] else ""

    assert outcome() == ""
    for fault, how in faults(name):
        said = outcome(**how)
        assert said, f"{name}: the fault {fault!r} was not caught"
        print(f"{fault}: {said}")
