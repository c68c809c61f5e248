"""The cards of this machine: their memory, streams and loaded kernels, by cuda.core; nothing else asks the driver.

The driver is loaded when the first card is asked for. A process that was forked after that cannot use it: CUDA itself
does not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from attn_numba.rules.data import AnyArray

__all__ = ["DEFAULT_STREAM", "THREAD_STREAM", "Card", "Kernel", "card", "card_count", "card_of", "driver_version"]

DEFAULT_STREAM, THREAD_STREAM = 1, 2  # handles that CUDA gives the default stream and a thread's own one
SHARED_WITHOUT_ASKING = 48 * 1024  # bytes of dynamic shared memory that a kernel may use as it is
STREAMS = 64  # wrapped streams that are kept

_started_in: list[int] = []


def _bindings() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    """Return what a function of the driver returned beside its status.

    Raises
    ------
    RuntimeError
        If it failed; names the driver's error.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver reports {status.name} while {doing}")
    return values[0] if values else None


def driver_version() -> tuple[int, int]:
    """Return the newest CUDA version that the driver knows."""
    number = int(_checked(_bindings().cuDriverGetVersion(), "asked for its version"))
    return number // 1000, number % 1000 // 10


def card_count() -> int:
    """Return how many cards the driver offers.

    Raises
    ------
    RuntimeError
        If there is no driver, or it does not start.
    """
    _require_no_fork()
    driver = _bindings()
    _checked(driver.cuInit(0), "starting")
    if not _started_in:
        _started_in.append(os.getpid())
    return int(_checked(driver.cuDeviceGetCount(), "counting cards"))


def _require_no_fork() -> None:
    if _started_in and _started_in[0] != os.getpid():
        raise RuntimeError(
            "CUDA was started before this process was forked, and does not survive that: start processes by 'spawn' or "
            "'forkserver', or fork before the first call on a card"
        )


@functools.cache
def card(index: int) -> Card:
    """Return a card by its number.

    Raises
    ------
    RuntimeError
        If there is no driver or no such card.
    """
    count = card_count()
    if not 0 <= index < count:
        raise RuntimeError(f"there is no card {index}: the driver offers {count}")
    return Card(index)


def oldest_capability() -> tuple[int, int] | None:
    """Return the oldest compute capability that the toolkit here compiles for; None if it does not say."""
    from cuda.bindings import nvrtc

    try:
        numbers = _checked(nvrtc.nvrtcGetSupportedArchs(), "asked for architectures")
    except RuntimeError:  # no NVRTC: kernels do not need it
        return None
    return divmod(min(numbers), 10)


def card_of(pointer: int) -> int:
    """Return the number of the card whose memory an address belongs to.

    Raises
    ------
    RuntimeError
        If it is no address that a card can read.
    """
    card_count()
    driver = _bindings()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(_checked(driver.cuPointerGetAttribute(attribute, pointer), f"asked for the card of address {pointer}"))


class Kernel:
    """A kernel that is loaded, ready to start.

    Parameters
    ----------
    code : bytes
        Machine code for the card.
    name : str
        Of the kernel in it.
    block : tuple of int
        Threads of a block.
    shared : int
        Bytes of dynamic shared memory.
    card : Card
        Where it is to run.
    """

    def __init__(self, code: bytes, name: str, block: tuple[int, ...], shared: int, card: Card) -> None:
        from cuda.core import LaunchConfig, ObjectCode, launch

        self._kernel = ObjectCode.from_cubin(code).get_kernel(name)
        if shared > SHARED_WITHOUT_ASKING:
            driver = _bindings()
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            handle = driver.CUkernel(int(self._kernel.handle))
            done = driver.cuKernelSetAttribute(attribute, shared, handle, driver.CUdevice(card.index))
            _checked(done, f"asking for {shared} bytes of shared memory")
        self._configuration = functools.lru_cache(16)(
            lambda grid: LaunchConfig(grid=grid, block=block, shmem_size=shared)
        )
        self._launch = launch

    def start(self, grid: tuple[int, int, int], stream: Any, arguments: list[Any]) -> None:
        """Put the kernel on a stream; its card is current."""
        self._launch(stream, self._configuration(grid), self._kernel, *arguments)


