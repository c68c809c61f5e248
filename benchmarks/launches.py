"""Which kernels a call on a card really starts; and calls for which one of them is left out on purpose.

A test or a measurement of one kernel means nothing if another one served the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

KERNELS = ("wgmma", "mma", "general")
"""The forward kernels in the order in which they are asked."""


def modules() -> dict[str, ModuleType]:
    """Return the modules of the kernels that run here, by name."""
    from attn_numba.gpu import engine, weights

    return engine._kernels() | {"weights": weights}


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Give a list that names the kernels that calls inside the block start, one entry a start."""
    names: list[str] = []

    def watched(kernel: str, arguments: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            names.append(kernel)
            return arguments(*args, **kwargs)

        return record

    with contextlib.ExitStack() as stack:
        for kernel, module in modules().items():
            stack.callback(setattr, module, "arguments", module.arguments)
            module.arguments = watched(kernel, module.arguments)  # type: ignore[attr-defined]
        yield names


class Without:
    """A block in which some kernels refuse every call; it may be entered again and again, one at a time.

    Parameters
    ----------
    kernels : str
        Names in `KERNELS`.
    """

    def __init__(self, *kernels: str) -> None:
        self._kernels, self._prepared = kernels, None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        if not self._kernels:
            return
        from attn_numba.gpu import engine
        from attn_numba.gpu.kept import Kept

        if self._prepared is None:
            self._prepared = Kept(engine.PREPARED)  # calls that repeat go where they went: these have their own memory
        self._replace(engine, "_prepared", self._prepared)
        for kernel in modules().keys() & self._kernels:
            self._replace(modules()[kernel], "refusal", lambda problem, capability: "it is left out on purpose")

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _replace(self, module: ModuleType, name: str, value: object) -> None:
        self._stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)


def expected(dtype: str, capability: tuple[int, int]) -> str:
    """Return the kernel that serves a softmax of dot products of head sizes up to 256 on a card."""
    if dtype in ("float16", "bfloat16"):
        if capability == (9, 0):
            return "wgmma"
        if capability >= (8, 0):
            return "mma"
    return "general"
