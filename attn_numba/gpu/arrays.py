"""Arrays in a card's memory: read where they lie, made in the kind of the caller's, uploaded.

What a kernel is given is a `View`; in the simulator it is a NumPy array. An array is known by its type: torch and CuPy
are asked in their own files under ``integrations``, all others by DLPack, and Numba's arrays and what has no DLPack by
``__cuda_array_interface__``. No input is copied.

Every array has a stream on which it is computed and freed: its own one, as its library says. A call on that stream
needs no care. A call on another one waits for it, and keeps the arrays alive until it is done.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu import driver
from attn_numba.gpu.driver import DEFAULT_STREAM, Card
from attn_numba.gpu.target import cuda
from attn_numba.rules.data import AnyArray

__all__ = [
    "BFLOAT16",
    "DeviceArray",
    "Kind",
    "View",
    "downloaded",
    "empty_view",
    "handle_of",
    "kind_of",
    "unplaced",
    "uploaded",
]


class Named(NamedTuple):
    """A dtype that NumPy may not know."""

    name: str
    itemsize: int


BFLOAT16, BITS = Named("bfloat16", 2), np.dtype(np.uint16)


@functools.cache
def dtype_of(name: str) -> Any:
    """Return the dtype of a name."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


class View:
    """Where the elements of an array lie in a card's memory.

    Attributes
    ----------
    pointer : int
        Address of element 0.
    shape, strides : tuple of int
        Sizes, and steps in bytes.
    dtype : numpy.dtype or Named
        Of the elements.
    owner : object
        Keeps the memory.
    readonly : bool
        Whether it may not be written.
    """

    __slots__ = ("dtype", "owner", "pointer", "readonly", "shape", "strides")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: Any,
        owner: object = None,
        readonly: bool = False,
    ) -> None:
        self.pointer, self.shape, self.strides, self.dtype = pointer, shape, strides, dtype
        self.owner, self.readonly = owner, readonly

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def reshape(self, shape: tuple[int, ...]) -> View:
        """Return the same elements with axes of size 1 before the others."""
        extra = len(shape) - len(self.shape)
        if extra < 0 or shape != (1,) * extra + self.shape:
            raise ValueError(f"shape is {shape}; needed {self.shape} with axes of size 1 before it")
        return View(self.pointer, shape, (0,) * extra + self.strides, self.dtype, self.owner, self.readonly)

    def bits(self) -> View:
        """Return the same elements as kernels see them: those of 16 bits as whole numbers."""
        if self.dtype.itemsize != 2:
            return self
        return View(self.pointer, self.shape, self.strides, BITS, self.owner, self.readonly)

    def span(self) -> tuple[int, int]:
        """Return the first address and the one after the last that elements lie at."""
        if 0 in self.shape:
            return self.pointer, self.pointer
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        low, high = sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)
        return self.pointer + low, self.pointer + high + self.dtype.itemsize


class Placed(NamedTuple):
    """An array of the caller's: where it is, and on which stream it is computed."""

    view: View
    card: int  # its number
    stream: int  # a handle
    lent: bool = False  # its owner may not know of our stream, and is to be kept until the call is done


class Kind(NamedTuple):
    """How arrays of one library are read and made."""

    name: str
    placed: Callable[[Any, str], Placed]  # (array, the argument's name)
    empty: Callable[[Any, tuple[int, ...], str, Card, int], tuple[Any, View]]  # (like, shape, dtype, card, stream)


def kind_of(x: object) -> Kind:
    """Return how to read and make arrays like `x`, which is one in a card's memory."""
    own: Any = type(x)
    return _kind_of_type(own)


@functools.cache
def _kind_of_type(kind: Any) -> Kind:
    libraries = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if "torch" in libraries:
        from attn_numba.integrations import torch

        return Kind("torch", _reader(torch.place), _maker(torch.empty))
    if "cupy" in libraries:
        from attn_numba.integrations import cupy

        return Kind("cupy", _reader(cupy.place), _maker(cupy.empty))
    if "numba" in libraries:
        return Kind("numba", _from_interface, _numba_empty)
    by_dlpack = hasattr(kind, "__dlpack__") and kind is not DeviceArray
    return Kind("other", _from_dlpack if by_dlpack else _from_interface, _own_empty)


def _reader(place: Callable[[Any, str], tuple[Any, ...]]) -> Callable[[Any, str], Placed]:
    """Return the reader made of a library's function that says where an array lies."""

    def placed(x: Any, name: str) -> Placed:
        pointer, shape, strides, dtype, index, stream = place(x, name)
        return Placed(View(pointer, shape, strides, _any_dtype(dtype), x), index, stream or DEFAULT_STREAM)

    return placed


