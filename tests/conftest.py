"""What all tests share: the backends that can run here, tests that want a card, a closing line on what was compiled."""

import gc
import os
import sys
import time

import pytest

from attn_numba import backends
from processes import COLLECTIONS

gc.set_threshold(*COLLECTIONS)

BACKENDS = [name for name, (available, _) in backends().items() if available]
UNTIL = float(os.environ.get("ATTN_NUMBA_TESTS_UNTIL", "inf"))  # when tests on a card stop being begun, in Unix time


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that can run here, the reference among them."""
    return request.param


def compiled_structures() -> int:
    """How many different sets of rules the CPU backend has compiled hooks for in this process."""
    hooks = sys.modules.get("attn_numba.cpu.hooks")
    return len(hooks._engines) if hooks is not None else 0


def pytest_itemcollected(item):
    """Mark the tests of all backends where they run on a card."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "cuda":
        item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item):
    if time.time() > UNTIL and item.get_closest_marker("gpu"):
        pytest.skip("no time left: ATTN_NUMBA_TESTS_UNTIL has passed")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_logreport(report):
    """End a process of pytest-xdist whose card answers nothing any more: another one takes the tests that are left."""
    result = yield
    if report.failed and "gpu" in report.keywords and "PYTEST_XDIST_WORKER" in os.environ:
        from device import broken

        reason = broken()
        if reason:
            sys.stderr.write(f"{report.nodeid} broke this process's card: {reason}\n")
            sys.stderr.flush()
            os._exit(3)
    return result


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"structures of rules compiled: {compiled_structures()}")
    for name, (available, reason) in backends().items():
        if not available:
            terminalreporter.write_line(f"backend {name} did not run: {reason}")
