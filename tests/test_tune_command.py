"""The command ``attn-numba tune``: it finds what `an.search` finds, goes on from its log, and refuses what is wrong."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed; it belongs to the extra sklearn")

import attn_numba as an
from attn_numba import cli, files
from attn_numba.tune_command import choices, sequences_of

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(2, 6, 24)
SEQUENCES = [RANDOM.standard_normal((length, 3)) for length in LENGTHS]
LABELS = np.array(["up" if x[0, 0] > 0 else "down" for x in SEQUENCES])
QUICK = ("--set", "heads=2", "--set", "epochs=3", "--folds", "2", "--quiet")
TRIED = ("--set", "hidden_size=4,8", "--set", "window=none,1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with inputs of every form, and the process in it."""
    monkeypatch.chdir(tmp_path)
    padded = an.sequences.pad(SEQUENCES).tokens
    np.save("padded.npy", padded)
    np.save("packed.npy", np.concatenate(SEQUENCES))
    np.save("y.npy", LABELS)
    np.save("lengths.npy", LENGTHS)
    files.write_arrays("all.npz", {"X": padded, "y": LABELS, "lengths": LENGTHS})
    np.save("features.npy", RANDOM.standard_normal((24, 3)))
    np.save("numbers.npy", RANDOM.standard_normal(24))
    return tmp_path


def tuned(*words: str) -> dict:
    """Return what a search wrote."""
    assert cli.main(["tune", *words, *QUICK, "-o", "best.json", "--force"]) == 0
    return json.loads(open("best.json", encoding="utf-8").read())


def without_seconds(found: dict) -> dict:
    candidates = [{name: c[name] for name in c if "seconds" not in name} for c in found["candidates"]]
    return found | {"candidates": candidates}


