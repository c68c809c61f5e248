"""The README: its code runs as it stands, and its commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
if not README.is_file():
    pytest.skip("the README is not beside the tests", allow_module_level=True)
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_the_quick_start_has_six_lines_and_every_example_runs():
    quick_start, *others = blocks("python")
    assert len([line for line in quick_start.splitlines() if line]) == 6
    names: dict[str, object] = {}
    for block in (quick_start, *others):
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].shape == names["q"].shape


def test_the_two_commands_install_and_run():
    (commands,) = blocks("sh")
    first, second = commands.splitlines()
    assert first == 'pip install -e ".[demo]" && python examples/generate.py "What is the capital of France?"'
    assert second == 'pip install -e ".[test]" && pytest'
    assert (README.parent / "examples" / "generate.py").is_file()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target
