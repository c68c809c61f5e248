"""Masked attention without PyTorch: a NumPy reference defines it, Numba kernels compute it.

Importing this package imports NumPy and nothing else of weight; Numba loads at the first call that needs it.

Examples
--------
>>> import numpy as np
>>> import attn_numba as an
>>> q, k, v = (np.random.default_rng(n).standard_normal((1, 8, 128, 64), dtype=np.float32) for n in range(3))
>>> out = an.attention(q, k, v, mask=an.Causal())
>>> out.shape, out.dtype
((1, 8, 128, 64), dtype('float32'))
"""

import importlib
from typing import TYPE_CHECKING, Any

import numpy as _numpy  # noqa: F401  the one dependency that importing costs

if TYPE_CHECKING:
    from attn_numba import reference as reference, sequences as sequences
    from attn_numba.api import (
        attention as attention,
        attention_vjp as attention_vjp,
        mask_array as mask_array,
        merge as merge,
    )
    from attn_numba.caches import KVCache as KVCache, PagedKVCache as PagedKVCache
    from attn_numba.decoding import decode as decode
    from attn_numba.environment import (
        backends as backends,
        config_report as config_report,
        warmup as warmup,
    )
    from attn_numba.explain import (
        TopKeys as TopKeys,
        column_sums as column_sums,
        entropy as entropy,
        rollout as rollout,
        top_keys as top_keys,
        weights_of as weights_of,
    )
    from attn_numba.integrations import dask as dask, mpi as mpi
    from attn_numba.integrations.sklearn import (
        AttentionClassifier as AttentionClassifier,
        AttentionRegressor as AttentionRegressor,
        search as search,
    )
    from attn_numba.layer_results import MultiHeadGradients as MultiHeadGradients, MultiHeadSaved as MultiHeadSaved
    from attn_numba.layers import SelfAttention as SelfAttention
    from attn_numba.multi_head import MultiHeadAttention as MultiHeadAttention
    from attn_numba.packing import pack as pack, unpack as unpack
    from attn_numba.parallel import set_threads as set_threads, threads as threads
    from attn_numba.profiles import use_profile as use_profile
    from attn_numba.ragged import (
        ragged_attention as ragged_attention,
        ragged_attention_vjp as ragged_attention_vjp,
    )
    from attn_numba.recurrent import recurrent_attention as recurrent_attention
    from attn_numba.rotations import rotary as rotary, rotary_vjp as rotary_vjp
    from attn_numba.rules import (
        AdaptiveSpan as AdaptiveSpan,
        Additive as Additive,
        ALiBi as ALiBi,
        Bias as Bias,
        Bilinear as Bilinear,
        BlockSparse as BlockSparse,
        Causal as Causal,
        Cosine as Cosine,
        CustomMask as CustomMask,
        CustomModifier as CustomModifier,
        Dense as Dense,
        Dot as Dot,
        DoubleSoftmax as DoubleSoftmax,
        Dropout as Dropout,
        Entmax15 as Entmax15,
        Neighborhood as Neighborhood,
        Padding as Padding,
        PrefixLM as PrefixLM,
        ReplaceExcluded as ReplaceExcluded,
        SameDocument as SameDocument,
        SlidingWindow as SlidingWindow,
        SoftCap as SoftCap,
        Softmax as Softmax,
        Sparsemax as Sparsemax,
        Temperature as Temperature,
        adapt as adapt,
    )

__version__ = "0.1.0"

_HOMES = {
    "api": ("attention", "attention_vjp", "merge", "mask_array"),
    "caches": ("KVCache", "PagedKVCache"),
    "decoding": ("decode",),
    "environment": ("warmup", "backends", "config_report"),
    "packing": ("pack", "unpack"),
    "parallel": ("threads", "set_threads"),
    "profiles": ("use_profile",),
    "layers": ("SelfAttention",),
    "multi_head": ("MultiHeadAttention",),
    "layer_results": ("MultiHeadGradients", "MultiHeadSaved"),
    "rotations": ("rotary", "rotary_vjp"),
    "explain": ("weights_of", "entropy", "top_keys", "TopKeys", "column_sums", "rollout"),
    "ragged": ("ragged_attention", "ragged_attention_vjp"),
    "recurrent": ("recurrent_attention",),
    "rules": (
        "Causal", "SlidingWindow", "Neighborhood", "Padding", "SameDocument", "PrefixLM", "BlockSparse", "Dense",
        "CustomMask", "SoftCap", "Bias", "ALiBi", "Temperature", "ReplaceExcluded", "CustomModifier", "AdaptiveSpan",
        "adapt", "Dropout", "Dot", "Cosine", "Bilinear", "Additive", "Softmax", "Sparsemax", "Entmax15",
        "DoubleSoftmax",
    ),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_OPTIONAL = {  # of libraries that may not be installed, so no part of `__all__`
    "AttentionClassifier": "integrations.sklearn",
    "AttentionRegressor": "integrations.sklearn",
    "search": "integrations.sklearn",
}
_MODULES = ("learning", "reference", "rules", "sequences", "testing")
_EXTRAS = ("dask", "mpi")  # among the integrations

__all__ = [*_HOME_OF, "reference", "sequences"]


def __getattr__(name: str) -> Any:
    if home := _HOME_OF.get(name) or _OPTIONAL.get(name):
        value = getattr(importlib.import_module(f"attn_numba.{home}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"attn_numba.{name}")
    elif name in _EXTRAS:
        value = importlib.import_module(f"attn_numba.integrations.{name}")
    else:
        raise AttributeError(f"module 'attn_numba' has no attribute {name!r}")
    globals()[name] = value  # found once, an attribute ever after
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
