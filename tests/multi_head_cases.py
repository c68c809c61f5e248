"""Layers and states that the tests of MultiHeadAttention share, and its formulas written out in torch."""

import numpy as np
import pytest

import attn_numba as an

PARTS = ("query", "key", "value", "output")


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def states(B=2, L=6, size=12, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal((B, L, size)).astype(dtype_of(dtype))


def made(*sizes, bias=True, dtype="float64", **options):
    """A layer whose biases are not 0."""
    layer = an.MultiHeadAttention(*(sizes or (12, 4)), bias=bias, dtype=dtype, seed=3, **options)
    rng = np.random.default_rng(9)
    for name, array in layer.parameters.items():
        if name.endswith("bias"):
            array[...] = rng.standard_normal(array.shape)
    return layer


class Written:
    """The formulas one after the other, in torch: what autograd differentiates."""

    def __init__(self, layer, hidden, context):
        self.torch = pytest.importorskip("torch")
        self.layer = layer
        self.hidden, self.context = self.leaf(hidden), None if context is None else self.leaf(context)
        self.parameters = {name: self.leaf(array) for name, array in layer.parameters.items()}

    def leaf(self, array):
        return self.torch.tensor(np.asarray(array, np.float64), requires_grad=True)

    def projected(self, x, part, heads):
        rows = x @ self.parameters[f"{part}.weight"].T
        if self.layer.bias:
            rows = rows + self.parameters[f"{part}.bias"]
        return rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)

    def turned(self, x, positions):
        """Pairs as complex numbers; positions (B, rows)."""
        torch, half = self.torch, x.shape[-1] // 2
        angles = torch.tensor(positions[:, None, :, None] * self.layer.base ** (-np.arange(half) / half))
        turn = torch.polar(torch.ones_like(angles), angles)
        if self.layer.rotary == "halves":
            pairs = torch.complex(x[..., :half], x[..., half:]) * turn
            return torch.cat([pairs.real, pairs.imag], -1)
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], half, 2)) * turn).reshape(x.shape)

    def scores(self, query_at=0, key_at=0):
        layer, source = self.layer, self.hidden if self.context is None else self.context
        q, k = self.projected(self.hidden, "query", layer.heads), self.projected(source, "key", layer.key_heads)
        if layer.rotary:
            B, M, N = q.shape[0], q.shape[2], k.shape[2]
            q = self.turned(q, np.broadcast_to(np.asarray(query_at)[..., None] + np.arange(M), (B, M)).astype(float))
            k = self.turned(k, np.broadcast_to(np.asarray(key_at)[..., None] + np.arange(N), (B, N)).astype(float))
        k = k.repeat_interleave(layer.heads // layer.key_heads, 1)
        return q @ k.transpose(-1, -2) / np.sqrt(layer.head_size)

    def result(self, scores, allowed=None):
        if allowed is not None:
            scores = scores.masked_fill(~self.torch.tensor(np.broadcast_to(allowed, scores.shape).copy()), -np.inf)
        weights = scores.softmax(-1).nan_to_num(0) if allowed is not None else scores.softmax(-1)
        source = self.hidden if self.context is None else self.context
        v = self.projected(source, "value", self.layer.key_heads)
        out = weights @ v.repeat_interleave(self.layer.heads // self.layer.key_heads, 1)
        out = out.transpose(1, 2).flatten(2) @ self.parameters["output.weight"].T
        return out + self.parameters["output.bias"] if self.layer.bias else out
