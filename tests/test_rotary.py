"""rotary against rotations of complex numbers, hand-worked numbers, torch's autograd, and what it refuses."""

import re
from typing import ClassVar

import numpy as np
import pytest

import attn_numba as an

PAIRS = ["halves", "neighbors"]
TOLERANCE = {"float64": 1e-14, "float32": 3e-7, "float16": 1e-3, "bfloat16": 8e-3}


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def arrays(*shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal(shape or (2, 3, 7, 10)).astype(dtype_of(dtype))


def by_complex_numbers(x, positions, base, pairs):
    """Each pair as one complex number times ``exp(i t)``; positions have as many axes as x has rows' axes."""
    D = x.shape[-1]
    first, second = (x[..., : D // 2], x[..., D // 2 :]) if pairs == "halves" else (x[..., 0::2], x[..., 1::2])
    turned = (first + 1j * second) * np.exp(1j * positions[..., None] * base ** (-np.arange(D // 2) / (D / 2)))
    parts = [turned.real, turned.imag]
    return np.concatenate(parts, -1) if pairs == "halves" else np.stack(parts, -1).reshape(x.shape)


POSITIONS = {
    "(M,)": (np.arange(7), np.arange(7)),
    "(B, M)": (np.array([np.arange(7), np.arange(50, 57)]), np.array([np.arange(7), np.arange(50, 57)])[:, None]),
    "(1, M)": (np.arange(7)[None] - 3, np.arange(7) - 3),
    "(B, H, M)": (np.arange(42).reshape(2, 3, 7), np.arange(42).reshape(2, 3, 7)),
    "(1, H, M)": (np.arange(21).reshape(1, 3, 7), np.arange(21).reshape(1, 3, 7)),
    "fractions": (np.linspace(-2, 9.5, 7), np.linspace(-2, 9.5, 7)),
    "list": ([5, 3, 3, 0, -1, 100_000, 2], np.array([5, 3, 3, 0, -1, 100_000, 2])),
    "narrow": (np.arange(7, dtype=np.uint8), np.arange(7)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("name", POSITIONS)
def test_complex_numbers(name, pairs, dtype):
    positions, rows = POSITIONS[name]
    x = arrays(dtype=dtype)
    out = an.rotary(x, positions, base=500.0, pairs=pairs)
    expected = by_complex_numbers(x.astype(float), np.broadcast_to(rows, (2, 3, 7)), 500.0, pairs)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out.astype(float), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_worked_by_hand():
    """A quarter turn at base 1; with base 16 and D = 4 the second pair turns by 1/4 of the position."""
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    quarter = [np.pi / 2]
    np.testing.assert_allclose(an.rotary(x, quarter, base=1), [[-3, -4, 1, 2]], atol=1e-15)
    np.testing.assert_allclose(an.rotary(x, quarter, base=1, pairs="neighbors"), [[-2, 1, -4, 3]], atol=1e-15)
    c, s = np.cos([1, 0.25]), np.sin([1, 0.25])
    halves = [[c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], s[0] + 3 * c[0], 2 * s[1] + 4 * c[1]]]
    np.testing.assert_allclose(an.rotary(x, [1], base=16), halves, rtol=1e-15)
    neighbors = [[c[0] - 2 * s[0], s[0] + 2 * c[0], 3 * c[1] - 4 * s[1], 3 * s[1] + 4 * c[1]]]
    np.testing.assert_allclose(an.rotary(x, [1], base=16, pairs="neighbors"), neighbors, rtol=1e-15)


@pytest.mark.parametrize("pairs", PAIRS)
def test_scores_depend_on_the_difference_of_positions(pairs):
    q, k = arrays(1, 16, seed=1), arrays(1, 16, seed=2)
    at = [an.rotary(q, [i], pairs=pairs) @ an.rotary(k, [j], pairs=pairs).T for i, j in ((5, 2), (1003, 1000), (0, -3))]
    np.testing.assert_allclose(np.ravel(at), [at[0].item()] * 3, rtol=1e-11)
    np.testing.assert_allclose(an.rotary(q, [7], pairs=pairs) @ an.rotary(k, [7], pairs=pairs).T, q @ k.T, rtol=1e-12)


def test_pairs_are_one_rotation_of_numbers_in_another_order():
    x = arrays()
    order = np.arange(10).reshape(2, 5).T.ravel()  # 0 5 1 6 2 7 ...
    halves, neighbors = an.rotary(x, np.arange(7)), an.rotary(x[..., order], np.arange(7), pairs="neighbors")
    np.testing.assert_array_equal(halves[..., order], neighbors)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("name", POSITIONS)
def test_gradient_is_the_transpose(name, pairs):
    """``dout . R x = R^T dout . x`` for any two arrays, and R^T undoes R."""
    positions, _ = POSITIONS[name]
    x, dout = arrays(), arrays(seed=1)
    dx = an.rotary_vjp(dout, positions, pairs=pairs)
    np.testing.assert_allclose((dx * x).sum(), (dout * an.rotary(x, positions, pairs=pairs)).sum(), rtol=1e-12)
    np.testing.assert_allclose(an.rotary_vjp(an.rotary(x, positions, pairs=pairs), positions, pairs=pairs), x, 1e-12)
    np.testing.assert_array_equal(dx, an.rotary(dout, -np.asarray(positions, float), pairs=pairs))


@pytest.mark.parametrize("pairs", PAIRS)
def test_gradient_by_torch(pairs):
    torch = pytest.importorskip("torch")
    x, dout, positions = arrays(), arrays(seed=1), np.arange(7) + 11
    t = torch.tensor(x, requires_grad=True)
    angles = torch.tensor(np.outer(positions, 10000.0 ** (-np.arange(5) / 5)))
    c, s = angles.cos(), angles.sin()
    if pairs == "halves":  # as the Llama of Hugging Face's transformers writes it
        c, s = torch.cat([c, c], -1), torch.cat([s, s], -1)
        out = t * c + torch.cat([-t[..., 5:], t[..., :5]], -1) * s
    else:  # as GPT-J writes it
        c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
        out = t * c + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * s
    out.backward(torch.tensor(dout))
    np.testing.assert_allclose(an.rotary(x, positions, pairs=pairs), out.detach(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(an.rotary_vjp(dout, positions, pairs=pairs), t.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ranks_and_strides(dtype):
    x = arrays(dtype=dtype)
    for pairs in PAIRS:
        whole = an.rotary(x, np.arange(7), pairs=pairs)
        np.testing.assert_array_equal(an.rotary(x[1, 2], np.arange(7), pairs=pairs), whole[1, 2])
        np.testing.assert_array_equal(an.rotary(x[1], np.arange(7), pairs=pairs), whole[1])
        np.testing.assert_array_equal(an.rotary(x[:, :, 3:4], [3], pairs=pairs), whole[:, :, 3:4])
        swapped = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        result = an.rotary(swapped, np.arange(7), pairs=pairs)
        np.testing.assert_array_equal(result, whole)
        assert result.strides == swapped.strides  # a view of (B, M, H, D) stays one
        backwards = an.rotary(x[..., ::-1, :], np.arange(7)[::-1], pairs=pairs)
        np.testing.assert_array_equal(backwards, whole[..., ::-1, :])


def test_inputs_are_not_written_and_the_result_is_new():
    x, positions = arrays(), np.arange(7)
    before = x.copy()
    x.flags.writeable = positions.flags.writeable = False
    out = an.rotary(x, positions)
    np.testing.assert_array_equal(x, before)
    assert out.flags.writeable
    assert not np.shares_memory(x, out)
    shared = an.rotary(np.broadcast_to(x[:1, :1], x.shape), np.arange(42).reshape(2, 3, 7))
    np.testing.assert_array_equal(shared[1, 2], an.rotary(x[0, 0], np.arange(35, 42)))


@pytest.mark.filterwarnings("error")
def test_a_row_stays_to_itself():
    x = arrays()
    spoiled = x.copy()
    spoiled[0, 1, 2, 3] = np.nan
    spoiled[1, 2, 5] = np.inf
    out = an.rotary(spoiled, np.arange(7))
    rows = np.isfinite(spoiled).all(-1)
    np.testing.assert_array_equal(out[rows], an.rotary(x, np.arange(7))[rows])
    assert np.isnan(out[0, 1, 2, [3, 8]]).all()


def test_empty():
    assert an.rotary(np.zeros((2, 0, 4)), []).shape == (2, 0, 4)
    assert an.rotary(np.zeros((0, 2, 3, 4)), np.zeros((0, 3))).shape == (0, 2, 3, 4)


REFUSED = [
    (lambda: an.rotary(arrays(3, 5), np.arange(3)), ValueError, "x has head size 5; needed an even one"),
    (lambda: an.rotary(arrays(3, 0), np.arange(3)), ValueError, "x has head size 0; needed an even one"),
    (lambda: an.rotary(arrays(4), np.arange(4)), ValueError, "x has 1 axes, shape (4,); needed 2 to 4"),
    (lambda: an.rotary(np.ones((3, 4), int), np.arange(3)), TypeError, "x has dtype int64; needed float64"),
    (lambda: an.rotary([[1.0, 2.0]], [0]), TypeError, "x is list; needed an array"),
    (lambda: an.rotary(arrays(3, 4), 5), ValueError, "positions is one number; needed (M,) = (3,), (B, M) = (1, 3)"),
    (lambda: an.rotary(arrays(3, 4), 5), ValueError, "pass np.arange(start, start + 3)"),
    (lambda: an.rotary(arrays(3, 4), [5]), ValueError, "positions has shape (1,); needed (M,) = (3,)"),
    (lambda: an.rotary(arrays(), np.zeros((3, 7))), ValueError, "positions has shape (3, 7); needed (M,) = (7,)"),
    (lambda: an.rotary(arrays(3, 4), np.zeros((1, 1, 1, 3))), ValueError, "positions has shape (1, 1, 1, 3)"),
    (lambda: an.rotary(arrays(3, 4), [0, 1, np.nan]), ValueError, "positions holds nan; needed finite numbers"),
    (lambda: an.rotary(arrays(3, 4), [0, 1, 1j]), TypeError, "positions has dtype complex128; needed real numbers"),
    (lambda: an.rotary(arrays(3, 4), [True, False, True]), TypeError, "positions has dtype bool; needed real numbers"),
    (lambda: an.rotary(arrays(3, 4), "abc"), TypeError, "rotary: positions is str"),
    (lambda: an.rotary(arrays(3, 4), np.arange(3), base=0), ValueError, "base is 0.0; needed a finite number above 0"),
    (lambda: an.rotary(arrays(3, 4), np.arange(3), base=np.inf), ValueError, "base is inf"),
    (lambda: an.rotary(arrays(3, 4), np.arange(3), base=np.nan), ValueError, "base is nan"),
    (lambda: an.rotary(arrays(3, 4), np.arange(3), base="big"), TypeError, "rotary: base is str"),
    (
        lambda: an.rotary(arrays(3, 4), np.arange(3), pairs="thirds"),
        ValueError,
        "pairs is 'thirds'; needed 'halves' or",
    ),
    (lambda: an.rotary(arrays(3, 4), np.arange(3), pairs=None), ValueError, "pairs is None; needed 'halves' or"),
    (lambda: an.rotary_vjp(arrays(3, 5), np.arange(3)), ValueError, "dout has head size 5"),
    (lambda: an.rotary_vjp(arrays(3, 4), np.arange(4)), ValueError, "rotary_vjp: positions has shape (4,)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_arrays_on_a_gpu_are_refused_by_name():
    class OnAGPU:
        __cuda_array_interface__: ClassVar = {}

    with pytest.raises(NotImplementedError, match="x is on a GPU; rotary takes arrays in host memory"):
        an.rotary(OnAGPU(), [0])
