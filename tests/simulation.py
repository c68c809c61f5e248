"""Numba's simulator of CUDA, in processes of its own: it is chosen when Numba is loaded."""

import sys
import threading

import numpy as np

from processes import run_python


def run_simulated(code: str, **changes: str | None) -> list[str]:
    """Return the lines that some code prints where kernels are simulated. `changes` are of its environment."""
    code = f"import simulation\nsimulation.hasten()\n{code}"
    return run_python(code, NUMBA_ENABLE_CUDASIM="1", PYTHONWARNINGS="ignore", **changes).splitlines()


def hasten() -> None:
    """Let threads of a block take turns often, and get the same arrays of shared memory whenever these turns come.

    The simulator polls the threads; while Python lets it go on for the usual 5 ms, they wait that long at each barrier.
    It gives the first thread that asks a new array, and another thread one too that asks at the same moment.
    """
    from attn_numba.gpu.target import SIMULATED  # the one place that loads Numba's module

    assert SIMULATED
    from numba.core import types
    from numba.cuda.simulator.kernelapi import FakeCUDAShared
    from numba.np import numpy_support

    one_by_one = threading.Lock()

    def array(self, shape, dtype, alignment=None):
        assert alignment is None
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno
        with one_by_one:
            if place not in self._allocations:
                number = numpy_support.as_dtype(dtype) if isinstance(dtype, types.Type) else dtype
                self._allocations[place] = np.empty(shape, number)
            return self._allocations[place]

    FakeCUDAShared.array = array
    sys.setswitchinterval(1e-4)
