"""The comparison with a recurrent network: that network's gradients, torch's GRU, lengths; and the script, small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from attn_numba.learning import Batch, cross_entropy

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the folder of examples is not beside the tests", allow_module_level=True)
for library in ("tqdm", "rich", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed; it belongs to the extras demo and plot")
sys.path.append(str(EXAMPLES))

import compare_recurrent  # noqa: E402
from models.gru import GRU, Shape  # noqa: E402

LENGTHS = np.array([7, 3, 0, 6])
TARGETS = np.array([1, 0, 1, 2])
SHARES = np.array([0.4, 0.3, 0.2, 0.1])


def a_network(dtype: str = "float64") -> tuple[GRU, Batch]:
    generator = np.random.default_rng(5)
    network = GRU(Shape(3, 5, 3), dtype, seed=1)
    for name in ("bias", "inner_bias", "output.weight", "output.bias"):  # which start at 0
        network.parameters[name][...] = generator.standard_normal(network.parameters[name].shape)
    return network, Batch(generator.standard_normal((4, 7, 3)).astype(dtype), LENGTHS)


@pytest.mark.parametrize("name", a_network()[0].parameters)
def test_gradients_are_central_differences(name):
    network, batch = a_network()
    gradient, array = network.gradients(batch, TARGETS, SHARES, cross_entropy)[1][name], network.parameters[name]
    assert gradient.shape == array.shape
    for place in np.ndindex(array.shape):
        losses, before = [], array[place]
        for step in (1e-5, -1e-5):
            array[place] = before + step
            losses.append(network.gradients(batch, TARGETS, SHARES, cross_entropy)[0])
        array[place] = before
        assert abs((losses[0] - losses[1]) / 2e-5 - gradient[place]) < 1e-9


def in_torch(network: GRU):
    """Return torch's module with the same weights."""
    import torch

    D, C, _ = network.design
    module = torch.nn.GRU(D, C, dtype=torch.float64)
    p = {name: torch.from_numpy(array) for name, array in network.parameters.items()}
    with torch.no_grad():
        module.weight_ih_l0.copy_(p["input"].T)
        module.weight_hh_l0.copy_(p["recurrent"].T)
        module.bias_ih_l0.copy_(p["bias"])
        module.bias_hh_l0.copy_(torch.cat([torch.zeros(2 * C), p["inner_bias"]]))
    return module


def test_states_and_gradients_are_those_of_torch():
    torch = pytest.importorskip("torch")
    network, batch = a_network()
    module, C = in_torch(network), network.design.hidden_size
    _, (steps, *_) = kept = network.forward(batch)
    states, _ = module(torch.from_numpy(batch.tokens.swapaxes(0, 1)))
    np.testing.assert_allclose(steps.states[1:], states.detach().numpy(), rtol=0, atol=1e-13)

    last = torch.stack([states[n - 1, b] if n else torch.zeros(C) for b, n in enumerate(LENGTHS)])
    dlast = np.random.default_rng(2).standard_normal((4, 3))
    (last @ torch.from_numpy(network.parameters["output.weight"]) * torch.from_numpy(dlast)).sum().backward()
    found = network.vjp(dlast, kept[1])
    np.testing.assert_allclose(found["input"], module.weight_ih_l0.grad.T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found["recurrent"], module.weight_hh_l0.grad.T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found["bias"], module.bias_ih_l0.grad, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found["inner_bias"], module.bias_hh_l0.grad[2 * C :], rtol=0, atol=1e-13)


def test_what_follows_the_end_of_a_sequence_changes_nothing():
    network, batch = a_network("float32")
    longer = np.concatenate([batch.tokens, np.full((4, 2, 3), 1e3, np.float32)], axis=1)
    for b, length in enumerate(LENGTHS):
        longer[b, length:] = 1e3
    before, after = (network.gradients(x, TARGETS, SHARES, cross_entropy) for x in (batch, Batch(longer, LENGTHS)))
    assert before[0] == after[0]
    for name, gradient in before[1].items():
        np.testing.assert_allclose(after[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "classes", "hidden"), [(1, 10, 32), (49, 10, 32), (9, 8, 16), (4, 2, 64)])
def test_the_models_have_as_many_parameters(size, classes, hidden):
    labels = np.zeros(1, int)
    task = compare_recurrent.Task("any", np.zeros((1, 5, size)), labels, np.zeros((1, 5, size)), labels, classes)
    found = compare_recurrent.networks(task, hidden, seed=0)
    counts = [compare_recurrent.parameters(network) for network in found.values()]
    assert list(found) == list(compare_recurrent.STYLES)
    assert max(counts) <= 1.1 * min(counts)
    assert counts[-1] == found["GRU"].design.parameters


def test_the_multiply_adds_of_the_gru_are_those_of_its_products():
    shape = Shape(3, 5, 2)
    weights = {name: array.size for name, array in GRU(shape).parameters.items() if array.ndim == 2}
    assert shape.multiply_adds(7) == 7 * (weights["input"] + weights["recurrent"]) + weights["output.weight"]


def test_recall_asks_for_the_value_that_is_marked():
    task = compare_recurrent.recall(12, seed=3)
    assert task.training.shape == (compare_recurrent.TRAINING, 12, 9)
    for tokens, labels in ((task.training, task.training_labels), (task.test, task.test_labels)):
        assert (tokens[..., :8].sum(axis=2) == 1).all()
        assert (tokens[..., 8].sum(axis=1) == 1).all()
        np.testing.assert_array_equal(tokens[tokens[..., 8] == 1][:, :8].argmax(axis=1), labels)


def test_patches_come_row_by_row():
    image = np.arange(28 * 28, dtype=np.float32).reshape(1, 28, 28)
    assert compare_recurrent.patches(image, 4).shape == (1, 49, 16)
    np.testing.assert_array_equal(compare_recurrent.patches(image, 4)[0, 8], image[0, 4:8, 4:8].ravel())


def test_the_script_learns_writes_and_repeats_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_recurrent, "TRAINING", 400)
    monkeypatch.setattr(compare_recurrent, "TEST", 100)
    found = []
    for n in range(2):
        picture, results = tmp_path / f"{n}.png", tmp_path / f"{n}.json"
        words = ["--patches", "--lengths", "3", "--hidden", "16", "--epochs", "12"]
        monkeypatch.setattr(sys, "argv", ["compare", *words, "--picture", str(picture), "--results", str(results)])
        compare_recurrent.main()
        assert "attention, window" in capsys.readouterr().out
        assert picture.read_bytes()[1:4] == b"PNG"
        found.append(json.loads(results.read_text()))
    assert [row["model"] for row in found[0]] == list(compare_recurrent.STYLES)
    assert min(row["accuracy"] for row in found[0]) > 0.9
    assert all(row["training_milliseconds"] > row["inference_milliseconds"] > 0 for row in found[0])
    for row in found[0] + found[1]:
        del row["training_milliseconds"], row["inference_milliseconds"]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patches", "5"], "divisor of 28"),
        (["--lengths", "0"], "at least 1"),
        (["--patches", "--lengths"], "one of them"),
        (["--hidden", "30"], "multiple of 4"),
        (["--rate", "0"], "above 0"),
        (["--picture", "x.gif"], ".png"),
    ],
)
def test_sizes_that_cannot_be_are_refused(words, message, capsys):
    parser = compare_recurrent.build_parser()
    with pytest.raises(SystemExit):
        compare_recurrent.check_options(parser, parser.parse_args(words))
    assert message in capsys.readouterr().err
