"""What is kept for calls that repeat: the things used last, up to a number and a size."""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Kept"]

Thing = TypeVar("Thing")


class Kept(Generic[Thing]):
    """Things by key; those not used for longest are dropped first. Threads may share it.

    Parameters
    ----------
    count : int
        How many are kept.
    size : int, optional
        Bytes that they take together, at most; larger ones are not kept.
    """

    def __init__(self, count: int, size: int = 2**63) -> None:
        self._count, self._size, self._total = count, size, 0
        self._found: collections.OrderedDict[Hashable, tuple[Thing, int]]
        self._found = collections.OrderedDict()
        self._lock = threading.Lock()
        _all.add(self)

    def get(self, key: Hashable) -> Thing | None:
        """Return what is kept under a key; None if there is nothing, or if the key is None."""
        if key is None:
            return None
        with self._lock:
            found = self._found.get(key)
            if found is None:
                return None
            self._found.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, thing: Thing, size: int = 0) -> None:
        """Keep a thing of so many bytes, unless its key is None or known, or it is too large."""
        if key is None or size > self._size:
            return
        dropped = []  # after the lock is free
        with self._lock:
            if key in self._found:
                return
            self._found[key] = thing, size
            self._total += size
            while len(self._found) > self._count or self._total > self._size:
                _, (old, freed) = self._found.popitem(last=False)
                self._total -= freed
                dropped.append(old)
        dropped.clear()

    def __len__(self) -> int:
        return len(self._found)

    def renew_lock(self) -> None:
        """Free the lock in a forked child: the thread that held it is not there."""
        self._lock = threading.Lock()


_all: weakref.WeakSet[Kept] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):

    def _renew_locks() -> None:
        for kept in _all:
            kept.renew_lock()

    os.register_at_fork(after_in_child=_renew_locks)
