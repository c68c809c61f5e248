"""The side kernels of the CUDA backend, maps of q and k and the weights of a softmax: in the simulator, on tiny shapes.

The simulator is chosen when Numba is loaded, so the cases run in processes of their own: this file as a script, which
prints the names of the cases that agree.
"""

import sys
from importlib.util import find_spec

import numpy as np
import pytest

import attn_numba as an
import cases
from attn_numba import reference, rules
from attn_numba.problem import check
from attn_numba.rules import Sizes
from processes import run_python
from simulation import hasten, require_greenlet

needs_cuda = pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda")
DTYPES = ("float64", "float32", "float16", "bfloat16")
SIZES = Sizes(B=2, H=2, Hk=1, M=5, N=11, D=6, E=1)


def random_dense(rng, z):
    seen = rng.random((z.B, z.H, z.M, z.N)) < 0.5
    seen[:, :, 2] = False
    return an.Dense(seen)


def random_documents(rng, z):
    return an.SameDocument(rng.integers(0, 3, (z.B, z.M)), rng.integers(0, 3, (z.B, z.N)))


CUSTOM = an.CustomMask(lambda b, h, i, j, p: (i + j) % p[0] != h, params=(3,))
RELATIVE = an.CustomModifier(lambda s, b, h, i, j, p: s * p[0] + 0.1 * (i - j), params=(0.7,))
RULES = {  # name -> arguments of `attention`; functions among them are called with (rng, sizes)
    "nothing": {},
    "scale": {"scale": -2.5},
    "Causal": {"mask": an.Causal(), "query_offset": 4, "key_offset": -1},
    "SlidingWindow": {"mask": an.SlidingWindow(2, 1), "query_offset": np.array([0, 7])},
    "Neighborhood": {"mask": an.Neighborhood(11, 3), "query_offset": 3},
    "Padding": {"mask": an.Padding([11, 4], key_starts=[1, 0], query_lengths=[5, 3])},
    "SameDocument": {"mask": random_documents},
    "PrefixLM": {"mask": an.PrefixLM([3, 8]), "query_offset": 1},
    "BlockSparse": {"mask": lambda rng, z: an.BlockSparse(rng.random((1, 2, 2, 3)) < 0.6, (3, 4))},
    "Dense and an empty row": {"mask": random_dense},
    "CustomMask": {"mask": CUSTOM, "query_offset": 0},
    "&": {"mask": an.Causal() & CUSTOM, "query_offset": 5},
    "|": {"mask": an.Causal() | an.Padding([3, 9]), "query_offset": 0},
    "~": {"mask": ~an.Causal(), "query_offset": 2},
    "SoftCap": {"modifiers": an.SoftCap(1.5)},
    "Bias": {"modifiers": cases.bias("HMN", excluded=0.3)},
    "ALiBi": {"modifiers": an.ALiBi([0.5, 0.1]), "query_offset": 2},
    "Temperature": {"modifiers": lambda rng, z: an.Temperature(rng.random((z.B, z.H, z.M)) + 0.3)},
    "ReplaceExcluded": {"modifiers": an.ReplaceExcluded(an.Causal(), -3.0), "query_offset": 3},
    "CustomModifier": {"modifiers": RELATIVE, "query_offset": 0},
    "AdaptiveSpan": {"modifiers": an.AdaptiveSpan(2.5, 3.0), "query_offset": 1},
    "modifiers in order": {"modifiers": (an.SoftCap(2.0), an.ALiBi([0.3, 0.2])), "mask": CUSTOM, "query_offset": 0},
    "Dropout": {"dropout": an.Dropout(0.5, 3), "query_offset": 0},
    "sink": {"normalizer": an.Softmax(sink=[-1.0, 4.0])},
    "Cosine": {"score": an.Cosine(), "scale": 3.0},
    "Bilinear": {"score": cases.bilinear("H"), "scale": 5.0},
    "Additive": {"score": cases.additive_by_head},
    "hidden NaN": {"mask": an.Padding([7, 5])},
    "seen NaN": {"mask": random_dense},
    "no keys": {},
    "grouped heads": {"mask": an.Causal(), "query_offset": 6},
}
IN_EVERY_DTYPE = ("nothing", "Causal", "seen NaN", "Bilinear", "Additive")
MAPS = (
    "cosine",
    "cosine of odd rows",
    "matrix",
    "matrix of each head",
    "long rows",
    "layers",
    "nothing",
    "real block",
    "real unit block",
)


