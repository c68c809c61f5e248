"""Attention over sequences that lie on several machines, by MPI; needs ``mpi4py`` (extra ``mpi``) and an MPI library.

A `Shard` deals the tokens of a sequence to the ranks of a communicator. Each rank holds q, k and v of its own tokens
and gets the output of these; blocks of keys and values travel round a ring of ranks meanwhile. Start a program by
``mpiexec -n 4 python -m mpi4py program.py``: then an exception on one rank ends all of them.

MPI starts when the first `Shard` is made or `warm_up` is called, not when this module is imported.

Examples
--------
On one rank, which any program is that was started without mpiexec:

>>> import numpy as np
>>> import attn_numba as an
>>> q, k, v = (np.random.default_rng(n).standard_normal((1, 8, 100, 64)) for n in range(3))
>>> causal = an.Causal()
>>> shard = an.mpi.Shard(100, mask=causal)
>>> out = an.mpi.attention(shard.take(q), shard.take(k), shard.take(v), shard=shard, mask=causal)
>>> bool(np.allclose(shard.gather(out), an.attention(q, k, v, mask=causal)))
True
"""

try:
    import mpi4py  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"attn_numba.mpi needs {error.name}, which is not installed: pip install 'attn-numba[mpi]', and an MPI library "
        "if there is none: pip install mpich",
        name="mpi4py",
    ) from error

from attn_numba.integrations.mpi.calls import attention, attention_vjp
from attn_numba.integrations.mpi.shard import Shard
from attn_numba.integrations.mpi.warming import warm_up

__all__ = ["Shard", "attention", "attention_vjp", "warm_up"]
