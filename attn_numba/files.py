"""Arrays in files: read as memory maps, written whole or not at all.

``.npy`` holds one array; ``.npz`` and ``.safetensors`` hold several by name. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

__all__ = ["check_contents", "check_output", "read_array", "read_arrays", "write_arrays", "write_whole"]

SUFFIXES = (".npy", ".npz", ".safetensors")
# what reading a damaged file raises; the last two by NumPy, which parses the header of a .npy file as Python text
DAMAGE = (ValueError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error, SyntaxError, TokenError)
Reader = Callable[[], np.ndarray]


def read_arrays(path: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return arrays of a ``.npy``, ``.npz`` or ``.safetensors`` file by name, mapped rather than loaded.

    Parameters
    ----------
    path : str or Path
        The file. The one array of a ``.npy`` file goes by the name of the file without its suffix. The compressed
        members of a ``.npz`` file cannot be mapped and are loaded.
    names : sequence of str, optional
        Which arrays; None for all.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        The file is corrupt, truncated, pickled or of another kind, or lacks one of the names; the message begins with
        the file's name.
    OSError
        The file cannot be opened.
    ImportError
        The file needs a package that is not installed.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_arrays(folder / "qkv.npz", {"q": np.zeros((2, 3)), "k": np.ones(4)})
    >>> {name: array.shape for name, array in read_arrays(folder / "qkv.npz").items()}
    {'q': (2, 3), 'k': (4,)}
    """
    path = Path(path)
    openers: dict[str, Callable[[Path], dict[str, Reader]]] = {
        ".npy": _open_npy,
        ".npz": _open_npz,
        ".safetensors": _open_safetensors,
    }
    if path.suffix not in openers:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(SUFFIXES)}")
    try:
        readers = openers[path.suffix](path)
        if missing := [name for name in names or () if name not in readers]:
            raise ValueError(f"has no array {missing[0]}; it holds {', '.join(sorted(readers)) or 'none'}")
        return {name: _checked(readers[name]()) for name in (readers if names is None else names)}
    except DAMAGE as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


def read_array(path: str | Path) -> np.ndarray:
    """Return the one array of a file.

    Parameters
    ----------
    path : str or Path
        A file as for `read_arrays`.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ValueError
        As `read_arrays`; or the file holds none or several arrays.
    """
    arrays = read_arrays(path)
    if len(arrays) != 1:
        raise ValueError(f"{path}: one array is needed; it holds {', '.join(sorted(arrays)) or 'none'}")
    return next(iter(arrays.values()))


def check_output(path: str | Path, overwrite: bool = False, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return a path as one that can be written, before the work is done that is to be kept there.

    Parameters
    ----------
    path : str or Path
        The file to be written.
    overwrite : bool
        Whether a file that exists may be replaced.
    suffixes : sequence of str
        The kinds of file that can be written there.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        The suffix is unknown.
    FileExistsError
        The file exists and `overwrite` is False.
    OSError
        Its folder does not exist or cannot be written.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(suffixes)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; it is replaced only with --force")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} cannot be written")
    return path


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], overwrite: bool = False) -> None:
    """Write arrays to a file, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The file to write: ``.npy`` for one array, ``.npz`` or ``.safetensors`` for any number.
    arrays : mapping of str to numpy.ndarray
        The arrays by name.
    overwrite : bool
        Whether a file that exists may be replaced.

    Raises
    ------
    ValueError
        The kind of file cannot hold these arrays (several in a ``.npy``, bfloat16 outside ``.safetensors``), or is
        unknown.
    FileExistsError
        The file exists and `overwrite` is False.
    OSError
        It cannot be written.
    ImportError
        The kind of file needs a package that is not installed.
    """
    path = check_output(path, overwrite)
    check_contents(path, {name: array.dtype for name, array in arrays.items()})
    write_whole(path, partial(_write, path.suffix, arrays), overwrite)