@needs_cuda
def test_maps_against_the_rules():
    assert _simulated("maps").splitlines() == [f"{name}, {dtype}" for dtype in DTYPES for name in MAPS]


@needs_cuda
def test_weights_against_the_reference():
    expected = [f"{name}, {dtype}" for dtype in DTYPES for name in names_in(dtype)]
    assert _simulated("weights").splitlines() == [*expected, "real tile"]


@needs_cuda
def test_machine_code():
    printed = run_python(__file__, "compiled", NUMBA_ENABLE_CUDASIM="0").splitlines()
    assert len(printed) == 2 * len(MAPPED) + len(WEIGHED)


def test_every_rule_has_its_weights_tested():
    sizes = np.random.default_rng(0), SIZES
    used = {type(x) for options in RULES.values() for x in cases.rules_of(built(options, *sizes))}
    kinds = (rules.Mask, rules.Modifier, rules.Score, rules.Dropout)
    public = {x for name in rules.__all__ if isinstance(x := getattr(rules, name), type) and issubclass(x, kinds)}
    assert public - used == {rules.Mask, rules.Modifier, rules.Score, rules.Dot}


def names_in(dtype):
    return list(RULES) if dtype == "float32" else list(IN_EVERY_DTYPE)


def built(options, rng, z):
    return {name: x(rng, z) if callable(x) else x for name, x in options.items()}


def _simulated(*arguments):
    require_greenlet()
    return run_python(__file__, *arguments, NUMBA_ENABLE_CUDASIM="1", PYTHONWARNINGS="ignore")


# --- calls as kernels see them ---


