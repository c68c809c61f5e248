"""What is to run on a card, tried without one: the record of kernels, the script of all parts."""

import os
import sys
import time
import zipfile

import numpy as np
import pytest

import attn_numba as an
from processes import run_python

launches = pytest.importorskip("launches", reason="the folder benchmarks is not beside the tests")
on_a_card = pytest.importorskip("on_a_card", reason="the folder benchmarks is not beside the tests")
from test_cuda_host import card  # noqa: E402, F401  a fixture, and its reasons to skip


def kernels_of(dtype, D, *left_out, **rules):
    from attn_numba.workloads import named_dtype

    x = np.ones((1, 2, 20, D), named_dtype(dtype))
    with launches.Without(*left_out), launches.recorded() as started:
        an.attention(x, x, x, backend="cuda", **rules)
    return started


def test_kernels_are_recorded_and_left_out(card):  # noqa: F811
    """A call that repeats goes where it went before, but for what is left out on purpose meanwhile."""
    pytest.importorskip("ml_dtypes")
    for dtype in ("bfloat16", "float16"):
        assert kernels_of(dtype, 64) == [launches.expected(dtype, card.capability)] == ["wgmma"]
        assert kernels_of(dtype, 64, "wgmma") == ["mma"]
        assert kernels_of(dtype, 64, "wgmma", "mma") == ["general"]
        assert kernels_of(dtype, 64) == ["wgmma"]
        assert kernels_of(dtype, 5) == ["general"]
    assert kernels_of("float32", 64) == [launches.expected("float32", card.capability)] == ["general"]
    assert kernels_of("float16", 64, normalizer=an.Entmax15()) == ["general"]
    assert kernels_of("float16", 64, return_weights=True) == ["wgmma", "weights"]
    assert len(card.started) == 14


def test_one_block_left_out_again_and_again(card):  # noqa: F811
    without = launches.Without("wgmma")
    x = np.ones((1, 2, 20, 64), np.float16)
    for _ in range(2):
        with without, launches.recorded() as started:
            an.attention(x, x, x, backend="cuda")
        assert started == ["mma"]
    assert kernels_of("float16", 64) == ["wgmma"]


def test_every_kernel_has_a_call():
    from few_calls import CALLS

    assert [kernel for kernel in launches.KERNELS if not any(call.kernel == kernel for call in CALLS)] == []


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
def test_a_part_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(on_a_card, "PATIENCE", 0.5)
    with (tmp_path / "log").open("wb") as log:
        status = on_a_card.waited([sys.executable, "-c", STUBBORN], log, 2.0, dict(os.environ))
        assert status == "stopped after 2 s"
        assert on_a_card.waited([sys.executable, "-c", "raise SystemExit(3)"], log, 60, dict(os.environ)) == (
            "failed with exit status 3"
        )
        assert on_a_card.waited(["no-such-program"], log, 60, dict(os.environ)).startswith("failed to start")
    child = int((tmp_path / "log").read_text().split()[0])
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_package_runs_from_where_it_is_laid_out(tmp_path):
    site = on_a_card.laid_out(tmp_path)
    code = "import attn_numba, attn_numba.reference as r; print(attn_numba.__file__); print(r.__file__)"
    for path in run_python(code, PYTHONPATH=str(site)).split():
        assert path.startswith(str(site))
    assert on_a_card.laid_out(tmp_path) == site  # again, over what is there


def test_wheels_that_are_carried_come_first(tmp_path):
    wheels = tmp_path / "carried" / on_a_card.WHEELS
    wheels.mkdir(parents=True)
    for name in ("one", "other"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "where = __file__")
    bench = on_a_card.Bench(tmp_path, tmp_path / "work", tmp_path / "carried", 1)
    code = "import one, other; print(one.where); print(other.where)"
    for path in run_python(code, PYTHONPATH=bench.environment["PYTHONPATH"]).split():
        assert path.startswith(str(tmp_path / "work"))


def test_a_long_log_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(on_a_card, "LONGEST_LOG", 4000)
    path = tmp_path / "log"
    path.write_bytes(b"begin" + b"." * 9000 + b"end")
    on_a_card.shortened(path)
    assert path.stat().st_size < 4000
    assert path.read_bytes().startswith(b"begin")
    assert on_a_card.tail(path, 8000).endswith("end")
    path.write_text("old\nnew")
    assert on_a_card.tail(path, 4) == "new"
