"""Machine code of CUDA kernels: what tells it apart, how it is kept on disk, carried, and noticed when damaged."""

from __future__ import annotations

import importlib.util
import shutil
import types as kinds
from pathlib import Path

import numpy as np
import pytest

import attn_numba as an
from processes import run_python

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("Numba simulates CUDA in this process", allow_module_level=True)

from attn_numba.gpu import ahead, availability, engine, launch, machine_code, maps
from attn_numba.gpu.hooks import bind

CODE = machine_code.Code("kernel", b"\x7fELF of no card")


def small_program():
    return maps.unit_program("float32", np.dtype(np.float32))


SECOND_PROCESS = """
import time
import numpy as np
from attn_numba.gpu import machine_code, maps
import cuda.core
start = time.perf_counter()
found = machine_code.code_of(maps.unit_program("float32", np.dtype(np.float32)), (9, 0))
print(found.where, time.perf_counter() - start, len(found.code.code), found.code.name)
"""


def test_a_second_process_does_not_compile(tmp_path):
    first, second = (run_python(SECOND_PROCESS, NUMBA_CACHE_DIR=str(tmp_path)).split() for _ in range(2))
    assert (first[0], second[0]) == ("compiled", "cache")
    assert first[2:] == second[2:]
    assert float(second[1]) < 0.3
    (entry,) = tmp_path.rglob("*.cubin")
    assert entry.name.startswith("unit_rows-")
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_cannot_be_written_means_compiling(tmp_path):
    """A copy of the package whose cache folder is a file, in a home that is a file."""
    package = tmp_path / "attn_numba"
    shutil.copytree(Path(an.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "gpu" / "__pycache__").write_text("not a folder")
    nowhere = tmp_path / "file"
    nowhere.write_text("not a folder")
    folders = ("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "IPYTHONDIR")
    home = {name: str(nowhere / "x") for name in folders}
    changes = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **home}
    printed = run_python(f"{SECOND_PROCESS}\nprint(machine_code.cache_folder())", **changes)
    assert printed.startswith("compiled ")
    assert '(None, "no folder can be written' in printed
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder, and a compiler that says how often it was asked."""
    asked = []

    def compiled(program, capability):
        asked.append(program.name)
        return CODE

    monkeypatch.setattr(machine_code, "compiled", compiled)
    monkeypatch.setattr(machine_code, "cache_folder", lambda: (str(tmp_path), "a test"))
    monkeypatch.delenv(availability.CARRIED, raising=False)
    return kinds.SimpleNamespace(path=tmp_path, asked=asked)


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "truncated": content[:-3],
        "empty": b"",
        "foreign": b"something else",
        "one bit flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "another name": content.replace(b"kernel", b"kernal"),
        "header alone": machine_code.FORMAT,
    }


def test_damaged_entries_are_rebuilt(folder):
    program = small_program()
    assert machine_code.code_of(program, (9, 0)) == ("compiled", CODE)
    assert machine_code.code_of(program, (9, 0)) == ("cache", CODE)
    (entry,) = folder.path.iterdir()
    whole = entry.read_bytes()
    for n, content in enumerate(damaged(whole).values()):
        entry.write_bytes(content)
        assert machine_code.code_of(program, (9, 0)) == ("compiled", CODE)
        assert entry.read_bytes() == whole
        assert len(folder.asked) == n + 2
    assert machine_code.code_of(program, (9, 0)) == ("cache", CODE)


def test_a_folder_that_fails_later_costs_the_entry_alone(folder, monkeypatch):
    def fail(path, found):
        raise OSError("no space left on device")

    monkeypatch.setattr(machine_code, "write_entry", fail)
    assert machine_code.code_of(small_program(), (9, 0)) == ("compiled", CODE)
    monkeypatch.setattr(machine_code, "cache_folder", lambda: (None, "no folder can be written"))
    assert machine_code.code_of(small_program(), (9, 0)) == ("compiled", CODE)


def test_an_interrupted_write_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(machine_code.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        machine_code.write_entry(folder.path / "x.cubin", CODE)
    assert not list(folder.path.iterdir())


def test_keys_tell_all_apart_that_machine_code_depends_on(monkeypatch):
    program = small_program()
    hooks = bind(engine.sample("float32", mask=an.Causal())).hooks
    other_rules = bind(engine.sample("float32", mask=an.SlidingWindow(3, 0))).hooks
    same_rules = bind(engine.sample("float32", mask=an.Causal())).hooks
    double = bind(engine.sample("float64", mask=an.Causal())).hooks
    variants = [
        program,
        program._replace(name="other"),
        program._replace(options=("float32", "float64")),
        program._replace(hooks=hooks),
        program._replace(hooks=other_rules),
        program._replace(hooks=double),
        program._replace(signature=program.signature[:1]),
        program._replace(signature=(program.signature[0], program.signature)),
        program._replace(block=(64, 4)),
        program._replace(resident=2),
        program._replace(specific=True),
    ]
    for portable in (False, True):
        assert len({machine_code.key_of(x, (9, 0), portable) for x in variants}) == len(variants)
    assert machine_code.key_of(program, (9, 0)) != machine_code.key_of(program, (8, 0))
    assert machine_code.key_of(variants[3], (9, 0)) == machine_code.key_of(program._replace(hooks=same_rules), (9, 0))
    assert machine_code.key_of(program._replace(make=None), (9, 0)) == machine_code.key_of(program, (9, 0))

    before, portable = machine_code.key_of(program, (9, 0)), machine_code.key_of(program, (9, 0), portable=True)
    monkeypatch.setattr(machine_code, "compilers", lambda: (("numba", "0.1"),))
    assert machine_code.key_of(program, (9, 0)) != before
    assert machine_code.key_of(program, (9, 0), portable=True) == portable
    monkeypatch.setattr(machine_code, "_sources_stamp", lambda: "changed")
    assert machine_code.key_of(program, (9, 0), portable=True) != portable


def test_new_parameters_are_the_same_machine_code():
    keys = set()
    for left in (3, 5):
        call = engine.sample("float32", mask=an.SlidingWindow(left, 0))
        _, program = engine.programs_of(call, bind(call), call.q, (8, 0), False, False)
        keys.add(machine_code.key_of(program, (8, 0)))
    assert len(keys) == 1


def test_machine_code_made_elsewhere_is_used_where_nothing_compiles(tmp_path, monkeypatch):
    program, told = small_program(), []
    monkeypatch.setattr(machine_code, "compiled", lambda program, capability: CODE)
    assert launch.write_code([program, program], (9, 0), str(tmp_path / "new"), told.append) == 1
    assert told == [program]

    def broken(program, capability):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(machine_code, "compiled", broken)
    monkeypatch.setattr(machine_code, "cache_folder", lambda: (None, "a test"))
    monkeypatch.setattr(machine_code, "compilers", lambda: (("numba", "of the other machine"),))
    monkeypatch.setenv(availability.CARRIED, str(tmp_path / "new"))
    assert machine_code.code_of(program, (9, 0)) == ("carried", CODE)
    with pytest.raises(RuntimeError, match="no compiler"):
        machine_code.code_of(program, (8, 0))


def test_what_cannot_be_compiled_says_where_it_can_be():
    def broken():
        raise ImportError("no libNVVM")

    with pytest.raises(
        RuntimeError, match=r"'unit_rows' cannot be compiled here for sm_90: ImportError: no libNVVM; .*"
    ):
        machine_code.compiled(small_program()._replace(make=broken), (9, 0))


@pytest.mark.parametrize(
    ("text", "capability"), [("sm_90a", (9, 0)), ("sm_80", (8, 0)), ("sm_120", (12, 0)), ("sm_75", (7, 5))]
)
def test_architectures(text, capability):
    assert ahead.capability_of(text) == capability
    with pytest.raises(ValueError, match="needed one such as sm_80"):
        ahead.capability_of(text.replace("sm_", "compute"))


def test_maps_of_scores_are_compiled_ahead_too(folder):
    calls = [engine.sample("bfloat16", 64, 64, score=score) for score in (an.Cosine(), an.Bilinear(np.eye(64)))]
    assert ahead.compile_ahead("sm_90a", str(folder.path), calls) == len(folder.asked)
    assert set(folder.asked) == {"unit_rows", "products", "general", "weights"}


def test_the_command_line_compiles_ahead(folder, capsys):
    from attn_numba import cli

    command = ["warmup", "--cuda", "sm_80", "--folder", str(folder.path), "--head-sizes", "32", "--", "float32"]
    assert cli.main(command) == 0
    assert "kernels compiled into" in capsys.readouterr().out
    assert sorted({path.name.split("-")[0] for path in folder.path.iterdir()}) == ["general", "weights"]
    asked = len(folder.asked)
    assert cli.main(command) == 0
    assert len(folder.asked) == asked
    assert cli.main(["warmup", "--cuda", "sm_80"]) == 2
