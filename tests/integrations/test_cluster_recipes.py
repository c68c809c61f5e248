"""The programs of docs/cluster.md run as they stand; its links lead somewhere; its scripts name what there is."""

from __future__ import annotations

import importlib.util
import re
import subprocess

import pytest

from attn_numba import cli
from documents import blocks, broken_links, read
from processes import MPIEXEC, run_python, run_ranks

DOCUMENT, TEXT = read("docs/cluster.md")
PROGRAMS = blocks(TEXT, "python")
# a program is named after the first of these that it imports
LIBRARIES = ("mpi4py.futures", "mpi4py", "distributed", "dask", "joblib")


def library_of(code: str) -> str:
    return next(name for name in LIBRARIES if re.search(rf"^(import|from) {name}\b", code, flags=re.MULTILINE))


@pytest.mark.parametrize("code", PROGRAMS, ids=library_of)
def test_programs_run_as_they_stand(code, tmp_path):
    library = library_of(code)
    if importlib.util.find_spec(library.split(".")[0]) is None:
        pytest.skip(f"{library} is not installed")
    program = tmp_path / "program.py"
    program.write_text(code, encoding="utf-8")
    if not library.startswith("mpi4py"):
        assert run_python(str(program)) == ""
        return
    if MPIEXEC is None:
        pytest.skip("there is no mpiexec")
    done = run_ranks(2, "-m", library, str(program))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_there_is_a_program_for_each_engine():
    assert sorted(map(library_of, PROGRAMS)) == sorted(LIBRARIES)


def test_links_lead_somewhere():
    assert broken_links(DOCUMENT, TEXT) == []
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_scripts_call_commands_that_there_are(capsys):
    commands = set(re.findall(r"\battn-numba (\w+)", TEXT))
    assert {"info", "warmup", "bench"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
    for script in blocks(TEXT, "bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