def _maker(make: Callable[..., tuple[Any, int]]) -> Callable[..., tuple[Any, View]]:
    """Return the maker made of a library's function that allocates an array."""

    def empty(like: Any, shape: tuple[int, ...], dtype: str, card: Card, stream: int) -> tuple[Any, View]:
        kind = dtype_of(dtype)
        try:
            made, pointer = make(like, shape, dtype, card.index, stream)
        except Exception as error:
            driver.raise_memory_error(error, driver.byte_count(shape, kind.itemsize), card)
            raise
        return made, View(pointer, shape, driver.dense_strides(shape, kind.itemsize), kind, made)

    return empty


def _any_dtype(name: str) -> Any:
    """Return the dtype of any name, also of one that no call takes."""
    try:
        return dtype_of(name)
    except TypeError:
        return Named(name, 1)


# --- __cuda_array_interface__ ---


def _from_interface(x: Any, name: str) -> Placed:
    interface = x.__cuda_array_interface__
    shape = tuple(interface["shape"])
    pointer, readonly = interface["data"]
    dtype = _interface_dtype(x, interface["typestr"], name)
    strides = interface.get("strides")
    strides = driver.dense_strides(shape, dtype.itemsize) if strides is None else tuple(strides)
    if interface.get("mask") is not None:
        raise TypeError(f"{name} has a mask of its own in __cuda_array_interface__; needed a plain array")
    view = View(int(pointer or 0), shape, strides, dtype, x, bool(readonly))
    return Placed(view, _card_of(view.pointer), int(interface.get("stream") or DEFAULT_STREAM), True)


def _interface_dtype(x: Any, text: str, name: str) -> Any:
    """Return the dtype that an interface names; two bytes without a meaning are what the array itself calls them."""
    dtype = np.dtype(text)
    if dtype.kind == "V" and dtype.itemsize == 2:
        own = str(getattr(x, "dtype", "")).rpartition(".")[2]
        return BFLOAT16 if own == "bfloat16" else Named(own or text, 2)
    if not dtype.isnative:
        raise TypeError(f"{name} has byte order {dtype.byteorder!r}; needed that of this machine")
    return dtype


def _card_of(pointer: int) -> int:
    """Return the number of the card that an address belongs to; that of the first one for an empty array."""
    return driver.card_of(pointer) if pointer else 0


# --- DLPack ---


def _from_dlpack(x: Any, name: str) -> Placed:
    """Return the place of an array; what is computed on the default stream waits for what makes it."""
    from cuda.core.utils import StridedMemoryView

    _, index = x.__dlpack_device__()
    with driver.card(int(index)).current():
        found = StridedMemoryView.from_dlpack(x, stream_ptr=DEFAULT_STREAM)
    try:
        dtype: Any = found.dtype
    except NotImplementedError as error:  # cuda.core needs ml_dtypes to name it
        own = str(getattr(x, "dtype", "")).rpartition(".")[2]
        if own != "bfloat16":
            raise TypeError(f"{name} has a dtype that DLPack does not name here: {error}") from error
        dtype = BFLOAT16
    if dtype.name == "bfloat16":
        dtype = BFLOAT16
    shape = tuple(found.shape)
    if found.strides is None:
        strides = driver.dense_strides(shape, dtype.itemsize)
    else:
        strides = tuple(s * dtype.itemsize for s in found.strides)
    return Placed(
        View(int(found.ptr), shape, strides, dtype, found, bool(found.readonly)), int(index), DEFAULT_STREAM, True
    )


# --- made here ---


def _numba_empty(like: Any, shape: tuple[int, ...], dtype: str, card: Card, stream: int) -> tuple[Any, View]:
    if dtype == "bfloat16":
        return _own_empty(like, shape, dtype, card, stream)
    make = _maker(lambda like, shape, dtype, index, stream: _with_pointer(cuda.device_array(shape, dtype)))
    made, view = make(like, shape, dtype, card, stream)
    return made if stream == DEFAULT_STREAM else made.bind(cuda.external_stream(stream)), view


def _with_pointer(made: Any) -> tuple[Any, int]:
    return made, int(made.__cuda_array_interface__["data"][0])


def _own_empty(like: Any, shape: tuple[int, ...], dtype: str, card: Card, stream: int) -> tuple[Any, View]:
    view = empty_view(shape, dtype, card, stream)
    return DeviceArray(view, card, stream), view


