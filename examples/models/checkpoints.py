"""A training run on disk: one `.safetensors` file with weights, moments, and what else it takes to go on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .command import Failure

Array = NDArray[Any]


def write(path: Path, arrays: Mapping[str, Array], said: Mapping[str, Any]) -> None:
    """Write arrays, and beside them values that JSON can hold; whoever reads sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, _header(said))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the name may move to the new file only after its bytes are on the disk
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return what `write` was given."""
    if not path.is_file():
        raise Failure(f"{path} does not exist: there is nothing to go on from")
    try:
        with safe_open(path, framework="np") as file:
            said = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, said  # noqa: SIM118, it is no dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise Failure(f"{path} is damaged or not a checkpoint: {error}") from error


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise Failure for the first setting in which a checkpoint differs from the run that is to go on from it."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise Failure(f"{path} is of a run with {name} {found.get(name)}; this one has {value}")


def _header(said: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in said.items()}
