"""Where a process runs: threads inside tasks of others, ranks, file systems, and many processes on one cache folder."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import attn_numba as an
from attn_numba import cluster, parallel
from processes import environment, run_python

UNTOLD = {"NUMBA_NUM_THREADS": None, "OMP_NUM_THREADS": None}


@pytest.fixture
def many_cores(monkeypatch):
    """A process that may use six cores, and of whose threads the environment says nothing."""
    monkeypatch.setattr(parallel, "_from_machine", lambda: (6, "the machine"))
    monkeypatch.setattr(parallel, "_from_environment", lambda: None)


# --- threads ---


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_a_task_of_dask_uses_one_thread_unless_told(scheduler, many_cores):
    dask = pytest.importorskip("dask", reason="dask is not installed; it belongs to the extra dask")
    count = dask.delayed(parallel.thread_count, pure=False)

    def own():
        with an.threads(3):
            return parallel.thread_count()

    assert parallel.thread_count() == (6, "the machine")
    assert count().compute(scheduler=scheduler) == (1, "a task of Dask")
    assert dask.delayed(own)().compute(scheduler=scheduler) == (3, "attn_numba.threads")
    an.set_threads(2)
    try:
        assert count().compute(scheduler=scheduler) == (2, "attn_numba.set_threads")
    finally:
        an.set_threads(None)
    assert parallel.thread_count() == (6, "the machine")


def test_the_environment_tells_a_task_too(many_cores, monkeypatch):
    dask = pytest.importorskip("dask", reason="dask is not installed; it belongs to the extra dask")
    monkeypatch.setattr(parallel, "_from_environment", lambda: (4, "OMP_NUM_THREADS"))
    assert dask.delayed(parallel.thread_count)().compute() == (4, "OMP_NUM_THREADS")


def test_a_worker_of_joblib_uses_one_thread_unless_told(many_cores):
    joblib = pytest.importorskip("joblib", reason="joblib is not installed; it comes with scikit-learn")

    def counts(n, backend, function=parallel.thread_count):
        return joblib.Parallel(n, backend=backend)(joblib.delayed(function)() for _ in range(2))

    assert counts(2, "threading") == [(1, "a worker of joblib")] * 2
    assert counts(1, "threading") == [(6, "the machine")] * 2, "nothing runs side by side"
    assert counts(2, "threading", tell_three) == [(3, "attn_numba.threads")] * 2
    assert parallel.thread_count() == (6, "the machine")


def tell_three():
    with an.threads(3):
        return parallel.thread_count()


WORKERS = """
import sys
from attn_numba.parallel import thread_count

if __name__ == "__main__":
    if sys.argv[1] == "dask":
        import dask
        counts = dask.compute([dask.delayed(thread_count, pure=False)() for _ in range(3)], scheduler="processes")[0]
    else:
        from joblib import Parallel, cpu_count, delayed
        counts = Parallel(cpu_count() + 1, backend=sys.argv[1])(delayed(thread_count)() for _ in range(3))
    print({count for count, _ in counts})
