"""Everything that needs a CUDA card, in one call on a machine with nothing of ours on it and no network.

    python3 benchmarks/on_a_card.py                        what fits into ten minutes; results under $OUT
    python3 benchmarks/on_a_card.py --parts tests          one part with all the time (and what it needs before)
    python3 benchmarks/on_a_card.py --pack .card           on a machine with a toolkit: what the other may lack

Parts, in this order: ``environment`` (card, versions, what can run), ``compile`` (whether Numba can compile there, with
which toolkit), ``calls`` (a few calls of every kernel), ``tests`` (``pytest -m gpu``), ``memcheck`` and ``racecheck``
(compute-sanitizer over the few calls), ``quick`` and ``benchmark`` (``bench_cuda.py``). Each has its own limit in
seconds and its own log, and whatever becomes of one the next begins. The package runs from the checkout: it need not be
installed. Exit status 0: every part that ran succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(tempfile.gettempdir()) / "attn-numba-on-a-card"
LONGEST_LOG = 12 * 2**20  # bytes of one log that are kept
SHOWN = 1200  # characters of each log on the screen
PATIENCE = 8.0  # seconds to end in, once asked
PROBE_SECONDS = 60  # for one try to compile
COMPILING = 40  # seconds before its limit at which the suite skips what is left: some tests are compiling then
ENDING = 25  # seconds before its limit at which the benchmark begins nothing new
WORTH_STARTING = 75  # seconds that a benchmark needs to say anything
NVVM, LIBDEVICE, MACHINE_CODE = "libnvvm.so.4.xz", "libdevice.10.bc", "machine-code"  # in the folder that is carried
WHEELS = "wheels"  # there too, put in by hand: packages that come before those of the machine


class Outcome(NamedTuple):
    """What became of a part: its name, "ok", "failed ...", "stopped ..." or "skipped: ...", and its seconds."""

    name: str
    status: str
    seconds: float = 0.0


class Bench:
    """One run of the script: where things are, how much time is left, what has become of the parts."""

    def __init__(self, out: Path, work: Path, carried: Path, minutes: float) -> None:
        self.out, self.work, self.carried = out, work, carried
        self.end = time.monotonic() + 60 * minutes
        self.outcomes: list[Outcome] = []
        places = (laid_out(work), opened(carried, work), ROOT / "benchmarks", ROOT / "tests")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            "PYTHONSAFEPATH": "1",  # the checkout's attn_numba lacks attn_numba.reference: it is not to be found first
            "PYTHONUNBUFFERED": "1",
            "NUMBA_CACHE_DIR": str(work / "cache"),  # of the card's code too
        }

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def note(self, name: str, status: str, seconds: float = 0.0) -> None:
        """Keep an outcome, on the screen and in a file that is whole at any time."""
        self.outcomes.append(Outcome(name, status, round(seconds, 1)))
        print(f"---- {name}: {status} ({seconds:.0f} s, {self.left:.0f} s left)", flush=True)
        text = json.dumps([outcome._asdict() for outcome in self.outcomes], indent=1)
        (self.out / "summary.json").write_text(text + "\n", encoding="utf-8")

    def run(self, name: str, command: list[str], limit: float, log: str = "", **changes: str) -> bool:
        """Run a command until it ends or its time is up, its output in `log`; return whether it succeeded."""
        path = self.out / (log or f"{name}.txt")
        limit = min(limit, self.left - 5)
        if limit < 5:
            self.note(name, "skipped: no time left")
            return False
        start = time.monotonic()
        shown = " ".join("..." if "\n" in word else word for word in command)
        print(f"\n==== {name}: {shown[:200]}", flush=True)
        with path.open("ab") as file:
            file.write(f"\n==== {name}: {shown}\n".encode())
            file.flush()
            begin = file.tell()
            status = waited(command, file, limit, self.environment | changes)
        shortened(path)
        print(tail(path, begin), flush=True)
        self.note(name, status, time.monotonic() - start)
        return status == "ok"


def waited(command: list[str], file, limit: float, environment: dict[str, str]) -> str:
    """Return how a command ended: "ok", "failed ..." or "stopped ...". Its whole process group ends with it."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"failed to start: {error}"
    try:
        code = process.wait(limit)
        return "ok" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        for sent in (signal.SIGINT, signal.SIGKILL):  # pytest reports what it has when interrupted
            end_group(process.pid, sent)
            try:
                process.wait(PATIENCE)
                break
            except subprocess.TimeoutExpired:
                continue
        return f"stopped after {limit:.0f} s"
    finally:
        end_group(process.pid, signal.SIGKILL)  # what it started and left behind


