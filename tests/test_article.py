"""The article: its code gives the numbers it shows, and it tells of everything there is."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import attn_numba as an
from attn_numba import rules
from attn_numba.cli import main
from documents import blocks, broken_links, only_blocks, read

ARTICLE, TEXT = read("docs/article.md")
BODY, REFERENCES = TEXT.split("\n## References\n")
FORMULA = re.compile(r"^\$\$.+\$\$$", flags=re.MULTILINE)
CITED = re.compile(r"((?:[A-Z][\w-]+ )*[A-Z]\w+)(?:\set\sal\.|\sand\s[A-Z]\w+)?\s\(?(\d{4})\b")
FILE = re.compile(r"\b[\w-]+\.png\b")
ENTRY = re.compile(r"(?:[A-Z][\w.-]* )*([A-Z]\w+)\b.*?\((\d{4})\)", flags=re.DOTALL)


@pytest.fixture(scope="module")
def session() -> tuple[str, dict[str, object]]:
    """Everything after a ``>>>``, run from top to bottom: what came out otherwise, and the names left behind."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed; it belongs to the extra sklearn")
    example = doctest.DocTestParser().get_doctest(only_blocks(TEXT, "pycon"), {}, ARTICLE.name, str(ARTICLE), 0)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
    return "".join(report), example.globs


def test_its_code_gives_the_numbers_shown(session):
    differences, names = session
    assert not differences, differences
    assert "exact" in names  # of the last block: the whole was run


def test_its_pictures_are_drawn(session, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    _, names = session
    for block in blocks(TEXT, "python"):
        exec(compile(block, str(ARTICLE), "exec"), names)
    for file in FILE.findall("".join(blocks(TEXT, "python"))):
        assert (tmp_path / file).stat().st_size > 0


def test_its_commands_run(session, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    _, names = session
    np.save("q.npy", names["hidden"])
    np.save("k.npy", names["hidden"])
    Path("words.txt").write_text("\n".join(names["words"]) + "\n")
    (commands,) = blocks(TEXT, "sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "attn-numba"
        assert main(arguments) == 0
    for file in FILE.findall(commands):
        assert Path(file).stat().st_size > 0


def test_every_block_shows_a_result():
    parse = doctest.DocTestParser().get_examples
    silent = [block for block in blocks(TEXT, "pycon") if not any(step.want for step in parse(block))]
    assert [block.split("(")[0] for block in silent] == [">>> def scores"], silent


def test_every_formula_stands_before_the_call_that_computes_it():
    formulas = list(FORMULA.finditer(BODY))
    assert len(formulas) > 10
    for formula in formulas:
        following = re.split(r"^#|^\$\$", BODY[formula.end() :], maxsplit=1, flags=re.MULTILINE)[0]
        assert any("an." in code or "scores(" in code for code in blocks(following, "pycon")), formula[0]


def test_it_names_only_what_exists_and_every_rule_and_function():
    used = set(re.findall(r"\ban\.(\w+)", "".join(blocks(TEXT, "pycon"))))
    assert [name for name in sorted(used) if not hasattr(an, name)] == []
    kinds = (rules.Mask, rules.Modifier, rules.Score, rules.Normalizer, rules.Dropout)
    told = {name for name in an.__all__ if isinstance(thing := getattr(an, name), type) and issubclass(thing, kinds)}
    told |= {"attention", "recurrent_attention", "SelfAttention", "merge", "adapt", "mask_array", "threads", "backends"}
    told |= {"weights_of", "entropy", "top_keys", "column_sums", "rollout"}
    assert sorted(name for name in told - used if f"`{name}`" not in TEXT) == []


def test_references_are_those_cited():
    cited = {(name.split()[-1], year) for name, year in CITED.findall(BODY)}
    _, *entries = REFERENCES.split("\n- ")
    first = {(ENTRY.match(entry)[1], ENTRY.match(entry)[2]) for entry in entries}
    assert cited == first


def test_links_lead_somewhere():
    assert broken_links(ARTICLE, TEXT) == []
