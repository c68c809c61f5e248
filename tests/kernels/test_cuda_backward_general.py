"""The general CUDA kernels of gradients: in Numba's simulator, on tiny shapes, against the reference; and their machine
code.

The simulator is chosen when Numba is loaded, so the cases run in processes of their own.
"""

from importlib.util import find_spec

import pytest

from processes import run_python
from simulation import run_simulated

pytestmark = pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda")
RULE_PARTS, NORMALIZER_PARTS, CODE_PARTS = 5, 2, 2


def simulated(call):
    """Return the lines that a check prints."""
    return run_simulated(f"import gpu_gradient_checks; gpu_gradient_checks.{call}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivatives_of_rules(dtype):
    assert int(simulated(f"check_derivatives('{dtype}')")[-1]) > 50


def test_hooks_with_and_without_derivatives():
    simulated("check_plain_hooks()")


@pytest.mark.parametrize("part", range(RULE_PARTS))
def test_every_rule(part):
    assert len(simulated(f"check_rules({part}, {RULE_PARTS})")) > 12


@pytest.mark.parametrize("part", range(NORMALIZER_PARTS))
def test_other_normalizers(part):
    assert len(simulated(f"check_normalizers({part}, {NORMALIZER_PARTS})")) == 18


def test_other_dtypes():
    pytest.importorskip("ml_dtypes")
    assert len(simulated("check_dtypes()")) > 18


def test_errors_are_at_most_twice_those_of_the_reference():
    pytest.importorskip("ml_dtypes")
    assert len(simulated("check_precision()")) > 30


def test_bits_depend_on_nothing_that_is_not_seen():
    assert len(simulated("check_bits(), gpu_gradient_checks.check_seen()")) == 6


def test_saved_results():
    assert simulated("check_saved()") == ["saved"]


def test_planted_faults_are_found():
    found = [line for line in simulated("find_faults()") if line.startswith("found")]
    assert len(found) == 8


def test_tiles_of_real_size():
    assert len(simulated("check_real_tiles()")) == 1


# --- machine code ---

needs_assembler = pytest.mark.skipif(find_spec("nvidia") is None, reason="needs the CUDA toolkit's packages")


@needs_assembler
@pytest.mark.parametrize("part", range(CODE_PARTS))
def test_machine_code(part):
    """What is in registers stays there: no stack frame, no spills, and the products as joined multiplies and adds."""
    lines = run_python(
        f"import gradient_code; gradient_code.compile_kernels({part}, {CODE_PARTS})", NUMBA_ENABLE_CUDASIM="0"
    ).splitlines()
    assert len(lines) >= 4
