"""Machine code of kernels: compiled by Numba, linked by cuda.core, kept on disk.

Two folders may hold it. The cache folder, beside that of the CPU's code, is filled as kernels are compiled; its entries
are told apart by all that the code depends on, the versions of the compilers included. The folder that the environment
variable ``ATTN_NUMBA_CUDA_CODE`` names is filled on purpose (`attn-numba warmup --cuda sm_90a --folder FOLDER`, which
needs no card) and carried along; its entries are told apart by the same but for these versions, and used before
anything is compiled: also where no compiler is, or one that is too old or too new.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

from numba.core.caching import FunctionCache

from attn_numba.gpu.availability import CARRIED, carried_folder
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import ptx_of, types

__all__ = ["Code", "Origin", "cache_folder", "code_of", "compiled", "key_of"]

FORMAT = b"attn_numba machine code 1\n"
COMPILERS = (
    "numba", "numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12", "nvidia-nvvm",
    "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12",
)  # fmt: skip


class Code(NamedTuple):
    """Machine code of one kernel."""

    name: str  # of the kernel in it
    code: bytes


class Origin(NamedTuple):
    """Where machine code came from, for reports: "carried", "cache" or "compiled"."""

    where: str
    code: Code


# --- what tells kernels apart ---


def architecture(program: Program, capability: tuple[int, int]) -> str:
    """Return the name of the architecture that a kernel is compiled for, such as sm_90a."""
    return f"sm_{capability[0]}{capability[1]}{'a' if program.specific else ''}"


@functools.cache
def _sources_stamp() -> str:
    """Return one hash over the sources of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def compilers() -> tuple[tuple[str, str], ...]:
    """Return the packages that machine code is made by, with their versions."""
    found = []
    for name in COMPILERS:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def type_text(kind: Any) -> str:
    """Return the name of a parameter's type; versions of Numba write it in different ways."""
    if isinstance(kind, types.Array):
        return f"array({kind.dtype}, {kind.ndim}, {kind.layout})"
    if isinstance(kind, types.CPointer):
        return f"pointer({kind.dtype})"
    if isinstance(kind, (tuple, types.BaseTuple)):
        members: Any = kind
        return f"({', '.join(map(type_text, members))})"
    return str(kind)


def key_of(program: Program, capability: tuple[int, int], portable: bool = False) -> str:
    """Return what tells the machine code of a kernel from all other, as text for a file's name.

    Parameters
    ----------
    program : Program
        The kernel.
    capability : (int, int)
        Of the card.
    portable : bool
        Whether to leave out what it is compiled by.
    """
    rules = None if program.hooks is None else (program.hooks.number, program.hooks.source)
    parts = (
        _sources_stamp(), program.name, program.options, rules, type_text(program.signature),
        architecture(program, capability), program.block, program.resident, () if portable else compilers(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


# --- folders ---


@functools.cache
def _cache_folder(named: str | None) -> tuple[str | None, str]:
    try:
        path = FunctionCache(_sources_stamp.__wrapped__).cache_path
    except RuntimeError as error:
        return None, f"no folder can be written: {error}"
    return path, "NUMBA_CACHE_DIR" if named else "next to the package or in the user's cache"


def cache_folder() -> tuple[str | None, str]:
    """Return the folder of compiled kernels and why it is that one; (None, reason) where none can be written."""
    return _cache_folder(os.environ.get("NUMBA_CACHE_DIR"))


def entry(folder: str, program: Program, key: str) -> Path:
    """Return the file of a kernel's machine code."""
    return Path(folder) / f"{program.name}-{key}.cubin"


def read_entry(path: Path) -> Code | None:
    """Return the machine code in a file; None if there is none, or not all of it is as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(FORMAT):
        return None
    digest, _, rest = content[len(FORMAT) :].partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    name, _, code = rest.partition(b"\n")
    return Code(name.decode(), code)


def write_entry(path: Path, found: Code) -> None:
    """Write machine code to a file that appears whole or not at all.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    rest = found.name.encode() + b"\n" + found.code
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(FORMAT + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


# --- finding it ---

_compiling = threading.Lock()  # the compiler asks global state for the card that it compiles for
if hasattr(os, "register_at_fork"):  # else a forked child may find it held by a thread that it does not have
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


def code_of(program: Program, capability: tuple[int, int]) -> Origin:
    """Return the machine code of a kernel: carried, from the cache folder, or compiled and left there.

    Raises
    ------
    RuntimeError
        If it is not at hand and cannot be compiled.
    """
    carried = carried_folder()
    if carried is not None:
        found = read_entry(entry(carried, program, key_of(program, capability, portable=True)))
        if found is not None:
            return Origin("carried", found)
    folder = cache_folder()[0]
    path = None if folder is None else entry(folder, program, key_of(program, capability))
    found = None if path is None else read_entry(path)
    if found is not None:
        return Origin("cache", found)
    found = compiled(program, capability)
    if path is not None:
        with contextlib.suppress(OSError):  # a full or withdrawn folder: the code serves this process
            write_entry(path, found)
    return Origin("compiled", found)


def compiled(program: Program, capability: tuple[int, int]) -> Code:
    """Return the machine code of a kernel, compiled now, whether or not there is a card.

    Raises
    ------
    RuntimeError
        If Numba, the compiler or the linker fails.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    name = architecture(program, capability)
    wanted = (*capability, "a") if program.specific else capability
    threads = 1
    for count in program.block:
        threads *= count
    try:
        with _compiling:
            text = ptx_of(program.make(), program.signature, wanted, launch_bounds=(threads, program.resident))
            (kernel,) = re.findall(r"\.entry\s+([\w$]+)", text)
            linker = Linker(ObjectCode.from_ptx(text.encode()), options=LinkerOptions(arch=name))
            return Code(kernel, bytes(linker.link("cubin").code))
    except Exception as error:
        raise RuntimeError(
            f"the kernel {program.name!r} cannot be compiled here for {name}: {_first_line(error)}; it can be compiled "
            f"elsewhere by `attn-numba warmup --cuda {name} --folder FOLDER` and found by {CARRIED}=FOLDER"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
