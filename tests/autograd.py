"""Gradients by PyTorch's automatic differentiation in float64: attention written once more, in its operations alone.

Of our rules it takes what has no gradient: which keys are allowed, which weights dropout keeps, and arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attn_numba.rules import (
    AdaptiveSpan,
    Additive,
    ALiBi,
    Bias,
    Bilinear,
    Cosine,
    DoubleSoftmax,
    Entmax15,
    ReplaceExcluded,
    Sizes,
    SoftCap,
    Softmax,
    Sparsemax,
    Temperature,
    as_modifiers,
    places_of,
)
from cases import allowed as allowed_of

LEARNED = {Bias: ["array"], ALiBi: ["slopes"], Temperature: ["t"], AdaptiveSpan: ["span"], Softmax: ["sink"]}
LEARNED |= {Bilinear: ["W"], Additive: ["Wq", "Wk", "w"]}


def learned_of(kwargs: dict[str, Any]) -> dict[tuple[int, str], np.ndarray]:
    """Return the arrays of a call's rules that have gradients, by the rule's id and the argument's name."""
    rules = [*as_modifiers(kwargs.get("modifiers")), kwargs.get("normalizer"), kwargs.get("score")]
    return {
        (id(rule), name): np.asarray(getattr(rule, name))
        for rule in rules
        for name in LEARNED.get(type(rule), ())
        if getattr(rule, name) is not None
    }


def gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, kwargs: dict[str, Any], custom: Any = None
) -> tuple[dict[str, np.ndarray], dict[tuple[int, str], np.ndarray]]:
    """Return gradients by q, k and v, and by the arrays of rules as `learned_of` names them.

    What is not finite must be out of every query's sight. `custom` is what a `CustomModifier` does to tensors, ``(s, i,
    j, modifier)``.
    """
    inputs = {
        name: _leaf(np.nan_to_num(x, nan=0, posinf=0, neginf=0)) for name, x in zip("qkv", (q, k, v), strict=True)
    }
    learned = {key: _leaf(array) for key, array in learned_of(kwargs).items()}
    out = _forward(*inputs.values(), learned, kwargs, custom)
    leaves = [*inputs.values(), *learned.values()]
    seen = torch.autograd.grad(out, leaves, torch.from_numpy(np.array(dout)).reshape(out.shape), allow_unused=True)
    arrays = [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(leaves, seen, strict=True)]
    return dict(zip(inputs, arrays, strict=False)), dict(zip(learned, arrays[3:], strict=True))


