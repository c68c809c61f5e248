"""The tensor-core kernels of gradients: run lane by lane on the CPU against the reference, and compiled without a card.

The simulator's mode is chosen when Numba is loaded, so the emulated checks run in processes of their own.
"""

import functools
from importlib.util import find_spec

import pytest

import attn_numba as an

if find_spec("numba_cuda") is None:
    pytest.skip("needs numba-cuda", allow_module_level=True)

import machine_code
from attn_numba.gpu import backward_mma, backward_mma_facts, engine
from attn_numba.gpu.hooks import bind
from processes import run_python

needs_emulator = pytest.mark.skipif(find_spec("greenlet") is None, reason="needs greenlet")
MISSING = [name for name in ("ptxas", "nvdisasm") if machine_code.tool(name) is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


# --- emulated ---

CHECKS = {
    "check_rules": 27,
    "check_sizes": 9,
    "check_strides": 5,
    "check_accuracy": 4,
    "check_isolation": 9,
    "check_bits": 4,
    "check_skipping": 1,
    "find_faults": 40,
}


@needs_emulator
@pytest.mark.parametrize("check", CHECKS)
def test_emulated(check):
    said = run_python(
        f"import backward_checks; backward_checks.{check}()", NUMBA_ENABLE_CUDASIM="1", PYTHONWARNINGS="ignore"
    )
    assert len(said.splitlines()) == CHECKS[check]


# --- compiled ---

RULES = {"full": {}, "causal": {"mask": an.Causal()}}


@functools.cache
def report(kind, capability, size, rule, dtype="bfloat16"):
    problem = engine.sample(dtype, size, size, **RULES[rule])
    bound = bind(problem, gradients=True)
    if kind == "facts":
        program, work = backward_mma_facts.program(problem, bound), backward_mma_facts.work_for(problem)
    else:
        program, work = backward_mma.program(kind, problem, bound), backward_mma.work_for(kind, problem)
    return machine_code.report(program._replace(specific=capability == (9, 0)), capability), program, work


@needs_tools
@pytest.mark.parametrize(("capability", "rule"), [((8, 0), "causal"), ((9, 0), "full")])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", ["facts", "queries", "keys"])
def test_compiled(kind, size, capability, rule):
    found, program, work = report(kind, capability, size, rule)
    assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), found
    assert found.registers * work.threads * program.resident <= 65536
    assert program.shared <= 99 * 1024  # the least that a card of these gives a block
    assert not found.warnings
    assert not found.instructions["LDL"]
    assert not found.instructions["STL"]
    assert not any(name.startswith(("DADD", "DMUL", "DFMA", "DSETP")) for name in found.full)  # nothing in float64
    assert not any(name.startswith(("ATOMG", "RED.", "ATOM.")) for name in found.full)  # none on results
    depth, columns, groups, steps = size // 16, work.columns, size // 8, work.lines // 16
    results = {"facts": 0, "queries": 1, "keys": 2}[kind]
    assert found.full["HMMA.16816.F32.BF16"] == work.row_tiles * (2 * columns * depth + results * groups * steps)
    loads = 2 * depth * (work.row_tiles + columns // 2) + results * steps * groups // 2
    assert found.instructions["LDSM"] == loads


@needs_tools
@pytest.mark.parametrize("kind", ["facts", "queries", "keys"])
def test_float16(kind):
    found, _, _ = report(kind, (8, 0), 64, "full", "float16")
    assert (found.stack, found.spill_stores) == (0, 0)
    assert found.full["HMMA.16816.F32"] > 0
    assert not found.full["HMMA.16816.F32.BF16"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("dtype", "D", "E", "capability", "why"),
    [
        ("bfloat16", 64, 64, (7, 5), "compute capability 8.0"),
        ("bfloat16", 256, 64, (8, 0), "to 128, and they are 256 and 64"),
        ("float16", 64, 136, (8, 0), "to 128, and they are 64 and 136"),
        ("float16", 60, 64, (8, 0), "rows of q are not made of these"),
        ("float32", 64, 64, (8, 0), "computes in 16 bits"),
    ],
)
def test_refused(dtype, D, E, capability, why):
    problem = engine.sample(dtype, D, E)
    dout = problem.q if E == D else problem.v
    assert why in backward_mma.refusal(problem, dout, capability)


def test_served():
    problem = engine.sample("bfloat16", 72, 128)
    assert backward_mma.refusal(problem, problem.v, (8, 0)) == ""
    assert "rows of dout" in backward_mma.refusal(problem, engine.sample("bfloat16", 72, 60).v, (8, 0))
    sparse = engine.sample("bfloat16", normalizer=an.Sparsemax())
    assert "the normalizer is Sparsemax" in backward_mma.refusal(sparse, sparse.v, (8, 0))
