"""Where a process runs on a cluster: its rank, its MPI library, and what kind of file system a folder is on.

All of it is read from the environment and from what is loaded or installed. Nothing is imported, so MPI is not
initialized in a process that has not done so itself.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["LAUNCHERS", "file_system", "ranks"]

LAUNCHERS = {  # launcher -> the variables in which it tells a process its rank and the number of ranks
    "Open MPI's launcher": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MVAPICH's launcher": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "MPICH's or Intel MPI's launcher": ("PMI_RANK", "PMI_SIZE"),
    "Slurm's srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}
LIBRARIES = ("mpich", "openmpi", "impi-rt")  # packages that bring an MPI library
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs",
}  # fmt: skip
MOUNTS = "/proc/self/mountinfo"

Setting = tuple[Any, str]  # a value and where it comes from


def ranks() -> dict[str, Setting]:
    """Return which rank this process is, of how many, and the MPI library, each with where it comes from.

    Returns
    -------
    dict of str to (value, str)
        "rank", "count" and "MPI library". A process that nobody launched is rank 0 of 1; a library that is not known is
        None.

    Examples
    --------
    >>> sorted(ranks())
    ['MPI library', 'count', 'rank']
    """
    (rank, count), source = _place()
    return {"rank": (rank, source), "count": (count, source), "MPI library": _library()}


def _place() -> tuple[tuple[int, int], str]:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        return (mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()), "mpi4py.MPI.COMM_WORLD"
    for launcher, names in LAUNCHERS.items():
        rank, count = (os.environ.get(name, "") for name in names)
        if rank.isdecimal() and count.isdecimal():
            return (int(rank), int(count)), f"{launcher}: {' and '.join(names)}"
    return (0, 1), "no launcher has set its variables"


def _library() -> Setting:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        first, *_ = mpi.Get_library_version().strip("\0 \n").split("\n")
        return " ".join(first.split()), "mpi4py.MPI, as this process has loaded it"
    spec = importlib.util.find_spec("mpi4py")
    if spec is None:
        return None, "mpi4py is not installed"
    source = f"not loaded in this process; mpi4py {_version('mpi4py')} is installed"
    for package in LIBRARIES:
        if version := _version(package):
            return f"{package} {version}", source
    return _compiler(spec.submodule_search_locations), source


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler(folders: Any) -> str | None:
    """Return the compiler of the MPI library that mpi4py was built with, where it was built here."""
    found = configparser.ConfigParser()
    found.read([Path(folder) / "mpi.cfg" for folder in folders or ()])
    return found.get("mpi", "mpicc", fallback=None)


def file_system(folder: str) -> dict[str, Setting]:
    """Return what kind of file system a folder is on, and whether that is one of a network.

    Parameters
    ----------
    folder : str
        Which need not exist; its nearest parent that does is looked at.

    Returns
    -------
    dict of str to (value, str)
        "file system" and "on a network", each with where it comes from; None where this system does not tell.

    Examples
    --------
    >>> sorted(file_system("/"))
    ['file system', 'on a network']
    """
    try:
        lines = Path(MOUNTS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return dict.fromkeys(("file system", "on a network"), (None, f"{MOUNTS} cannot be read"))
    path = Path(os.path.realpath(folder))
    kind, mount = "", ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        at = _unescaped(fields.split()[4])
        if path.is_relative_to(at) and len(at) >= len(mount):  # what is mounted later lies above
            kind, mount = rest.split()[0], at
    network = kind in NETWORK or (kind.startswith("fuse.") and kind != "fuse.fuse-overlayfs")
    return {
        "file system": (kind, f"mounted at {mount}"),
        "on a network": (network, "by its type: others may see the folder" if network else "by its type"),
    }


def _unescaped(text: str) -> str:
    """Return a path as it is; in the table of mounts some characters stand as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