def refused(capsys, *words: str) -> str:
    """Return the one line that a command is refused with."""
    assert cli.main(["tune", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attn-numba: error: ")
    assert err.count("\n") == 1
    return err


def test_it_finds_what_search_finds(folder, capsys):
    found = tuned("all.npz", *TRIED)
    grid = {"hidden_size": [4, 8], "window": [None, 1], "heads": [2], "epochs": [3]}
    expected = an.search(
        an.AttentionClassifier(random_state=0), SEQUENCES, LABELS, grid, folds=2, progress=False, refit=False
    )
    assert found["best"] == expected.best
    assert found["best_score"] == expected.best_score
    assert found["task"] == "classify"
    for one, other in zip(found["candidates"], expected.candidates, strict=True):
        assert one["parameters"] == other.parameters
        for name in ("score", "deviation", "resource", "parameter_count", "multiply_adds"):
            assert one[name] == getattr(other, name)
    table = capsys.readouterr().out
    assert f"AttentionClassifier, 24 samples, 2 folds: best score {expected.best_score:.4f}" in table
    assert all(word in table for word in ("hidden_size", "window", "none", "multiply-adds", "front by"))


def test_forms_of_the_same_sequences_give_the_same(folder):
    one = without_seconds(tuned("all.npz", "--set", "hidden_size=4"))
    for words in (("padded.npy", "y.npy"), ("packed.npy", "y.npy")):
        assert without_seconds(tuned(*words, "--lengths", "lengths.npy", "--set", "hidden_size=4")) == one


def test_numbers_are_regressed_and_features_are_tokens(folder):
    found = tuned("features.npy", "numbers.npy", "--set", "hidden_size=4", "--method", "random", "--count", "1")
    assert (found["task"], found["method"], len(found["candidates"])) == ("regress", "random", 1)
    scored = tuned(
        "features.npy", "numbers.npy", "--set", "hidden_size=4", "--scoring", "neg_mean_squared_error", "--seed", "1"
    )
    assert scored["best_score"] < 0
    assert (scored["scoring"], scored["seed"]) == ("neg_mean_squared_error", 1)


def test_a_search_goes_on_from_its_log(folder, monkeypatch):
    whole = without_seconds(tuned("all.npz", *TRIED, "--log", "whole.jsonl"))
    lines = (folder / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 8
    (folder / "log.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # as if killed while it wrote the sixth
    fits, fit = [], an.AttentionClassifier.fit
    monkeypatch.setattr(
        an.AttentionClassifier, "fit", lambda self, *data, **rest: fits.append(self) or fit(self, *data, **rest)
    )
    assert without_seconds(tuned("all.npz", *TRIED, "--log", "log.jsonl")) == whole
    assert len(fits) == 3


def test_it_draws_the_front(folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it belongs to the extra plot")
    tuned("all.npz", *TRIED, "--plot", "front.svg", "--cost", "parameter_count", "--method", "halving")
    picture = (folder / "front.svg").read_text()
    assert "<svg" in picture


REFUSED = {
    "missing.npz --set heads=1": "missing.npz",
    "y.npy --set heads=1": "has no array X; it holds y",
    "all.npz y.npy y.npy --set heads=1": "inputs are one file that holds X and y or two",
    "all.npz --set heads=1 --set heads=2": "--set names a parameter twice",
    "all.npz --set head=1": "head",
    "all.npz --set heads=1 --plot x.gif": "unknown kind of file '.gif'",
    "all.npz --set heads=1 -o y.npy": "unknown kind of file '.npy'; known are .json",
    "all.npz --set heads=1 -o old.json": "old.json exists; it is replaced only with --force",
    "all.npz --set heads=1 -o nowhere/best.json": "there is no folder nowhere",
    "padded.npy y.npy --lengths numbers.npy --set heads=1": "lengths has dtype float64; needed integers",
    "numbers.npy y.npy --lengths lengths.npy --set heads=1": "X has shape (24,); lengths needs",
    "all.npz --folds 1 --set heads=1": "folds",
    "all.npz --set heads=3 --quiet --folds 2": "hidden_size is 32, not a multiple of heads, 3",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_refused_in_one_line(folder, capsys, words):
    if "--plot" in words:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed; it belongs to the extra plot")
    (folder / "old.json").write_text("mine")
    before = sorted(folder.iterdir())
    assert REFUSED[words] in refused(capsys, *words.split())
    assert sorted(folder.iterdir()) == before
    assert (folder / "old.json").read_text() == "mine"


@pytest.mark.parametrize("word", ["heads", "heads=", "=4", "heads=1,,2", "heads=1,1", "a-b=1"])
def test_bad_choices_end_with_code_2(folder, capsys, word):
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "all.npz", "--set", word])
    assert caught.value.code == 2
    assert repr(word) in capsys.readouterr().err


def test_choices_are_read_as_what_they_mean():
    assert choices("window=None,-1:4,adaptive,8") == ("window", [None, (-1, 4), "adaptive", 8])
    assert choices("warm_start=true,false") == ("warm_start", [True, False])
    assert choices("learning_rate=1e-3,0.5") == ("learning_rate", [0.001, 0.5])
    assert choices("inputs=a:b") == ("inputs", ["a:b"])


def test_sequences_come_padded_or_end_to_end():
    ids = np.arange(6)
    for X in (ids, np.array([[0, 1, 2, 3], [4, 5, 9, 9]])):
        found = sequences_of(X, [4, 2])
        assert [x.tolist() for x in found] == [[0, 1, 2, 3], [4, 5]]
    assert [x.shape for x in sequences_of(np.zeros((5, 3)), [2, 0, 3])] == [(2, 3), (0, 3), (3, 3)]
    assert [x.shape for x in sequences_of(np.zeros((2, 3)), [1, 1])] == [(1, 3), (1, 3)]
    for X, lengths, message in (
        (np.zeros((2, 4, 3)), [4, 5], "X has shape (2, 4, 3); lengths needs 2 sequences of 5 tokens or more"),
        (np.zeros((5, 3)), [2, 2], "X has shape (5, 3); lengths needs 4 tokens"),
        (ids, [-1, 7], "lengths has shape (2,) and goes down to -1"),
        (ids, np.zeros(0, int), "lengths has shape (0,)"),
    ):
        with pytest.raises(ValueError) as caught:
            sequences_of(X, lengths)
        assert message in str(caught.value)


def test_without_scikit_learn_the_extra_is_named(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("attn_numba.integrations.sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delattr("attn_numba.integrations.sklearn", raising=False)
    assert 'pip install "attn-numba[sklearn]"' in refused(capsys, "all.npz", "--set", "heads=1")
