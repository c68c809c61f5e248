"""The ring of ranks against one process, started by mpiexec; what is refused, and how failures end."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import attn_numba as an
from processes import MPIEXEC, OF_LAUNCHERS, TESTS, run_python, run_ranks

pytest.importorskip("mpi4py", reason="mpi4py is not installed; it belongs to the extra mpi")

from attn_numba.integrations.mpi.launch import _under_mpi4py
from attn_numba.integrations.mpi.layouts import LAYOUTS, ring_time, stretches_of, work_of
from attn_numba.integrations.mpi.route import hops_of, legs_of

needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is not installed: pip install mpich brings one")


def start(ranks, *words, module=("-m", "mpi4py"), timeout=900, **changes):
    """Return what became of a check on so many ranks of one thread each."""
    return run_ranks(ranks, *module, str(TESTS / "mpi_checks.py"), *words, timeout=timeout, **changes)


def passed(done):
    """Return what rank 0 said at the end of a check."""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "passed on" in done.stdout
    return done.stdout


@needs_mpiexec
@pytest.mark.parametrize(("ranks", "first", "step"), [(1, 6, 16), (2, 0, 4), (3, 1, 4), (4, 2, 8)])
def test_every_rule_gives_what_one_process_does(ranks, first, step):
    """Outputs, lse and gradients, by q, k, v and by arrays of rules, on the ring and with all keys gathered.

    Each case meets one number of ranks and one layout and dtype here; ``mpi_checks.py every_case`` lets it meet more.
    """
    said = passed(start(ranks, "every_case", str(first), str(step), "alternate"))
    assert int(said.split("s: ")[1].split()[0]) > 200 // step


@needs_mpiexec
@pytest.mark.parametrize(("ranks", "check"), [(4, "shards"), (3, "agreement"), (3, "kinds"), (4, "early_end")])
def test_ranks_together(ranks, check):
    passed(start(ranks, check))


@needs_mpiexec
def test_one_rank_of_a_machine_compiles(tmp_path):
    passed(start(3, "warm", NUMBA_CACHE_DIR=str(tmp_path)))


@needs_mpiexec
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells of a peak from a moment on")
def test_memory_of_a_rank():
    passed(start(4, "memory"))


@needs_mpiexec
def test_an_exception_on_one_rank_ends_all():
    began = time.perf_counter()
    done = start(3, "fails", "raise", timeout=30)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert time.perf_counter() - began < 5 + float(run_python(IMPORT_TIME))


IMPORT_TIME = "import time; t = time.perf_counter(); import attn_numba.cpu.gradients; print(time.perf_counter() - t)"


@needs_mpiexec
def test_a_killed_rank_ends_the_job_and_is_named():
    done = start(3, "fails", "kill", timeout=30)
    assert done.returncode != 0
    assert "KILLED" in (done.stdout + done.stderr).upper()


@needs_mpiexec
def test_a_program_that_would_hang_is_warned():
    done = start(2, "shards", module=())
    passed(done)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "needed: mpiexec -n 4 python -m mpi4py program.py" in done.stderr
    assert "RuntimeWarning" not in start(2, "shards").stderr


@needs_mpiexec
def test_the_command_shares_its_pieces_and_writes_one_file(tmp_path):
    """The bits of one process, though ranks hold no shares of rows; what is wrong is said once, by all exit codes."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape, dtype=np.float32) for shape in ((2, 4, 2100, 8), *[(2, 2, 2500, 8)] * 2))
    np.savez(tmp_path / "qkv.npz", q=q, k=k, v=v)
    words = ["run", "qkv.npz", "-o", "out.npz", "--causal", "--query-offset", "400", "--lse", "--quiet"]

    done = run_ranks(3, "-m", "attn_numba", *words, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = an.attention(q, k, v, mask=an.Causal(), query_offset=400, return_lse=True)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["out"], expected.out)
        np.testing.assert_array_equal(found["lse"], expected.lse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "qkv.npz"]
    again = run_ranks(3, "-m", "attn_numba", *words, folder=tmp_path)
    assert again.returncode == 2
    assert again.stderr.count("attn-numba: error: out.npz exists") == 1
    assert again.stderr.count("error") == 1


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_of_another_mpi_is_told_apart(name):
    code = "import attn_numba as an\ntry:\n    an.mpi.Shard(3)\nexcept RuntimeError as error:\n    print(error)\n"
    said = run_python(code, **dict.fromkeys(OF_LAUNCHERS) | {name: "4"})
    assert said.startswith(f"the launcher started 4 processes ({name}), but MPI sees 1")


