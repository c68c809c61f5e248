"""Compiling ahead on many ranks: once on each machine."""

from __future__ import annotations

import time
from typing import Any

from attn_numba.environment import warmup
from attn_numba.integrations.mpi.agreement import together
from attn_numba.integrations.mpi.launch import own_space, started

__all__ = ["warm_up"]

PAUSE = 0.02  # seconds between two looks: a rank that waits without sleeping takes a core from the one that compiles


def warm_up(
    dtypes: Any = ("float32",), every: bool = False, *, gradients: bool = False, comm: Any = None
) -> dict[str, float]:
    """Compile the kernels on one rank of each machine while its others sleep; these load them from the disk cache then.

    Called by all ranks together, before the first call. Where the cache has no folder that it can write to, every rank
    compiles for itself.

    Parameters
    ----------
    dtypes : str or sequence of str
        Of float64, float32, float16, bfloat16.
    every : bool
        Whether to compile all kernels, as `attn_numba.warmup` does.
    gradients : bool
        Whether to compile the kernels of gradients too.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; without it ``MPI.COMM_WORLD``.

    Returns
    -------
    dict of str to float
        Seconds that this rank took for each dtype.

    Raises
    ------
    TypeError
        If `comm` is no communicator.
    ValueError
        On every rank, if a dtype is not one of the four on one of them.
    RuntimeError
        If a launcher started several processes and MPI sees one.

    Examples
    --------
    >>> import attn_numba as an
    >>> list(an.mpi.warm_up("float32"))
    ['float32']
    """
    MPI = started()
    if comm is None:
        comm = MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise TypeError(f"comm is {comm!r}; needed a communicator of mpi4py, such as MPI.COMM_WORLD")
    space = own_space(comm)
    machine = space.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        return together(space, lambda: _in_turn(machine, dtypes, every, gradients))
    finally:
        machine.Free()


def _in_turn(machine: Any, dtypes: Any, every: bool, gradients: bool) -> dict[str, float]:
    first = machine.rank == 0
    try:
        found = warmup(dtypes, every, gradients=gradients) if first else {}
    finally:  # the others must not wait for a rank that failed
        compiled = machine.Ibarrier()
        while not compiled.Test():
            time.sleep(PAUSE)
    return found if first else warmup(dtypes, every, gradients=gradients)
