"""Train a small character-level transformer in NumPy, its attention and the gradient of that by attn_numba.

    python examples/train.py --sample 300

The text is Python's own help pages, which every installation has; their last twentieth is held out. The table at the
end compares bits per character there with interpolated 1-, 2- and 3-gram models of the same training text. The folder
gets `checkpoint.safetensors`, `weights.safetensors` and the loss curve, `loss.png`. After Ctrl-C, or a kill, `--resume`
goes on from the last checkpoint and ends with the same weights as a run that was left alone. The same seed gives the
same result, on one machine with one number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from models import command

with command.optional_imports("demo,plot"):
    import numpy as np
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from attn_numba.integrations.rich import print_table
    from attn_numba.learning import AdamW, Settings
    from models import checkpoints, corpus
    from models.ngram import Ngram
    from models.transformer import Config, Transformer

EVALUATIONS = 8  # of the development part, evenly spread over a run
SMOOTHING = 0.9  # of the loss beside the progress bar
CHECKPOINT, WEIGHTS, PICTURE = "checkpoint.safetensors", "weights.safetensors", "loss.png"


@dataclass
class Run:
    """A training run: what `train` changes step by step, and a checkpoint holds.

    Attributes
    ----------
    text : Corpus
        What is learned.
    model : Transformer
        Who learns.
    optimizer : AdamW
        How.
    settings : dict
        Everything that a result depends on: a checkpoint of other settings is refused.
    step : int
        Steps taken.
    seconds : float
        Time they took, evaluations included.
    losses : list of float
        Bits per character of each step's batch.
    curve : list of (int, float)
        Bits per character of the development part after so many steps.
    """

    text: corpus.Corpus
    model: Transformer
    optimizer: AdamW
    settings: dict[str, int | str]
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def context(self) -> int:
        """Characters of a sequence, M."""
        return int(self.settings["context"])

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.optimizer.settings.steps

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        arrays = dict(self.model.parameters)
        arrays |= {f"first/{name}": array for name, array in self.optimizer.first.items()}
        arrays |= {f"second/{name}": array for name, array in self.optimizer.second.items()}
        said = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "curve": self.curve}
        checkpoints.write(path, arrays, {**said, "attention": self.model.seconds, "settings": self.settings})

    def resume(self, path: Path) -> None:
        """Go back to a checkpoint of the same settings."""
        arrays, said = checkpoints.read(path)
        checkpoints.check_same(path, said.get("settings", {}), self.settings)
        self.model.load(arrays)
        for name in self.model.parameters:
            self.optimizer.first[name][...] = arrays[f"first/{name}"]
            self.optimizer.second[name][...] = arrays[f"second/{name}"]
        self.step, self.seconds, self.losses = said["step"], said["seconds"], said["losses"]
        self.curve, self.model.seconds = [tuple(point) for point in said["curve"]], said["attention"]


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    check_options(parser, options)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / CHECKPOINT
    if path.exists() and not (options.resume or options.force):
        raise command.Failure(f"{path} exists: --resume goes on from it, --force begins anew in its place")

    run = begin(options, corpus.split(corpus.read()))
    if options.resume:
        run.resume(path)
    with command.announce_compilation():
        run.model.gradients(*batch(run, 0))
        run.model.seconds = dict.fromkeys(run.model.seconds, 0.0) if not run.step else run.model.seconds
    stopped = train(run, path, options.checkpoint, options.minutes)
    draw(run, options.folder / PICTURE)
    if stopped == "interrupted":
        print(f"interrupted after step {run.step}; --resume goes on from {path}", file=sys.stderr)
        raise KeyboardInterrupt

    checkpoints.write(options.folder / WEIGHTS, run.model.parameters, {"alphabet": run.text.alphabet})
    report(run, reloaded(run, options.folder / WEIGHTS))
    if options.sample:
        before = run.text.tokens[: run.text.held_out]
        print(run.text.spell(run.model.sample(before, options.sample, run.context, options.seed)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a character-level transformer in NumPy on Python's help pages.")
    add = parser.add_argument
    add("--steps", type=int, default=900, help="default %(default)s; the learning rate falls until the last")
    add("--minutes", type=float, help="stop after so many, however few steps that is; --resume goes on")
    add("--hidden", type=int, default=128, help="size of a hidden state; default %(default)s")
    add("--layers", type=int, default=3, help="default %(default)s")
    add("--heads", type=int, default=4, help="in each layer; default %(default)s")
    add("--context", type=int, default=128, help="characters of a sequence; default %(default)s")
    add("--batch", type=int, default=16, help="sequences of a step; default %(default)s")
    add("--backend", choices=command.BACKENDS, default="auto", help="what computes attention; default %(default)s")
    add("--threads", type=int, metavar="N", help="for attention; NumPy's products follow OPENBLAS_NUM_THREADS")
    add("--seed", type=int, default=0, help="of initial weights, data order and sample; default %(default)s")
    add("--folder", type=Path, default=Path("trained"), help="for all files; default %(default)s")
    add("--checkpoint", type=int, default=50, metavar="STEPS", help="steps between checkpoints; default %(default)s")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder")
    add("--force", action="store_true", help="replace the checkpoint in the folder")
    add("--sample", type=int, default=0, metavar="N", help="print N characters that follow the text before the end")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse sizes that cannot be, and a backend that cannot run here."""
    for name in ("steps", "hidden", "layers", "heads", "batch", "checkpoint"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; at least 1 is needed")
    if options.context < 2 or options.context % 2:
        parser.error(f"--context is {options.context}; an even number from 2 is needed")
    if options.hidden % (2 * options.heads):
        parser.error(f"--hidden is {options.hidden}; a multiple of twice --heads, {2 * options.heads}, is needed")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; more than 0 is needed")
    for name in ("sample", "seed"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} is {getattr(options, name)}; at least 0 is needed")
    if options.resume and options.force:
        parser.error("--resume needs the checkpoint that --force replaces: pass one of them")
    command.configure(parser, options)


def begin(options: argparse.Namespace, text: corpus.Corpus) -> Run:
    """Return a run of no steps."""
    config = Config(len(text.alphabet), options.hidden, options.layers, options.heads)
    model = Transformer(config, seed=options.seed, backend=options.backend)
    names = ("steps", "context", "batch", "seed")
    settings: dict[str, int | str] = {**asdict(config), **{name: getattr(options, name) for name in names}}
    settings["text"] = hashlib.sha256(text.tokens.tobytes() + text.alphabet.encode()).hexdigest()
    warmup = min(50, max(1, options.steps // 10))
    return Run(text, model, AdamW(model.parameters, Settings(options.steps, warmup=warmup)), settings)


def train(run: Run, path: Path, interval: int, minutes: float | None = None) -> str:
    """Take the steps that are left, with a checkpoint after every `interval` of them and at the end.

    Returns
    -------
    str
        "finished", "interrupted" (by Ctrl-C, which takes effect between two steps), or "minutes" if they are over.
    """
    steps, before, begun = run.optimizer.settings.steps, run.seconds, time.perf_counter()
    evaluate_every = max(1, steps // EVALUATIONS)
    smooth = run.losses[-1] if run.losses else None
    stopped = "finished"
    with (
        until_interrupted() as interrupted,
        tqdm(desc="training", total=steps, initial=run.step, unit="step", disable=None) as bar,
    ):
        while not run.finished:
            loss, gradients = run.model.gradients(*batch(run, run.step))
            run.optimizer.update(gradients, run.step)
            run.step += 1
            run.losses.append(loss / float(np.log(2)))
            smooth = run.losses[-1] if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * run.losses[-1]
            bar.update()
            bar.set_postfix_str(f"{smooth:.3f} bits", refresh=False)
            if run.step % evaluate_every == 0 or run.finished:
                run.curve.append((run.step, development_bits(run)))
            run.seconds = before + time.perf_counter() - begun
            if run.finished:
                break
            if interrupted():
                stopped = "interrupted"
            elif minutes is not None and run.seconds >= 60 * minutes:
                stopped = "minutes"
            if stopped != "finished":
                break
            if run.step % interval == 0:
                run.save(path)
    run.save(path)
    return stopped


def batch(run: Run, step: int) -> tuple[corpus.Tokens, corpus.Tokens]:
    """Return a step's sequences and their successors, `(B, M)` each; they depend on the seed and the step alone."""
    generator = np.random.default_rng([int(run.settings["seed"]), step])
    begins = generator.integers(0, run.text.development - run.context, int(run.settings["batch"]))
    places = begins[:, None] + np.arange(run.context)
    return run.text.tokens[places], run.text.tokens[places + 1]


@contextmanager
def until_interrupted() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed in the block; pressed twice, it interrupts at once."""
    asked = []

    def remember(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def untimed(model: Transformer) -> Iterator[None]:
    """Leave evaluations out of the time that training spends in attention."""
    seconds = dict(model.seconds)
    try:
        yield
    finally:
        model.seconds = seconds


def development_bits(run: Run) -> float:
    """Return bits per character of the development part."""
    with untimed(run.model):
        return run.model.bits(run.text.tokens[: run.text.held_out], run.text.development, run.context)


def held_out_bits(run: Run, model: Transformer) -> float:
    """Return bits per character of the held-out part."""
    with untimed(model):
        return model.bits(run.text.tokens, run.text.held_out, run.context)


def reloaded(run: Run, path: Path) -> Transformer:
    """Return a new model with the weights of a file."""
    model = Transformer(run.model.config, backend=run.model.backend)
    model.load(checkpoints.read(path)[0])
    return model


def ngram_bits(text: corpus.Corpus) -> list[float]:
    """Return the held-out bits per character of the interpolated 1-, 2- and 3-gram models."""
    found = []
    for order in (1, 2, 3):
        model = Ngram(order, len(text.alphabet), text.training)
        model.fit(text.tokens[text.development : text.held_out])
        found.append(model.bits(text.tokens, text.held_out))
    return found


def draw(run: Run, path: Path) -> None:
    """Write the loss curve as a picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(run.losses) + 1), run.losses, color="0.75", linewidth=0.8, label="training batch")
    if run.curve:
        axes.plot(*zip(*run.curve, strict=True), "o-", color="tab:blue", label="development part")
    axes.axhline(ngram_bits(run.text)[-1], color="tab:red", linestyle="--", label="3-gram, interpolated (held out)")
    axes.set(xlabel="step", ylabel="bits per character")
    axes.legend()
    figure.savefig(path, dpi=150)


def report(run: Run, again: Transformer) -> None:
    """Print the table, and hold the reloaded model to the trained one."""
    bits = held_out_bits(run, run.model)
    if held_out_bits(run, again) != bits:
        raise command.Failure("the reloaded weights give other bits than the trained ones")
    rows = [(f"{n}-gram, interpolated", f"{value:.3f}") for n, value in enumerate(ngram_bits(run.text), 1)]
    rows += [(f"transformer, {run.step} steps", f"{bits:.3f}"), ("the same, weights reloaded", f"{bits:.3f}")]
    print_table("Bits per character of the held-out text", ("model", "bits"), rows)
    characters = run.step * run.context * int(run.settings["batch"])
    parts = {name: value / run.seconds for name, value in run.model.seconds.items()}
    rows = [
        ("minutes", f"{run.seconds / 60:.1f}"),
        ("characters per second", f"{characters / run.seconds:.0f}"),
        ("in attention layers, forward", f"{parts['forward']:.0%}"),
        ("in attention layers, backward", f"{parts['backward']:.0%}"),
    ]
    print_table("Training, evaluations included; attention layers with their projections", ("", "value"), rows)


if __name__ == "__main__":
    sys.exit(command.run(main))
