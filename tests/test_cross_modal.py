"""Questions about pictures: what is asked, the model's gradients; and the script, small."""

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

import cross_modal  # noqa: E402
from data import questions  # noqa: E402
from data.parts import Part  # noqa: E402
from models import weights  # noqa: E402
from models.reader import Config, Reader, beside  # noqa: E402


def a_part() -> Part:
    """Return images (100, 3, 3) of which the middle pixel is 1 more than the digit, and the paper 0."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 10))
    images = np.zeros((100, 3, 3), np.float32)
    images[:, 1, 1] = labels + 1
    return Part(images, labels)


@pytest.mark.parametrize("row", [1, 2, 5])
def test_answers_follow_from_pictures_and_words(row):
    asked = questions.ask(a_part(), 300, np.random.default_rng(1), row=row, simple=0.4)
    kinds = set()
    for image, ids, answer, digits in zip(asked.images, asked.words, asked.answers, asked.digits, strict=True):
        seen = [int(image[1, 3 * place + 1]) - 1 for place in range(row)]
        assert seen == digits.tolist()
        assert len(set(seen)) == row
        words = [questions.WORDS[word] for word in ids]
        number = int(words[6])
        match " ".join([*words[:6], "N", *words[7:]]):
            case "which digit is left of the N ?":
                expected, kind = seen[seen.index(number) - 1], "left"
                assert seen.index(number) > 0
            case "which digit is right of the N ?":
                expected, kind = seen[seen.index(number) + 1], "right"
            case "which digit is at place number N ?":
                expected, kind = seen[number - 1], "place"
        assert answer == expected
        kinds.add(kind)
    assert kinds == ({"place"} if row == 1 else {"left", "right", "place"})


def test_images_are_moved_over_paper():
    part = a_part()
    moved = questions.ask(part, 200, np.random.default_rng(2), row=2, shift=1).images
    assert moved.shape == (200, 3, 6)
    places = {tuple(np.argwhere(image[:, 3:] > 0)[0]) for image in moved}
    assert len(places) == 9
    assert all((image[:, :3] > 0).sum() == 1 for image in moved)
    assert part.inputs[:, 1, 1].min() == 1


def test_half_of_the_heads_see_the_left_neighbor():
    assert beside(3, 2).astype(int).tolist() == [[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1], [0, 0, 0]]]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_central_differences(count):
    generator = np.random.default_rng(3)
    model = Reader(Config(words=7, outputs=3, patches=4, patch=2, hidden_size=8, heads=2), dtype="float64")
    for array in model.parameters.values():
        array += 0.3 * generator.standard_normal(array.shape)
    images, words = generator.standard_normal((3, 2, 2 * count)), generator.integers(0, 7, (3, 5))
    answers = np.array([0, 2, 1])
    _, gradients = model.gradients(images, words, answers)
    assert list(gradients) == list(model.parameters)
    for name, array in model.parameters.items():
        direction = generator.standard_normal(array.shape)
        losses = []
        for step in (1e-6, -2e-6):
            array += step * direction
            losses.append(model.gradients(images, words, answers)[0])
        array += 1e-6 * direction
        assert abs((losses[0] - losses[1]) / 2e-6 - np.vdot(direction, gradients[name])) < 1e-7, name


def test_one_modality_alone_is_blind_to_the_other():
    asked = questions.ask(a_part(), 20, np.random.default_rng(4), row=5)
    pictures, words = cross_modal.given("question alone", asked)
    assert not pictures.any()
    assert words is asked.words
    pictures, words = cross_modal.given("picture alone", asked)
    assert pictures is asked.images
    assert (words == questions.IDS["?"]).all()


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cross_modal.py", *words])
    try:
        cross_modal.main()
    except weights.DownloadError as error:
        pytest.skip(str(error))


def test_from_pictures_to_table_and_picture(monkeypatch, tmp_path, capsys):
    words = ["--steps", "12", "--held-out", "20", "--hidden", "8", "--folder", str(tmp_path)]
    run(monkeypatch, *words)
    assert (tmp_path / cross_modal.PICTURE).read_bytes().startswith(b"\x89PNG")
    out = " ".join(capsys.readouterr().out.split())
    assert "20 questions about rows of digits never seen" in out
    assert all(f"│ {senses} │ 0." in out for senses in cross_modal.SENSES)
    with pytest.raises(FileExistsError, match="exists"):
        run(monkeypatch, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps is 0; at least 1 is needed"),
        (["--hidden", "10"], "--hidden is 10; a multiple of 4 is needed"),
        (["--rate", "nan"], "--rate is nan; more than 0 is needed"),
        (["--seed", "-1"], "--seed is -1; at least 0 is needed"),
    ],
)
def test_what_cannot_be_is_refused(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert message in capsys.readouterr().err
