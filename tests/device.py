"""Arrays of the libraries that keep them on a card: made from NumPy's and brought back."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np


class Library(NamedTuple):
    """One library: arrays on the card from NumPy's with the same strides, and back."""

    name: str
    device: Callable[[np.ndarray], Any]
    host: Callable[[Any], np.ndarray]
    kind: type


def libraries() -> list[str]:
    """Return the names of those that are installed."""
    return [name for name in ("torch", "cupy", "numba") if find_spec(name) is not None]


def library(name: str) -> Library:
    """Return one by its name."""
    return {"torch": _torch, "cupy": _cupy, "numba": _numba}[name]()


def _torch() -> Library:
    import torch

    def device(x: np.ndarray) -> Any:
        base, order = _contiguous(x)
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(base.view(np.int16)).cuda().view(torch.bfloat16).permute(order)
        return torch.from_numpy(base).cuda().permute(order)

    def host(x: Any) -> np.ndarray:
        x = x.detach().cpu().contiguous()
        return x.view(torch.int16).numpy().view(_bfloat16()) if x.dtype == torch.bfloat16 else x.numpy()

    return Library("torch", device, host, torch.Tensor)


def _cupy() -> Library:
    import cupy

    def device(x: np.ndarray) -> Any:
        base, order = _contiguous(x)
        return cupy.asarray(base).transpose(order)

    return Library("cupy", device, cupy.asnumpy, cupy.ndarray)


def _numba() -> Library:
    from attn_numba.gpu.target import cuda

    def device(x: np.ndarray) -> Any:
        base, order = _contiguous(x)
        found = cuda.to_device(base)
        if order == tuple(range(x.ndim)):
            return found
        return cuda.as_cuda_array(_Transposed(found, order))  # Numba itself transposes matrices only

    return Library("numba", device, lambda x: np.ascontiguousarray(x.copy_to_host()), type(cuda.to_device(np.ones(1))))


class _Transposed:
    """An array on the card with its axes in another order."""

    def __init__(self, base: Any, order: tuple[int, ...]) -> None:
        self._base, found = base, dict(base.__cuda_array_interface__)
        steps = [base.dtype.itemsize * int(np.prod(base.shape[axis + 1 :])) for axis in range(base.ndim)]
        found["shape"], found["strides"] = (tuple(x[axis] for axis in order) for x in (base.shape, steps))
        self.__cuda_array_interface__ = found


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Raise unless two arrays are equal in dtype, shape and numbers, NaN equal to NaN."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(*(x.astype(np.float64) for x in (found, expected)))


def _contiguous(x: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the array with its axes in the order of memory, contiguous, and the order that leads back."""
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    return np.array(x.transpose(order), order="C"), tuple(np.argsort(order).tolist())


def _bfloat16() -> np.dtype:
    from attn_numba.workloads import named_dtype

    return named_dtype("bfloat16")


def broken() -> str:
    """Return what keeps this process from using its card for good, such as an illegal address; "" if nothing does."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return ""
    status, context = driver.cuCtxGetCurrent()
    if int(status) != 0 or int(context) == 0:
        status, context = driver.cuDevicePrimaryCtxGetState(0)[:2]
        return "" if int(status) in (0, 3, 100) else status.name  # 3, 100: CUDA was not started, there is no card
    (status,) = driver.cuCtxSynchronize()
    return "" if int(status) == 0 else status.name