def end_group(leader: int, sent: signal.Signals) -> None:
    """Send a signal to the processes of a group that this script started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, sent)


def shortened(path: Path) -> None:
    """Keep the beginning and the end of a log that is too long to come back."""
    if path.stat().st_size > LONGEST_LOG:
        data = path.read_bytes()
        path.write_bytes(data[: LONGEST_LOG // 4] + b"\n[...]\n" + data[-LONGEST_LOG // 2 :])


def tail(path: Path, begin: int) -> str:
    """Return the end of what was written to a log from `begin` on."""
    data = path.read_bytes()
    begin = begin if begin < len(data) else 0  # it was shortened since
    return data[max(begin, len(data) - SHOWN) :].decode("utf-8", "replace").strip()


def laid_out(work: Path) -> Path:
    """Return a folder that holds the package as an installation would, with `reference` in its place."""
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "attn_numba", site / "attn_numba", ignore=unwanted)
    if not (site / "attn_numba" / "reference").exists():
        shutil.copytree(ROOT / "reference", site / "attn_numba" / "reference", ignore=unwanted)
    found = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    about = site / f"attn_numba-{found.group(1)}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: attn-numba\nVersion: {found.group(1)}\n")
    return site


def opened(carried: Path, work: Path) -> Path:
    """Return a folder with the packages whose wheels were carried along."""
    packages = work / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    packages.mkdir(parents=True)
    for wheel in sorted((carried / WHEELS).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    return packages


# --- the parts ---

VERSIONS = """
import importlib.metadata, platform, sys
print("python", platform.python_version(), sys.executable)
names = "numpy numba numba-cuda llvmlite cuda-core cuda-bindings cuda-pathfinder nvidia-cuda-nvcc nvidia-nvvm"
names += " nvidia-nvjitlink nvidia-cuda-nvrtc torch triton cupy-cuda13x ml-dtypes pytest pytest-xdist pytest-timeout"
for name in names.split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
"""

REPORT = """
import attn_numba as an
print(an.__file__)
for name, (available, reason) in an.backends().items():
    print("backend", name, "can run" if available else "cannot run", "-", reason)
for section, settings in an.config_report().items():
    for name, setting in settings.items():
        print(f"{section}: {name}: {setting}")
"""


def environment(bench: Bench, limit: float) -> bool:
    """Say which machine this is, and what the package makes of it."""
    end = time.monotonic() + limit
    log = "environment.txt"
    commands = {
        "card": ["nvidia-smi"],
        "nvcc": ["nvcc", "--version"],
        "compute-sanitizer": ["compute-sanitizer", "--version"],
        "versions": [sys.executable, "-c", VERSIONS],
    }
    for name, command in commands.items():
        if shutil.which(command[0]) is None:
            bench.note(name, f"skipped: there is no {command[0]} here")
        else:
            bench.run(name, command, max(6.0, end - time.monotonic()), log)
    return True


PROBE = """
import math
from attn_numba.gpu.machine_code import compiled
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, types

def kernel(x):
    x[cuda.threadIdx.x] = math.exp(x[cuda.threadIdx.x])

