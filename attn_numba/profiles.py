"""Profiles of kernels: what was measured to be fastest on one processor, in a file, used only if asked for.

A profile changes how long a call takes and no bit of its results. It holds for the processor and the versions of the
libraries that it was measured with, and is ignored, with one warning, anywhere else.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attn_numba import files

if TYPE_CHECKING:
    from attn_numba.cpu.choices import Choice

__all__ = ["Trial", "active", "in_use", "machine", "trying", "use_profile", "write_profile"]

VARIABLE = "ATTN_NUMBA_PROFILE"
FORMAT, VERSION = "attn-numba kernel profile", 1
LIBRARIES = ("attn-numba", "numba", "llvmlite")  # what compiled code comes from
_UNREAD: Any = object()

_local = threading.local()
_lock = threading.Lock()
_active: Mapping[str, Choice] | None = _UNREAD  # the choices in use, None for none, _UNREAD before the variable is read
_source: tuple[str | None, str] = (None, "")


def use_profile(path: str | os.PathLike[str] | None) -> bool:
    """Let the calls of this process be computed as a profile of this processor says, or as usual.

    Parameters
    ----------
    path : str or path-like or None
        A file that ``attn-numba tune-kernels`` wrote; None for the usual choices, whatever the environment variable
        ``ATTN_NUMBA_PROFILE`` says.

    Returns
    -------
    bool
        Whether the profile is in use. One that is damaged, or of another processor or other versions of the libraries,
        is ignored with a `RuntimeWarning`; then calls are computed as usual.

    Raises
    ------
    TypeError
        If `path` is not a path.
    OSError
        If the file cannot be read.

    Notes
    -----
    Results do not change by one bit, times do. Without a call of this function the file that ``ATTN_NUMBA_PROFILE``
    names is used, if there is such a variable; a file that cannot be read is then ignored with a warning too.

    Examples
    --------
    >>> import attn_numba as an
    >>> an.use_profile(None)
    False
    >>> an.config_report()["profile"]["file"]
    (None, 'attn_numba.use_profile')
    """
    if path is None:
        _set(None, (None, "attn_numba.use_profile"))
        return False
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {type(path).__name__}; needed the name of a file or None")
    return _use(Path(path), Path(path).read_bytes(), "attn_numba.use_profile")


def active() -> Mapping[str, Choice] | None:
    """Return what is chosen for classes of calls, None for the usual; read the environment's profile at first."""
    tried = getattr(_local, "tried", None)
    if tried is not None:
        return tried
    if _active is _UNREAD:
        _read_environment()
    return _active


def in_use() -> dict[str, tuple[Any, str]]:
    """Return what a report says of the profile in use: its file and the number of classes of calls that it knows."""
    choices = active()
    report: dict[str, tuple[Any, str]] = {"file": _source}
    if choices is not None:
        report["classes of calls"] = (len(choices), "of this processor")
    return report


class Trial(dict):
    """One choice for every class of calls; it remembers which classes were asked for."""

    def __init__(self, choice: Choice | None) -> None:
        super().__init__()
        self.choice = choice
        self.asked: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """Return the choice, or what is usual if there is none."""
        self.asked.append(name)
        return default if self.choice is None else self.choice


@contextlib.contextmanager
def trying(choice: Choice | None) -> Iterator[Trial]:
    """Let the calls that this thread makes inside the block be computed by one choice, whatever their class.

    Parameters
    ----------
    choice : attn_numba.cpu.choices.Choice or None
        What to try; None for the usual choices, whatever profile is in use.

    Yields
    ------
    Trial
        It remembers the classes of the calls.
    """
    before = getattr(_local, "tried", None)
    _local.tried = trial = Trial(choice)
    try:
        yield trial
    finally:
        _local.tried = before


def machine() -> dict[str, Any]:
    """Return what a profile holds for: the processor, its features and the versions of what compiles for it."""
    from attn_numba.cpu.target import features, target

    return {
        "processor": {"name": target().name, "model": _model(), "features": features()},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write_profile(
    path: str | os.PathLike[str],
    choices: Mapping[str, Choice],
    measurements: Sequence[Mapping[str, Any]] = (),
    overwrite: bool = False,
) -> None:
    """Write a profile of this processor, whole or not at all.

    Parameters
    ----------
    path : str or path-like
        The file, ``.json`` by name.
    choices : mapping of str to attn_numba.cpu.choices.Choice
        By class of calls.
    measurements : sequence of mapping
        What they come from, kept with them.
    overwrite : bool
        Whether a file that exists may be replaced.

    Raises
    ------
    ValueError
        The suffix is another.
    FileExistsError
        The file exists and `overwrite` is False.
    OSError
        It cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        **machine(),
        "choices": {name: choice._asdict() for name, choice in choices.items()},
        "measurements": list(measurements),
    }

    def write(part: Path, file: IO[bytes]) -> None:
        file.write(json.dumps(content, indent=1).encode() + b"\n")

    files.write_whole(Path(path), write, overwrite, (".json",))


def _read_environment() -> None:
    """Use the profile that the environment names; several threads may ask at once, and one reads it."""
    with _lock:
        if _active is not _UNREAD:
            return
        named = os.environ.get(VARIABLE)
        if not named:
            _set(None, (None, f"neither {VARIABLE} nor attn_numba.use_profile names one"))
            return
        try:
            data = Path(named).read_bytes()
        except OSError as error:
            _ignore(named, f"cannot be read: {error.strerror}", VARIABLE)
            return
        _use(Path(named), data, VARIABLE)


def _use(path: Path, data: bytes, source: str) -> bool:
    """Use a file's choices; or warn, and use the usual ones."""
    try:
        choices = _choices_of(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _ignore(str(path), str(error) if type(error) is ValueError else "is damaged", source)
        return False
    _set(choices, (str(path), source))
    return True


def _choices_of(content: Any) -> dict[str, Choice]:
    """Return a profile's choices; raise a ValueError that says why they cannot be used here."""
    from attn_numba.cpu.choices import Choice, is_valid

    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("is no profile of kernels")
    if content.get("version") != VERSION:
        raise ValueError(f"is of version {content.get('version')!r}; this library reads {VERSION}")
    here = machine()
    for part, settings in here.items():
        for name, value in settings.items():
            if content[part].get(name) != value:
                what = "other features" if name == "features" else f"{content[part].get(name)!r}, here it is {value!r}"
                raise ValueError(f"was measured elsewhere: its {part} has {name} {what}")
    choices = {}
    for name, fields in content["choices"].items():
        choices[name] = Choice(**fields)
        if not is_valid(choices[name], name):
            raise ValueError(f"is damaged: {name!r} has {fields}")
    return choices


def _ignore(path: str, reason: str, source: str) -> None:
    _set(None, (None, f"{source} names {path}, which is ignored: it {reason}"))
    warnings.warn(f"{path} {reason}; calls are computed as usual", RuntimeWarning, stacklevel=2)


def _set(choices: Mapping[str, Choice] | None, source: tuple[str | None, str]) -> None:
    global _active, _source
    _active, _source = choices, source


def _model() -> str:
    """Return the processor's name as its maker writes it, an empty text where nothing tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
