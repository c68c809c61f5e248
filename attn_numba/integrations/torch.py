"""torch tensors on a GPU, read where they lie and made; needs the package ``torch``."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["current_stream", "empty", "place"]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def current_stream(index: int) -> int:
    """Return the handle of torch's current stream on a card.

    Parameters
    ----------
    index : int
        Number of the card.

    Returns
    -------
    int
        0 is the default stream.
    """
    return torch.cuda.current_stream(index).cuda_stream


def place(x: Any, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...], str, int, int]:
    """Return where a tensor lies.

    Parameters
    ----------
    x : torch.Tensor
        On a GPU.
    name : str
        What to call it in messages.

    Returns
    -------
    tuple
        Address, shape, strides in bytes, name of the dtype, number of the card, handle of torch's current stream there.

    Raises
    ------
    TypeError
        If gradients are asked of it, which are not computed, it is not strided, or it is to be negated when read.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{name} requires grad, and gradients of torch tensors are not computed: pass {name}.detach()")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; needed torch.strided")
    if x.is_neg():
        raise TypeError(f"{name} is a view that torch negates when it is read: pass {name}.resolve_neg()")
    size, index = x.element_size(), x.device.index
    strides = tuple(step * size for step in x.stride())
    return x.data_ptr(), tuple(x.shape), strides, _NAMES.get(x.dtype) or str(x.dtype), index, current_stream(index)


def empty(like: Any, shape: tuple[int, ...], dtype: str, index: int, stream: int) -> tuple[Any, int]:
    """Return a new tensor, allocated on a stream, and its address.

    Parameters
    ----------
    like : torch.Tensor
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
    (torch.Tensor, int)
    """
    kind = DTYPES[dtype]
    if current_stream(index) in ((0, 1) if stream == 1 else (stream,)):
        made = like.new_empty(shape, dtype=kind)
    else:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=index)):
            made = like.new_empty(shape, dtype=kind)
    return made, made.data_ptr()
