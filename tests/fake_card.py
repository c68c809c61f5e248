"""A card that is not there: its memory is the host's, its kernels are noted and not run."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np

from attn_numba.gpu import driver


class FakeCard:
    """What `driver.Card` offers, on host memory."""

    def __init__(self, index=0, capability=(9, 0), memory=2**30):
        self.index, self.name, self.capability, self.memory = index, f"fake card {index}", capability, memory
        self.uploads: list[int] = []  # bytes of each
        self.loaded: list[str] = []
        self.started: list[SimpleNamespace] = []
        self.waits: list[tuple[int, int]] = []
        self.held: list[tuple] = []
        self.synchronized = 0

    @contextlib.contextmanager
    def current(self):
        yield

    def stream(self, handle):
        return SimpleNamespace(handle=handle)

    def load(self, code, name, block, shared):
        assert code[:4] == b"\x7fELF"
        self.loaded.append(name)

        def start(grid, stream, arguments):
            self.started.append(SimpleNamespace(name=name, grid=grid, stream=stream.handle, arguments=list(arguments)))

        return SimpleNamespace(start=start)

    def allocate(self, size, stream):
        if size > self.memory:
            error = RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: no memory")
            driver.raise_memory_error(error, size, self)
        memory = np.zeros(size, np.uint8)
        return SimpleNamespace(handle=memory.ctypes.data, memory=memory, stream=stream.handle)

    def free_bytes(self):
        return self.memory

    def upload(self, pointer, array, stream):
        self.uploads.append(array.nbytes)
        memory_at(pointer, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def download(self, array, pointer, stream):
        array.reshape(-1).view(np.uint8)[:] = memory_at(pointer, array.nbytes)

    def synchronize(self, stream=None):
        self.synchronized += 1

    def order(self, first, then):
        self.waits.append((first.handle, then.handle))

    def hold(self, stream, objects):
        self.held.append(objects)


def memory_at(pointer, size):
    """The bytes at an address."""
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


class Lying:
    """A host array that says it is in a card's memory, by __cuda_array_interface__."""

    def __init__(self, array, stream=None, readonly=False, typestr=None):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": typestr or array.dtype.str,
            "data": (array.ctypes.data, readonly),
            "strides": array.strides,
            "stream": stream,
            "version": 3,
        }
