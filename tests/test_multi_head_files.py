"""MultiHeadAttention: its initial weights, its files, and what it refuses."""

import os
import re
from typing import ClassVar

import numpy as np
import pytest

import attn_numba as an
from attn_numba import files
from multi_head_cases import made, states

DTYPES = ("float64", "float32", "float16", "bfloat16")


def test_initial_weights():
    layer = an.MultiHeadAttention(96, 6, key_heads=2, value_size=24, context_size=64, bias=True, dtype="float64")
    shapes = {"query": (96, 96), "key": (32, 64), "value": (48, 64), "output": (96, 144)}
    for part, shape in shapes.items():
        weight = layer.parameters[f"{part}.weight"]
        assert weight.shape == shape
        limit = np.sqrt(6 / sum(shape))
        assert 0.99 * limit < np.abs(weight).max() <= limit
        np.testing.assert_allclose(weight.var(), 2 / sum(shape), rtol=0.06)
        assert abs(weight.mean()) < 5 * limit / np.sqrt(3 * weight.size)
        assert not layer.parameters[f"{part}.bias"].any()
        assert layer.parameters[f"{part}.bias"].shape == shape[:1]


def test_seeds():
    first = an.MultiHeadAttention(8, 2, dtype="float64", seed=1).parameters
    for name, array in an.MultiHeadAttention(8, 2, dtype="float32", seed=np.int64(1)).parameters.items():
        np.testing.assert_array_equal(array, first[name].astype(np.float32))
    generator = np.random.default_rng(1)
    for name, array in an.MultiHeadAttention(8, 2, dtype="float64", seed=generator).parameters.items():
        np.testing.assert_array_equal(array, first[name])
    second = an.MultiHeadAttention(8, 2, dtype="float64", seed=generator).parameters
    assert not any(np.array_equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_and_loaded(tmp_path, dtype):
    pytest.importorskip("safetensors")
    layer, other = made(dtype=dtype), an.MultiHeadAttention(12, 4, bias=True, dtype=dtype, seed=50)
    layer.save(tmp_path / "layer.safetensors")
    other.load(tmp_path / "layer.safetensors")
    assert list(other.parameters) == list(layer.parameters)
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], array)
        assert other.parameters[name].dtype == array.dtype
        other.parameters[name] -= other.parameters[name]  # they can be trained on
    assert os.listdir(tmp_path) == ["layer.safetensors"]
    hidden = states(dtype=dtype)
    assert not other(hidden).any()
    other.load(tmp_path / "layer.safetensors")
    np.testing.assert_array_equal(other(hidden), layer(hidden))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path, first, second = tmp_path / "layer.safetensors", made(), an.MultiHeadAttention(12, 4, bias=True, dtype=float)
    first.save(path)
    written = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"layer.safetensors exists; it is replaced only with overwrite=True"):
        second.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            second.save(path, overwrite=True)
    assert path.read_bytes() == written
    assert os.listdir(tmp_path) == ["layer.safetensors"]
    second.save(path, overwrite=True)
    assert path.read_bytes() != written


WRONG_FILES = [
    (lambda p: p.pop("key.bias"), ValueError, "parameters lack key.bias; needed query.weight, key.weight"),
    (lambda p: p.update(gate=np.ones(3)), ValueError, "parameters hold gate, which the layer has not"),
    (
        lambda p: p.update({"key.weight": np.ones((12, 11))}),
        ValueError,
        "key.weight has shape (12, 11); needed (12, 12)",
    ),
    (
        lambda p: p.update({"key.bias": np.ones(12, "f4")}),
        TypeError,
        "key.bias has dtype float32; the layer has float64",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG_FILES, ids=[message for _, _, message in WRONG_FILES])
def test_wrong_files_are_refused(tmp_path, change, kind, message):
    pytest.importorskip("safetensors")
    layer = made()
    arrays, before = dict(layer.parameters), dict(layer.parameters)
    change(arrays)
    files.write_arrays(tmp_path / "layer.safetensors", arrays)
    with pytest.raises(kind, match=r"layer.safetensors: " + re.escape(message)):
        layer.load(tmp_path / "layer.safetensors")
    assert all(layer.parameters[name] is array for name, array in before.items())


def test_damaged_files_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    layer, path = made(), tmp_path / "layer.safetensors"
    layer.save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="layer.safetensors: not a readable safetensors file"):
        layer.load(path)
    with pytest.raises(FileNotFoundError):
        layer.load(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"layer.npz: unknown kind of file '.npz'; needed .safetensors"):
        layer.load(tmp_path / "layer.npz")
    with pytest.raises(ValueError, match=r"layer.npz: unknown kind of file '.npz'; known are .safetensors"):
        layer.save(tmp_path / "layer.npz")