def write_whole(
    path: str | Path,
    write: Callable[[Path, IO[bytes]], None],
    overwrite: bool = False,
    suffixes: Sequence[str] = SUFFIXES,
) -> None:
    """Write a file whole or not at all.

    It is written under another name in the same folder and takes the final name once it is complete.

    Parameters
    ----------
    path : str or Path
        The file to write.
    write : callable
        Is called with the path of the unfinished file and with that file, open, and fills it.
    overwrite : bool
        Whether a file that exists may be replaced.
    suffixes : sequence of str
        The kinds of file that `write` can make.

    Raises
    ------
    ValueError
        The suffix is unknown.
    FileExistsError
        The file exists and `overwrite` is False.
    OSError
        It cannot be written.
    """
    path = check_output(path, overwrite, suffixes)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            write(part, file)
            file.flush()
            os.fsync(file.fileno())
        check_output(path, overwrite, suffixes)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_contents(path: str | Path, dtypes: Mapping[str, np.dtype]) -> None:
    """Raise a ValueError if a kind of file cannot hold arrays of these names and dtypes.

    Parameters
    ----------
    path : str or Path
        The file to be written.
    dtypes : mapping of str to numpy.dtype
        What is to go there.
    """
    suffix = Path(path).suffix
    if suffix == ".npy" and len(dtypes) > 1:
        raise ValueError(f"{path}: .npy holds one array, not {', '.join(dtypes)}; use .npz or .safetensors")
    for name, dtype in dtypes.items():
        if suffix != ".safetensors" and dtype.name == "bfloat16":
            raise ValueError(f"{path}: {suffix} cannot hold {name}, which is bfloat16; use .safetensors")


def _write(suffix: str, arrays: Mapping[str, np.ndarray], part: Path, file: IO[bytes]) -> None:
    if suffix == ".safetensors":
        _safetensors().save(part, arrays)
    elif suffix == ".npz":
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    else:
        (array,) = arrays.values()
        np.save(file, array, allow_pickle=False)


def _open_npy(path: Path) -> dict[str, Reader]:
    return {path.stem: lambda: np.load(path, mmap_mode="r", allow_pickle=False)}


def _open_npz(path: Path) -> dict[str, Reader]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    return {member.filename.removesuffix(".npy"): partial(_read_member, path, member) for member in members}


def _open_safetensors(path: Path) -> dict[str, Reader]:
    with open(path, "rb"):  # an unreadable file is an OSError before a package that may be missing is asked for
        return _safetensors().readers(path)


def _safetensors():
    try:
        from attn_numba.integrations import safetensors
    except ImportError:
        raise ImportError("a .safetensors file needs the package safetensors (pip install safetensors)") from None
    return safetensors


def _read_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """Return an array of an archive: mapped where it is stored as it is, else loaded."""
    if member.compress_type != zipfile.ZIP_STORED:
        with zipfile.ZipFile(path) as archive, archive.open(member) as compressed:
            return np.lib.format.read_array(compressed, allow_pickle=False)
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)  # the fixed part of a member's own header; it ends with the lengths of what follows
        if local[:4] != b"PK\x03\x04":
            raise ValueError(f"{member.filename} is damaged")
        file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), os.SEEK_CUR)
        start = file.tell()
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read_header(file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds pickled objects")
    size = dtype.itemsize * prod(shape)
    if offset - start + size != member.file_size:
        raise ValueError(f"{member.filename} is damaged: its header asks for {size} bytes")
    if size == 0:  # an empty part of a file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if columns_first else "C")


def _checked(array: np.ndarray) -> np.ndarray:
    """Return an array just read, unless ``.npy`` had no name for its numbers: bfloat16 comes back as plain bytes."""
    if array.dtype.kind == "V" and array.dtype.name != "bfloat16":
        raise ValueError(f"holds numbers that .npy cannot name ({array.dtype}); bfloat16 is kept by .safetensors")
    return array


def _reason(error: Exception) -> str:
    """Return an error's message in one line, or its kind where it has none."""
    if isinstance(error, EOFError):
        return "the file ends too early"
    if "pickle" in str(error) or "Python objects" in str(error):
        return "holds pickled objects or is no array file; pickles are not read"
    return " ".join(str(error).split()) or type(error).__name__
