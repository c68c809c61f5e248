"""The example that trains: its gradients, runs that are interrupted and go on, files, and the n-gram models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the folder of examples is not beside the tests", allow_module_level=True)
for library in ("safetensors", "tqdm", "rich", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed; it belongs to the extras demo and plot")
sys.path.append(str(EXAMPLES))

import train  # noqa: E402
from attn_numba.learning import AdamW, Settings  # noqa: E402
from models import checkpoints, command, corpus, ngram, transformer  # noqa: E402


def a_run(steps: int = 6, characters: int = 6000) -> train.Run:
    words = [
        "--steps",
        str(steps),
        "--hidden",
        "16",
        "--layers",
        "2",
        "--heads",
        "2",
        "--context",
        "16",
        "--batch",
        "3",
    ]
    return train.begin(train.build_parser().parse_args(words), corpus.split(corpus.read()[:characters]))


def a_model(dtype: str = "float64") -> tuple[transformer.Transformer, np.ndarray, np.ndarray]:
    model = transformer.Transformer(transformer.Config(11, 8, 2, 2), seed=3, dtype=dtype)
    rng = np.random.default_rng(5)
    model.parameters["head"][...] = rng.standard_normal(model.parameters["head"].shape)
    tokens = rng.integers(0, 11, (2, 7))
    return model, tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", a_model()[0].parameters)
def test_gradients_are_central_differences(name):
    model, tokens, following = a_model()
    gradient = model.gradients(tokens, following)[1][name]
    array = model.parameters[name]
    assert gradient.shape == array.shape
    direction = np.random.default_rng(1).standard_normal(array.shape)
    step = 1e-5
    losses = []
    for sign in (1, -2, 1):
        array += sign * step * direction
        losses.append(model.gradients(tokens, following)[0])
    measured = (losses[0] - losses[1]) / (2 * step)
    assert abs((gradient * direction).sum() - measured) < 1e-8 * (1 + abs(measured))


def test_a_character_sees_none_that_follow():
    model, tokens, _ = a_model()
    before = model.forward(tokens)
    changed = tokens.copy()
    changed[:, 4:] += 1
    np.testing.assert_array_equal(model.forward(changed % 11)[:, :4], before[:, :4])


def test_steps_lower_the_loss(tmp_path):
    run = a_run(steps=60)
    assert train.train(run, tmp_path / "checkpoint.safetensors", 100) == "finished"
    assert np.mean(run.losses[-5:]) < 0.8 * run.losses[0]
    assert [step for step, _ in run.curve][-1] == 60


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(tmp_path):
    whole, path = a_run(), tmp_path / "checkpoint.safetensors"
    train.train(whole, tmp_path / "whole.safetensors", 100)
    stopped = a_run()
    assert train.train(stopped, path, 2, minutes=1e-9) == "minutes"
    assert stopped.step == 1
    again = a_run()
    again.resume(path)
    assert (again.step, again.losses) == (1, stopped.losses)
    assert train.train(again, path, 2) == "finished"
    assert again.losses == whole.losses
    assert again.curve == whole.curve
    for name, array in whole.model.parameters.items():
        np.testing.assert_array_equal(again.model.parameters[name], array)


def test_ctrl_c_leaves_a_checkpoint(tmp_path, monkeypatch):
    import signal

    run, path = a_run(), tmp_path / "checkpoint.safetensors"
    batch = train.batch

    def pressed(run, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return batch(run, step)

    monkeypatch.setattr(train, "batch", pressed)
    assert train.train(run, path, 100) == "interrupted"
    monkeypatch.undo()
    again = a_run()
    again.resume(path)
    assert again.step == 4


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    train.train(a_run(steps=2), path, 1)
    with pytest.raises(command.Failure, match="of a run with steps 2; this one has 3"):
        a_run(steps=3).resume(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(command.Failure, match="damaged"):
        a_run(steps=2).resume(path)
    with pytest.raises(command.Failure, match="does not exist"):
        a_run(steps=2).resume(tmp_path / "nothing.safetensors")


def test_reloaded_weights_give_the_same_bits(tmp_path):
    run, path = a_run(steps=3), tmp_path / "weights.safetensors"
    train.train(run, tmp_path / "checkpoint.safetensors", 100)
    checkpoints.write(path, run.model.parameters, {"alphabet": run.text.alphabet})
    assert train.held_out_bits(run, train.reloaded(run, path)) == train.held_out_bits(run, run.model)


def test_the_loss_curve_is_a_picture(tmp_path):
    run = a_run(steps=2)
    train.train(run, tmp_path / "checkpoint.safetensors", 100)
    train.draw(run, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bits_do_not_depend_on_how_many_windows_are_computed_at_a_time():
    model, _, _ = a_model()
    tokens = np.random.default_rng(0).integers(0, 11, 61)
    found = [model.bits(tokens, 20, 8, batch=n) for n in (1, 3, 100)]
    np.testing.assert_allclose(found, found[0], rtol=1e-12)


def test_ngrams_by_hand():
    """Of "abab" after EM: b follows a always, so the 2-gram model loses nothing on "abab" but the first letter."""
    tokens = np.array([0, 1, 0, 1, 0, 1])
    one = ngram.Ngram(1, 2, tokens)
    assert one.bits(tokens, 1) == pytest.approx(1.0)
    two = ngram.Ngram(2, 2, tokens)
    np.testing.assert_array_equal(two.counts[1], [[0, 3], [2, 0]])
    # even weights of 1/2, 1/2 and 1: probability 2/3 of what follows
    assert two.bits(tokens, 1) == pytest.approx(-np.log2(2 / 3))
    two.fit(tokens)
    assert two.bits(tokens, 1) == pytest.approx(0.0, abs=1e-6)


def test_the_text_is_cut_into_three_parts():
    text = corpus.split(corpus.read())
    assert len(text.tokens) > 300_000
    assert 0 < text.development < text.held_out < len(text.tokens)
    assert text.spell(text.tokens[:40]) == corpus.read()[:40]
    paragraphs = corpus.read().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_the_first_step_of_the_optimizer():
    """Moments start at 0 and are corrected for it: the first step is the rate, against the gradient's sign."""
    parameters = {"weight": np.array([[1.0, -2.0]]), "gain": np.array([3.0])}
    settings = Settings(steps=10, rate=0.1, warmup=1, weight_decay=0.5, longest=1e9)
    optimizer = AdamW(parameters, settings)
    length = optimizer.update({"weight": np.array([[0.3, -4.0]]), "gain": np.array([0.0])}, 0)
    assert length == pytest.approx(np.hypot(0.3, 4.0))
    np.testing.assert_allclose(parameters["weight"], [[0.95 - 0.1, -1.9 + 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(parameters["gain"], [3.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--context 15", "--context is 15; an even number"),
        ("--hidden 20", "--hidden is 20; a multiple of twice --heads, 8"),
        ("--steps 0", "--steps is 0; at least 1"),
        ("--minutes 0", "--minutes is 0.0; more than 0"),
        ("--resume --force", "--resume needs the checkpoint"),
    ],
)
def test_options_are_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    with pytest.raises(SystemExit):
        train.main()
    assert message in capsys.readouterr().err
