"""Decode's CUDA kernels without a card: simulated against the reference, and compiled."""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import attn_numba as an
from attn_numba import problem as problems
from simulation import run_simulated


@pytest.mark.parametrize("part", ["every_code", "every_rule", "what_is_not_seen", "other_ways"])
def test_simulated(part):
    pytest.importorskip("numba")
    assert run_simulated(f"import decode_checks\ndecode_checks.check_{part}()\nprint('done')")[-1] == "done"


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda")
@pytest.mark.parametrize(("code", "served", "most"), [("bfloat16", 1, 96), ("int8", 4, 168)])
def test_compiled(code, served, most):
    """Nothing spills, keys and values come 16 bytes at a time, and enough threads fit to keep memory busy."""
    import machine_code

    for name in ("ptxas", "nvdisasm"):
        if machine_code.tool(name) is None:
            pytest.skip(f"needs {name}")
    from attn_numba.gpu import decode
    from attn_numba.gpu.hooks import bind
    from attn_numba.gpu.stored import Stored

    q, k = (problems.nothing((8, heads, n, 128), np.float32) for heads, n in ((8 * served, 1), (8, 4096)))
    call = problems.check(q, k, k, mask=an.SlidingWindow(3000, 0), query_offset=4095)
    bound, rows = bind(call), Stored(code, 128)
    options = decode.options_of(rows, rows, "float32", served, sink=False, lse=True, weights=False)
    for program in (decode.splitting(bound.hooks, bound, options), decode.merging(bound.hooks, options)):
        found = machine_code.report(program, (9, 0))
        assert (found.stack, found.spill_stores, found.spill_loads, found.warnings) == (0, 0, 0, [])
        assert found.registers <= most
        if program.name == "decode":
            assert found.full["LDG.E.128.CONSTANT"] >= 2


def test_arrays_on_a_gpu_are_refused():
    on_card = SimpleNamespace(__cuda_array_interface__=None)
    with pytest.raises(NotImplementedError, match=r"q is on a GPU, and caches are in host memory"):
        an.decode(on_card, an.KVCache(1, 1, 4))