class Card:
    """One card. What is done with it is done inside `current`."""

    def __init__(self, index: int) -> None:
        from cuda.core import Device

        self.index = index
        driver = _bindings()
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index)), f"starting card {index}")
        self._streams = functools.lru_cache(STREAMS)(_wrapped)
        with self.current():
            device = Device(index)
            device.set_current()
            self.name = str(device.name)
            major, minor = device.compute_capability
            self.capability = int(major), int(minor)
            self._memory = device.memory_resource

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the card the current one of this thread while the block runs."""
        _require_no_fork()
        driver = _bindings()
        before = _checked(driver.cuCtxGetCurrent(), "asked for its context")
        other = int(before) != int(self._context)
        if other:
            _checked(driver.cuCtxSetCurrent(self._context), f"changing to card {self.index}")
        try:
            yield
        finally:
            if other:
                _checked(driver.cuCtxSetCurrent(before), "changing cards")

    def stream(self, handle: int) -> Any:
        """Return the stream of a handle, as cuda.core has it."""
        return self._streams(handle or DEFAULT_STREAM)

    def load(self, code: bytes, name: str, block: tuple[int, ...], shared: int) -> Kernel:
        """Return a kernel, loaded."""
        return Kernel(code, name, block, shared, self)

    def allocate(self, size: int, stream: Any) -> Any:
        """Return memory with its address as `handle`, free again for what follows on the stream once it is dropped.

        Raises
        ------
        MemoryError
            If the card has not so many bytes left.
        """
        try:
            return self._memory.allocate(size, stream=stream)
        except Exception as error:
            raise_memory_error(error, size, self)
            raise

    def free_bytes(self) -> int:
        """Return how much memory is left."""
        driver = _bindings()
        status, free, _ = driver.cuMemGetInfo()
        return int(_checked((status, free), "asked for its memory"))

    def upload(self, pointer: int, array: AnyArray, stream: Any) -> None:
        """Begin to copy a contiguous host array to the card."""
        done = _bindings().cuMemcpyHtoDAsync(pointer, array.ctypes.data, array.nbytes, int(stream.handle))
        _checked(done, f"copying {array.nbytes} bytes to {self.name}")

    def download(self, array: AnyArray, pointer: int, stream: Any) -> None:
        """Copy from the card to a contiguous host array, which holds it after `synchronize`."""
        done = _bindings().cuMemcpyDtoHAsync(array.ctypes.data, pointer, array.nbytes, int(stream.handle))
        _checked(done, f"copying {array.nbytes} bytes from {self.name}")

    def synchronize(self, stream: Any = None) -> None:
        """Wait until all that is on a stream, or on the card, is done."""
        driver = _bindings()
        done = driver.cuCtxSynchronize() if stream is None else driver.cuStreamSynchronize(int(stream.handle))
        _checked(done, f"{self.name} was computing")

    def order(self, first: Any, then: Any) -> None:
        """Let what follows on one stream wait for what is on another."""
        then.wait(first.record())

    def hold(self, stream: Any, objects: tuple[Any, ...]) -> None:
        """Keep objects until what is on a stream now is done; they are dropped when a later call looks."""
        event = stream.record()
        with _lock:
            while _held and _held[0][0].is_done:
                _held.popleft()
            _held.append((event, objects))


_held: deque[tuple[Any, tuple[Any, ...]]] = deque()
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # else a forked child may find it held by a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _wrapped(handle: int) -> Any:
    from cuda.core import LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM, Stream

    own = {DEFAULT_STREAM: LEGACY_DEFAULT_STREAM, THREAD_STREAM: PER_THREAD_DEFAULT_STREAM}
    return own[handle] if handle in own else Stream.from_handle(handle)


def raise_memory_error(error: Exception, size: int, card: Card) -> None:
    """Raise `MemoryError` if an error of some library says that a card's memory is used up.

    Raises
    ------
    MemoryError
        Names the bytes that were asked for, and those that are left.
    """
    text = f"{type(error).__name__} {error}".upper().replace(" ", "_")
    if isinstance(error, MemoryError) or "OUTOFMEMORY" in text or "OUT_OF_MEMORY" in text:
        left = "an unknown number of"
        with contextlib.suppress(RuntimeError):
            left = str(card.free_bytes())
        raise MemoryError(f"{card.name} has no {size} bytes for a result or a copy; {left} are free") from error


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of a contiguous array, in bytes."""
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides[: len(shape)]))


def byte_count(shape: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes of a contiguous array."""
    return math.prod(shape) * itemsize
