"""What the card is, what compiles for it, and which kernel serves what there."""

from __future__ import annotations

from typing import Any

from attn_numba.gpu import driver, engine, machine_code
from attn_numba.gpu.availability import CARRIED, carried_folder
from attn_numba.gpu.target import SIMULATED

__all__ = ["gpu_report"]


def gpu_report() -> dict[str, tuple[Any, str]]:
    """Return settings and what they come from, of a machine where CUDA is available.

    Returns
    -------
    dict of str to (value, str)
        The card, driver, toolkit and folders of machine code; and for each dtype the kernel that serves a plain softmax
        of it, and why not the kernels that are asked before that.
    """
    if SIMULATED:
        report: dict[str, tuple[Any, str]] = {"card": ("none", "simulated by Numba: NUMBA_ENABLE_CUDASIM")}
        capability = (0, 0)
    else:
        card = driver.card(0)
        capability = card.capability
        cards = driver.card_count()
        report = {
            "card": (card.name, f"the first of {cards}" if cards > 1 else "the only one"),
            "compute capability": (".".join(map(str, capability)), "driver"),
            "driver": (".".join(map(str, driver.driver_version())), "newest CUDA that it knows"),
            "toolkit": (", ".join(" ".join(x) for x in machine_code.compilers()), "installed packages"),
            "cache folder": machine_code.cache_folder(),
            "carried folder": (carried_folder(), CARRIED),
        }
    for dtype, (kernel, reason) in engine.served(capability).items():
        report[dtype] = (kernel, reason)
    return report
