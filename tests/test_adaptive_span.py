"""Spans that tokens choose: the task, the model's gradients, what it sees; and the script, small."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the folder of examples is not beside the tests", allow_module_level=True)
for library in ("tqdm", "rich", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed; it belongs to the extras demo and plot")
sys.path.append(str(EXAMPLES))

import adaptive_span  # noqa: E402
from data import marks  # noqa: E402
from models.tagger import Tagger  # noqa: E402


def test_the_answer_is_the_last_marked_symbol():
    drawn = marks.draw(40, 50, np.random.default_rng(0))
    assert set(drawn.beats) == set(marks.BEATS)
    for tokens, targets, beat in zip(drawn.tokens, drawn.targets, drawn.beats, strict=True):
        last, places = -1, []
        for place, token in enumerate(tokens):
            assert token[: marks.SYMBOLS].sum() == 1
            if token[marks.SYMBOLS]:
                last = token[: marks.SYMBOLS].argmax()
                places.append(place)
            assert targets[place] == last
        assert places[0] < beat
        assert set(np.diff(places)) <= {beat}
        np.testing.assert_allclose(tokens[:, -1], np.log2(beat) - 3)


def test_the_ceiling_counts_marks_within_reach():
    drawn = marks.draw(30, 64, np.random.default_rng(1))
    found = []
    for tokens, targets in zip(drawn.tokens, drawn.targets, strict=True):
        marked = np.flatnonzero(tokens[:, marks.SYMBOLS])
        for place in np.flatnonzero(targets >= 0):
            found.append(place - marked[marked <= place].max())
    within = np.mean(np.array(found) <= 6)
    assert drawn.ceiling(6) == pytest.approx(within + (1 - within) / marks.SYMBOLS)
    assert drawn.ceiling(31) == 1


def a_model(span: int | None) -> tuple[Tagger, marks.Marks]:
    generator = np.random.default_rng(2)
    model = Tagger(marks.INPUTS, marks.SYMBOLS, span=span, largest=9, ramp=3, hidden_size=8, dtype="float64")
    for array in model.parameters.values():
        array += 0.3 * generator.standard_normal(array.shape)
    return model, marks.draw(3, 11, generator)


@pytest.mark.parametrize("span", [None, 2])
def test_gradients_are_central_differences(span):
    model, drawn = a_model(span)
    loss, gradients = model.gradients(drawn.tokens, drawn.targets, 0.05)
    assert list(gradients) == list(model.parameters)
    generator = np.random.default_rng(3)
    for name, array in model.parameters.items():
        direction = generator.standard_normal(array.shape)
        losses = []
        for step in (1e-6, -2e-6):
            array += step * direction
            losses.append(model.gradients(drawn.tokens, drawn.targets, 0.05)[0])
        array += 1e-6 * direction
        assert abs((losses[0] - losses[1]) / 2e-6 - np.vdot(direction, gradients[name])) < 1e-7, name
    assert model.gradients(drawn.tokens, drawn.targets)[0] < loss or span is not None


@pytest.mark.parametrize("span", [None, 2])
def test_visible_keys_are_those_with_a_weight(span):
    model, drawn = a_model(span)
    _, saved = model.forward(drawn.tokens, weights=True)
    seen = (saved[1][1][0].weights > 0).sum(axis=3)
    np.testing.assert_array_equal(model.visible(saved, drawn.targets.shape), seen)
    assert seen.std() > 0


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["adaptive_span.py", *words])
    adaptive_span.main()


def test_from_task_to_table_and_picture(monkeypatch, tmp_path, capsys):
    words = ["--steps", "4", "--batch", "2", "--length", "40", "--held-out", "20", "--spans", "1", "31"]
    run(monkeypatch, *words, "--folder", str(tmp_path))
    assert (tmp_path / adaptive_span.PICTURE).read_bytes().startswith(b"\x89PNG")
    out = " ".join(capsys.readouterr().out.split())
    assert "│ 1 before itself │ 2.0 │" in out
    assert "│ chosen │" in out
    assert "If one head had all of these keys" in out
    with pytest.raises(FileExistsError, match="exists"):
        run(monkeypatch, *words, "--folder", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0; at least 1 is needed"),
        (["--length", "31"], "--length is 31; at least 32 is needed"),
        (["--penalty", "-1"], "--penalty is -1.0; at least 0 is needed"),
        (["--spans", "128"], "--spans are [128]; needed are 0 to 127"),
        (["--seed", "-1"], "--seed is -1; at least 0 is needed"),
    ],
)
def test_what_cannot_be_is_refused(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert message in capsys.readouterr().err