def coded(x, dtype):
    """Return numbers as an array of a dtype holds them, those of 16 bits as bits, and what they then are."""
    x = x.astype(np.float32 if dtype == "bfloat16" else dtype)
    if dtype == "bfloat16":
        bits = (x.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    return (x.view(np.uint16), x.astype(np.float32)) if dtype == "float16" else (x, x)


def laid_out(x, layout):
    return cases._laid_out(x, layout)


def problem_of(q, k, dtype, layout="plain", **options):
    """Return a call as a kernel is given it, and q and k as its numbers."""
    (q, q_numbers), (k, k_numbers) = coded(q, dtype), coded(k, dtype)
    v = np.zeros((*k.shape[:3], 1), k_numbers.dtype)
    problem = check(q_numbers, k_numbers, v, **options)
    q, k = laid_out(q, layout), laid_out(k, layout)
    return problem._replace(q=q, k=k, dtype=dtype), q_numbers, k_numbers


def run(program, grid, arguments):
    from attn_numba.gpu.launch import ready

    assert 0 not in grid
    ready(program, None).start(grid, None, arguments)


def upload(array):
    assert array.flags.c_contiguous
    return array


def empty(shape, dtype):
    return np.full(shape, np.nan, dtype)


def mapped(problem):
    from attn_numba.gpu import maps

    assert maps.refusal(problem) == ""
    return maps.mapped(problem, upload, empty, run)


# --- what runs in the simulator ---


def maps():
    from attn_numba.gpu import maps

    real_blocks = maps.UNIT_BLOCK, maps.PRODUCT_BLOCK
    for dtype in DTYPES:
        for n, name in enumerate(MAPS):
            maps.UNIT_BLOCK, maps.PRODUCT_BLOCK = real_blocks if name.startswith("real") else ((3, 2), (4, 2))
            compare_maps(name, dtype, n)
            print(f"{name}, {dtype}")


def compare_maps(name, dtype, n):
    """Hold q and k of a call, mapped, to what the rule itself makes of them."""
    tolerance = {"rtol": 1e-14, "atol": 1e-14} if dtype == "float64" else {"rtol": 2e-6, "atol": 2e-6}
    rng = np.random.default_rng(n)
    B, H, Hk, M, N, D, hidden = 1, 2, 1, 5, 3, 6, 19
    if name == "long rows":
        M, D = 1, 300
    elif name == "nothing":
        M = 0
    elif name.startswith("real"):
        B, H, M, N, D, hidden = 1, 1, 2, 1, 35, 3
    Dk = 4 if name == "long rows" else D
    W = rng.standard_normal((H, D, Dk)) / D
    layers = rng.standard_normal((hidden, D)), rng.standard_normal((Hk, hidden, D)), rng.standard_normal(hidden)
    score = {
        "cosine": an.Cosine(), "cosine of odd rows": an.Cosine(), "matrix": an.Bilinear(W[0]),
        "layers": an.Additive(*layers), "real block": an.Additive(*layers), "real unit block": an.Cosine(),
    }.get(name, an.Bilinear(W))  # fmt: skip
    q, k = rng.standard_normal((B, H, M, D)), rng.standard_normal((B, Hk, N, Dk))
    if name == "cosine of odd rows":
        largest, least = {
            "float64": (1.7e308, 5e-324), "float32": (3e38, 1e-45), "bfloat16": (3e38, 1e-40),
            "float16": (65504, 6e-8),
        }[dtype]  # fmt: skip
        q[0, 0, :4], q[0, 1, 2, 3], q[0, 1, 3, 1], q[0, 1, 4, :3] = 0, np.nan, -np.inf, np.nan
        q[0, 0, 0, 0], q[0, 0, 1], q[0, 0, 2] = -0.0, largest, -least
        k[0, 0, 0] *= 3e4
    layout = ("plain", "columns", "reversed", "spaced", "swapped")[n % 5]
    problem, q, k = problem_of(q, k, dtype, layout, score=score)
    found = mapped(problem)
    with np.errstate(all="ignore"):
        wanted = score.mapped(q.astype(problem.accumulator), k.astype(problem.accumulator))
    assert found.q.dtype == problem.accumulator
    assert found.q.flags.c_contiguous
    np.testing.assert_allclose(found.q, wanted[0], err_msg=name, **tolerance)
    if isinstance(score, an.Bilinear):
        assert found.k is problem.k
    else:
        np.testing.assert_allclose(found.k, wanted[1], err_msg=name, **tolerance)
    assert found.sizes == problem.sizes._replace(D=found.q.shape[3])
    assert found.v is problem.v
    assert found.dtype == dtype
    assert isinstance(found.score, an.Additive if isinstance(score, an.Additive) else an.Dot)
    if name in ("cosine", "matrix of each head"):  # a row has the same bits alone
        alone = problem._replace(q=np.ascontiguousarray(problem.q[:, :, 3:4]))
        np.testing.assert_array_equal(mapped(alone).q, found.q[:, :, 3:4])


def weights():
    from attn_numba.gpu import maps, tiles, weights as module

    real_tiles, maps.UNIT_BLOCK, maps.PRODUCT_BLOCK = module.TILES, (2, 1), (4, 2)
    module.TILES = dict.fromkeys(real_tiles, tiles.Tile(4, 8, 4, 4, 2, 4, 2))
    for dtype in DTYPES:
        for name in names_in(dtype):
            compare_weights(name, dtype, SIZES)
            print(f"{name}, {dtype}")
    module.TILES = real_tiles
    for dtype in ("float32", "float64"):
        compare_weights("Causal", dtype, Sizes(B=1, H=1, Hk=1, M=3, N=66, D=9, E=1))
    print("real tile")


def compare_weights(name, dtype, z):
    """Hold the weights of a call to those of the reference."""
    from attn_numba.gpu import weights as module
    from attn_numba.gpu.forward_general import units_of
    from attn_numba.gpu.hooks import bind

    rng = np.random.default_rng(len(name))
    z = z._replace(**{"no keys": {"N": 0}, "grouped heads": {"B": 1, "H": 4, "Hk": 2}}.get(name, {}))
    q, k = rng.standard_normal((z.B, z.H, z.M, z.D)), rng.standard_normal((z.B, z.Hk, z.N, z.D))
    options = built(RULES[name], rng, z)
    if name == "hidden NaN":
        k[:, :, 7:], k[1, :, 5:] = np.nan, np.inf
    elif name == "seen NaN":
        k[0, 0, 3, 1], q[1, 0, 1, 0], q[1, 1, 4], k[1, 0, 6] = np.nan, np.nan, np.inf, -np.inf
    problem, q, k = problem_of(q, k, dtype, "spaced" if name == "nothing" else "plain", **options)
    with np.errstate(all="ignore"):
        wanted = reference.attention(
            q, k, np.zeros((*k.shape[:3], 1), k.dtype), return_lse=True, return_weights=True, **options
        )
    if name == "Dropout":
        del options["dropout"]
    seen = cases.allowed(z, options)

    # What a forward kernel tells of the rows, of the reference's results: a row's largest weight is that of its top.
    largest = wanted.weights.max(axis=3, initial=0)
    stats = np.empty((z.B, z.H, z.M, 2), problem.accumulator)
    with np.errstate(all="ignore"):
        top = wanted.lse + np.log(largest)
    stats[..., 0] = np.where(np.isnan(top), [[[-np.inf, 0.5, 3.0, -np.inf, -1.0]]][0] if z.M == 5 else 0, top)
    stats[..., 1] = largest

    bound = bind(problem)
    inner = mapped(problem)
    assert module.refusal(inner, (8, 0)) == ""
    units = units_of(inner)
    spare = np.full((z.B, z.M, z.H, z.N), 7, problem.accumulator)
    found = spare.swapaxes(1, 2)
    if z.N:
        arguments = module.arguments(inner, bound.entries, found, stats, units)
        run(module.program(inner, bound), module.grid(inner), arguments)
    else:
        assert 0 in module.grid(inner)
    bits = 1e-12 if dtype == "float64" else 5e-6
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted.weights), f"{name}, {dtype}")
    np.testing.assert_allclose(found, wanted.weights, rtol=bits, atol=bits, err_msg=f"{name}, {dtype}")
    assert not found[~seen].any(), name


