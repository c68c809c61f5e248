"""Who holds which tokens of a sequence."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from attn_numba.integrations.mpi.agreement import agree, described
from attn_numba.integrations.mpi.launch import own_space, started
from attn_numba.integrations.mpi.layouts import LAYOUTS, Stretch, chosen_layout, stretches_of
from attn_numba.rules import as_mask
from attn_numba.rules.arguments import POSITION_LIMIT
from attn_numba.rules.data import AnyArray, as_array

__all__ = ["Shard"]


class Shard:
    """The tokens of a sequence, dealt to the ranks of a communicator. Made by all its ranks together.

    Ranks hold as many tokens as each other, give or take two; if there are fewer tokens than ranks, some hold none.

    Parameters
    ----------
    n_tokens : int
        Tokens of the whole sequence, at least 1; q, k and v are dealt alike.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks; without it ``MPI.COMM_WORLD``. Messages go by a copy of it that is made once.
    layout : {"auto", "contiguous", "zigzag"}
        "contiguous": one stretch of tokens for each rank, in their order. "zigzag": one of the first half and its
        mirror image of the second, which evens out the work of causal masks. "auto": the one of these that has the ring
        done first by an estimate of what `mask` hides, and contiguous where it makes no difference.
    mask : mask rule or bool array that broadcasts to (B, H, n_tokens, n_tokens), optional
        What "auto" goes by: that of the calls to come, which are given theirs all the same. Without it no key is
        hidden, as far as "auto" knows.

    Attributes
    ----------
    n_tokens : int
        Tokens of the whole sequence.
    comm : mpi4py.MPI.Intracomm
        The ranks.
    layout : {"contiguous", "zigzag"}
        The layout, "auto" decided.
    positions : int64 array
        Which tokens this rank holds, in the order of its rows: for rotary positions, labels and the like.

    Raises
    ------
    TypeError
        On every rank, if `n_tokens` is no integer, `comm` no communicator or `mask` no mask on one of them.
    ValueError
        On every rank, if `n_tokens` is below 1, or 2**30 and above, `layout` is none of the three, `mask` does not fit
        the tokens, or the arguments differ between ranks.
    RuntimeError
        If a launcher started several processes and MPI sees one: they are of different MPIs. If MPI is not running.

    Warns
    -----
    RuntimeWarning
        On rank 0, if the program was not started by ``python -m mpi4py``: then an exception on one rank leaves the
        others waiting.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> shard = an.mpi.Shard(6, mask=an.Causal())
    >>> shard
    Shard(6, layout='contiguous'), rank 0 of 1
    >>> shard.positions
    array([0, 1, 2, 3, 4, 5])
    """

    def __init__(self, n_tokens: int, comm: Any = None, layout: str = "auto", mask: Any = None) -> None:
        MPI = started()
        if comm is None:
            comm = MPI.COMM_WORLD
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise TypeError(f"comm is {comm!r}; needed a communicator of mpi4py, such as MPI.COMM_WORLD")
        self.comm, self.space = comm, own_space(comm)
        (self.n_tokens, self.layout), _ = agree(self.space, lambda: self._checked(n_tokens, layout, mask))
        self.stretches = stretches_of(self.n_tokens, comm.size, self.layout)
        self.positions = np.concatenate([np.arange(*s) for s in self.own] or [np.arange(0)]).astype(np.int64)

    def _checked(self, n_tokens: Any, layout: Any, mask: Any) -> tuple[tuple[int, str], dict[str, Any]]:
        if isinstance(n_tokens, bool) or not hasattr(n_tokens, "__index__"):
            raise TypeError(f"n_tokens is {type(n_tokens).__name__}; needed an integer")
        count = operator.index(n_tokens)
        if not 1 <= count < POSITION_LIMIT:
            raise ValueError(f"n_tokens is {count}; needed at least 1, and less than 2**30")
        if layout not in ("auto", *LAYOUTS):
            raise ValueError(f"layout is {layout!r}; needed 'auto', 'contiguous' or 'zigzag'")
        rule = as_mask(mask)
        found = chosen_layout(count, self.comm.size, rule) if layout == "auto" else layout
        return (count, found), {"n_tokens": count, "layout": layout, "mask": described(rule), "layout chosen": found}

    def __repr__(self) -> str:
        return f"Shard({self.n_tokens}, layout={self.layout!r}), rank {self.comm.rank} of {self.comm.size}"

    @property
    def own(self) -> tuple[Stretch, ...]:
        """First and end of each stretch of tokens that this rank holds, in the order of its rows."""
        return self.stretches[self.comm.rank]

    def own_rows(self) -> list[tuple[Stretch, slice]]:
        """Return the stretches of this rank, each with the rows of the rank's arrays that it is."""
        found, first = [], 0
        for stretch in self.own:
            end = first + stretch[1] - stretch[0]
            found.append((stretch, slice(first, end)))
            first = end
        return found

    def counts(self) -> list[int]:
        """Return how many tokens each rank holds."""
        return [sum(end - first for first, end in stretches) for stretches in self.stretches]

    def take(self, x: Any, axis: int = -2) -> AnyArray:
        """Return this rank's part of an array that it can see the whole of, such as a file mapped into memory.

        Parameters
        ----------
        x : array
            With `n_tokens` entries along `axis`. Of a mapped file only the part is read.
        axis : int
            The axis of the tokens.

        Returns
        -------
        array
            A copy, its elements side by side.

        Raises
        ------
        TypeError
            If `x` is no array.
        ValueError
            If it has no such axis, or that is of another length.

        Examples
        --------
        >>> import numpy as np
        >>> import attn_numba as an
        >>> an.mpi.Shard(3).take(np.eye(3)[:, :1], axis=0).ravel()
        array([1., 0., 0.])
        """
        array = as_array(x, "Shard.take", "x")
        at = _axis_of("take", array, axis, self.n_tokens, "tokens")
        before = (slice(None),) * at
        parts = [array[(*before, slice(*stretch))] for stretch in self.own] or [array[(*before, slice(0, 0))]]
        return np.array(parts[0], order="C") if len(parts) == 1 else np.concatenate(parts, axis=at)

    def gather(self, x: Any, axis: int = -2, root: int | None = 0) -> AnyArray | None:
        """Return the whole array of which each rank gives its part. Called by all ranks together.

        Parameters
        ----------
        x : array
            This rank's part, its tokens along `axis` in the order of `positions`.
        axis : int
            The axis of the tokens.
        root : int or None
            The rank that gets it; None for all of them.

        Returns
        -------
        array or None
            On other ranks than `root` None.

        Raises
        ------
        TypeError
            On every rank, if `x` is no array on one.
        ValueError
            On every rank, if a part does not fit, or arguments differ between ranks.

        Examples
        --------
        >>> import numpy as np
        >>> import attn_numba as an
        >>> an.mpi.Shard(3).gather(np.array([[7], [8], [9]])).ravel()
        array([7, 8, 9])
        """
        from mpi4py import MPI

        (array, at), _ = agree(self.space, lambda: self._part(x, axis, root))
        space, counts = self.space, self.counts()
        rest = (*array.shape[:at], *array.shape[at + 1 :])
        mine = np.ascontiguousarray(np.moveaxis(array, at, 0))
        wanted = root is None or space.rank == root
        whole = np.empty((self.n_tokens, *rest), array.dtype) if wanted else None
        for rank, count in enumerate(counts):
            part = mine if rank == space.rank else np.empty((count, *rest), array.dtype) if wanted else mine
            bits = [part.reshape(-1).view(np.uint8), MPI.BYTE]
            if root is None:
                space.Bcast(bits, rank)
            elif rank != root and space.rank == rank:
                space.Send(bits, root)
            elif rank != root and wanted:
                space.Recv(bits, rank)
            if whole is not None:
                first = 0
                for stretch in self.stretches[rank]:
                    end = first + stretch[1] - stretch[0]
                    whole[slice(*stretch)] = part[first:end]
                    first = end
        return None if whole is None else np.moveaxis(whole, 0, at)

    def _part(self, x: Any, axis: int, root: int | None) -> tuple[tuple[AnyArray, int], dict[str, Any]]:
        array = as_array(x, "Shard.gather", "x")
        at = _axis_of("gather", array, axis, len(self.positions), "of the rank's tokens")
        if root is not None and not (isinstance(root, int) and 0 <= root < self.comm.size):
            raise ValueError(f"Shard.gather: root is {root!r}; needed None or a rank from 0 to {self.comm.size - 1}")
        rest = (*array.shape[:at], *array.shape[at + 1 :])
        return (array, at), {
            "shape of x but for its tokens": rest,
            "dtype of x": array.dtype.name,
            "axis": at,
            "root": root,
        }


def _axis_of(name: str, array: AnyArray, axis: Any, length: int, what: str) -> int:
    """Return which axis is meant, counted from the first one."""
    at = operator.index(axis)
    if not -array.ndim <= at < array.ndim:
        raise ValueError(f"Shard.{name}: axis is {at}; x has {array.ndim} axes")
    at %= array.ndim
    if array.shape[at] != length:
        raise ValueError(f"Shard.{name}: x has {array.shape[at]} entries along axis {at}; needed {length}, {what}")
    return at
