"""Run Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_python(code: str, *, timeout: float = 300, **environment: str | None) -> str:
    """Return what a new Python process prints; an environment variable of None is taken away.

    The process finds the modules of this folder, and the package where this process found it.
    """
    found = {**os.environ, **environment}
    path = [str(TESTS), *sys.path, found.get("PYTHONPATH") or ""]
    if "PYTHONPATH" in environment:  # to be found first
        path.reverse()
    found["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    found = {name: value for name, value in found.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
