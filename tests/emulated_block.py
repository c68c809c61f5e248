"""A block of threads on a CPU, each a greenlet, and what its shared memory allows: `emulator` runs kernels on it."""

from __future__ import annotations

import collections
import math

import numpy as np
from greenlet import getcurrent, greenlet

FIRST = 1024  # address of the dynamic shared memory
SEVERAL = -1


class Fault(AssertionError):
    """A kernel did what the device does not allow."""


def require(condition, text):
    if not condition:
        raise Fault(text)


class Block:
    """What the threads of a block share."""

    def __init__(self, launch, index):
        self.launch, self.index = launch, index
        count = launch.shared
        self.bytes = bytearray(b"\xff" * count)
        self.words = memoryview(self.bytes).cast("I")
        self.halves = np.frombuffer(self.bytes, np.uint16)
        self.time = 1  # barriers so far
        n = count // 4  # everything below is for each word of shared memory
        self.written, self.writer, self.written_in_warp = (np.zeros(n, np.int64) for _ in range(3))
        self.read, self.reader = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.coming, self.unfenced = np.zeros(n, bool), np.zeros(n, bool)
        self.busy = np.zeros(n, np.int64)  # products under way that read it
        self.threads = [Thread(launch.kernel, self, t) for t in range(launch.threads)]
        self.groups = {
            size: [Group(self.threads[n : n + size]) for n in range(0, launch.threads, size)]
            for size in sorted({32, 128, launch.threads})
            if size <= launch.threads
        }
        self.barrier = self.groups[launch.threads][0]
        for thread in self.threads:
            thread.warp = self.groups[32][thread.index // 32]
            thread.group = self.groups[128][thread.index // 128] if launch.threads >= 128 else None
        self.ready = collections.deque(self.threads)

    def run(self):
        while self.ready:
            self.ready.popleft().switch()
        require(all(t.dead for t in self.threads), "threads wait for others that have ended")

    def place(self, address, count):
        """Return the words of shared memory that an access means."""
        first = int(address) - FIRST
        require(first >= 0 and first + count <= len(self.bytes), f"shared address {first} of {len(self.bytes)} bytes")
        require(first % count == 0, f"shared address {first} of {count} bytes is not aligned")
        return slice(first // 4, (first + count) // 4)

    def check_read(self, warp, place, thread=None):
        """Hold a read by a thread, or by all of a warp, to what others wrote."""
        require(not self.coming[place].any(), "shared memory is read before a copy to it has landed")
        new = self.written[place] == self.time
        if new.any():
            writer = self.writer[place][new]
            foreign = (writer >> 5 != warp.first >> 5) | (self.written_in_warp[place][new] == warp.time)
            if thread is not None:
                foreign &= writer != thread.index
            require(not foreign.any(), "shared memory is read without a barrier since another thread wrote it")
        before = self.read[place] == self.time
        self.reader[place] = np.where(before & (self.reader[place] != warp.first), SEVERAL, warp.first)
        self.read[place] = self.time

    def check_write(self, thread, place):
        """Hold a write to what others read and wrote."""
        now = self.time
        if not (self.busy[place].any() or now in self.read[place] or now in self.written[place]):
            return
        require(not self.busy[place].any(), "shared memory is overwritten while a product under way reads it")
        own = self.reader[place] == thread.warp.first
        require(
            not ((self.read[place] == self.time) & ~own).any(),
            "shared memory is overwritten without a barrier since it was read",
        )
        require(
            not ((self.written[place] == self.time) & (self.writer[place] >> 5 != thread.index >> 5)).any(),
            "two warps write the same shared memory without a barrier between",
        )

    def wrote(self, thread, place):
        self.written[place], self.writer[place] = self.time, thread.index
        self.written_in_warp[place] = thread.warp.time
        self.unfenced[place] = True
        thread.landed.append(place)

    def begin_product(self, group, place):
        """Hold the reading of a product to what was written, and note that it is under way."""
        require(not self.coming[place].any(), "a product reads shared memory before a copy to it has landed")
        require(not self.unfenced[place].any(), "a product reads shared memory that was written and not fenced")
        require(
            (self.written[place] < self.time).all(), "a product reads shared memory without a barrier since its writing"
        )
        self.busy[place] += 1
        several = (self.read[place] == self.time) & (self.reader[place] != group.first)
        self.reader[place] = np.where(several, SEVERAL, group.first)
        self.read[place] = self.time


class Group:
    """Threads that do things together."""

    def __init__(self, threads):
        self.threads, self.first, self.size = threads, threads[0].index, len(threads)
        self.time = 1  # syncwarp calls and barriers so far
        self.values, self.missing, self.doing = [None] * self.size, self.size, None
        self.under_way = []  # products of a warpgroup

    def gather(self, thread, what, value, action):
        """Wait until all threads have come here with a value, then act on all values; return this thread's result."""
        if self.missing == self.size:
            self.doing = what
        require(self.doing == what, f"thread {thread.index} does {what} where others of its group do {self.doing}")
        self.values[thread.index - self.first] = value
        self.missing -= 1
        if self.missing:
            thread.parent.switch()
            return thread.result
        values, self.values, self.missing = self.values, [None] * self.size, self.size
        results = action(values)
        ready = thread.block.ready
        for n, other in enumerate(self.threads):
            other.result = None if results is None else results[n]
            if other is not thread:
                ready.append(other)
        return thread.result


class Thread(greenlet):
    """One thread of a block."""

    def __init__(self, kernel, block, index):
        super().__init__(lambda: kernel(*block.launch.arguments))
        self.block, self.index, self.result = block, index, None
        self.copies, self.groups_of_copies = [], []
        self.landed = []  # places that were written since the last fence


class Launch:
    """A kernel with its grid and arguments."""

    def __init__(self, kernel, threads, shared, arguments, inputs, results):
        self.kernel, self.threads, self.shared, self.arguments = kernel, threads, shared, arguments
        self.inputs, self.results = [_span(x) for x in inputs], [_span(x) for x in results]

    def place(self, address, count, writing=False):
        address = int(address)
        for first, last, memory in self.results if writing else self.inputs:
            if first <= address and address + count <= last:
                require(address % count == 0, f"global address {address} of {count} bytes is not aligned")
                return memory[address - first : address - first + count]
        raise Fault(f"global address {address:#x} lies outside of all {'results' if writing else 'inputs'}")


def _span(array):
    """Return where an array's elements begin and end, and the bytes between."""
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = array.__array_interface__["data"][0]
    low = first + sum(step for step in steps if step < 0)
    high = first + sum(step for step in steps if step > 0) + array.itemsize
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    start = base.__array_interface__["data"][0]
    flat = memoryview(base.reshape(-1).view(np.uint8))
    return low, high, flat[low - start : high - start]


def launch(kernel, grid, threads, shared, arguments, inputs, results):
    """Run a kernel for every block of a grid, one after the other.

    `inputs` are the arrays that it may read, `results` those that it may write.
    """
    what = Launch(kernel, threads, shared, arguments, inputs, results)
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    Block(what, (x, y, z)).run()


# --- the stand-in for Numba's CUDA module ---


class _Index:
    def __init__(self, find):
        self._find = find

    x = property(lambda self: self._find()[0])
    y = property(lambda self: self._find()[1])
    z = property(lambda self: self._find()[2])


class Cuda:
    """What kernels use of Numba's CUDA module."""

    threadIdx = _Index(lambda: (getcurrent().index, 0, 0))
    blockIdx = _Index(lambda: getcurrent().block.index)

    class local:
        @staticmethod
        def array(size, kind):
            return [math.nan if kind is float else 0xFFFFFFFF] * size

    class shared:
        @staticmethod
        def array(size, kind, alignment=None):
            assert size == 0
            return getcurrent().block

    @staticmethod
    def syncthreads():
        _barrier("syncthreads", None, lambda values: None)

    @staticmethod
    def syncthreads_or(predicate):
        return _barrier("syncthreads_or", predicate, lambda values: [int(any(values))] * len(values))

    @staticmethod
    def syncthreads_count(predicate):
        return _barrier("syncthreads_count", predicate, lambda values: [sum(map(bool, values))] * len(values))

    @staticmethod
    def syncwarp():
        warp = getcurrent().warp

        def pass_on(values):
            warp.time += 1

        warp.gather(getcurrent(), "syncwarp", None, pass_on)

    @staticmethod
    def ffs(x):
        return (x & -x).bit_length()


def _barrier(name, value, action):
    thread = getcurrent()
    block = thread.block

    def pass_on(values):
        block.time += 1
        for warp in block.groups[32]:
            warp.time += 1
        return action(values)

    return block.barrier.gather(thread, name, value, pass_on)
