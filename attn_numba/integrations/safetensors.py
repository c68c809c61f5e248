"""Arrays in ``.safetensors`` files, read as memory maps; needs the package ``safetensors``.

The package checks the whole header (names, shapes, offsets, the file's length) when it opens a file; only then are the
offsets read here, so that every array is a view of the file and no byte of it is loaded before it is used.

References
----------
Hugging Face (2022). The safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

__all__ = ["readers", "save"]

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}


def readers(path: str | Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return what the file holds by name: for each array a function that maps it, read-only.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file.

    Returns
    -------
    dict of str to callable
        Each returns a ``numpy.ndarray``; a tensor of type BF16 comes as ``ml_dtypes.bfloat16``. It raises ImportError
        where that package is not installed, and ValueError for a type that NumPy has no name for.

    Raises
    ------
    ValueError
        The file is corrupt or truncated.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"not a readable safetensors file: {error}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: partial(_map, path, name, 8 + length, entry) for name, entry in header.items()}


def save(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a new file.

    Parameters
    ----------
    path : str or Path
        The file to write; one that exists is replaced.
    arrays : mapping of str to numpy.ndarray
        Boolean, integer or floating arrays of any strides, ``ml_dtypes.bfloat16`` among them.
    """
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _map(path: str | Path, name: str, start: int, entry: dict[str, Any]) -> np.ndarray:
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = _dtype(name, entry["dtype"])
    if first == last:  # an empty part of a file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=start + first, shape=shape)


def _dtype(name: str, code: str) -> np.dtype:
    if code == "BF16":
        try:
            from attn_numba.integrations.ml_dtypes import bfloat16
        except ImportError:
            raise ImportError(f"{name} is bfloat16: it needs the package ml_dtypes (pip install ml_dtypes)") from None
        return bfloat16
    if code not in _DTYPES:
        raise ValueError(f"{name} is of type {code}; known are BF16, {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[code])