# --- what is compiled ---

MAPPED = (("float64", (8, 0)), ("float16", (9, 0)))  # dtypes, and the cards that kernels are compiled for
WEIGHED = (
    ("nothing", "float64", (8, 0)),
    ("modifiers in order", "bfloat16", (8, 0)),
    ("SameDocument", "float32", (9, 0)),
    ("Additive", "float32", (9, 0)),
)
DOUBLE = {"DFMA", "DMUL", "DADD"}  # instructions that compute in float64


def compiled():
    """Compile the kernels without a card, and look at their machine code."""
    from attn_numba.gpu import maps, weights as module
    from attn_numba.gpu.hooks import bind
    from machine_code import report

    programs = []
    for dtype, capability in MAPPED:
        number = np.dtype("float64" if dtype == "float64" else "float32")
        programs += [(dtype, make(dtype, number), capability) for make in (maps.unit_program, maps.product_program)]
    for name, dtype, capability in WEIGHED:
        rng = np.random.default_rng(0)
        q, k = np.zeros((SIZES.B, SIZES.H, SIZES.M, SIZES.D)), np.zeros((SIZES.B, SIZES.Hk, SIZES.N, SIZES.D))
        problem = problem_of(q, k, dtype, **built(RULES[name], rng, SIZES))[0]
        programs.append((dtype, module.program(problem, bind(problem)), capability))
    for dtype, program, capability in programs:
        found = report(program, capability)
        assert found.stack == found.spill_stores == found.spill_loads == 0, (program.name, dtype, found)
        assert bool(DOUBLE & found.instructions.keys()) == (dtype == "float64"), (program.name, dtype)
        assert not {"LDL", "STL"} & found.instructions.keys(), (program.name, dtype)  # numbers outside registers
        print(f"{program.name}, {dtype}, {capability}: {found.registers} registers")


if __name__ == "__main__":
    if sys.argv[1] != "compiled":
        hasten()
    {"maps": maps, "weights": weights, "compiled": compiled}[sys.argv[1]](*sys.argv[2:])
