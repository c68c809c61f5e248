"""Whether CUDA can run here, and the precise reason where it cannot."""

from __future__ import annotations

import importlib.util
import os
import sys

from attn_numba.gpu import driver

__all__ = ["CARRIED", "availability", "carried_folder"]

CARRIED = "ATTN_NUMBA_CUDA_CODE"  # the environment's name of a folder of machine code made elsewhere
INSTALL = "install attn-numba[cuda13], or attn-numba[cuda12] for a driver of CUDA 12"
PACKAGES = {"numba_cuda": "numba-cuda", "cuda.bindings": "cuda-bindings", "cuda.core": "cuda-core"}
COMPILERS = ("nvvm", "nvJitLink", "cudart")


def carried_folder() -> str | None:
    """Return the folder of machine code made elsewhere, if the environment names one."""
    return os.environ.get(CARRIED) or None


def availability() -> tuple[bool, str]:
    """Return whether calls can run on a card, or in the simulator, and what it is or why they cannot."""
    if is_simulated():
        return True, "Numba's simulator (NUMBA_ENABLE_CUDASIM), for arrays in host memory"
    for module, package in PACKAGES.items():
        if not _is_installed(module):
            return False, f"{package} is not installed: {INSTALL}"
    try:
        count = driver.card_count()
    except Exception as error:  # what cuda.bindings raises without a driver differs between its versions
        return False, f"there is no NVIDIA driver that works: {_line(error)}"
    if count == 0:
        return False, "the NVIDIA driver finds no card"
    try:
        card = driver.card(0)
    except Exception as error:  # such as one that another process has for itself
        return False, f"the first card does not start: {_line(error)}"
    name = f"{card.name}, compute capability {card.capability[0]}.{card.capability[1]}"
    folder = carried_folder()
    if folder is not None:
        return True, f"{name}; machine code of {CARRIED}={folder}"
    reason = missing_compiler()
    if reason:
        return False, f"there is a card ({name}), and no CUDA toolkit to compile for it: {reason}; {INSTALL}"
    oldest = driver.oldest_capability()
    if oldest is not None and card.capability < oldest:
        return False, f"the card is too old: {name}; the CUDA toolkit here compiles for {oldest[0]}.{oldest[1]} or more"
    return True, name


def is_simulated() -> bool:
    """Whether Numba simulates CUDA in this process; Numba need not be loaded yet."""
    numba = sys.modules.get("numba")
    if numba is not None:
        return bool(getattr(numba.config, "ENABLE_CUDASIM", False))
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def missing_compiler() -> str:
    """Return which library of the CUDA toolkit is missing and where it was looked for; an empty text for none."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    for name in COMPILERS:
        try:
            load_nvidia_dynamic_lib(name)
        except Exception as error:
            return f"{name} is missing: {_line(error)}"
    return ""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