def make(*arguments, **options):
    return lambda: an.MultiHeadAttention(*arguments, **options)


def spoil(name, value):
    def call():
        layer = made()
        if value is None:
            del layer.parameters[name]
        else:
            layer.parameters[name] = value
        layer(states())

    return call


def of_another_call(**changes):
    layer, hidden = made(), states()
    _, saved = layer(hidden, return_saved=True)
    return layer.vjp(hidden, hidden, saved=saved._replace(**changes), backend="reference")


def rotating(*arguments, **options):
    return made(context_size=12, rotary="halves", head_size=2)(*arguments, **options)


REFUSED = [
    (make(0, 1), ValueError, "MultiHeadAttention: hidden_size is 0; needed at least 1"),
    (make(8, 2.0), TypeError, "MultiHeadAttention: heads is float; needed an integer"),
    (make(8, 3), ValueError, "hidden_size is 8, not a multiple of heads, 3: pass head_size"),
    (make(8, 4, key_heads=3), ValueError, "key_heads is 3; heads is 4, not a multiple of it"),
    (make(8, 4, key_heads=0), ValueError, "key_heads is 0; needed at least 1"),
    (make(8, 2, value_size=-1), ValueError, "value_size is -1; needed at least 1"),
    (make(8, 2, context_size=True), TypeError, "context_size is True; needed an integer"),
    (make(8, 2, bias=1), TypeError, "bias is int; needed True or False"),
    (make(8, 2, rotary=True), ValueError, "rotary is True; needed 'halves' or 'neighbors'"),
    (make(9, 3, rotary="halves"), ValueError, "head_size is 3; rotary needs an even one"),
    (make(8, 2, base=-1), ValueError, "MultiHeadAttention: base is -1.0; needed a finite number above 0"),
    (make(8, 2, dtype="int32"), TypeError, "dtype is 'int32'; needed float64, float32, float16 or bfloat16"),
    (make(8, 2, dtype="single precision"), TypeError, "dtype is 'single precision'; needed float64"),
    (make(8, 2, dtype=None), TypeError, "dtype is None; needed float64"),
    (make(8, 2, seed=-1), ValueError, "seed is -1; needed at least 0, or a numpy.random.Generator"),
    (make(8, 2, seed="one"), TypeError, "seed is str; needed an integer"),
    (lambda: made()(states()[0]), ValueError, "(6, 12); needed 3 axes, (B, rows, 12): pass hidden[None]"),
    (lambda: made()(states(size=13)), ValueError, "hidden has states of size 13; the layer was made for 12"),
    (lambda: made()(states(dtype="float32")), TypeError, "hidden has dtype float32; the layer has float64"),
    (lambda: made()([1.0]), TypeError, "hidden is list; needed an array"),
    (lambda: made()(states(), states(3)), ValueError, "context has 3 sequences; hidden has 2"),
    (lambda: made()(states(), states(size=8)), ValueError, "context has states of size 8; the layer was made for 12"),
    (lambda: made(context_size=8)(states()), ValueError, "context is None, and the layer makes keys of states of size"),
    (lambda: made()(states(), mask=an.Padding([1, 2, 3])), ValueError, "Padding: key_lengths has shape (3,)"),
    (lambda: made()(states(), mask=np.ones((6, 6))), TypeError, "mask"),
    (lambda: made()(states(), backend="metal"), ValueError, "backend is 'metal'"),
    (lambda: rotating(states(), states(L=9)), ValueError, "query_offset is None, but MultiHeadAttention uses"),
    (spoil("key.bias", None), ValueError, "parameters lack key.bias"),
    (spoil("gate", np.ones(3)), ValueError, "parameters hold gate, which the layer has not"),
    (spoil("key.bias", np.ones(11)), ValueError, "key.bias has shape (11,); needed (12,)"),
    (spoil("key.bias", np.ones(12, "f4")), TypeError, "key.bias has dtype float32; the layer has float64"),
    (spoil("key.bias", [0.0] * 12), TypeError, "key.bias is list; needed an array"),
    (lambda: made().vjp(states(), states(L=5)), ValueError, "dout has shape (2, 5, 12); needed that of the result"),
    (lambda: made().vjp(states(), states(dtype="float32")), TypeError, "dout has dtype float32; the layer has float64"),
    (lambda: of_another_call(k=np.ones((2, 4, 9, 3))), ValueError, "another call: its k has shape (2, 4, 9, 3)"),
    (lambda: of_another_call(lse=None), ValueError, "another call: its lse is None, and the normalizer is Softmax"),
    (lambda: of_another_call(v=np.ones((2, 4, 6, 3), "f4")), TypeError, "another call: its v has dtype float32"),
    (lambda: of_another_call(out=[1.0]), TypeError, "saved has out of type list; needed an array"),
    (lambda: made().vjp(states(), states(), saved=(1, 2), backend="reference"), TypeError, "saved is tuple; needed"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_errors_come_before_work(monkeypatch):
    """A rule that does not fit and a backend that cannot run are refused before any state is projected."""
    monkeypatch.setattr("attn_numba.multi_head.project", lambda *_: pytest.fail("a state was projected"))
    layer, hidden = made(), states()
    with pytest.raises(ValueError, match="Bias"):
        layer(hidden, modifiers=an.Bias(np.zeros((5, 5))))
    with pytest.raises(ValueError, match="backend"):
        layer.vjp(hidden, hidden, backend="metal")
    with pytest.raises(ValueError, match="dout"):
        layer.vjp(hidden, hidden[:1], backend="reference")


def test_what_is_saved_is_not_computed_again(monkeypatch):
    layer, hidden = made(), states()
    _, saved = layer(hidden, return_saved=True)
    seen, compute = [], an.attention_vjp

    def watched(*arrays, saved=None, **rules):
        seen.append(saved)
        return compute(*arrays, saved=saved, **rules)

    for name in ("project", "attention"):
        monkeypatch.setattr(f"attn_numba.multi_head.{name}", lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr("attn_numba.multi_head.attention_vjp", watched)
    layer.vjp(hidden, hidden, saved=saved, backend="reference")
    out, lse = seen[-1]
    assert out is saved.out
    assert lse is saved.lse
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        layer.vjp(hidden, hidden, backend="reference")


def test_arrays_on_a_gpu_are_refused_by_name():
    class OnAGPU:
        __cuda_array_interface__: ClassVar = {}

    layer = made()
    for call, name in (
        (lambda: layer(OnAGPU()), "hidden"),
        (lambda: layer(states(), OnAGPU()), "context"),
        (lambda: layer.vjp(states(), OnAGPU()), "dout"),
        (spoil("key.bias", OnAGPU()), "key.bias"),
        (lambda: an.SelfAttention(12).vjp(states(), OnAGPU()), "dout"),
    ):
        with pytest.raises(NotImplementedError, match=f"{name} is on a GPU; .* takes arrays in host memory"):
            call()


def test_it_says_what_it_is():
    said = "MultiHeadAttention(hidden_size=8, heads=2, key_heads=1, head_size=4, value_size=4, context_size=8, "
    assert (
        repr(an.MultiHeadAttention(8, 2, key_heads=1))
        == said + "bias=False, rotary=None, base=10000.0, dtype='float32')"
    )
