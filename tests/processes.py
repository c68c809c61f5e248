"""Run Python in a process of its own, or in several ranks of MPI."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TESTS = Path(__file__).parent
COLLECTIONS = (50_000, 20, 20)  # tests, and all that Numba makes, stay: looking for garbage took a tenth of the time
BESIDE = Path(sysconfig.get_path("scripts")) / "mpiexec"
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
OF_LAUNCHERS = ("PMI_SIZE", "PMI_RANK", "PMI_FD", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def environment(**changes: str | None) -> dict[str, str]:
    """Return the environment of a new process: it finds the modules of this folder, and the package where this one did.

    A variable of None is taken away. A PYTHONPATH given here is searched first.
    """
    path = [changes.pop("PYTHONPATH", None), str(TESTS), *sys.path]
    found = {**os.environ, **changes, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
    return {name: value for name, value in found.items() if value is not None}


def run_python(*arguments: str, timeout: float = 300, **changes: str | None) -> str:
    """Return what a new Python process prints: of some code, or of a script with its arguments.

    `changes` are of its environment. The folder it starts in is not searched for modules.
    """
    code, *words = arguments
    started = [code] if code.endswith(".py") else ["-c", f"import gc; gc.set_threshold(*{COLLECTIONS})\n{code}"]
    command = [sys.executable, "-P", *started, *words]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_ranks(
    ranks: int, *words: str, folder: Path | None = None, timeout: float = 300, **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """Return what became of Python with these words on so many ranks of one thread each; `changes` as above."""
    assert MPIEXEC is not None
    own = dict.fromkeys(OF_LAUNCHERS) | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": None} | changes
    command = [MPIEXEC, "-n", str(ranks), sys.executable, *words]
    return subprocess.run(command, env=environment(**own), cwd=folder, capture_output=True, text=True, timeout=timeout)
