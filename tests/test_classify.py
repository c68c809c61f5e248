"""The examples that classify speech, images and text, in a tiny setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the folder of examples is not beside the tests", allow_module_level=True)
for library in ("sklearn", "matplotlib", "tqdm", "rich"):
    pytest.importorskip(library, reason=f"{library} is not installed; it belongs to the extras sklearn, plot and demo")
sys.path.append(str(EXAMPLES))

import attn_numba as an  # noqa: E402
import classify_images  # noqa: E402
import classify_speech  # noqa: E402
import classify_text  # noqa: E402
from data.parts import Part  # noqa: E402
from models import classification, command, weights  # noqa: E402
from processes import environment  # noqa: E402

TINY = ["--hidden", "8", "--window", "none,1", "--folds", "2", "--epochs", "2", "--seed", "1"]


def run(script, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    try:
        script.main()
    except weights.DownloadError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("script", "samples", "words"),
    [
        (classify_speech, 45, []),
        (classify_images, 60, []),
        (classify_images, 60, ["mnist5k"]),
        (classify_text, 300, []),
    ],
    ids=["speech", "digits", "mnist5k", "text"],
)
def test_from_data_to_score_and_pictures(script, samples, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(classify_text, "LONGEST", 25)
    run(script, monkeypatch, *words, *TINY, "--samples", str(samples), "-o", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attended.png", "front.png", "search.jsonl"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    fits = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert len(fits) == 4  # two windows in two folds
    out = " ".join(capsys.readouterr().out.split())
    assert f"cross-validation on {samples} training samples" in out
    assert "attention │" in out
    assert "mean of all tokens │" in out


def test_search_goes_on_from_its_log(monkeypatch, tmp_path):
    words = [*TINY, "--samples", "45", "-o", str(tmp_path)]
    run(classify_speech, monkeypatch, *words)
    log = (tmp_path / "search.jsonl").read_text()
    kept = log.splitlines(keepends=True)
    (tmp_path / "search.jsonl").write_text("".join(kept[:3]) + kept[3][:20])  # killed while the last was written
    fitted = []
    fit = an.AttentionClassifier.fit
    monkeypatch.setattr(an.AttentionClassifier, "fit", lambda *words, **more: fitted.append(1) or fit(*words, **more))
    run(classify_speech, monkeypatch, *words, "--force")
    assert len(fitted) == 3  # the one that was lost, the best on all samples, the one of means

    found = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()[-1:]]
    assert found[0]["score"] == json.loads(kept[3])["score"]


def test_test_part_is_scored_once_per_model(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    parts = [Part(rng.standard_normal((n, 5, 2)), np.arange(n) % 2) for n in (12, 7)]
    seen = []
    predict = an.AttentionClassifier.predict

    def watched(model, X):
        seen.append((X is parts[1].inputs, model.attention_score, model.pooling))
        return predict(model, X)

    monkeypatch.setattr(an.AttentionClassifier, "predict", watched)
    estimator = an.AttentionClassifier(hidden_size=8, epochs=2, random_state=0)
    task = classification.Task("some", *parts, estimator, {"hidden_size": [4, 8], "window": [None]})
    options = classification.build_parser("", "", "4", "none", "some").parse_args(["--folds", "2", "-o", str(tmp_path)])
    outcome = classification.classify(task, options)
    assert [entry[1:] for entry in seen if entry[0]] == [("dot", "attention"), ("uniform", "mean")]
    assert outcome.mean.hidden_size == outcome.attention.hidden_size == outcome.search.best["hidden_size"]


class TestParts:
    def test_some_of_a_part_are_spread_over_it(self):
        part = Part([np.full(n, n) for n in range(10)], np.arange(10))
        assert classification.some_of(part, 4).labels.tolist() == [0, 3, 6, 9]
        assert [len(ids) for ids in classification.some_of(part, 4).inputs] == [0, 3, 6, 9]
        assert classification.some_of(part, 11) is classification.some_of(part, None) is part

    def test_patches_overlap_by_half(self):
        image = np.arange(64.0).reshape(1, 8, 8)
        found = classify_images.tokens(Part(image, np.zeros(1, int)), 4).inputs
        assert found.shape == (1, 9, 16)
        np.testing.assert_array_equal(found[0, 5], image[0, 2:6, 4:8].ravel())

    def test_pixels_have_the_mean_weight_of_their_patches(self):
        found = classify_images.pixel_weights(np.arange(9.0)[None], 4, 8)[0]
        assert (found[0, 0], found[7, 7], found[0, 2], found[3, 3]) == (0, 8, 0.5, 2)

    def test_relevance_follows_the_weights_back_to_the_tokens(self):
        rng = np.random.default_rng(2)
        inputs = [rng.standard_normal((length, 3)) for length in (4, 2, 5)]
        model = an.AttentionClassifier(hidden_size=8, layers=2, epochs=3, random_state=0).fit(inputs, [0, 1, 0])
        found, attended = classification.relevance(model, inputs), model.explain(inputs)
        for n, length in enumerate(len(each) for each in inputs):
            share = attended.pooling[n, :, :length].mean(axis=0)
            for layer in reversed(attended.layers):
                share = share / 2 + share @ layer[n, :, :length, :length].mean(axis=0) / 2
            np.testing.assert_allclose(found[n], share, rtol=1e-5)
            np.testing.assert_allclose(found[n].sum(), 1, rtol=1e-5)

    def test_vocabulary_leaves_rare_words_out(self):
        texts = [["b", "a", "a"], ["a", "b"], ["b", "a"], ["b", "c", "c", "c"]]
        numbers = classify_text.vocabulary(texts)
        assert numbers == {"b": 1, "a": 2}
        part = classify_text.encoded(Part([["c", "a"], ["b"] * 200], np.zeros(2, int)), numbers)
        assert part.inputs[0].tolist() == [classify_text.UNKNOWN, 2]
        assert len(part.inputs[1]) == classify_text.LONGEST


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "1"], "--folds is 1; at least 2 is needed"),
        (["--folds", "3", "--samples", "5"], "--samples is 5; at least 6 is needed"),
        (["--window", "some"], "argument --window: invalid windows value: 'some'"),
        (["--jobs", "0"], "--jobs is 0; at least 1 is needed"),
    ],
)
def test_wrong_usage(words, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(classify_speech, monkeypatch, *words)
    assert capsys.readouterr().err.rstrip().endswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "8,10"], "--hidden holds 10; multiples of the 4 heads are needed"),
        (["--window", "none,-1"], "--window holds -1; at least 0 positions are needed"),
        (["--data", "absent.whl"], "absent.whl does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, monkeypatch, tmp_path):
    with pytest.raises(command.Failure, match=message):
        run(classify_speech, monkeypatch, *words, "-o", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_missing_scikit_learn_is_one_line(tmp_path):
    absent = "raise ModuleNotFoundError('No module named sklearn', name='sklearn')"
    (tmp_path / "sklearn.py").write_text(absent)
    words = [sys.executable, os.fspath(EXAMPLES / "classify_speech.py")]
    changed = environment(PYTHONPATH=os.fspath(tmp_path))
    done = subprocess.run(words, env=changed, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("classify_speech.py: sklearn is not installed")
    assert line.endswith('pip install ".[demo,plot,sklearn]"')
