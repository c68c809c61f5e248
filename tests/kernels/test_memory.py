"""Kernels read and write nothing outside their arrays: beside each one lies memory that may not be touched."""

import sys

import pytest

from processes import run_python

GUARDED = """
import ctypes, mmap, sys
import numpy as np
import attn_numba as an
from cases import CASES

libc = ctypes.CDLL(None, use_errno=True)
keep = []


def guarded(array, at_end):
    '''A copy whose last byte (or first) lies at the edge of a page; the next page may not be touched.'''
    low = min((s * (n - 1) for s, n in zip(array.strides, array.shape) if s < 0 and n > 1), default=0)
    if array.size == 0 or low or 0 in array.strides:  # the plain layouts are enough
        return array
    size = array.itemsize + sum(s * (n - 1) for s, n in zip(array.strides, array.shape))
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    keep.append(memory)
    offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    copy = np.ndarray(array.shape, array.dtype, memory, offset, array.strides)
    copy[...] = array
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    return copy


calls = 0
for case in CASES[PART::2]:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        try:
            q, k, v, kwargs = case.build(dtype)
        except ImportError:  # no bfloat16 here
            continue
        expected = an.attention(q, k, v, **kwargs)
        for at_end in (True, False):
            print(case.name, dtype, at_end, file=sys.stderr, flush=True)
            inputs = [guarded(x, at_end) for x in (q, k, v)]
            out = guarded(np.zeros(q.shape[:-1] + v.shape[-1:], q.dtype), at_end)
            an.attention(*inputs, **kwargs, out=out)
            assert np.array_equal(out, expected, equal_nan=True), case.name
            calls += 1
        keep.clear()
print(calls > 100)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are closed by Linux's mprotect")
@pytest.mark.parametrize("part", [0, 1])
def test_nothing_around_the_arrays_is_touched(part):
    assert run_python(GUARDED.replace("PART", str(part))) == "True\n"
