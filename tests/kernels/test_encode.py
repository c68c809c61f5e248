"""Codes of rows by compiled code: byte for byte those of NumPy."""

import numpy as np
import pytest

from attn_numba.cpu.encode import encoded
from attn_numba.rules.storage import CODES

INTEGERS = {"int8": CODES["int8"].keys, "int4": CODES["int4"].values}


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 31, 48, 64, 100, 128, 272])
@pytest.mark.parametrize("name", INTEGERS)
def test_bytes(name, size):
    code, rng = INTEGERS[name], np.random.default_rng(size)
    x = rng.standard_normal((2, 50, size)) * np.exp(3 * rng.standard_normal((2, 50, 1)))
    x[0, 0], x[0, 1], x[0, 2, 0], x[0, 3], x[0, 4] = 0, 1.5, 1e30, 1e-30, x[0, 4] * 1e-38
    x[1, 7] = np.round(x[1, 7])  # ties
    for numbers in (x, x.astype(np.float32), x[:, ::2], x.clip(-9, 9).astype(np.float16)[:, 5:]):
        before = numbers.copy()
        np.testing.assert_array_equal(encoded(code, numbers), code.encode(numbers))
        np.testing.assert_array_equal(numbers, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_row_that_is_not_finite_is_read_back_as_nan(name, bad):
    code, x = INTEGERS[name], np.random.default_rng(0).standard_normal((4, 48))
    x[2, 33] = bad
    back = code.decode(encoded(code, x), 48)
    assert np.isnan(back[2]).all()
    assert np.isfinite(back[[0, 1, 3]]).all()


def test_nothing_and_floats():
    for pair in CODES.values():
        for code in pair:
            nothing = np.zeros((3, 0, 20), np.float32)
            np.testing.assert_array_equal(encoded(code, nothing), code.encode(nothing))
    x = np.random.default_rng(0).standard_normal((3, 20))
    for name in ("float64", "float32", "float16", "bfloat16"):
        np.testing.assert_array_equal(encoded(CODES[name].keys, x), CODES[name].keys.encode(x))
