"""What bad input gets: an error that names the argument, what came and what was needed, before anything is computed."""

# ruff: noqa: E501  a refusal a line

import re
import sys

import numpy as np
import pytest

import attn_numba as an
from attn_numba import api
from processes import run_python


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def call(q=(2, 4, 6, 8), k=(2, 2, 9, 8), v=(2, 2, 9, 5), **kwargs):
    """Call `attention` on zeros of these shapes, or on these objects."""
    inputs = [zeros(*x) if isinstance(x, tuple) else x for x in (q, k, v)]
    return an.attention(*inputs, **kwargs)


class Elsewhere:
    """An array that says it is on a GPU."""

    dtype, shape, ndim = np.dtype(np.float32), (3, 4), 2
    __cuda_array_interface__ = {"shape": (3, 4), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


class Broken:
    def __array__(self, dtype=None, copy=None):
        raise ValueError("it has no numbers")


def out(*shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype)


def read_only():
    array = out(2, 4, 6, 5)
    array.flags.writeable = False
    return array


def inside(name):
    """A call whose `out` lies in the memory of an input."""
    q, k, v = zeros(1, 1, 6, 8), zeros(1, 1, 6, 8), zeros(1, 1, 6, 8)
    target = {"q": q, "k": k, "v": v}[name]
    return an.attention(q, k, v, out=target)


def half_inside():
    memory = zeros(100)
    q = memory[:48].reshape(6, 8)
    return an.attention(q, zeros(9, 8), zeros(9, 8), out=memory[40:88].reshape(6, 8))


M, N = 6, 9
REFUSED = {
    # q, k, v
    "q is a list": (lambda: call(q=[[1.0]]), TypeError, "q is list; needed an array"),
    "q is None": (lambda: call(q=None), TypeError, "q is NoneType; needed an array"),
    "k is a number": (lambda: call(k=1.0), TypeError, "k is float; needed an array"),
    "v makes no array": (lambda: call(v=Broken()), TypeError, "v is Broken, which does not make a NumPy array: it has no numbers"),
    "q has integers": (lambda: call(q=zeros(6, 8, dtype=int)), TypeError, "q has dtype int64; needed float64, float32, float16 or bfloat16"),
    "k is complex": (lambda: call(k=zeros(2, 2, 9, 8, dtype=complex)), TypeError, "k has dtype complex128; needed float64"),
    "v has longdouble": (lambda: call(v=zeros(2, 2, 9, 5, dtype=np.longdouble)), TypeError, "v has dtype"),
    "q has bools": (lambda: call(q=zeros(6, 8, dtype=bool)), TypeError, "q has dtype bool; needed float64"),
    "dtypes differ": (
        lambda: call(k=zeros(2, 2, 9, 8, dtype=np.float64)), TypeError, "q, k, v have dtypes float32, float64, float32; needed one dtype"
    ),
    "q has 1 axis": (lambda: call(q=(8,)), ValueError, "q has 1 axes, shape (8,); needed 2 to 4, (B, H, M, D)"),
    "k has 0 axes": (lambda: call(k=()), ValueError, "k has 0 axes, shape (); needed 2 to 4, (B, Hk, N, D)"),
    "v has 5 axes": (lambda: call(v=(1, 2, 2, 9, 5)), ValueError, "v has 5 axes, shape (1, 2, 2, 9, 5); needed 2 to 4, (B, Hk, N, E)"),
    "heads do not divide": (lambda: call(q=(2, 8, 6, 8), k=(2, 5, 9, 8), v=(2, 5, 9, 5)), ValueError, "k has 5 heads; q has 8, not a multiple of 5"),
    "more key heads than heads": (lambda: call(k=(2, 8, 9, 8), v=(2, 8, 9, 5)), ValueError, "k has 8 heads; q has 4, not a multiple of 8"),
    "no key head": (lambda: call(k=(2, 0, 9, 8), v=(2, 0, 9, 5)), ValueError, "k has 0 heads; needed at least 1"),
    "no head": (lambda: call(q=(2, 0, 6, 8)), ValueError, "heads"),
    "v has other heads": (lambda: call(v=(2, 4, 9, 5)), ValueError, "v has 4 heads; k has 2"),
    "k has other sequences": (lambda: call(k=(3, 2, 9, 8)), ValueError, "k has 3 sequences; q has 2"),
    "v has other sequences": (lambda: call(v=(1, 2, 9, 5)), ValueError, "v has 1 sequences; q has 2"),
    "v has other rows": (lambda: call(v=(2, 2, 8, 5)), ValueError, "v has 8 rows; k has 9"),
    "head sizes differ": (lambda: call(k=(2, 2, 9, 7)), ValueError, "k has head size 7; q has 8"),
    "head size 0": (lambda: call(q=(2, 4, 6, 0), k=(2, 2, 9, 0)), ValueError, "q has head size 0; needed at least 1"),
    "value size 0": (lambda: call(v=(2, 2, 9, 0)), ValueError, "v has value size 0; needed at least 1"),
    # mask
    "float mask": (lambda: call(mask=zeros(M, N)), TypeError, "mask has dtype float32; needed a boolean array, True = may attend: pass modifiers=Bias(m)"),
    "0/1 mask": (lambda: call(mask=zeros(M, N, dtype=int)), TypeError, "mask has dtype int64; needed a boolean array, True = may attend: pass m.astype(bool)"),
    "mask of another shape": (lambda: call(mask=zeros(M, 8, dtype=bool)), ValueError, "Dense: array has shape (6, 8); needed one that broadcasts to (B, H, M, N) = (2, 4, 6, 9)"),
    "mask of 5 axes": (lambda: call(mask=zeros(1, 1, 1, M, N, dtype=bool)), ValueError, "5 axes; needed at most 4"),
    "mask is a class": (lambda: call(mask=an.Causal), TypeError, "mask is the class Causal; needed a mask, Causal(...)"),
    "mask is True": (lambda: call(mask=True), TypeError, "mask is True; needed a mask rule"),
    "mask is a word": (lambda: call(mask="causal"), TypeError, "mask is 'causal'; needed a mask rule such as Causal()"),
    "mask is a function": (lambda: call(mask=lambda b, h, i, j, p: j <= i), TypeError, "mask is a function: wrap it, CustomMask("),
    "mask is a modifier": (lambda: call(mask=an.SoftCap(2.0)), TypeError, "mask is a modifier, SoftCap: pass it as modifiers="),
    "and of masks": (lambda: call(mask=an.Causal() and an.Padding(3)), TypeError, "use & | ~"),
    "not of a mask": (lambda: call(mask=not an.Causal()), TypeError, "use & | ~"),
    "float array & mask": (lambda: zeros(M, N) & an.Causal(), TypeError, "dtype float32; needed a boolean array"),
    "mask | 0/1 array": (lambda: an.Causal() | zeros(M, N, dtype=np.int8), TypeError, "pass m.astype(bool)"),
    "mask & None": (lambda: an.Causal() & None, TypeError, "the other side of & is None"),
    "padding for others": (lambda: call(mask=an.Padding([1, 2, 3])), ValueError, "Padding: key_lengths has shape (3,); needed one that broadcasts to (B,) = (2,)"),
    "documents for others": (lambda: call(mask=an.SameDocument(np.arange(5), np.arange(N))), ValueError, "SameDocument: query_ids has shape (5,)"),
    "documents of one length": (lambda: call(mask=an.SameDocument(np.arange(M))), ValueError, "SameDocument: query_ids, for keys too, has shape (6,)"),
    "blocks for others": (lambda: call(mask=an.BlockSparse(zeros(2, 2, dtype=bool), (3, 3))), ValueError, "BlockSparse: blocks has shape (1, 1, 2, 2); needed one that broadcasts to (2, 4, 2, 3)"),
    "a position outside the grid": (lambda: call(mask=an.Neighborhood((2, 3), 1), query_offset=0), ValueError, "Neighborhood: key positions go from 0 to 8; grid (2, 3) has 0 to 5"),
    "an index that leaves its array": (
        lambda: call(mask=an.CustomMask(lambda b, h, i, j, p: p[0][j] > i, (np.arange(8),)), query_offset=0),
        ValueError, "CustomMask reads index j of an array (8,): it goes from 0 to 8, axis 0 has 8"
    ),
    "a negative index": (
        lambda: call(mask=an.CustomMask(lambda b, h, i, j, p: p[0][i - j] > 0, (np.arange(50),)), query_offset=0),
        ValueError, "it goes from -8 to 5"
    ),
    "a divisor that can be 0": (lambda: call(mask=an.CustomMask(lambda b, h, i, j, p: j % i == 0), query_offset=0), ValueError, "can be zero"),
    "branching in a rule": (lambda: an.CustomMask(lambda b, h, i, j, p: j if i else b), TypeError, "a rule may not branch: use & | ~"),
    "a rule of numbers": (lambda: an.CustomMask(lambda b, h, i, j, p: i - j), TypeError, "CustomMask: allowed returns int; needed bool"),
    # modifiers
    "modifiers are a mask": (lambda: call(modifiers=an.Causal()), TypeError, "modifiers is Causal; needed a modifier: pass a mask as mask="),
    "modifiers are an array": (lambda: call(modifiers=zeros(M, N)), TypeError, "modifiers is ndarray; needed a modifier: wrap an array to add to the scores, Bias(array)"),
    "a modifier is a class": (lambda: call(modifiers=[an.SoftCap(2.0), an.ALiBi]), TypeError, "modifiers[1] is the class ALiBi; needed ALiBi(...)"),
    "a modifier is a function": (lambda: call(modifiers=[lambda s: s]), TypeError, "modifiers[0] is function; needed a modifier: wrap a function, CustomModifier(function)"),
    "a modifier is dropout": (lambda: call(modifiers=[an.Dropout(0.1, 1)]), TypeError, "pass it as dropout="),
    "a modifier is a number": (lambda: call(modifiers=[3]), TypeError, "modifiers[0] is int; needed a modifier"),
    "bias of another shape": (lambda: call(modifiers=an.Bias(zeros(M, 8))), ValueError, "Bias: array has shape (6, 8); needed one that broadcasts to (B, H, M, N) = (2, 4, 6, 9)"),
    "slopes for other heads": (lambda: call(modifiers=an.ALiBi([1.0, 2.0]), query_offset=0), ValueError, "ALiBi: slopes has shape (2,); needed one that broadcasts to (H,) = (4,)"),
    "temperatures for others": (lambda: call(modifiers=an.Temperature(zeros(5))), ValueError, "Temperature: t has shape (5,); needed one that broadcasts to (B, H, M) = (2, 4, 6)"),
    "replaced by another shape": (lambda: call(modifiers=an.ReplaceExcluded(zeros(M, 8, dtype=bool), 0.0)), ValueError, "shape (6, 8); needed one that broadcasts"),
    "cap 0": (lambda: an.SoftCap(0), ValueError, "SoftCap: cap is 0.0; needed a finite number above 0"),
    # score, normalizer
    "score is a word": (lambda: call(score="dot"), TypeError, "score is str; needed Dot()"),
    "score is a class": (lambda: call(score=an.Dot), TypeError, "score is the class Dot; needed Dot()"),
    "score is a normalizer": (lambda: call(score=an.Softmax()), TypeError, "score is Softmax; needed Dot()"),
    "normalizer is a word": (lambda: call(normalizer="softmax"), TypeError, "normalizer is str; needed Softmax()"),
    "normalizer is a class": (lambda: call(normalizer=an.Softmax), TypeError, "normalizer is the class Softmax; needed Softmax()"),
    "sinks for other heads": (lambda: call(normalizer=an.Softmax([1.0, 2.0, 3.0])), ValueError, "Softmax: sink has shape (3,); needed one that broadcasts to (B, H) = (2, 4)"),
    "sink is NaN": (lambda: an.Softmax(np.nan), ValueError, "Softmax: sink holds NaN; needed numbers"),
    # scale
    "scale is NaN": (lambda: call(scale=float("nan")), ValueError, "scale is NaN; needed a number"),
    "scale is a word": (lambda: call(scale="1"), TypeError, "scale is '1'; needed a number or None"),
    "scale is True": (lambda: call(scale=True), TypeError, "scale is True; needed a number or None"),
    "scale is an array": (lambda: call(scale=zeros(3)), TypeError, "scale is ndarray; needed a number or None"),
    "scale is complex": (lambda: call(scale=1j), TypeError, "scale is complex; needed a number or None"),
    # offsets
    "no query offset": (
        lambda: call(mask=an.Causal()), ValueError,
        "query_offset is None, but Causal uses positions and q has 6 rows, k has 9: pass query_offset=0 (first rows aligned) or query_offset=3 (N - M"
    ),
    "no query offset, joined": (lambda: call(mask=an.Padding(3) | ~an.SlidingWindow(2, 0)), ValueError, "query_offset=0"),
    "no query offset, modifier": (lambda: call(modifiers=an.ALiBi(0.5)), ValueError, "query_offset is None, but ALiBi uses positions"),
    "no query offset, inside": (lambda: call(modifiers=an.ReplaceExcluded(an.Causal(), 0.0)), ValueError, "query_offset=3"),
    "no query offset, dropout": (lambda: call(dropout=an.Dropout(0.1, 1)), ValueError, "query_offset is None, but Dropout uses positions"),
    "offset is a float": (lambda: call(query_offset=1.0), TypeError, "query_offset is float of dtype float64; needed an integer or integers (B,)"),
    "offset is True": (lambda: call(query_offset=True), TypeError, "query_offset is bool"),
    "key offset is None": (lambda: call(key_offset=None), TypeError, "key_offset is NoneType"),
    "offsets for others": (lambda: call(query_offset=[1, 2, 3]), ValueError, "query_offset has shape (3,); needed one integer or shape (B,) = (2,)"),
    "offset out of range": (lambda: call(query_offset=2**30 - 6), ValueError, "query_offset gives positions from 1073741818 to 1073741823; needed less than 2**30"),
    "offset out of range below": (lambda: call(key_offset=[0, -(2**30)]), ValueError, "key_offset gives positions from -1073741824"),
    # dropout
    "dropout is a number": (lambda: call(dropout=0.1), TypeError, "dropout is float; needed Dropout(rate, seed)"),
    "seeds for others": (lambda: call(dropout=an.Dropout(0.1, [1, 2, 3]), query_offset=0), ValueError, "Dropout: seed has shape (3,); needed one integer, or (B,) = (2,)"),
    "rate 1": (lambda: an.Dropout(1.0, 0), ValueError, "Dropout: rate is 1.0; needed 0 <= rate < 1"),
    # backend, stream
    "unknown backend": (lambda: call(backend="gpu"), ValueError, "backend is 'gpu'; needed one of 'auto', 'reference', 'cpu', 'cuda'"),
    "backend is None": (lambda: call(backend=None), ValueError, "backend is None; needed one of"),
    "backend is a list": (lambda: call(backend=["cpu"]), ValueError, "backend is ['cpu']; needed one of"),
    "cuda for host arrays": (lambda: call(backend="cuda"), NotImplementedError, "run on 'cpu' and 'reference'"),
    "arrays on a device": (lambda: call(q=Elsewhere(), k=Elsewhere(), v=Elsewhere()), NotImplementedError, "backend 'cuda' cannot run"),
    "arrays in different places": (lambda: call(k=Elsewhere()), TypeError, "q on a host, k on a GPU, v on a host; needed one place for all three"),
    "stream for host arrays": (lambda: call(stream=3), ValueError, "stream is int; needed None for arrays in host memory"),
    # out
    "out is a list": (lambda: call(out=[0.0]), TypeError, "out is list; needed a NumPy array"),
    "out of another dtype": (lambda: call(out=out(2, 4, 6, 5, dtype=np.float64)), TypeError, "out has dtype float64; q has float32"),
    "out of another shape": (lambda: call(out=out(2, 4, 6, 8)), ValueError, "out has shape (2, 4, 6, 8); needed (2, 4, 6, 5)"),
    "out of another rank": (lambda: call(q=(6, 8), k=(9, 8), v=(9, 5), out=out(1, 1, 6, 5)), ValueError, "out has shape (1, 1, 6, 5); needed (6, 5)"),
    "out is read-only": (lambda: call(out=read_only()), ValueError, "out is read-only"),
    "out is q": (lambda: inside("q"), ValueError, "out overlaps q; needed memory of its own"),
    "out is k": (lambda: inside("k"), ValueError, "out overlaps k; needed memory of its own"),
    "out is v": (lambda: inside("v"), ValueError, "out overlaps v; needed memory of its own"),
    "out overlaps a part": (half_inside, ValueError, "out overlaps q"),
    "out overlaps itself": (
        lambda: call(out=np.lib.stride_tricks.as_strided(out(500), (2, 4, 6, 5), (120, 4, 20, 4))), ValueError, "out has elements that share memory"
    ),
    "out is broadcast": (lambda: call(out=np.lib.stride_tricks.as_strided(out(5), (2, 4, 6, 5), (0, 0, 0, 4))), ValueError, "out has elements that share memory"),
    # arguments as such
    "unknown argument": (lambda: call(causal=True), TypeError, "unexpected keyword argument 'causal'"),
    "mask by place": (lambda: an.attention(zeros(6, 8), zeros(9, 8), zeros(9, 5), an.Causal()), TypeError, "positional arguments"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_computed(name, monkeypatch):
    def never(*_):
        raise AssertionError("it was computed")

    monkeypatch.setattr(api, "_on_cpu", never)
    monkeypatch.setattr(api, "_on_reference", never)
    function, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        function()
    assert caught.type is kind


def test_the_reference_refuses_the_same(monkeypatch):
    """Called by itself, the reference raises the same kinds for what it too takes."""
    skipped = ("out", "backend", "unknown backend", "stream", "cuda", "arrays", "q is", "k is", "v makes")
    for name, (function, kind, _) in REFUSED.items():
        if name.startswith(skipped):
            continue
        with monkeypatch.context() as patch:
            patch.setattr(an, "attention", an.reference.attention)
            with pytest.raises(kind):
                function()


ALL_REFUSED = """
import sys
from test_errors import REFUSED
for name, (function, kind, message) in REFUSED.items():
    try:
        function()
    except kind as error:
        assert message in str(error), (name, str(error))
    else:
        raise AssertionError(name)
print(len(REFUSED), "numba" in sys.modules)
"""


def test_errors_load_no_compiler():
    assert run_python(ALL_REFUSED) == f"{len(REFUSED)} False\n"


def test_a_failed_call_writes_nothing():
    target = out(2, 4, 6, 5)
    with pytest.raises(ValueError, match="query_offset is None"):
        call(mask=an.Causal(), out=target)
    assert np.isnan(target).all()


# --- the other functions ---

OTHERS = {
    "mask_array of 3 sizes": (lambda: an.mask_array(an.Causal(), (1, 2, 3)), TypeError, "shape is (1, 2, 3); needed four integers (B, H, M, N)"),
    "mask_array of a float": (lambda: an.mask_array(an.Causal(), (1, 1, 2.0, 2)), TypeError, "needed four integers"),
    "mask_array below 0": (lambda: an.mask_array(an.Causal(), (1, 1, -2, 2)), ValueError, "needed sizes of at least 0"),
    "mask_array without offset": (lambda: an.mask_array(an.Causal(), (1, 1, 2, 3)), ValueError, "query_offset=1"),
    "mask_array of a float mask": (lambda: an.mask_array(zeros(2, 2), (1, 1, 2, 2)), TypeError, "needed a boolean array"),
    "merge of nothing": (lambda: an.merge([], []), ValueError, "part"),
    "merge of unequal parts": (lambda: an.merge([zeros(2, 3)], [zeros(2), zeros(2)]), ValueError, "lses"),
    "merge of other shapes": (lambda: an.merge([zeros(2, 3), zeros(2, 4)], [zeros(2), zeros(2)]), ValueError, "outs[1] has shape (2, 4)"),
    "merge of another lse": (lambda: an.merge([zeros(2, 3)], [zeros(3)]), ValueError, "lses[0] has shape (3,)"),
    "threads 0": (lambda: an.threads(0).__enter__(), ValueError, "n is 0; needed at least 1"),
    "threads of a float": (lambda: an.threads(2.0).__enter__(), TypeError, "n is float; needed a whole number of threads"),
    "threads True": (lambda: an.threads(True).__enter__(), TypeError, "n is bool"),
    "set_threads 0": (lambda: an.set_threads(0), ValueError, "n is 0; needed at least 1"),
    "warmup of another dtype": (lambda: an.warmup("int8"), ValueError, "dtypes has 'int8'; needed float64, float32, float16 or bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_refuse(name):
    function, kind, message = OTHERS[name]
    with pytest.raises(kind, match=re.escape(message)):
        function()


# --- what looks odd and is fine ---


def test_accepted():
    q, k, v = zeros(2, 4, 6, 8), zeros(2, 2, 9, 8), zeros(2, 2, 9, 5)
    expected = an.attention(q, k, v)
    memory = np.empty((2, 4, 6, 13), np.float32)
    for kwargs in (
        {"modifiers": None},
        {"modifiers": []},
        {"mask": True & an.Padding(9) if False else an.Padding(np.int64(9))},
        {"scale": np.float32(0.5)},
        {"scale": 1},
        {"query_offset": np.int32(3), "key_offset": np.array([1, 2])},
        {"query_offset": 2**30 - 7},
        {"out": memory[..., 8:]},
        {"backend": "reference"},
    ):
        np.testing.assert_array_equal(an.attention(q, k, v, **kwargs), expected)


def test_numpy_by_other_names():
    """`__array__`, DLPack and memory in the other byte order are arrays too."""

    class Wrapped:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return self.array

    class Packed:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (9, 8), (9, 5))]
    expected = an.attention(*inputs)
    other = ">f4" if sys.byteorder == "little" else "<f4"
    for convert in (Wrapped, Packed, lambda x: x.astype(other), np.ma.asarray):
        found = an.attention(*map(convert, inputs))
        assert type(found) is np.ndarray
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_torch_tensors_in_host_memory():
    torch = pytest.importorskip("torch")
    inputs = [torch.arange(float(m * n)).reshape(m, n).sin() for m, n in ((6, 8), (9, 8), (9, 5))]
    found = an.attention(*inputs)
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, an.attention(*(x.numpy() for x in inputs)))
    with pytest.raises(TypeError, match="v is Tensor, which does not make a NumPy array"):
        an.attention(*inputs[:2], inputs[2].requires_grad_())


def test_cuda_is_refused_by_name():
    available, reason = an.backends()["cuda"]
    if available:
        pytest.skip("there is a device")
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        call(backend="cuda")
