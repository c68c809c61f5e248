"""Machine code of kernels, made and read without a card: registers, spills, stack frame, instructions."""

from __future__ import annotations

import collections
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from attn_numba.gpu import launch
from attn_numba.gpu.machine_code import architecture
from attn_numba.gpu.target import ptx_of


class Report(NamedTuple):
    """What is known of a kernel's machine code; sizes in bytes a thread."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    instructions: collections.Counter  # by name without what follows the first dot
    full: collections.Counter  # by whole name
    order: list[str]  # whole names, as they lie in memory
    warnings: list[str]  # of the assembler: spills, products that do not overlap


def tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, from its package or where programs are found."""
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or [] if package else []:
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name)


def report(program, capability) -> Report:
    """Compile a kernel for a card of that capability and return what its machine code is like."""
    threads = 1
    for n in program.block:
        threads *= n
    wanted = (*capability, "a") if program.specific else capability
    text = ptx_of(program.make(), program.signature, wanted, launch_bounds=(threads, program.resident))
    assert _parameter_bytes(text) == _bytes_handed_over(program), "the host hands over other parameters"
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        said = _run("ptxas", "-v", "--warn-on-spills", f"-arch={architecture(program, capability)}", source, "-o", code)
        listing = _run("nvdisasm", "-c", code)
    order = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", listing, re.MULTILINE)
    found = collections.Counter(order)
    short: collections.Counter = collections.Counter()
    for name, count in found.items():
        short[name.split(".")[0]] += count
    return Report(
        _number(r"Used (\d+) registers", said),
        _number(r"(\d+) bytes stack frame", said),
        _number(r"(\d+) bytes spill stores", said),
        _number(r"(\d+) bytes spill loads", said),
        short,
        found,
        order,
        re.findall(r".*(?:warning|Potential Performance Loss).*", said),
    )


def _parameter_bytes(text: str) -> list[int]:
    """Return the bytes of each parameter of the kernel in a text of PTX."""
    start = text.index(".entry")
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", text[start : text.index(")\n", start)])]


def _bytes_handed_over(program) -> list[int]:
    """Return the bytes of each parameter as `launch` hands them to the driver: integers of Python take eight."""

    def value(kind):
        what, of = kind
        return of(0) if what == launch.NUMBER else tuple(map(value, of)) if what == launch.GROUP else None

    kinds, flat = tuple(map(launch._kind_of, program.signature)), []
    launch._flatten(kinds, tuple(map(value, kinds)), flat)
    return [getattr(x, "nbytes", 8) for x in flat]


def _run(name: str, *arguments: object) -> str:
    path = tool(name)
    assert path is not None, f"{name} is not installed"
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, f"{pattern!r} is not in {text!r}"
    return sum(map(int, found))
