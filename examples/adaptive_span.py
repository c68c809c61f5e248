"""Let each token choose how far it looks back, where sequences differ in how far that must be.

    python examples/adaptive_span.py

Every token of a sequence is to say the last marked symbol. Marks come at a tempo of the sequence's own, every 2 to 32
tokens. The same model is trained with spans that it chooses (Sukhbaatar et al., "Adaptive attention span in
transformers", 2019) and with fixed ones; the cost is the number of keys that a query sees, in the mean. The last fixed
span is the one that costs what the chosen ones cost. Prints a table and writes `adaptive_span.png`. The same seed gives
the same result, on one machine with one number of threads.
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
    from data import marks
    from models.tagger import Tagger

SPANS = (*(beat - 1 for beat in marks.BEATS), 63)  # what each tempo needs, and twice what all need
PICTURE = "adaptive_span.png"
HEADS = 2
AT_ONCE = 50  # sequences that are scored together


@dataclass(frozen=True)
class Result:
    """A trained model on the sequences held out.

    Attributes
    ----------
    span : int or None
        The fixed one; None if tokens choose.
    keys : float
        Keys that a query sees, in the mean of heads, tokens and sequences.
    accuracy : float
        Share of the answers that are right.
    by_tempo : tuple of float
        The same for each of `marks.BEATS`.
    keys_by_tempo : array (tempos, heads)
        Keys that a query sees, of each tempo and head.
    seconds : float
        Of training.
    """

    span: int | None
    keys: float
    accuracy: float
    by_tempo: tuple[float, ...]
    keys_by_tempo: NDArray[np.float64]
    seconds: float

    @property
    def name(self) -> str:
        """What the model is called in the table."""
        return "chosen" if self.span is None else f"{self.span} before itself"


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_options(parser, options)
    options.folder.mkdir(parents=True, exist_ok=True)
    check_output(options.folder / PICTURE, options.force, pictures.SUFFIXES)
    held_out = marks.draw(options.held_out, options.length, np.random.default_rng([options.seed, 1]))
    chosen, fixed = compare(held_out, options)
    report(chosen, fixed, held_out)
    path = options.folder / PICTURE
    pictures.save(draw(chosen, fixed), path, overwrite=options.force)
    print(path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare spans that tokens choose with fixed ones.")
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of training, for each model; default %(default)s")
    add("--batch", type=int, default=32, help="sequences of a step; default %(default)s")
    add("--length", type=int, default=128, help="tokens of a sequence; default %(default)s")
    add("--penalty", type=float, default=0.003, help="on each position of the mean span, in nats; default %(default)s")
    add("--spans", type=int, nargs="+", default=SPANS, help="the fixed ones; default %(default)s")
    add("--held-out", type=int, default=400, metavar="N", help="sequences that are scored; default %(default)s")
    add("--threads", type=int, metavar="N", help="for attention; NumPy's products follow OPENBLAS_NUM_THREADS")
    add("--seed", type=int, default=0, help="of initial weights and sequences; default %(default)s")
    add("--folder", type=Path, default=Path("."), help="for the picture; default %(default)s")
    add("--force", action="store_true", help="replace a picture that exists")
    parser.set_defaults(backend="auto")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse sizes that cannot be."""
    for name in ("steps", "batch", "held_out"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; at least 1 is needed")
    if options.length < max(marks.BEATS):
        parser.error(f"--length is {options.length}; at least {max(marks.BEATS)} is needed, the slowest beat")
    if not 0 <= options.penalty < np.inf:
        parser.error(f"--penalty is {options.penalty}; at least 0 is needed")
    if min(options.spans) < 0 or max(options.spans) >= options.length:
        parser.error(f"--spans are {options.spans}; needed are 0 to {options.length - 1}")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; at least 0 is needed")
    command.configure(parser, options)


def compare(held_out: marks.Marks, options: argparse.Namespace) -> tuple[Result, list[Result]]:
    """Return the results of the model that chooses its spans, and of those with fixed ones in ascending order."""
    chosen = trained(None, held_out, options)
    equal = least_span(chosen.keys, options.length)
    return chosen, [trained(span, held_out, options) for span in sorted({*options.spans, equal})]


def least_span(keys: float, length: int) -> int:
    """Return the least fixed span with which a token sees so many keys or more, in the mean; else the longest."""
    before = np.arange(length)
    return next((n for n in before.tolist() if np.minimum(before, n).mean() + 1 >= keys), length - 1)


def trained(span: int | None, held_out: marks.Marks, options: argparse.Namespace) -> Result:
    """Train a model with a fixed span, or with chosen ones, and score it."""
    model = Tagger(marks.INPUTS, marks.SYMBOLS, span=span, largest=2 * max(marks.BEATS), heads=HEADS, seed=options.seed)
    optimizer = AdamW(model.parameters, Settings(options.steps, rate=5e-3, warmup=max(1, options.steps // 20)))
    generator, begun = np.random.default_rng([options.seed, 0]), time.perf_counter()
    label = "chosen spans" if span is None else f"span {span}"
    for step in tqdm(range(options.steps), desc=label, unit="step", disable=None, leave=False):
        batch = marks.draw(options.batch, options.length, generator)
        _, gradients = model.gradients(batch.tokens, batch.targets, options.penalty)
        optimizer.update(gradients, step)
    return scored(model, held_out, time.perf_counter() - begun)


def scored(model: Tagger, held_out: marks.Marks, seconds: float) -> Result:
    """Return what a model answers, and what it sees for that."""
    right, visible = [], []
    for begin in range(0, len(held_out.beats), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        logits, saved = model.forward(held_out.tokens[part])
        right.append(logits.argmax(axis=2) == held_out.targets[part])
        visible.append(model.visible(saved, held_out.targets[part].shape))
    correct, keys, asked = np.concatenate(right), np.concatenate(visible), held_out.asked
    of_tempo = [held_out.beats == beat for beat in marks.BEATS]
    return Result(
        span=model.span,
        keys=float(keys.mean()),
        accuracy=float(correct[asked].mean()),
        by_tempo=tuple(float(correct[tempo][asked[tempo]].mean()) for tempo in of_tempo),
        keys_by_tempo=np.array([keys[tempo].mean(axis=(0, 2)) for tempo in of_tempo]),
        seconds=seconds,
    )


def equal_in_cost(chosen: Result, fixed: list[Result]) -> Result:
    """Return the least fixed span that sees as many keys as the chosen ones do, or more."""
    return min((result for result in fixed if result.keys >= chosen.keys), key=lambda result: result.keys)


def report(chosen: Result, fixed: list[Result], held_out: marks.Marks) -> None:
    """Print the table, and the comparison at equal cost."""
    rows = [
        [
            result.name,
            f"{result.keys:.1f}",
            f"{result.accuracy:.3f}",
            *(f"{share:.2f}" for share in result.by_tempo),
            f"{result.seconds:.0f}",
        ]
        for result in [*fixed, chosen]
    ]
    columns = ["span", "mean visible keys", "accuracy", *(f"every {beat}" for beat in marks.BEATS), "seconds"]
    print_table("The last marked symbol, sequences held out; on the right by tempo", columns, rows)
    same = equal_in_cost(chosen, fixed)
    print(
        f"At {chosen.keys:.1f} visible keys chosen spans answer {chosen.accuracy:.1%}; the fixed span of {same.span}, "
        f"which sees {same.keys:.1f}, {same.accuracy:.1%}."
    )
    one = least_span(HEADS * chosen.keys, held_out.targets.shape[1])
    print(
        f"If one head had all of these keys, and saw {one} tokens before each, it could answer "
        f"{held_out.ceiling(one):.1%} at most, however it was trained."
    )
    as_good = [result for result in fixed if result.accuracy >= chosen.accuracy]
    if as_good:
        least = min(as_good, key=lambda result: result.keys)
        print(f"The least fixed span here that answers as many is {least.span}; it sees {least.keys:.1f} keys.")


def draw(chosen: Result, fixed: list[Result]) -> Figure:
    """Return the picture: accuracy against visible keys, and the keys that each head chose to see by tempo."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    quality, reach = figure.subplots(1, 2)
    ordered = sorted(fixed, key=lambda result: result.keys)
    quality.plot([r.keys for r in ordered], [r.accuracy for r in ordered], "o-", color="0.5", label="fixed span")
    for result in ordered:
        quality.annotate(str(result.span), (result.keys, result.accuracy), xytext=(5, -11), textcoords="offset points")
    quality.plot(chosen.keys, chosen.accuracy, "*", color="tab:red", markersize=15, label="chosen spans")
    quality.set(xlabel="visible keys, mean over queries", ylabel="accuracy, held out", ylim=(0, 1.05))
    quality.set_xscale("log", base=2)
    quality.legend(loc="lower right")
    for head, keys in enumerate(chosen.keys_by_tempo.T):
        reach.plot(marks.BEATS, keys, "o-", label=f"head {head}")
    reach.plot(marks.BEATS, marks.BEATS, "--", color="0.5", label="needed")
    reach.set_xscale("log", base=2)
    reach.set_yscale("log", base=2)
    reach.set(xlabel="tokens from one mark to the next", ylabel="visible keys, mean over queries")
    reach.legend()
    return figure


if __name__ == "__main__":
    sys.exit(command.run(main))
