"""Rules as functions for the device: held to the rules in the simulator, and compiled without a device."""

import math
from importlib.util import find_spec

import numpy as np
import pytest

from processes import run_python

needs_cuda = pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda")


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rules_in_the_simulator(dtype):
    count = run_python(f"import hook_checks; hook_checks.simulate('{dtype}')", NUMBA_ENABLE_CUDASIM="1")
    assert int(count) > 100


@needs_cuda
def test_a_kernel_of_the_simulator_calls_them():
    run_python("import hook_checks; hook_checks.launch(); hook_checks.check_reuse()", NUMBA_ENABLE_CUDASIM="1")


@needs_cuda
def test_planted_faults_are_found():
    assert int(run_python("import hook_checks; hook_checks.find_faults()", NUMBA_ENABLE_CUDASIM="1")) > 10


@needs_cuda
def test_machine_code_without_a_device():
    printed = run_python(
        "import hook_checks; hook_checks.check_exactness(); hook_checks.compile_rules()", NUMBA_ENABLE_CUDASIM="0"
    )
    assert printed.count("sm_80") == printed.count("sm_90a") > 0


@needs_cuda
@pytest.mark.parametrize("simulated", ["0", "1"])
def test_loads_where_numpy_has_no_row_stack(simulated):
    code = (
        "import numpy, warnings\nwarnings.simplefilter('ignore')\nvars(numpy).pop('row_stack', None)\n"
        "import attn_numba.gpu.target\nassert 'row_stack' not in vars(numpy)"
    )
    run_python(code, NUMBA_ENABLE_CUDASIM=simulated)


NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.1, -0.3, 7.0, -7.5, 1e300, 5e-324, math.nan]


@needs_cuda
def test_device_functions_of_floats_are_those_of_numpy():
    from attn_numba.gpu import target

    functions = {
        np.minimum: target.minimum,
        np.maximum: target.maximum,
        np.remainder: target.remainder,
        np.floor_divide: target.floor_divide_with(np.floor),
    }
    x = [np.float64(a) for a in NUMBERS]
    with np.errstate(all="ignore"):
        for wanted, function in functions.items():
            for a in x:
                for b in x:
                    if b == 0 and function not in (target.minimum, target.maximum):
                        continue  # Python's own fmod raises there
                    got = function(a, b)
                    np.testing.assert_equal(float(got), float(wanted(a, b)), f"{wanted.__name__}({a}, {b})")