program = Program("probe", (), None, lambda: kernel, (types.Array(types.float32, 1, "A"),), (32,), 1, 0, True)
print(f"compiles: {len(compiled(program, (9, 0)).code)} bytes of machine code")
"""


def compile_(bench: Bench, limit: float) -> bool:
    """Find an environment in which Numba compiles, or else take machine code that was carried; say what can run."""
    end = time.monotonic() + limit - PROBE_SECONDS
    code = bench.carried / MACHINE_CODE
    for name, changes in toolkits(bench):
        seconds = min(PROBE_SECONDS, end - time.monotonic())
        command = [sys.executable, "-c", PROBE]
        if seconds > 0 and bench.run(f"compile, {name}", command, seconds, "environment.txt", **changes):
            bench.environment |= changes
            break
    else:
        if code.is_dir():
            bench.environment["ATTN_NUMBA_CUDA_CODE"] = str(code)
            bench.note("compile", f"Numba cannot compile here: only what {code} holds can run")
        else:
            bench.note("compile", f"failed: Numba cannot compile here, and there is no {code}")
    return bench.run("backends", [sys.executable, "-c", REPORT], PROBE_SECONDS, "environment.txt")


def toolkits(bench: Bench) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield environments in which Numba may find NVVM: as it is, each toolkit of the machine, what was carried."""
    yield "as it is", {}
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    roots += sorted(Path("/usr/local").glob("cuda*")) + sorted(Path("/opt").glob("cuda*"))
    seen = set()
    for root in (Path(x).resolve() for x in roots if x):
        if root not in seen and nvvm_folders(root):
            seen.add(root)
            yield f"toolkit {root}", at_toolkit(root)
    if (bench.carried / NVVM).is_file():
        yield "the NVVM carried along", at_toolkit(unpacked(bench.carried, bench.work / "toolkit"))


def nvvm_folders(root: Path) -> list[str]:
    """Return the folders of a toolkit that hold NVVM."""
    return sorted({str(path.parent) for inside in ("nvvm/lib*", "lib*") for path in root.glob(f"{inside}/libnvvm.so*")})


def at_toolkit(root: Path) -> dict[str, str]:
    """Return what makes Numba look for a toolkit there."""
    path = os.pathsep.join([*nvvm_folders(root), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return {"CUDA_HOME": str(root), "CUDA_PATH": str(root), "LD_LIBRARY_PATH": path}


def unpacked(carried: Path, root: Path) -> Path:
    """Lay out NVVM and its library of functions as a toolkit does."""
    for folder in ("lib64", "libdevice"):
        (root / "nvvm" / folder).mkdir(parents=True, exist_ok=True)
    library = root / "nvvm" / "lib64" / "libnvvm.so.4"
    library.write_bytes(lzma.decompress((carried / NVVM).read_bytes()))
    shutil.copy(carried / LIBDEVICE, root / "nvvm" / "libdevice" / LIBDEVICE)
    return root


def calls(bench: Bench, limit: float) -> bool:
    """Make a few calls of every kernel."""
    return bench.run("calls", [sys.executable, "benchmarks/few_calls.py"], limit, "environment.txt")


def tests(bench: Bench, limit: float) -> bool:
    """Run the tests that want a card; those that come too late are skipped and say so."""
    limit = min(limit, bench.left - 5)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--maxfail=60",
        "-rfEs",
        "--tb=short",
        "--durations=10",
    ]
    command += ["-p", "no:cacheprovider", f"--junitxml={bench.out / 'tests.xml'}", "-o", "junit_logging=no"]
    if find_spec("xdist"):
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2))), "--max-worker-restart=8"]
    if find_spec("pytest_timeout"):
        command += ["--timeout=90", "--timeout-method=thread"]
    first = [ROOT / "tests" / name for name in FIRST]
    command += map(str, [*first, *sorted(set((ROOT / "tests").rglob("test_*.py")) - set(first))])
    until = time.time() + limit - COMPILING
    return bench.run("tests", command, limit, ATTN_NUMBA_TESTS_UNTIL=str(until), OMP_NUM_THREADS="1", **ONE_THREAD)


FIRST = ("kernels/test_cuda_device.py", "kernels/test_forward.py", "test_isolation.py", "kernels/test_cuda_mma.py")
ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "2",
}  # of each of many processes


