"""Where a call runs: in several threads, in forked and spawned processes, without a cache folder, in little memory."""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import attn_numba as an
from processes import run_python
from test_promises import arrays

BIG = {"M": 300, "N": 300, "D": 64, "E": 64}  # enough work for several threads


# --- Python threads ---


@pytest.mark.parametrize("callers", [2, 5])
def test_calls_from_several_threads_at_once(callers):
    rules = [
        {"mask": an.Causal()},
        {"mask": an.Padding([150, 290])},
        {"modifiers": an.SoftCap(3.0)},
        {"mask": np.random.default_rng(0).random((300, 300)) < 0.5},
        {},
    ]
    inputs = [arrays(**BIG, seed=n) for n in range(callers)]
    expected = [an.attention(*x, **rules[n]) for n, x in enumerate(inputs)]
    found: list[list[np.ndarray]] = [[] for _ in range(callers)]
    together = threading.Barrier(callers)

    def call(n):
        together.wait()
        for count in (2, 3, 1, 2, 2, 2):
            with an.threads(count):
                found[n].append(an.attention(*inputs[n], **rules[n]))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(callers):
        assert len(found[n]) == 6
        for out in found[n]:
            np.testing.assert_array_equal(out, expected[n])


def test_many_small_calls_from_several_threads():
    """Helpers that are woken, called back and lent to others, thousands of times."""
    inputs = [arrays(B=1, H=8, Hk=8, M=64, N=64, D=D, E=D, seed=D) for D in (48, 64)]
    with an.threads(1):
        expected = [an.attention(*x) for x in inputs]
    wrong = []

    def call(count):
        with an.threads(count):
            for n in range(600):
                out = an.attention(*inputs[n % 2])
                if not np.array_equal(out, expected[n % 2]):
                    wrong.append(n)
                if n % 100 == 0:
                    time.sleep(1e-3)  # long enough for helpers to fall asleep

    threads = [threading.Thread(target=call, args=(count,)) for count in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FIRST_CALLS = """
import threading
import numpy as np
import attn_numba as an
from test_promises import arrays

inputs = arrays(M=300, N=300, D=64, E=64)
masks = [an.Causal(), an.Causal(), an.SlidingWindow(20, 3), an.Causal() & an.SlidingWindow(50, 0)]
found, together = [None] * 4, threading.Barrier(4)

def call(n):
    together.wait()
    with an.threads(2):
        found[n] = an.attention(*inputs, mask=masks[n])

threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
for n in range(4):
    assert np.array_equal(found[n], an.attention(*inputs, mask=masks[n])), n
print("same")
"""


def test_the_first_calls_of_a_process_at_once():
    """Kernels and hooks are loaded or compiled by whoever comes first."""
    assert run_python(FIRST_CALLS) == "same\n"


def test_threads_are_a_matter_of_the_calling_thread():
    seen = []

    def look():
        seen.append(an.config_report()["threads"]["count"])

    with an.threads(3):
        assert an.config_report()["threads"]["count"] == (3, "attn_numba.threads")
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen[0][1] != "attn_numba.threads"


# --- processes ---

FORKED = """
import os
import numpy as np
import attn_numba as an
from test_promises import arrays

inputs = arrays(M=300, N=300, D=64, E=64)
an.set_threads(2)
expected = an.attention(*inputs, mask=an.Causal()) {started}
child = os.fork()
if child == 0:
    status = 1
    try:
        out = an.attention(*inputs, mask=an.Causal())
        again = an.attention(*inputs, mask=an.Causal())
        status = 0 if np.array_equal(out, again) and (expected is None or np.array_equal(out, expected)) else 2
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert np.array_equal(an.attention(*inputs, mask=an.Causal()), an.attention(*inputs, mask=an.Causal()))
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("started", ["", "if False else None"], ids=["threads started", "no thread started"])
def test_after_a_fork(started):
    """The child computes the same, whether or not the parent's threads were running."""
    assert run_python(FORKED.format(started=started)) == "same\n"


FORKED_AMID_CALLS = """
import os
import threading
import numpy as np
import attn_numba as an
from test_promises import arrays

inputs = arrays(M=300, N=300, D=64, E=64)
an.set_threads(2)
expected = an.attention(*inputs, mask=an.Causal())
done = threading.Event()

def keep_calling():
    n = 0
    while not done.is_set():
        n += 1
        an.attention(*inputs, mask=an.Padding(n % 300))  # a rule that is bound anew

threads = [threading.Thread(target=keep_calling) for _ in range(2)]
[t.start() for t in threads]
statuses = []
for _ in range(15):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import signal

            signal.alarm(10)  # a child that waits forever for a lock ends so
            status = 0 if np.array_equal(an.attention(*inputs, mask=an.Causal()), expected) else 2
        finally:
            os._exit(status)
    statuses.append(os.waitpid(child, 0)[1])
done.set()
[t.join() for t in threads]
print(set(statuses))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_amid_calls_of_other_threads():
    """Threads that are in the middle of a call when another one forks leave nothing locked in the child."""
    assert run_python(FORKED_AMID_CALLS) == "{0}\n"


INTERRUPTED = """
import signal
import numpy as np
import attn_numba as an
from test_promises import arrays

inputs = arrays(M=2000, N=2000, D=64, E=64)
small = arrays()
expected = an.attention(*small)
interrupted = 0
with an.threads(2):
    for _ in range(3):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            an.attention(*inputs)
        except KeyboardInterrupt:
            interrupted += 1
        assert np.array_equal(an.attention(*small), expected)
print(interrupted)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="timers are of Unix")
def test_an_interrupt_waits_for_the_workers():
    """Ctrl-C in a long call is raised once no worker uses the call's memory any more."""
    handler = "import signal; signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    assert run_python(handler + INTERRUPTED) == "3\n"


