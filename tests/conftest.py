"""What all tests share: the backends that can run here, and a closing line on what was compiled."""

import sys

import pytest

from attn_numba import backends

BACKENDS = [name for name, (available, _) in backends().items() if available]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that can run here, the reference among them."""
    return request.param


def compiled_structures() -> int:
    """How many different sets of rules the CPU backend has compiled hooks for in this process."""
    hooks = sys.modules.get("attn_numba.cpu.hooks")
    return len(hooks._engines) if hooks is not None else 0


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"structures of rules compiled: {compiled_structures()}")
    for name, (available, reason) in backends().items():
        if not available:
            terminalreporter.write_line(f"backend {name} did not run: {reason}")
