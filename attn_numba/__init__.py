"""Masked attention without PyTorch: a NumPy reference that defines it, Numba kernels that compute it, on the CPU and on GPUs.

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
import os
import sys

import numpy as _numpy  # noqa: F401  the one dependency that importing costs

__version__ = "0.1.0"

_HOMES = {
    "api": ("attention", "merge", "mask_array", "warmup", "backends", "config_report"),
    "parallel": ("threads", "set_threads"),
    "layers": ("SelfAttention",),
    "rules": (
        "Causal", "SlidingWindow", "Neighborhood", "Padding", "SameDocument", "PrefixLM", "BlockSparse", "Dense", "CustomMask",
        "SoftCap", "Bias", "ALiBi", "Temperature", "ReplaceExcluded", "CustomModifier", "Dropout", "Dot", "Softmax",
    ),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("reference", "rules", "testing")

__all__ = [*_HOME_OF, "reference"]


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"attn_numba.{_HOME_OF[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"attn_numba.{name}")
    else:
        raise AttributeError(f"module 'attn_numba' has no attribute {name!r}")
    globals()[name] = value  # found once, an attribute ever after
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _pool_runs() -> bool:
    """Whether Numba's thread pool has been started, by anyone; asks without importing Numba."""
    return getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False)


# True where Numba's pool may have been started in a parent process: entering it would end this one. It must be known before any
# fork, hence here. A pool that runs before this import may be inherited or not; it then counts as inherited.
_pool_is_inherited = _pool_runs()


def _after_fork() -> None:
    global _pool_is_inherited
    _pool_is_inherited = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
