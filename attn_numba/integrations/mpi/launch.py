"""How this process was started: whether the launcher and the MPI library know each other, and who ends whom."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import Any

from attn_numba.cluster import LAUNCHERS

__all__ = ["own_space", "started"]


def started(warn: bool = True) -> Any:
    """Return the module ``mpi4py.MPI``, with MPI started.

    Parameters
    ----------
    warn : bool
        Whether to warn of a start that leaves ranks waiting for one that fails.

    Raises
    ------
    RuntimeError
        If there is no MPI library, MPI is not running, or a launcher started several processes and MPI sees only this
        one.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise RuntimeError(f"mpi4py found no MPI library ({found}); needed one, such as: pip install mpich") from error

    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError(
            "MPI is not running: mpi4py.rc.initialize is off and MPI.Init() was not called, or MPI.Finalize() was"
        )
    world = MPI.COMM_WORLD
    if world.size == 1:
        _require_one_process(MPI.Get_library_version())
    elif warn and world.rank == 0:
        _warn_of_hanging()
    return MPI


def _require_one_process(library: str) -> None:
    """Raise if the environment speaks of more processes: each would take itself for the only one, and do all."""
    for _, name in LAUNCHERS.values():
        number = os.environ.get(name, "")
        if number.isdecimal() and int(number) > 1:
            raise RuntimeError(
                f"the launcher started {number} processes ({name}), but MPI sees 1: the launcher and the MPI library "
                f"({library.split(',')[0].splitlines()[0].strip()}) are of different MPIs; needed the mpiexec of that "
                "library; with srun, try --mpi=pmi2 or --mpi=pmix"
            )


@functools.cache
def _warn_of_hanging() -> None:
    """Warn once if an exception on one rank would leave the others waiting for it."""
    if not _under_mpi4py(sys.orig_argv):
        warnings.warn(
            "this program was not started by `python -m mpi4py`: after an exception on one rank the others wait for "
            "it without end; needed: mpiexec -n 4 python -m mpi4py program.py",
            RuntimeWarning,
            stacklevel=4,
        )


def _under_mpi4py(words: list[str]) -> bool:
    """Whether the words of a command line run a program by ``-m mpi4py``, which ends all ranks if one fails.

    Examples
    --------
    >>> _under_mpi4py(["python", "-u", "-m", "mpi4py", "program.py"]), _under_mpi4py(["python", "program.py"])
    (True, False)
    """
    for n, word in enumerate(words[1:], 1):
        module = word[2:] or "".join(words[n + 1 : n + 2]) if word.startswith("-m") else ""
        if module:
            return module.split(".")[0] == "mpi4py"
    return False


def own_space(comm: Any) -> Any:
    """Return a communicator of the same ranks whose messages meet nobody else's; always the same one.

    Collective at the first call for a communicator. It lives as long as that one.
    """
    from mpi4py import MPI

    keyval = _keyval()
    space = comm.Get_attr(keyval)
    if space is None:
        space = comm.Dup()
        comm.Set_attr(keyval, space)
        if MPI.Comm.Compare(space, comm) != MPI.CONGRUENT:
            raise RuntimeError("the MPI library made a copy of a communicator that is not like it")
    return space


@functools.cache
def _keyval() -> int:
    from mpi4py import MPI

    def freed(comm: Any, keyval: int, space: Any) -> None:
        if not MPI.Is_finalized():
            space.Free()

    return int(MPI.Comm.Create_keyval(delete_fn=freed))
