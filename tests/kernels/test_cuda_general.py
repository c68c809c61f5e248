"""The general CUDA kernel: in Numba's simulator, on tiny shapes, against the reference; and its machine code.

The simulator is chosen when Numba is loaded, so the cases run in processes of their own.
"""

from importlib.util import find_spec

import pytest

from processes import run_python
from simulation import run_simulated

pytestmark = pytest.mark.skipif(find_spec("numba_cuda") is None, reason="needs numba-cuda")
PARTS = 2


def simulated(call):
    """Return the lines that a check prints."""
    return run_simulated(f"import general_checks; general_checks.{call}")


@pytest.mark.parametrize("part", range(PARTS))
def test_every_rule(part):
    assert len(simulated(f"check_rules({part}, {PARTS})")) > 20


def test_other_normalizers():
    assert len(simulated("check_normalizers()")) > 25


def test_other_dtypes():
    pytest.importorskip("ml_dtypes")
    assert len(simulated("check_dtypes()")) > 15


def test_bits_depend_on_nothing_beside_a_row():
    assert len(simulated("check_coverage(), general_checks.check_bits()")) == 5


def test_planted_faults_are_found():
    assert len(simulated("find_faults()")) == 6


def test_tiles_of_real_size():
    assert len(simulated("check_real_tiles()")) == 1


def test_numbers_of_16_bits():
    pytest.importorskip("ml_dtypes")
    assert simulated("check_elements()") == ["float16", "bfloat16"]


def test_wrong_tiles():
    run_python(
        "import pytest\nfrom attn_numba.gpu.tiles import Tile\n"
        "with pytest.raises(ValueError, match='divide'):\n    Tile(8, 8, 7, 4, 2, 4, 2).check()\n"
    )


# --- machine code ---

needs_assembler = pytest.mark.skipif(find_spec("nvidia") is None, reason="needs the CUDA toolkit's packages")


@needs_assembler
def test_machine_code():
    """What is in registers stays there: no stack frame, no spills, and the products as joined multiplies and adds."""
    lines = run_python("import general_code; general_code.compile_kernels()", NUMBA_ENABLE_CUDASIM="0").splitlines()
    assert len(lines) == 5
