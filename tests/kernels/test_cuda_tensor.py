"""The kernels for the tensor cores, run lane by lane on the CPU, against the reference; and faults put into them.

The simulator's mode is chosen when Numba is loaded, so the checks run in processes of their own.
"""

from importlib.util import find_spec

import pytest

from processes import run_python

MISSING = [name for name in ("numba_cuda", "greenlet") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


def emulated(call):
    """Return the lines that a check prints."""
    return run_python(
        f"import tensor_checks; tensor_checks.{call}", NUMBA_ENABLE_CUDASIM="1", PYTHONWARNINGS="ignore"
    ).splitlines()


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_every_rule(kernel):
    assert len(emulated(f"check_rules('{kernel}')")) > 30


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_sizes(kernel):
    assert len(emulated(f"check_sizes('{kernel}')")) == 12


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_strides_and_real_tiles(kernel):
    assert len(emulated(f"check_strides('{kernel}')")) == 6


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_numbers_that_are_not_finite(kernel):
    assert len(emulated(f"check_isolation('{kernel}')")) == 7


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_bits_depend_on_nothing_beside_a_row(kernel):
    assert emulated(f"check_bits('{kernel}')") == ["alone", "later rows", "seen keys"]


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_tiles_that_nobody_sees_are_not_read(kernel):
    assert len(emulated(f"check_skipping('{kernel}')")) == 1


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
def test_planted_faults_are_caught(kernel):
    assert len(emulated(f"find_faults('{kernel}')")) > 15