def _leaf(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float64)).requires_grad_()


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, learned: Any, kwargs: dict[str, Any], custom: Any
) -> torch.Tensor:
    q, k, v = (x[(None,) * (4 - x.ndim)] for x in (q, k, v))
    B, H, M, D = q.shape
    z = Sizes(B, H, k.shape[1], M, k.shape[2], D, v.shape[3])
    key_offset, query_offset = kwargs.get("key_offset", 0), kwargs.get("query_offset")
    places = places_of(z, key_offset if query_offset is None else query_offset, key_offset)
    i, j = torch.from_numpy(places.i).double(), torch.from_numpy(places.j).double()
    allowed = torch.from_numpy(allowed_of(z, kwargs))
    k, v = (x.repeat_interleave(H // z.Hk, 1) for x in (k, v))

    score = kwargs.get("score")
    mine = {name: array for (rule, name), array in learned.items() if rule == id(score)}
    s, default = _scores(q, k, score, mine, z)
    s = s * (default if kwargs.get("scale") is None else kwargs["scale"])
    for modifier in as_modifiers(kwargs.get("modifiers")):
        mine = {name: array for (rule, name), array in learned.items() if rule == id(modifier)}
        if isinstance(modifier, SoftCap):
            s = modifier.cap * torch.tanh(s / modifier.cap)
        elif isinstance(modifier, Bias):
            s = s + torch.where(mine["array"] == -torch.inf, 0, mine["array"])  # excluded, as `allowed` says
        elif isinstance(modifier, ALiBi):
            s = s - mine["slopes"].expand(H)[:, None, None] * (i - j).abs()
        elif isinstance(modifier, Temperature):
            s = s / mine["t"].expand(B, H, M)[..., None]
        elif isinstance(modifier, ReplaceExcluded):
            keeps = torch.from_numpy(np.broadcast_to(modifier.mask.evaluate(places, z), s.shape).copy())
            s = torch.where(keeps, s, modifier.value)
        elif isinstance(modifier, AdaptiveSpan):
            ratio = (modifier.ramp + mine["span"].expand(B, H, M)[..., None] - (i - j).abs()) / modifier.ramp
            on_ramp = (ratio > 0) & (ratio < 1)
            s = s + torch.where(on_ramp, torch.log(torch.where(on_ramp, ratio, 1)), 0)  # 0 is excluded
        else:
            s = custom(s, i, j, modifier)
    normalizer = kwargs.get("normalizer")
    sink = next((array for (rule, _), array in learned.items() if rule == id(normalizer)), None)
    w = _weights(s, allowed, normalizer, sink)
    dropout = kwargs.get("dropout")
    if dropout is not None:
        w = torch.where(torch.from_numpy(dropout.kept(places, z)), w / (1 - dropout.rate), 0)
    return w @ v


def _scores(q: torch.Tensor, k: torch.Tensor, score: Any, mine: Any, z: Sizes) -> tuple[torch.Tensor, float]:
    if isinstance(score, Cosine):
        return torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT, 1.0
    if isinstance(score, Bilinear):
        return q @ mine["W"] @ k.mT, 1.0
    if isinstance(score, Additive):
        keys = mine["Wk"].repeat_interleave(z.H // z.Hk, 0) if mine["Wk"].ndim == 3 else mine["Wk"]
        hidden = torch.tanh((q @ mine["Wq"].mT)[:, :, :, None] + (k @ keys.mT)[:, :, None])
        return (hidden * mine["w"][..., None, None, :]).sum(-1), 1.0
    return q @ k.mT, z.D**-0.5


def _weights(s: torch.Tensor, allowed: torch.Tensor, normalizer: Any, sink: Any) -> torch.Tensor:
    some = allowed.any(-1, keepdim=True)  # a row without keys has weights 0, which no autograd of a softmax gives
    s = torch.where(allowed | ~some, s, -torch.inf)
    if s.shape[-1] == 0:
        return s
    if isinstance(normalizer, Sparsemax):
        w = _above_threshold(s, lambda z, k: (z.sum(-1, keepdim=True) - 1) / k, lambda z: z)
    elif isinstance(normalizer, Entmax15):
        w = _above_threshold(s / 2, _entmax_threshold, lambda z: z * z)
    elif isinstance(normalizer, DoubleSoftmax):
        w = torch.softmax(torch.where(allowed | ~some, torch.softmax(s, -1), -torch.inf), -1)
    elif sink is not None:
        column = sink.expand(s.shape[:2])[..., None, None].expand(*s.shape[:3], 1)
        w = torch.softmax(torch.cat([s, column], -1), -1)[..., :-1]
    else:
        w = torch.softmax(s, -1)
    return torch.where(allowed, w, 0)


def _entmax_threshold(z: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    mean = z.sum(-1, keepdim=True) / k
    distances = (torch.where(z != 0, z - mean, 0) ** 2).sum(-1, keepdim=True)
    return mean - torch.sqrt((1 - distances) / k)


def _above_threshold(s: torch.Tensor, threshold: Any, power: Any) -> torch.Tensor:
    """Return weights above a threshold of the keys in the support, found by halving; autograd sees the keys in it."""
    with torch.no_grad():
        high = s.max(-1, keepdim=True).values
        low = high - 1
        for _ in range(100):
            middle = (low + high) / 2
            above = power(torch.clamp(s - middle, min=0)).sum(-1, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        support, shift = s > low, low
    count = support.sum(-1, keepdim=True)
    z = torch.where(support, s - shift, 0)  # above 0 in the support
    return torch.where(support, power(torch.where(support, z - threshold(z, count), 0)), 0)
