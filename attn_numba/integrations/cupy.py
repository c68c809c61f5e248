"""CuPy arrays, read where they lie and made; needs the package ``cupy``."""

from __future__ import annotations

from typing import Any

import cupy

__all__ = ["empty", "place"]


def place(x: Any, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...], str, int, int]:
    """Return where an array lies.

    Parameters
    ----------
    x : cupy.ndarray
        The array.
    name : str
        What to call it in messages.

    Returns
    -------
    tuple
        Address, shape, strides in bytes, name of the dtype, number of the card, handle of CuPy's current stream there.
    """
    with x.device:
        stream = cupy.cuda.get_current_stream().ptr
    return x.data.ptr, x.shape, x.strides, x.dtype.name, x.device.id, stream


def empty(like: Any, shape: tuple[int, ...], dtype: str, index: int, stream: int) -> tuple[Any, int]:
    """Return a new array, allocated on a stream, and its address.

    Parameters
    ----------
    like : cupy.ndarray
        One on the same card.
    shape : tuple of int
        Its sizes.
    dtype : str
        Name of its dtype.
    index : int
        Number of the card.
    stream : int
        Handle of the stream; 1 is the default one.

    Returns
    -------
    (cupy.ndarray, int)
    """
    kind = like.dtype if like.dtype.name == dtype else dtype
    with cupy.cuda.Device(index):
        if cupy.cuda.get_current_stream().ptr in ((0, 1) if stream == 1 else (stream,)):
            made = cupy.empty(shape, kind)
        else:
            with cupy.cuda.ExternalStream(stream, index):
                made = cupy.empty(shape, kind)
    return made, made.data.ptr
