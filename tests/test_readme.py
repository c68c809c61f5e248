"""The README: its code runs as it stands, and its commands name things that exist."""

from __future__ import annotations

import pytest

from documents import blocks, broken_links, read, run_python

README, TEXT = read("README.md")


def test_the_quick_start_has_six_lines_and_every_example_runs():
    quick_start, *_ = blocks(TEXT, "python")
    assert len([line for line in quick_start.splitlines() if line]) == 6
    names = run_python(README, TEXT)
    assert names["out"].shape == names["q"].shape


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_example_of_each_framework_runs(library):
    """They are marked ``py``, since what they need is not installed everywhere."""
    pytest.importorskip(library)
    (code,) = [code for code in blocks(TEXT, "py") if f"import {library}\n" in code]
    names: dict[str, object] = {}
    exec(compile(code, f"{README}, {library}", "exec"), names)
    if library == "torch":
        assert (names["slopes"].grad != 0).all()
    else:
        assert [x.shape for x in names["gradients"]] == [(2, 8, 64, 16)] * 3 + [(8,)]


def test_the_example_of_choosing_parameters_runs(tmp_path, monkeypatch):
    for library in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in blocks(TEXT, "py") if "an.search(" in code]
    exec(compile(code, str(README), "exec"), {})
    assert (tmp_path / "front.png").stat().st_size > 0


@pytest.mark.parametrize("engine", ["mpi", "dask"])
def test_the_example_of_each_engine_runs(engine):
    pytest.importorskip({"mpi": "mpi4py", "dask": "dask.array"}[engine])
    (code,) = [code for code in blocks(TEXT, "py") if f"an.{engine}." in code]
    names: dict[str, object] = {}
    exec(compile(code, f"{README}, {engine}", "exec"), names)
    if engine == "mpi":
        assert names["whole"].shape == names["grads"].q.shape == (1, 8, 1000, 64)
    else:
        assert sum(key[0].startswith("attention-part") for key in names["out"].dask) == 4 + 3


def test_the_two_commands_install_and_run():
    (commands,) = blocks(TEXT, "sh")
    first, second = commands.splitlines()
    assert first == 'pip install -e ".[demo]" && python examples/generate.py "What is the capital of France?"'
    assert second == 'pip install -e ".[test]" && pytest -n 2 --dist worksteal'
    assert (README.parent / "examples" / "generate.py").is_file()


def test_links_lead_somewhere():
    assert broken_links(README, TEXT) == []
