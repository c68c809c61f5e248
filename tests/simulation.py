"""Numba's simulator of CUDA, in processes of its own: it is chosen when Numba is loaded."""

import random
import sys
import threading

import numpy as np
import pytest

from processes import run_python


def run_simulated(code: str, **changes: str | None) -> list[str]:
    """Return the lines that some code prints where kernels are simulated. `changes` are of its environment."""
    require_greenlet()
    code = f"import simulation\nsimulation.hasten()\n{code}"
    return run_python(code, NUMBA_ENABLE_CUDASIM="1", PYTHONWARNINGS="ignore", **changes).splitlines()


def require_greenlet() -> None:
    pytest.importorskip("greenlet", reason="needs greenlet")


def hasten() -> None:
    """Let the threads of a block be greenlets that take turns at barriers, in an order that differs each time.

    The simulator's own are threads of Python, which it polls while they wait for each other and for the interpreter.
    Here each runs until the next barrier, so what a thread reads too early has not been written yet, or not by all:
    a barrier that is missing is found as often as the order tells, and always in the same runs.
    """
    from attn_numba.gpu.target import SIMULATED  # the one place that loads Numba's module

    assert SIMULATED
    from greenlet import getcurrent, greenlet
    from numba.core import types
    from numba.cuda.simulator import kernelapi
    from numba.cuda.simulator.kernel import BlockManager, BlockThread
    from numba.np import numpy_support

    class Lane(greenlet):
        """One thread of a block, with what the simulator asks of one."""

        syncthreads_count = BlockThread.syncthreads_count
        syncthreads_and = BlockThread.syncthreads_and
        syncthreads_or = BlockThread.syncthreads_or

        def __init__(self, manager, block, thread):
            super().__init__(manager._f)
            self._manager = manager
            self.blockIdx, self.threadIdx = kernelapi.Dim3(*block), kernelapi.Dim3(*thread)
            x, y, _ = manager._block_dim
            self.thread_id = thread[0] + x * (thread[1] + y * thread[2])

        def syncthreads(self):
            self.parent.switch()

    orders = random.Random(0)

    def run(self, block, *arguments):
        lanes = [Lane(self, block, thread) for thread in np.ndindex(*self._block_dim)]
        orders.shuffle(lanes)
        for lane in lanes:
            lane.switch(*arguments)
        while lanes := [lane for lane in lanes if not lane.dead]:
            orders.shuffle(lanes)
            for lane in lanes:
                lane.switch()

    def array(self, shape, dtype, alignment=None):
        assert alignment is None
        caller = sys._getframe(1)  # the simulator's own reads the source of every frame
        place = caller.f_code.co_filename, caller.f_lineno
        if place not in self._allocations:
            number = numpy_support.as_dtype(dtype) if isinstance(dtype, types.Type) else dtype
            self._allocations[place] = np.empty(shape, number)
        return self._allocations[place]

    def current_thread():
        now = getcurrent()
        return now if isinstance(now, Lane) else of_python()

    of_python = threading.current_thread
    BlockManager.run, threading.current_thread = run, current_thread
    kernelapi.FakeCUDAShared.array = array
