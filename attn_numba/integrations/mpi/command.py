"""One call on files, its pieces computed by all ranks: what ``attn-numba run`` does under mpiexec.

Pieces have all keys of their rows, which each rank reads from the files itself, so any rules will do and results have
the bits of one process.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from attn_numba.integrations.mpi.agreement import together
from attn_numba.integrations.mpi.launch import own_space, started
from attn_numba.job import Job, pairs_of
from attn_numba.rules.blocks import Block

__all__ = ["MPI_FAILED", "run_on_ranks"]

MPI_FAILED = 2  # exit code of a job that one rank ends for all
Results = dict[str, np.ndarray]
Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]


def run_on_ranks(
    prepare: Callable[[int], tuple[Job, Sequence[Block]]],
    compute: Callable[[Job, Block | None], Results],
    progress: Progress,
    write: Callable[[Results], object],
) -> None:
    """Compute a call on all ranks that a launcher started, and write its results on rank 0.

    Parameters
    ----------
    prepare : callable
        Takes the number of ranks; returns the call, checked, and its pieces. The same on every rank.
    compute : callable
        Returns the results of a piece by name, and those of a call that has no pieces.
    progress : callable
        Takes the number of query-key pairs that rank 0 is to compute; returns what shows how many it has done.
    write : callable
        Writes the results of the call.

    Raises
    ------
    Exception
        On every rank, if one of the functions raised on one: there the exception itself, elsewhere one like it.
    """
    space = own_space(started(warn=False).COMM_WORLD)
    job, pieces = together(space, lambda: prepare(space.size))
    owners = dealt(len(pieces), space.size)
    mine = [piece for piece, owner in zip(pieces, owners, strict=True) if owner == space.rank]

    def computed() -> list[Results]:
        found = []
        with progress(sum(map(pairs_of, mine)) if space.rank == 0 else 0) as advance:
            for piece in mine:
                found.append(compute(job, piece))
                advance(pairs_of(piece))
        return found

    results = together(space, computed)
    if not pieces:
        whole = together(space, lambda: compute(job, None))
    elif space.rank == 0:
        whole = _or_end_all(space, lambda: job.joined(zip(pieces, _received(space, owners, results), strict=True)))
    else:
        _send(space, results)
    together(space, lambda: write(whole) if space.rank == 0 else None)


def dealt(count: int, ranks: int) -> list[int]:
    """Return the rank of each piece: there and back, for under a causal mask each has more to do than the one before.

    Examples
    --------
    >>> dealt(7, 3)
    [0, 1, 2, 2, 1, 0, 0]
    """
    there_and_back = [*range(ranks), *reversed(range(ranks))]
    return [there_and_back[n % (2 * ranks)] for n in range(count)]


def _send(space: Any, results: Sequence[Results]) -> None:
    space.gather([[(name, x.shape, x.dtype) for name, x in arrays.items()] for arrays in results])
    for arrays in results:
        for array in arrays.values():
            space.Send(_bits(np.ascontiguousarray(array)), 0)


def _received(space: Any, owners: Sequence[int], own: Sequence[Results]) -> Iterator[Results]:
    """Yield the results of all pieces on rank 0, which has computed some of them itself."""
    told = [iter(ones) for ones in space.gather([])]
    mine = iter(own)
    for owner in owners:
        if owner == 0:
            yield next(mine)
            continue
        arrays = {}
        for name, shape, dtype in next(told[owner]):
            arrays[name] = np.empty(shape, dtype)
            space.Recv(_bits(arrays[name]), owner)
        yield arrays


def _bits(array: np.ndarray) -> list[Any]:
    from mpi4py import MPI

    return [array.reshape(-1).view(np.uint8), MPI.BYTE]


def _or_end_all(space: Any, work: Callable[[], Results]) -> Results:
    """Return what `work` returns; if it raises, end all ranks, which wait for this one in the middle of a message."""
    try:
        return work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        space.Abort(MPI_FAILED)
        raise
