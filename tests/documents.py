"""The Markdown documents as tests read them: their blocks of code, and where their links lead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)\)")


def read(name: str) -> tuple[Path, str]:
    """Return path and text of a document; without a checkout around the tests, skip the module that asks for it."""
    path = Path(__file__).parents[1] / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the tests", allow_module_level=True)
    return path, path.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of code in one language, in order."""
    return [code for found, code in FENCED.findall(text) if found == language]


def only_blocks(text: str, language: str) -> str:
    """Return the text with all lines empty that are not in a block of this language, so that numbers of lines stay."""
    lines = [""] * len(text.split("\n"))
    for found in FENCED.finditer(text):
        if found[1] == language:
            first = text.count("\n", 0, found.start(2))
            code = found[2].split("\n")
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def run_python(path: Path, text: str) -> dict[str, object]:
    """Run the blocks of Python one after the other and return the names they leave."""
    names: dict[str, object] = {}
    exec(compile(only_blocks(text, "python"), str(path), "exec"), names)
    return names


def broken_links(path: Path, text: str) -> list[str]:
    """Return the links to files that are not there."""
    targets = [target for target in LINK.findall(text) if not target.startswith("https:")]
    return [target for target in targets if not (path.parent / target).exists()]
