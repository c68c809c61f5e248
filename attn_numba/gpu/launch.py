"""Kernels that can be started: their machine code found and loaded once a process, their parameters flattened.

In the simulator a kernel is the plain function, run by Numba's simulator, one launch at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_numba.gpu import machine_code
from attn_numba.gpu.driver import Card, Kernel
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, in_simulator, types

__all__ = ["Ready", "ready", "write_code"]

ARRAY, ADDRESS, NUMBER, GROUP = range(4)


class Ready:
    """A kernel that is ready to start on one card.

    Parameters
    ----------
    program : Program
        The kernel.
    card : Card or None
        Where it is to run; None in the simulator.
    """

    def __init__(self, program: Program, card: Card | None) -> None:
        self.name, self._block = program.name, program.block
        self._kinds = tuple(map(_kind_of, program.signature))
        self._kernel: Kernel | None = None
        if card is None:
            self._function, self._shared = cuda.jit(program.make()), program.shared
            self.origin = "simulated"
        else:
            found = machine_code.code_of(program, card.capability)
            self.origin = found.where
            self._kernel = card.load(found.code.code, found.code.name, program.block, program.shared)

    def start(self, grid: tuple[int, int, int], stream: Any, arguments: tuple[Any, ...]) -> None:
        """Put the kernel on a stream of its card, which is the current one.

        Parameters
        ----------
        grid : (int, int, int)
            Blocks.
        stream : object
            As the card has it.
        arguments : tuple
            Values of the parameters: a view for an array, a view, an address or None for an address, numbers of NumPy,
            and tuples of these.
        """
        if self._kernel is None:
            simulated = tuple(_simulated(kind, x) for kind, x in zip(self._kinds, arguments, strict=True))
            with _simulating:
                self._function[grid, self._block, 0, self._shared](*simulated)
            return
        flat: list[Any] = []
        _flatten(self._kinds, arguments, flat)
        self._kernel.start(grid, stream, flat)


def _kind_of(kind: Any) -> tuple[int, Any]:
    """Return what a parameter's type asks of its value: which of the four it is, and what belongs to that."""
    if isinstance(kind, types.Array):
        return ARRAY, kind.ndim
    if isinstance(kind, types.CPointer):
        return ADDRESS, None
    if isinstance(kind, (tuple, types.BaseTuple)):
        members: Any = kind
        return GROUP, tuple(map(_kind_of, members))
    return (ADDRESS, None) if str(kind) == "uint64" else (NUMBER, np.dtype(str(kind)).type)


def _flatten(kinds: tuple[tuple[int, Any], ...], values: tuple[Any, ...], flat: list[Any]) -> None:
    """Append the values of parameters as the driver takes them."""
    for (what, of), value in zip(kinds, values, strict=True):
        if what == NUMBER:
            flat.append(value if type(value) is of else of(value))
        elif what == ARRAY:  # owner, parent and count, which kernels do not look at; bytes of an element, address
            if value is None:
                flat += (0,) * (5 + 2 * of)
            else:
                flat += (0, 0, 0, value.dtype.itemsize, value.pointer, *value.shape, *value.strides)
        elif what == GROUP:
            _flatten(of, value, flat)
        else:
            flat.append(0 if value is None else value.pointer if hasattr(value, "pointer") else int(value))


def _simulated(kind: tuple[int, Any], value: Any) -> Any:
    """Return what the simulator takes for a value: arrays without a copy."""
    what, of = kind
    if isinstance(value, np.ndarray):
        return in_simulator(value)
    return of(value) if what == NUMBER else value


_ready: dict[tuple[str, int | None], Ready] = {}
_locks: dict[tuple[str, int | None], threading.Lock] = {}
_lock = threading.Lock()
_simulating = threading.Lock()  # the simulator lends a kernel's module its threads, for one launch at a time


def _forget_locks() -> None:
    """Free the locks in a forked child: the thread that held one is not there."""
    global _lock, _simulating
    _lock, _simulating = threading.Lock(), threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def ready(program: Program, card: Card | None) -> Ready:
    """Return a kernel that is ready to start, found or made once a process.

    Raises
    ------
    RuntimeError
        If it can neither be found nor compiled, or not be loaded.
    """
    key = (
        machine_code.key_of(program, (0, 0) if card is None else card.capability),
        None if card is None else card.index,
    )
    with _lock:
        found = _ready.get(key)
        own = _locks.setdefault(key, threading.Lock())
    if found is not None:
        return found
    with own:  # others may compile other kernels meanwhile
        if key not in _ready:
            _ready[key] = Ready(program, card)
    return _ready[key]


def write_code(
    programs: list[Program], capability: tuple[int, int], folder: str, told: Callable[[Program], object] | None = None
) -> int:
    """Compile kernels into a folder that is carried to machines which may not be able to; no card is needed.

    Parameters
    ----------
    programs : list of Program
        The kernels.
    capability : (int, int)
        Of the cards that they are for.
    folder : str
        Where to write; kernels that are there already are left.
    told : callable, optional
        Is told of each kernel that was compiled.

    Returns
    -------
    int
        How many were compiled.

    Raises
    ------
    OSError
        If the folder cannot be written.
    RuntimeError
        If a kernel cannot be compiled.
    """
    count = 0
    for program in programs:
        path = machine_code.entry(folder, program, machine_code.key_of(program, capability, portable=True))
        if machine_code.read_entry(path) is None:
            machine_code.write_entry(path, machine_code.compiled(program, capability))
            count += 1
            if told is not None:
                told(program)
    return count
