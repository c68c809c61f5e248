"""Checks of the rules as functions for the device, in the simulator or compiled; each runs in a process of its own."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import cases
from attn_numba.gpu.hooks import bind
from attn_numba.gpu.target import cuda, language, ptx_of, types
from attn_numba.problem import check
from attn_numba.rules import Causal, CustomMask, Softmax, Sparsemax, as_modifiers, places_of

PAIRS, TILES = 60, 16
COMPILED = (  # structures with every kind of operation
    "Causal",
    "nested masks",
    "CustomMask, strides",
    "BlockSparse, odd tile",
    "Neighborhood 3-D",
    "SameDocument, unordered",
    "modifiers in order",
    "AdaptiveSpan (BHM)",
    "CustomModifier",
    "dropout, offsets",
)


def problem_of(case, dtype):
    q, k, v, kwargs = case.build(dtype)
    kwargs = {name: x for name, x in kwargs.items() if name not in ("score", "normalizer")}
    if isinstance(case.kwargs().get("normalizer"), Softmax | Sparsemax):
        kwargs["normalizer"] = case.kwargs()["normalizer"]
    z = case.sizes
    q, k = (np.zeros((*x.shape[:-1], z.D), dtype) for x in (q, k))
    return check(q, k, v, **kwargs)


def some_places(rng, z, count):
    corners = [(b, h, i, j) for b in (0, z.B - 1) for h in (0, z.H - 1) for i in (0, z.M - 1) for j in (0, z.N - 1)]
    return corners + [tuple(int(rng.integers(n)) for n in (z.B, z.H, z.M, z.N)) for _ in range(count)]


def reference_of(problem):
    """Return scaled raw scores, final scores, what is allowed and what is kept, from the rules' own functions."""
    z = problem.sizes
    rng = np.random.default_rng(5)
    places = places_of(z, problem.query_offset, problem.key_offset)
    raw = (rng.standard_normal((z.B, z.H, z.M, z.N)) * 3).astype(problem.accumulator)
    raw.ravel()[::97], raw.ravel()[1::97], raw.ravel()[2::97] = np.nan, np.inf, -np.inf
    with np.errstate(all="ignore"):
        scaled = raw.astype(np.float64) * problem.scale
        s, allowed = scaled, np.ones(raw.shape, bool)
        for modifier in as_modifiers(problem.modifiers):
            s = modifier.evaluate(s, places, z)
            excluded = modifier.excluded(places, z)
            if excluded is not None:
                allowed &= ~excluded
    if problem.mask is not None:
        allowed &= problem.mask.evaluate(places, z)
    kept = problem.dropout.kept(places, z) if problem.dropout is not None else None
    return raw, scaled, np.broadcast_to(s, raw.shape), allowed, kept


def check_pairs(case, problem, hooks, p, rng):
    z = problem.sizes
    raw, _, wanted, allowed, kept = reference_of(problem)
    tolerance = 1e-12 if problem.accumulator == np.float64 else 3e-6
    for place in some_places(rng, z, PAIRS):
        b, h, i, j = (np.int32(x) for x in place)
        f = hooks.fixed(b, h, p)
        at = (b, h, i, j, f, p)
        counts = bool(hooks.allowed(*at))
        assert counts == allowed[place], (case.name, place, "allowed")
        assert counts or not hooks.plain(*at), (case.name, place, "plain")
        value = hooks.score(raw[place], *at)
        assert isinstance(value, problem.accumulator.type), (case.name, type(value))
        if hooks.partial or not hooks.scores:
            value = value * problem.accumulator.type(problem.scale)
        if counts:
            np.testing.assert_allclose(value, wanted[place], tolerance, tolerance, err_msg=f"{case.name} {place}")
        if kept is not None and hooks.drops:
            assert bool(hooks.kept(*at)) == kept[place], (case.name, place, "kept")