CHILDREN = """
import multiprocessing
import sys
import numpy as np
import attn_numba as an
from test_promises import arrays


def compute(seed):
    with an.threads(2):
        return an.attention(*arrays(M=300, N=300, D=64, E=64, seed=seed), mask=an.Causal())


if __name__ == "__main__":
    expected = [compute(seed) for seed in range(3)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        found = pool.map(compute, range(3))
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    print("same")
"""


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_in_children_of_multiprocessing(start, tmp_path):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    script = tmp_path / "script.py"
    script.write_text(CHILDREN)
    assert run_python(str(script), start) == "same\n"


# --- compiled code ---

WITHOUT_CACHE = """
import json
import attn_numba as an
from test_promises import arrays

inputs = arrays(M=300, N=300, D=64, E=64)
with an.threads(2):
    found = float(an.attention(*inputs, mask=an.Causal()).astype(float).sum())
print(json.dumps([an.__file__, an.config_report()["cache"]["folder"], found]))
"""


@pytest.mark.slow
def test_without_a_folder_for_compiled_code(tmp_path):
    """A copy of the package whose cache folder is a file, in a home that is a file: it compiles and keeps nothing."""
    package = Path(an.__file__).parent
    shutil.copytree(package, tmp_path / "attn_numba", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(an.reference.__file__).parent, tmp_path / "attn_numba" / "reference", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "attn_numba" / "reference" / "__pycache__", ignore_errors=True)
    (tmp_path / "attn_numba" / "cpu" / "__pycache__").write_text("not a folder")
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder")
    folders = ("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "IPYTHONDIR")
    home = {name: str(nowhere / "x") for name in folders}
    printed = run_python(WITHOUT_CACHE, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", **home)
    file, (folder, reason), found = json.loads(printed)
    assert Path(file).parent == tmp_path / "attn_numba"
    assert folder is None
    assert "no folder can be written" in reason
    inputs = arrays(**BIG)
    assert found == float(an.attention(*inputs, mask=an.Causal()).astype(float).sum())


def pairs_of_rules():
    """Two calls' arguments each, of one structure and other parameters."""
    rng = np.random.default_rng(0)

    def dense(share):
        return an.Dense(rng.random((2, 4, 30, 40)) < share)

    return {
        "Causal": [{"mask": an.Causal(), "query_offset": n} for n in (3, 70)],
        "SlidingWindow": [{"mask": an.SlidingWindow(*n), "query_offset": 10} for n in ((3, -1), (-1, 8))],
        "Neighborhood": [
            {"mask": an.Neighborhood(*n), "query_offset": 0} for n in (((5, 8), (3, 3)), ((8, 5), (1, 5)))
        ],
        "Padding": [{"mask": an.Padding(n)} for n in (17, 40)],
        "SameDocument": [{"mask": an.SameDocument(rng.integers(0, n, 30), rng.integers(0, n, 40))} for n in (2, 5)],
        "PrefixLM": [{"mask": an.PrefixLM(n), "query_offset": 0} for n in (5, 6)],
        "BlockSparse": [{"mask": an.BlockSparse(rng.random((3, 4)) < 0.5, (10, 10))} for _ in range(2)],
        "Dense": [{"mask": dense(share)} for share in (0.2, 0.8)],
        "joined": [
            {"mask": ~an.SlidingWindow(n, n) & (an.Padding(n) | an.Causal()), "query_offset": n} for n in (4, 9)
        ],
        "CustomMask": [
            {"mask": an.CustomMask(lambda b, h, i, j, p: (i + j) % p[0] < p[1], (n, 2)), "query_offset": 0}
            for n in (3, 7)
        ],
        "SoftCap": [{"modifiers": an.SoftCap(cap)} for cap in (2.0, 30.0)],
        "Bias": [{"modifiers": an.Bias(rng.standard_normal((4, 30, 40)))} for _ in range(2)],
        "ALiBi": [{"modifiers": an.ALiBi(rng.random(4)), "query_offset": 5} for _ in range(2)],
        "Temperature": [{"modifiers": an.Temperature(t)} for t in (0.5, 3.0)],
        "ReplaceExcluded": [{"modifiers": an.ReplaceExcluded(dense(0.5), value)} for value in (-1.0, -1e9)],
        "CustomModifier": [
            {"modifiers": an.CustomModifier(lambda s, b, h, i, j, p: s * p[0], (x,)), "query_offset": 0}
            for x in (0.5, 2.0)
        ],
        "Dropout": [{"dropout": an.Dropout(rate, 7), "query_offset": 0} for rate in (0.1, 0.6)],
        "sink": [{"normalizer": an.Softmax(sink)} for sink in (0.0, 2.0)],
        "scale": [{"scale": scale} for scale in (0.3, 2.0)],
        "scale below 0": [{"scale": scale} for scale in (-0.3, -2.0)],
    }


@pytest.mark.parametrize("name", pairs_of_rules())
def test_new_parameters_compile_nothing(name):
    from numba.core import event

    from attn_numba.cpu import hooks

    first, second = pairs_of_rules()[name]
    q, k, v = arrays(M=30, N=40)
    an.attention(q, k, v, **first)
    before = len(hooks._engines)
    with event.install_recorder("numba:compile") as recorder:
        found = an.attention(q, k, v, **second, return_lse=True)
    assert len(hooks._engines) == before
    assert not recorder.buffer
    expected = an.attention(q, k, v, **second, return_lse=True, backend="reference")
    np.testing.assert_allclose(found.out, expected.out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-4, atol=1e-5)


# --- memory ---

MEMORY = """
import numpy as np
import attn_numba as an

def peak():  # of this process alone: what getrusage tells begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

q, k, v = (np.random.default_rng(n).standard_normal((1, 1, {length}, 64), np.float32) for n in range(3))
out = np.ones_like(q)

def call(q, k, v, out):
    {calls}

with an.threads(2):
    call(*(x[:, :, :512] for x in (q, k, v, out)))
    before = peak()
    call(q, k, v, out)
print(peak() - before)
"""
BY_TILES = """
    an.attention(q, k, v, mask=an.Causal(), out=out)
    an.attention(q, k, v, mask=an.SlidingWindow(700, 9), modifiers=an.SoftCap(9.0), out=out, return_lse=True)
"""
BY_ROWS = """
    an.attention(q, k, v, normalizer=an.Sparsemax(), mask=an.Causal(), out=out)
    an.attention(q, k, v, normalizer=an.DoubleSoftmax(), mask=an.SlidingWindow(700, 9), out=out)
    an.entropy(q, k, mask=an.Causal()), an.top_keys(q, k, 2, mask=an.Causal()), an.column_sums(q, k, mask=an.Causal())
    an.weights_of(q, k, rows=slice(0, 9))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read as Linux tells it")
@pytest.mark.parametrize(("calls", "most"), [(BY_TILES, 24), (BY_ROWS, 40)], ids=["by tiles", "by rows"])
def test_a_long_sequence_needs_little_memory(calls, most):
    """16384 x 16384 scores would take 1 GiB; a call takes its workers' tiles, or their keys and rows of scores."""
    assert int(run_python(MEMORY.format(length=16384, calls=calls.strip()))) < most * 2**20


# --- imports ---


def test_import_is_light():
    heavy = ("numba", "llvmlite", "scipy", "attn_numba.rules", "attn_numba.api", "ml_dtypes", "torch")
    code = f"import sys, attn_numba; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_python(code) == "[]\n"


def test_names_come_when_asked_for():
    code = "import sys, attn_numba as an; an.Causal() & an.Padding(3); an.attention; print('numba' in sys.modules)"
    assert run_python(code) == "False\n"
    assert set(an.__all__) <= set(dir(an))
    for name in an.__all__:
        assert getattr(an, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        an.flash  # noqa: B018


WITHOUT_NUMBA = """
import sys
for name in ("numba", "llvmlite", "scipy"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
import attn_numba as an

q = k = v = np.arange(12.0).reshape(3, 4)
out = an.attention(q, k, v, mask=an.Causal(), modifiers=an.SoftCap(3.0), backend="reference")
assert np.array_equal(out[0], v[0])
layer = an.SelfAttention(4)(q[None], backend="reference")
assert an.mask_array(an.Causal(), (1, 1, 3, 3)).sum() == 6
assert an.merge([out], [np.zeros(3)])[0].shape == (3, 4)
assert an.backends()["cpu"] == (False, "numba is not installed"), an.backends()
assert an.config_report()["versions"]
for backend in ("cpu", "auto"):
    try:
        an.attention(q, k, v, backend=backend)
    except NotImplementedError as error:
        assert "numba" in str(error) and "'reference'" in str(error), error
    else:
        raise AssertionError(backend)
print("computed")
"""


def test_the_reference_needs_numpy_alone():
    assert run_python(WITHOUT_NUMBA) == "computed\n"


# --- settings ---


@pytest.mark.parametrize(
    ("numba", "omp", "expected"),
    [
        ("3", "5", (3, "NUMBA_NUM_THREADS")),
        (None, "5", (5, "OMP_NUM_THREADS")),
        (None, "5,2", (5, "OMP_NUM_THREADS")),
        ("many", "4", (4, "OMP_NUM_THREADS")),
        ("0", None, None),
        (None, None, None),
    ],
)
def test_where_the_number_of_threads_comes_from(numba, omp, expected):
    code = "from attn_numba.parallel import thread_count; print(*thread_count(), sep='|')"
    count, source = run_python(code, NUMBA_NUM_THREADS=numba, OMP_NUM_THREADS=omp).strip().split("|")
    if expected is None:
        assert 1 <= int(count) <= (os.cpu_count() or 1)
        assert source in ("processors this process may use", "cgroup quota")
    else:
        assert (int(count), source) == expected


def test_threads_are_restored():
    before = an.config_report()["threads"]["count"]
    an.set_threads(7)
    try:
        with an.threads(2), an.threads(3):
            assert an.config_report()["threads"]["count"] == (3, "attn_numba.threads")
        assert an.config_report()["threads"]["count"] == (7, "attn_numba.set_threads")
        with pytest.raises(KeyError), an.threads(2):
            raise KeyError
        assert an.config_report()["threads"]["count"] == (7, "attn_numba.set_threads")
    finally:
        an.set_threads(None)
    assert an.config_report()["threads"]["count"] == before


def test_warmup_leaves_nothing_to_compile():
    from numba.core import event

    seconds = an.warmup(("float32", "float64", "float16", "bfloat16"))
    assert list(seconds) == ["float32", "float64", "float16", "bfloat16"]
    assert all(isinstance(x, float) and x >= 0 for x in seconds.values())
    with event.install_recorder("numba:compile") as recorder:
        an.attention(*arrays(M=3, N=3))
        assert sum(an.warmup("float32").values()) < 0.1
    assert not recorder.buffer


def test_warmup_of_every_kernel():
    from numba.core import event

    assert list(an.warmup("float32", every=True)) == ["float32"]
    q, k, v = arrays(M=3, N=3)
    with event.install_recorder("numba:compile") as recorder:
        an.attention(q, k, v, normalizer=an.Sparsemax(), return_weights=True)
        an.attention(q, k, v, mask=an.SlidingWindow(1, 1), return_weights=True)
        an.entropy(q, k)
    assert not recorder.buffer


def test_warmup_of_gradients():
    from numba.core import event

    an.warmup("float32", every=True, gradients=True)
    q, k, v = arrays(M=3, N=3)
    dout = np.ones((*q.shape[:-1], v.shape[-1]), q.dtype)
    with event.install_recorder("numba:compile") as recorder:
        an.attention_vjp(q, k, v, dout)
        an.attention_vjp(q, k, v, dout, normalizer=an.Sparsemax())
    assert not recorder.buffer


def test_reports():
    report = an.config_report()
    assert {"versions", "processor", "threads", "cache", "backends"} <= set(report)
    for section in report.values():
        for setting, (_, source) in section.items():
            assert isinstance(source, str), setting
    assert {name: yes for name, (yes, _) in an.backends().items()} == {
        name: yes for name, (yes, _) in report["backends"].items()
    }