class DeviceArray:
    """A result in a card's memory, for callers whose library cannot be asked for one.

    It offers ``__cuda_array_interface__`` and DLPack. Its memory is free again, for what follows on the stream that it
    was computed on, once it is dropped; that stream must live as long.

    Parameters
    ----------
    view : View
        Its elements, contiguous.
    card : Card
        Where it is.
    stream : int
        Handle of the stream that it is computed on.
    """

    def __init__(self, view: View, card: Card, stream: int) -> None:
        self._view, self._card, self._stream = view, card, stream

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self._view.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the elements: NumPy's, or for bfloat16 one that has its `name` and `itemsize`."""
        return self._view.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        view = self._view
        return {
            "shape": view.shape,
            "typestr": "<V2" if view.dtype is BFLOAT16 else view.dtype.str,
            "data": (view.pointer, False),
            "strides": None,
            "stream": self._stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._card.index

    def __dlpack__(self, **options: Any) -> Any:
        from cuda.core.utils import StridedMemoryView

        view, dtype = self._view, self._view.dtype
        if dtype is BFLOAT16:
            from attn_numba.integrations.ml_dtypes import bfloat16 as dtype
        with self._card.current():
            shared = StridedMemoryView.from_buffer(view.owner, view.shape, dtype=dtype)
            wanted = options.get("stream")
            if wanted is not None and wanted != -1:
                self._card.order(self._card.stream(self._stream), self._card.stream(int(wanted)))
            return shared.__dlpack__(**options)

    def copy_to_host(self) -> AnyArray:
        """Return a NumPy copy, once the array is computed; bfloat16 needs the package ``ml_dtypes``."""
        dtype = self._view.dtype
        if dtype is BFLOAT16:
            from attn_numba.integrations.ml_dtypes import bfloat16 as dtype
        copy = np.empty(self.shape, dtype)
        with self._card.current():
            stream = self._card.stream(self._stream)
            if copy.size:
                self._card.download(copy, self._view.pointer, stream)
            self._card.synchronize(stream)
        return copy


def unplaced(shape: tuple[int, ...], dtype: Any) -> View:
    """Return a contiguous view of no memory, to ask what would be done with one."""
    kind = dtype_of(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    return View(0, shape, driver.dense_strides(shape, kind.itemsize), kind)


def empty_view(shape: tuple[int, ...], dtype: str, card: Card, stream: int) -> View:
    """Return new memory for an array, contiguous, free again for what follows on the stream once it is dropped."""
    kind = dtype_of(dtype)
    count = driver.byte_count(shape, kind.itemsize)
    buffer = card.allocate(max(1, count), card.stream(stream))  # an array without elements has a place all the same
    return View(int(buffer.handle), shape, driver.dense_strides(shape, kind.itemsize), kind, buffer)


def uploaded(array: AnyArray, card: Card, stream: int) -> View:
    """Return a copy of a host array in a card's memory, contiguous."""
    array = np.ascontiguousarray(array)
    view = empty_view(array.shape, array.dtype.name, card, stream)
    if array.size:
        on = card.stream(stream)
        card.upload(view.pointer, array, on)
        card.hold(on, (array,))  # a card that reads the host's memory by itself may not have done so yet
    return view


def downloaded(view: View, array: AnyArray, card: Card, stream: int) -> None:
    """Copy a contiguous view into a host array, and wait for it."""
    on = card.stream(stream)
    target = array if array.flags.c_contiguous else np.empty(array.shape, array.dtype)
    if array.size:
        card.download(target, view.pointer, on)
    card.synchronize(on)
    if target is not array:
        array[...] = target


def handle_of(stream: Any) -> int:
    """Return the handle of a stream: itself, or what an object of some library says it is.

    Raises
    ------
    TypeError
        If it is no stream.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(f"stream is {stream}; needed a stream's handle, which is not negative")
        return stream or DEFAULT_STREAM
    own = getattr(stream, "__cuda_stream__", None)
    if own is not None:
        return int((own() if callable(own) else own)[1]) or DEFAULT_STREAM
    for name in ("cuda_stream", "ptr", "handle"):
        found = getattr(stream, name, None)
        if found is not None:
            return int(getattr(found, "value", found) or DEFAULT_STREAM)
    raise TypeError(
        f"stream is {type(stream).__name__}; needed a stream's handle as an int, or a stream of torch, CuPy, Numba or "
        "cuda.core"
    )