def random_tile(rng, z, n):
    if n < 4:  # the whole of a head, and single pairs
        i, j = int(rng.integers(z.M)), int(rng.integers(z.N))
        return (0, z.M, 0, z.N) if n == 0 else (i, i + 1, j, j + 1)
    rows, columns = (int(rng.choice([8, 16, 32, 64])) for _ in range(2))
    i, j = int(rng.integers(-(-z.M // rows))) * rows, int(rng.integers(-(-z.N // columns))) * columns
    return i, min(i + rows, z.M), j, min(j + columns, z.N)


def check_tiles(case, problem, hooks, p, rng):
    """Return how many tiles were settled by their bounds, of those that are all or none."""
    z = problem.sizes
    _, scaled, wanted, allowed, _ = reference_of(problem)
    settled = clear = 0
    for n in range(TILES):
        b, h = np.int32(rng.integers(z.B)), np.int32(rng.integers(z.H))
        ends = random_tile(rng, z, n)
        tile = (b, h, slice(*ends[:2]), slice(*ends[2:]))
        f = hooks.fixed(b, h, p)
        ends = tuple(np.int32(x) for x in ends)
        kind = int(hooks.kind(b, h, *ends, f, p))
        some, every = bool(allowed[tile].any()), bool(allowed[tile].all())
        assert kind in (0, 1, 2)
        assert kind or not some, (case.name, ends, "a tile wrongly skipped")
        if kind == 2:
            assert every, (case.name, ends, "a tile wrongly taken whole")
            if hooks.partial:
                same = np.isclose(scaled[tile], wanted[tile], equal_nan=True)
                assert same.all(), (case.name, ends, "an edited tile taken as it is")
        settled += kind != 1
        clear += every or not some
        if allowed[tile].size <= 300:
            bits = hooks.look(b, h, *ends, np.int32(0), np.int32(2), f, p)
            bits |= hooks.look(b, h, *ends, np.int32(1), np.int32(2), f, p)
            exact = int(hooks.answer(bits))
            assert (exact > 0) == some, (case.name, ends, "look")
            assert exact < 2 or every, (case.name, ends, "look")
            assert exact == 2 or hooks.partial or not every, (case.name, ends, "look")
            assert kind in (1, exact), (case.name, ends, "kind against look")
    return settled, clear


def has_rules(case):
    kwargs = case.kwargs()
    z = case.sizes
    return bool({"mask", "modifiers", "dropout"} & set(kwargs)) and 0 not in (z.B, z.H, z.M, z.N)


def simulate(dtype):
    """Hold the functions of every case's rules to the rules."""
    chosen = [case for case in cases.CASES if has_rules(case)]
    with np.errstate(all="ignore"):
        for case in chosen:
            problem = problem_of(case, dtype)
            bound = bind(problem)
            rng = np.random.default_rng(11)
            check_pairs(case, problem, bound.hooks, bound.entries, rng)
            settled, clear = check_tiles(case, problem, bound.hooks, bound.entries, rng)
            if isinstance(problem.mask, Causal) and not problem.modifiers:
                assert settled == clear, case.name
    print(len(chosen))


FAULTS = (  # name, case, text, what stands there instead
    ("query offset ignored", "Causal, ends together", "row_i + f[0]", "row_i + int32(0)"),
    ("key offset ignored", "Causal, offsets by sequence", "row_j + f[1]", "row_j + int32(0)"),
    ("mask off by one", "Causal", " <= ", " < "),
    ("stride ignored", "Dense", "int64(row_i) * p[", "int64(0) * p["),
    ("wrong sequence", "Dense", "int64(b) * p[", "int64(0) * p["),
    ("wrong head", "ALiBi", "[int64(h)]", "[int64(0)]"),
    ("wrong function", "SoftCap", "tanh(", "sqrt("),
    ("tile wrongly skipped", "SlidingWindow both sides", "(int32(1) if", "(int32(1) if False and"),
    ("tile wrongly whole", "SlidingWindow both sides", "int32(2) if", "int32(2) if True or"),
    ("edit forgotten", "AdaptiveSpan", "return int32(2) if", "return int32(2) if True or"),
    ("counter of another group", "dropout", "j >> 2", "j >> 1"),
    ("key of another sequence", "dropout, seed by sequence", "int64(b) * p[", "int64(0) * p["),
    ("threshold off", "dropout", "word > unsigned(p", "unsigned(0xFFFFFFFF) - word > unsigned(p"),
)


def with_fault(hooks, old, new):
    """Return the functions of some rules with one text replaced by another."""
    text = hooks.source.replace(old, new)
    assert text != hooks.source, (old, hooks.source)
    names = language(np.dtype(hooks.number))
    exec(text, names)
    return hooks._replace(**{name: names[name] for name in hooks._fields if callable(getattr(hooks, name))})


def find_faults():
    """Plant faults, one at a time, and count those that the checks find."""
    found = 0
    with np.errstate(all="ignore"):
        for name, case_name, old, new in FAULTS:
            case = cases.BY_NAME[case_name]
            problem = problem_of(case, np.float32)
            hooks, p = bind(problem)[:2]
            wrong = with_fault(hooks, old, new)
            try:
                check_pairs(case, problem, wrong, p, np.random.default_rng(11))
                check_tiles(case, problem, wrong, p, np.random.default_rng(11))
            except AssertionError:
                found += 1
            else:
                raise AssertionError(f"not found: {name}")
    print(found)


def launch():
    """Run a kernel of the simulator that calls the functions."""
    case = cases.BY_NAME["soft cap and causal and grouped heads"]
    problem = problem_of(case, np.float32)
    hooks, p = bind(problem)[:2]
    fixed, allowed, score = hooks.fixed, hooks.allowed, hooks.score

    @cuda.jit
    def kernel(out, p):
        i, j = cuda.blockIdx.x, cuda.threadIdx.x
        f = fixed(1, 2, p)
        out[i, j] = score(np.float32(i), 1, 2, i, j, f, p) if allowed(1, 2, i, j, f, p) else -1

    out = np.zeros((6, 8), np.float32)
    kernel[6, 8](out, p)
    i, j = np.indices(out.shape)
    wanted = np.where(j <= i, 5 * np.tanh(i * problem.scale / 5), -1)
    np.testing.assert_allclose(out, wanted, 1e-6)


def special_kernel(number):
    """Return a kernel that computes what generated code has of its own of floats and integers, and its signature."""
    names = language(np.dtype(number))
    body = ", ".join(f"number({name}(x[n], y[n]))" for name in ("minimum", "maximum", "floor_divide", "remainder"))
    exec(
        f"def kernel(x, y, i, j, out, whole):\n    n = cuda.threadIdx.x\n    out[0], out[1], out[2], out[3] = {body}\n"
        "    whole[0], whole[1], whole[2] = int_divide(i[n], j[n]), int_remainder(i[n], j[n]), ilog2(j[n])\n",
        names | {"cuda": cuda},
        names,
    )
    floats, ints = types.CPointer(getattr(types, number)), types.CPointer(types.int32)
    return names["kernel"], (floats, floats, ints, ints, floats, ints)


def rules_kernel(hooks):
    """Return a kernel that calls every function of some rules."""
    fixed, kind, allowed, plain, score = hooks.fixed, hooks.kind, hooks.allowed, hooks.plain, hooks.score
    look, answer, unknown, partial = hooks.look, hooks.answer, hooks.unknown, hooks.partial
    kept, drops, factor = hooks.kept or allowed, hooks.drops, hooks.keep_factor or hooks.fixed
    int32 = types.int32

    def kernel(scores, rows, columns, p):
        b, h = int32(cuda.blockIdx.y), int32(cuda.blockIdx.z)
        row = int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        f = fixed(b, h, p)
        for first in range(0, columns, 8):
            column = int32(first)
            ends = (row, int32(row + 1), column, int32(column + 8))
            tile = kind(b, h, ends[0], ends[1], ends[2], ends[3], f, p)
            if unknown and tile == 1:
                bits = look(b, h, ends[0], ends[1], ends[2], ends[3], int32(0), int32(1), f, p)
                tile = answer(bits)
            if tile == 0:
                continue
            for n in range(8):
                j = int32(column + n)
                at = row * columns + j
                value = scores[at]
                if not (partial and (tile == 2 or plain(b, h, row, j, f, p))):
                    value = score(value, b, h, row, j, f, p)
                if tile == 2 or allowed(b, h, row, j, f, p):
                    if drops:
                        value = value * factor(p) if kept(b, h, row, j, f, p) else value - value
                    scores[at] = value + value

    return kernel


def assembler():
    found = [Path(sys.prefix, "bin", "ptxas"), *Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/*/bin/ptxas")]
    return next((str(path) for path in found if path.exists()), None)


def check_machine_code(name, text, architecture):
    """Check that PTX calls nothing and keeps nothing in local memory; the assembler's count where there is one."""
    assert ".extern .func" not in text, (name, "calls what it does not have")
    assert not re.search(r"\.local\s", text), (name, "uses local memory")
    assert not re.search(r"^\s*call\b", text, re.MULTILINE), (name, "has calls left")
    tool = assembler()
    if tool is None:
        return "no assembler"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(text)
        command = [tool, "-v", f"-arch={architecture}", str(path), "-o", str(Path(folder, "kernel.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, (name, log)
    return re.search(r"Used \d+ registers", log)[0]


def check_exactness():
    """Check that a mask's product is not joined with the sum that follows: its bounds would not hold."""
    x = np.zeros((1, 1, 9, 4), np.float32)
    rule = CustomMask(lambda b, h, i, j, p: (i - j) * p[0] + p[1] < p[2], (0.3, 0.7, 1.0))
    bound = bind(check(x, x, x, mask=rule))
    hooks = bound.hooks
    signature = (types.CPointer(types.float32), types.int32, types.int32, bound.signature())
    text = ptx_of(rules_kernel(hooks), signature, (9, 0, "a"))
    assert "mul.rn.f32" in text
    assert "fma." not in text
    assert "div.full" not in text
    assert "div.s64" not in text


def compile_rules():
    """Compile rules without a device: in float32 for one architecture, in float64 for another, which differ little."""
    for dtype, capability, architecture in ((np.float64, (8, 0), "sm_80"), (np.float32, (9, 0, "a"), "sm_90a")):
        for name in COMPILED:
            bound = bind(problem_of(cases.BY_NAME[name], dtype))
            scores = types.CPointer(getattr(types, bound.hooks.number))
            begin = time.perf_counter()
            text = ptx_of(rules_kernel(bound.hooks), (scores, types.int32, types.int32, bound.signature()), capability)
            seconds = time.perf_counter() - begin
            found = check_machine_code(name, text, architecture)
            if dtype == np.float32:
                assert not re.search(r"\.f64\s", text), (name, "computes in float64")
            print(f"{name}, {dtype.__name__}, {architecture}: {found}, {seconds:.2f} s")
        for number in ("float32", "float64"):
            kernel, signature = special_kernel(number)
            check_machine_code(number, ptx_of(kernel, signature, capability), architecture)


def check_reuse():
    """Check that other parameters give the same functions and the same type of parameters."""
    x = np.zeros((1, 2, 50, 4), np.float32)

    def bound(rule, **offsets):
        return bind(check(x, x, x, mask=rule, **offsets))

    def distance(b, h, i, j, p):
        return i - j < p[0]

    a, b = bound(CustomMask(distance, (3,))), bound(CustomMask(distance, (9,)), query_offset=np.array([4]))
    assert a.hooks is b.hooks
    assert a.signature() == b.signature()
    assert a.hooks is not bound(Causal()).hooks
