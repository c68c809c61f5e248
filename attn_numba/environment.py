"""What a process can run and with what settings, and compiling ahead."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from typing import Any

from attn_numba.cluster import file_system, ranks
from attn_numba.parallel import thread_count
from attn_numba.profiles import in_use
from attn_numba.rules.arguments import ANY_DTYPE, DTYPES

__all__ = ["backends", "config_report", "warmup"]


def warmup(dtypes: Any = ("float32",), every: bool = False, *, gradients: bool = False) -> dict[str, float]:
    """Compile the CPU kernels, or load them from the disk cache, before the first call needs them.

    Parameters
    ----------
    dtypes : str or sequence of str
        Of float64, float32, float16, bfloat16.
    every : bool
        Whether to compile all kernels, not just the one of plain calls: for returned weights, for masks that list
        their keys, for other normalizers and scores, for what explains weights, for caches and for unequal lengths.
    gradients : bool
        Whether to compile the kernels of gradients too.

    Returns
    -------
    dict of str to float
        Seconds for each dtype.

    Raises
    ------
    ValueError
        If a dtype is not one of the four.

    Examples
    --------
    >>> import attn_numba as an
    >>> list(an.warmup("float32"))
    ['float32']
    """
    names = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtypes has {name!r}; needed {ANY_DTYPE}")
    from attn_numba.cpu.engine import prepare

    seconds = {}
    for name in names:
        start = time.perf_counter()
        prepare(name, every)
        if every:
            from attn_numba.cpu.decode_engine import prepare as prepare_decode
            from attn_numba.cpu.ragged import prepare as prepare_ragged

            prepare_decode(name)
            prepare_ragged()
        if gradients:
            from attn_numba.cpu.gradients import prepare as prepare_gradients

            prepare_gradients(name, every)
        seconds[name] = time.perf_counter() - start
    return seconds


def backends() -> dict[str, tuple[bool, str]]:
    """Return for each backend whether it can run here, and why not.

    Returns
    -------
    dict of str to (bool, str)
        Availability and reason.

    Examples
    --------
    >>> import attn_numba as an
    >>> an.backends()["reference"]
    (True, 'plain NumPy')
    """
    found = {"reference": (True, "plain NumPy")}
    if importlib.util.find_spec("numba") is None:
        found["cpu"] = (False, "numba is not installed")
    else:
        from attn_numba.cpu.target import target

        found["cpu"] = (True, f"{target().name}, {target().vectors}")
    found["cuda"] = cuda_availability()
    return found


def config_report() -> dict[str, dict[str, tuple[Any, str]]]:
    """Return all settings in force, each with where it comes from.

    Returns
    -------
    dict of str to dict of str to (value, str)
        Sections "versions", "processor", "threads", "ranks" (which of those that a launcher started, and the MPI
        library), "cache" (the folder of compiled code, and its file system), "profile" (of kernels, see `use_profile`),
        "backends" and "gpu": the card, what compiles for it, and for each dtype the kernel that serves plain calls of
        it and why not those that are asked before.

    Examples
    --------
    >>> import attn_numba as an
    >>> sorted(an.config_report())
    ['backends', 'cache', 'gpu', 'processor', 'profile', 'ranks', 'threads', 'versions']
    """
    report: dict[str, dict[str, tuple[Any, str]]] = {"versions": _versions(), "threads": {"count": thread_count()}}
    available = backends()
    report["ranks"] = ranks()
    report["backends"] = {name: (yes, reason) for name, (yes, reason) in available.items()}
    report["processor"] = {"machine": (platform.machine(), "platform")}
    report["cache"], report["profile"] = {}, {}
    if available["cpu"][0]:
        from attn_numba.cpu.compilation import cache_folder
        from attn_numba.cpu.target import target

        source = "NUMBA_CPU_NAME" if os.environ.get("NUMBA_CPU_NAME") else "the host, as LLVM knows it"
        found = target()
        report["processor"] |= {
            "name": (found.name, source),
            "vectors": (found.vectors, "what the compiler emits for it"),
            "register tile": (f"{found.tile_rows} rows x 3 vectors", "vector registers"),
            "bfloat16 dot product": (found.bfloat_dot, "what the compiler emits for it"),
            "dot product of bytes": (found.byte_dot, "what the compiler emits for it"),
            "float16 conversion": (found.half, "what the compiler emits for it"),
        }
        folder, reason = cache_folder()
        report["cache"] = {"folder": (folder, reason), **(file_system(folder) if folder else {})}
        report["profile"] = in_use()
    report["gpu"] = {}
    if available["cuda"][0]:
        from attn_numba.gpu.report import gpu_report

        report["gpu"] = gpu_report()
    return report


def _versions() -> dict[str, tuple[Any, str]]:
    import attn_numba

    found: dict[str, tuple[Any, str]] = {
        "attn_numba": (attn_numba.__version__, os.path.dirname(attn_numba.__file__)),
        "python": (platform.python_version(), sys.executable),
    }
    for name in ("numpy", "numba", "llvmlite", "scipy", "numba-cuda", "cuda-core", "mpi4py", "dask"):
        try:
            found[name] = (importlib.metadata.version(name), "installed package")
        except importlib.metadata.PackageNotFoundError:
            found[name] = (None, "not installed")
    return found


def cuda_availability() -> tuple[bool, str]:
    """Return whether the CUDA backend can run here, and why not."""
    if importlib.util.find_spec("numba") is None:
        return False, "numba is not installed"
    from attn_numba.gpu.availability import availability

    return availability()