"""


@pytest.mark.parametrize("by", ["loky", "multiprocessing", "dask"])
def test_a_worker_process_uses_one_thread(by, tmp_path):
    pytest.importorskip("dask" if by == "dask" else "joblib")
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    assert run_python(str(script), by, **UNTOLD) == "{1}\n"


# --- ranks and file systems ---

REPORT = """
import json, sys
import attn_numba as an
found = an.config_report()["ranks"]
assert "mpi4py" not in sys.modules
print(json.dumps(found))
"""
NOBODY = dict.fromkeys(name for names in cluster.LAUNCHERS.values() for name in names)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0"}, (1, 4)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, (5, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # in a job's script, not started by srun
        ({"PMI_RANK": "first", "PMI_SIZE": "3"}, (0, 1)),
    ],
    ids=str,
)
def test_ranks_are_those_that_a_launcher_tells(variables, place, monkeypatch):
    for name in NOBODY:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    found = cluster.ranks()
    assert (found["rank"][0], found["count"][0]) == place
    assert all(name in found["rank"][1] for name in variables if len(variables) == 2 and place != (0, 1))


def test_the_report_does_not_load_mpi():
    ranks = run_python(REPORT, **NOBODY)
    assert '"rank": [0' in ranks
    installed = importlib.util.find_spec("mpi4py") is not None
    assert ("mpi4py is not installed" in ranks) == (not installed)


class FakeMPI:
    """What `cluster` asks of mpi4py.MPI."""

    class COMM_WORLD:
        Get_rank, Get_size = staticmethod(lambda: 6), staticmethod(lambda: 7)

    initialized = True
    Is_initialized = classmethod(lambda cls: cls.initialized)
    Is_finalized = staticmethod(lambda: False)
    Get_library_version = staticmethod(lambda: "MPICH Version:      5.0\nand more\0")


@pytest.mark.parametrize("initialized", [True, False])
def test_a_process_that_has_loaded_mpi_is_asked_itself(initialized, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", FakeMPI)
    monkeypatch.setattr(FakeMPI, "initialized", initialized)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    found = cluster.ranks()
    assert (found["rank"][0], found["count"][0]) == ((6, 7) if initialized else (1, 2))
    assert found["MPI library"] == ("MPICH Version: 5.0", "mpi4py.MPI, as this process has loaded it")


MOUNTED = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /home rw shared:2 - nfs4 server:/home rw
24 23 0:22 / /home/me/local rw - tmpfs tmpfs rw
25 22 0:23 / /with\040space rw - fuse.sshfs me@there: rw
26 22 0:24 / /scratch rw - ext4 /dev/vdb rw
27 26 0:25 / /scratch rw - lustre mds@tcp:/scratch rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "mount", "network"),
    [
        ("/opt/x", "ext4", "/", False),
        ("/homes", "ext4", "/", False),
        ("/home/me/.cache/numba", "nfs4", "/home", True),
        ("/home/me/local/numba", "tmpfs", "/home/me/local", False),
        ("/with space/x", "fuse.sshfs", "/with space", True),
        ("/scratch/x", "lustre", "/scratch", True),
    ],
)
def test_the_file_system_of_a_folder(folder, kind, mount, network, tmp_path, monkeypatch):
    table = tmp_path / "mounts"
    table.write_text(MOUNTED.lstrip())
    monkeypatch.setattr(cluster, "MOUNTS", str(table))
    monkeypatch.setattr(cluster.os.path, "realpath", lambda path: path)
    found = cluster.file_system(folder)
    assert found["file system"] == (kind, f"mounted at {mount}")
    assert found["on a network"][0] is network


def test_a_system_that_tells_of_no_mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "MOUNTS", str(tmp_path / "nothing"))
    assert cluster.file_system("/")["file system"][0] is None


# --- one cache folder for many processes ---

COLD = """
import numpy as np
import attn_numba as an
from numba.core import event
from test_promises import arrays

q, k, v = (x.astype(float) for x in arrays(M=3, N=50, D=16, E=16))
cache = an.KVCache(k.shape[0], k.shape[1], 16, dtype="float64")
cache.append(k, v)
with an.threads(1), event.install_recorder("numba:compile") as recorder:
    found = an.decode(q, cache)
expected = an.attention(q, k, v, backend="reference")
np.testing.assert_allclose(found, expected, atol=1e-13)
print("compiled" if recorder.buffer else "loaded", found.tobytes().hex())
"""


@pytest.mark.slow
def test_four_processes_that_start_cold_on_one_cache_folder(tmp_path):
    """All compile at once and write the same files; all are right, and what they leave serves the next.

    Of all kernels this one compiles in the least time; all are kept in the same way.
    """
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-c", COLD]
    started = [
        subprocess.Popen(
            command, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 4, [err for _, err in ended]
    told = [out.split() for out, _ in ended]
    assert "compiled" in {how for how, _ in told}
    assert run_python(COLD, **settings).split() == ["loaded", told[0][1]]
    assert len({found for _, found in told}) == 1
