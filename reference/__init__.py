"""The reference: what is right, dense and in NumPy alone.

It needs NumPy and `attn_numba.rules`, nothing else, and knows nothing of tiles, threads or compiled code.

Examples
--------
>>> import numpy as np
>>> from attn_numba import reference
>>> x = np.eye(2)
>>> reference.attention(x, x, x, scale=0.0)
array([[0.5, 0.5],
       [0.5, 0.5]])
"""

from attn_numba.reference.backward import attention_vjp
from attn_numba.reference.explain import column_sums, entropy, top_keys, weights_of
from attn_numba.reference.forward import attention, merge

__all__ = ["attention", "attention_vjp", "column_sums", "entropy", "merge", "top_keys", "weights_of"]
