"""The kernels for the tensor cores compiled without a card: nothing spills, and the instructions are those expected."""

import functools
from importlib.util import find_spec

import numpy as np
import pytest

import attn_numba as an

if find_spec("numba_cuda") is None:
    pytest.skip("needs numba-cuda", allow_module_level=True)

import machine_code
from attn_numba.gpu import engine, forward_mma, forward_wgmma, target
from attn_numba.gpu.hooks import bind

MISSING = [name for name in ("ptxas", "nvdisasm") if machine_code.tool(name) is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

RULES = {
    "full": {},
    "causal": {"mask": an.Causal()},
    "custom": {
        "mask": an.CustomMask(lambda b, h, i, j, p: (j <= i) & ((i - j) % p[0] != 1), params=(3,)),
        "modifiers": an.SoftCap(30.0),
    },
}
MODULES = {"mma": forward_mma, "wgmma": forward_wgmma}


@functools.cache
def report(kernel, capability, size, rule, dtype="bfloat16"):
    problem = engine.sample(dtype, size, size, **RULES[rule])
    program = MODULES[kernel].program(problem, bind(problem))
    return machine_code.report(program, capability)


def check(found):
    """Hold machine code to what every one of the kernels promises."""
    assert (found.stack, found.spill_stores, found.spill_loads) == (0, 0, 0), found
    assert found.registers <= 255
    assert not found.warnings
    assert not found.instructions["LDL"]
    assert not found.instructions["STL"]
    assert found.instructions["LDGSTS"] > 0  # cp.async
    assert not any(name.startswith(("DADD", "DMUL", "DFMA", "DSETP")) for name in found.full)  # nothing in float64


@needs_tools
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [64, 128])
def test_wgmma(size, rule):
    found = report("wgmma", (9, 0), size, rule)
    check(found)
    keys = 128
    # One product for the first tile, one in the loop; the values' in the loop and after it.
    scores, values = 2 * size // 16, 2 * keys // 16
    assert found.instructions["HGMMA"] == scores + values
    shapes = {name.split(".")[1] for name in found.full if name.startswith("HGMMA")}
    assert shapes == {f"64x{keys}x16", f"64x{size}x16"}
    assert not found.instructions["HMMA"]
    # In the loop both products are begun, the scores waited for, the softmax computed, and then the values waited for.
    waits = [n for n, name in enumerate(found.order) if name.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 4
    under_way = found.order[waits[1] : waits[2]]
    assert under_way.count("MUFU.EX2") >= keys // 2
    assert not any(name.startswith("HGMMA") for name in under_way)


@needs_tools
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [64, 128])
def test_mma(size, rule):
    found = report("mma", (8, 0), size, rule)
    check(found)
    assert not found.instructions["HGMMA"]
    layout = forward_mma.layout_of("bfloat16", size, size, False)
    columns, depth = layout.key_columns, size // 16
    products = layout.row_tiles * (columns * depth + layout.value_columns * (layout.keys // 16))
    assert found.full["HMMA.16816.F32.BF16"] == products
    loads = depth * (layout.row_tiles + columns // 2) + (layout.keys // 16) * (layout.value_columns // 2)
    assert found.instructions["LDSM"] == loads
    assert any(name.startswith("LDSM.16.MT88") for name in found.full)


@needs_tools
def test_mma_on_hopper():
    found = report("mma", (9, 0), 64, "causal", "float16")
    check(found)
    assert found.full["HMMA.16816.F32"] > 0
    assert not found.full["HMMA.16816.F32.BF16"]


@needs_tools
def test_a_spill_is_seen():
    problem = engine.sample("bfloat16", 64, 64)
    program = forward_mma.program(problem, bind(problem))
    found = machine_code.report(program._replace(resident=6), (8, 0))
    assert found.registers <= 85
    assert min(found.stack, found.spill_stores, found.spill_loads, found.instructions["LDL"]) > 0
    assert found.warnings


def test_tanh_of_float32():
    """The device's formula with NumPy's numbers, and with an exp that errs as the device's does."""

    def exp(x):
        return np.float32(np.exp2(np.float32(x * np.float32(np.log2(np.e)))) * np.float32(1 + 2.0**-22))

    tanh = target.tanh_with(np.float32, exp, np.divide)
    near = [0.0, -0.0, 0.625, np.nextafter(np.float32(0.625), np.float32(0)), 44.0, 45.0, 88.0, 89.0, np.inf, -np.inf]
    sizes = np.logspace(-44, 38, 3000)
    x = np.concatenate([near, np.linspace(-12, 12, 6001), sizes, -sizes]).astype(np.float32)
    with np.errstate(all="ignore"):
        found = np.array([tanh(a) for a in x])
        assert np.isnan(tanh(np.float32(np.nan)))
    wanted = np.tanh(x.astype(np.float64))
    assert (np.abs(found - wanted) <= 3e-7 * np.abs(wanted) + 1e-45).all()
    assert found[0] == found[1] == 0
    assert found[-1] == -1
    assert found[8] == 1
    assert found[9] == -1