def test_mpi_starts_at_first_use_alone():
    code = "import sys, attn_numba as an; an.mpi; print('mpi4py.MPI' in sys.modules, 'numba' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]
    absent = "import sys; sys.modules['mpi4py'] = None; import attn_numba as an\ntry:\n    an.mpi\n"
    assert "attn-numba[mpi]" in run_python(absent + "except ModuleNotFoundError as error:\n    print(error)")


def test_command_lines():
    assert _under_mpi4py(["python", "-X", "dev", "-m", "mpi4py.futures", "a.py"])
    assert _under_mpi4py(["python", "-mmpi4py", "a.py"])
    assert not _under_mpi4py(["python", "-m", "pytest", "-m", "mpi4py"])
    assert not _under_mpi4py(["python", "a.py", "mpi4py"])


def sights():
    """Yield who sees whose block: named patterns, then random ones."""
    for ranks in (1, 2, 3, 4, 7):
        yield np.ones((ranks, ranks), bool)
        yield np.tri(ranks, dtype=bool)
        yield np.abs(np.subtract.outer(np.arange(ranks), np.arange(ranks))) <= 1
        yield np.zeros((ranks, ranks), bool)
        random = np.random.default_rng(ranks)
        for share in (0.1, 0.3, 0.7):
            yield random.random((ranks, ranks)) < share


@pytest.mark.parametrize("needed", [*sights()], ids=lambda needed: f"{len(needed)} ranks")
def test_blocks_come_to_all_who_need_them_and_gradients_go_home(needed):
    ranks = len(needed)
    legs = legs_of(needed)
    plans = [list(hops_of(legs, rank)) for rank in range(ranks)]
    steps = len(plans[0])
    assert all(len(plan) == steps for plan in plans)
    met = np.eye(ranks, dtype=bool)
    here = [*range(ranks)]
    for step in range(steps):
        now = [plan[step] for plan in plans]
        for rank, hop in enumerate(now):
            if hop.source is None:
                continue
            sender = now[hop.source]
            assert (sender.target, sender.sent) == (rank, hop.block)
            assert hop.block == hop.source if hop.number == 1 else here[hop.source] == hop.block
            assert not met[rank, hop.block], "a block comes once"
            met[rank, hop.block] = True
        for rank, hop in enumerate(now):
            if hop.target is not None:
                assert now[hop.target].source == rank
            if hop.home is not None:  # the rank whose gradients of this rank's block go home now
                assert now[hop.home].block == rank
                assert now[hop.home].source is not None
                assert now[hop.home].number == now[hop.home].reach
        here = [hop.block if hop.source is not None else None for hop in now]
    assert met[needed].all()
    far = needed & ~np.eye(ranks, dtype=bool)
    assert steps <= ranks - 1
    assert (steps == 0) == (not far.any())


@pytest.mark.parametrize("ranks", [2, 4, 7, 16])
def test_zigzag_evens_out_causal_work_and_contiguous_windows(ranks):
    n = 4096
    causal, window = an.Causal(), an.SlidingWindow(256, 0)
    visible = [
        sum((end * (end + 1) - first * (first + 1)) // 2 for first, end in own)
        for own in stretches_of(n, ranks, "zigzag")
    ]
    assert max(visible) < 1.05 * np.mean(visible)
    assert work_of(n, ranks, "zigzag", causal).sum() == pytest.approx(n * n / 2, rel=0.02)
    times = {layout: (ring_time(n, ranks, layout, causal), ring_time(n, ranks, layout, window)) for layout in LAYOUTS}
    assert times["zigzag"][0] < 1.1 * n * n / 2 / ranks
    assert times["contiguous"][0] > 1.3 * times["zigzag"][0]
    assert times["contiguous"][1] < times["zigzag"][1] or ranks == 2
