"""The log of a search: a JSON line for every finished fit, under a key that says of what it is."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

__all__ = ["append", "digest", "plain", "prepare", "read"]

START = '{"key": "'
WITHOUT_EFFECT = {"n_jobs", "verbose"}  # parameters on which no result depends, by scikit-learn's conventions

Record = dict[str, Any]


def prepare(path: str | Path) -> dict[str, Record]:
    """Return the fits of a log by their keys, and leave the file ready to be appended to.

    A line that was not written to its end, for its process was killed, is passed over, and closed if it is the last.

    Parameters
    ----------
    path : str or Path
        The log; it is made if it does not exist.

    Returns
    -------
    dict of str to dict

    Raises
    ------
    ValueError
        If the file has lines of another kind; it is then left as it is.
    OSError
        If it cannot be read or written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"log is {str(path)!r}: there is no folder {path.parent}")
    with open(path, "a+b") as file:
        found = read(path)
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return found


def read(path: str | Path) -> dict[str, Record]:
    """Return the fits of a log by their keys, the first of each key.

    Parameters
    ----------
    path : str or Path
        The log.

    Returns
    -------
    dict of str to dict

    Raises
    ------
    ValueError
        If the file has lines of another kind.
    OSError
        If it cannot be read.
    """
    found: dict[str, Record] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        start = line[: len(START)].decode("latin-1")
        if not START.startswith(start):
            raise ValueError(
                f"log is {str(path)!r}, whose line {number} is no fit of a search; needed a log of `search`"
            )
        try:
            record = json.loads(line)
            found.setdefault(record["key"], record)
        except (ValueError, KeyError):  # not written to its end
            continue
    return found


def append(path: str | Path, line: str) -> None:
    """Append a line to a file, whole, whoever else may append to it.

    Parameters
    ----------
    path : str or Path
        The file.
    line : str
        Without its end.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    data = f"{line}\n".encode()
    number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if os.write(number, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(number)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: what has no name there, by its text.

    Parameters
    ----------
    value : object
        Any value.

    Returns
    -------
    None, bool, int, float, str, list or dict
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return _name(value) if inspect.isroutine(value) or inspect.isclass(value) else repr(value)


def digest(*values: Any) -> str:
    """Return a name for values that is the same in each process, and another for other values.

    Parameters
    ----------
    *values : object
        Arrays, numbers, texts, collections of these, estimators, functions and classes; all else as it is pickled.

    Returns
    -------
    str
        32 hexadecimal digits, of SHA-256.
    """
    found = hashlib.sha256()
    for part in _parts(values):
        found.update(part)
    return found.hexdigest()[:32]


def _parts(value: Any) -> Iterator[bytes]:
    """Yield bytes that are the same for values that are."""
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        text = repr(value)
        yield _text(f"{kind.__name__} {len(text)} {text}")
    elif isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        array = np.asarray(value)
        yield _text(f"array {array.dtype.str} {array.shape}")
        yield array.tobytes()
    elif isinstance(value, np.ndarray):
        yield from _parts((str(value.shape), value.ravel().tolist()))
    elif kind in (list, tuple):
        yield _text(f"{kind.__name__} {len(value)}")
        for each in value:
            yield from _parts(each)
    elif kind is dict:
        yield from _parts(sorted(value.items(), key=lambda item: repr(item[0])))
    elif inspect.isroutine(value) or inspect.isclass(value):
        yield from _parts(_code(value))
    elif hasattr(value, "get_params"):
        chosen = value.get_params(deep=False)
        yield from _parts((_code(kind), {name: each for name, each in chosen.items() if name not in WITHOUT_EFFECT}))
    else:
        yield from _parts(_pickled(value))


def _text(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _code(value: Any) -> tuple[Any, ...]:
    """Return what says which code a function or class is: its name, and its library's version or what it is made of."""
    home = sys.modules.get((getattr(value, "__module__", None) or "").partition(".")[0])
    version = getattr(home, "__version__", None)
    if version is not None:
        return (_name(value), str(version))
    if hasattr(value, "__code__"):  # two functions may stand in one line of the source
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [_name(cell) if inspect.isroutine(cell) or inspect.isclass(cell) else cell for cell in cells]
        return (_name(value), _instructions(value.__code__), value.__defaults__, value.__kwdefaults__, held)
    try:
        return (_name(value), inspect.getsource(value))
    except (OSError, TypeError):  # compiled, or typed in
        return (_name(value),)


def _instructions(code: CodeType) -> tuple[Any, ...]:
    constants = [_instructions(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return (code.co_code, code.co_names, constants)


def _pickled(value: Any) -> tuple[Any, ...]:
    """Return a name of what an object is pickled as, or if it cannot be, what it holds."""
    import joblib

    try:
        return (_name(type(value)), joblib.hash(value))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if not hasattr(value, "__dict__"):
            raise TypeError(f"a search needs a name for {value!r}, which cannot be pickled") from error
        return (_code(type(value)), vars(value))


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', repr(value))}"