def sanitized(tool: str):
    """Return the part that runs the few calls under one tool of compute-sanitizer."""

    def part(bench: Bench, limit: float) -> bool:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
        if shutil.which(command[0]) is None:
            bench.note(tool, "skipped: there is no compute-sanitizer here")
            return True
        return bench.run(tool, [*command, sys.executable, "benchmarks/few_calls.py", "--tiny"], limit, "sanitizer.txt")

    return part


def quick(bench: Bench, limit: float) -> bool:
    """Measure a few sizes."""
    return benchmark(bench, limit, "--quick")


def benchmark(bench: Bench, limit: float, *words: str) -> bool:
    """Measure as many sizes as there is time for; what is measured is in the file at any time."""
    limit = min(limit, bench.left - 5)
    name = "quick" if words else "benchmark"
    if limit < WORTH_STARTING:
        bench.note(name, f"skipped: {max(limit, 0):.0f} s are left, it needs {WORTH_STARTING}")
        return True
    command = [sys.executable, "benchmarks/bench_cuda.py", *words, "--folder", str(bench.out / name)]
    return bench.run(name, [*command, "--limit", f"{limit - ENDING:.0f}"], limit, "benchmark.txt")


PARTS = {  # name: what runs, its limit in seconds within ten minutes
    "environment": (environment, 60),
    "compile": (compile_, 180),
    "calls": (calls, 90),
    "tests": (tests, 200),
    "memcheck": (sanitized("memcheck"), 50),
    "racecheck": (sanitized("racecheck"), 50),
    "quick": (quick, 110),
    "benchmark": (benchmark, 600),
}
ALWAYS = ("environment", "compile")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, joined by commas")
    parser.add_argument("--minutes", type=float, default=9.4, help="for all of it (default: 9.4)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "on-a-card"), help="default: $OUT")
    parser.add_argument("--work", type=Path, default=WORK, help=f"what is compiled stays here (default: {WORK})")
    parser.add_argument("--carried", type=Path, default=ROOT / ".card", help="what --pack made (default: .card)")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="gather NVVM and machine code for another machine")
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}; known are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and the part that runs ends with it
    out = (arguments.pack or arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    minutes = 70 if arguments.pack else arguments.minutes
    bench = Bench(out, arguments.work.resolve(), arguments.carried.resolve(), minutes)
    if arguments.pack:
        return pack(bench)
    alone = len(set(chosen) - set(ALWAYS)) == 1
    succeeded = True
    for name, (part, limit) in PARTS.items():
        if name in ALWAYS or name in chosen:
            try:
                done = part(bench, bench.left if alone and name not in ALWAYS else limit)
            except Exception as error:  # a part that breaks loses nothing of the others
                bench.note(name, f"failed: {type(error).__name__}: {error}")
                done = False
            succeeded &= done
    print("\n" + "\n".join(f"{x.name:22} {x.seconds:6.1f} s  {x.status}" for x in bench.outcomes), flush=True)
    return 0 if succeeded else 1


FIND = """
from pathlib import Path
from cuda.pathfinder import load_nvidia_dynamic_lib
library = Path(load_nvidia_dynamic_lib("nvvm").abs_path).resolve()
inside = ("libdevice/libdevice.10.bc", "nvvm/libdevice/libdevice.10.bc")
print(library)
print(next(parent / x for parent in library.parents for x in inside if (parent / x).is_file()))
"""


def pack(bench: Bench) -> int:
    """Gather what another machine may lack: NVVM, compressed, and machine code of a few calls and of the benchmark."""
    found = subprocess.run([sys.executable, "-c", FIND], env=bench.environment, capture_output=True, text=True)
    if found.returncode:
        print(found.stderr)
        return 1
    library, functions = map(Path, found.stdout.split())
    (bench.out / NVVM).write_bytes(lzma.compress(library.read_bytes(), preset=2))
    shutil.copy(functions, bench.out / LIBDEVICE)
    folder = bench.out / MACHINE_CODE
    made = bench.run("pack", [sys.executable, "benchmarks/few_calls.py", "--into", str(folder)], 3600)
    size = sum(path.stat().st_size for path in bench.out.rglob("*") if path.is_file())
    print(f"{bench.out}: {size / 2**20:.0f} MB")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
