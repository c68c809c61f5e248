"""What the scripts that classify share: a search by cross-validation, one look at the test part, and tables."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

import attn_numba as an
from attn_numba.files import check_output
from attn_numba.integrations.rich import print_table
from data.parts import Part

from .command import Failure

METHODS = ("grid", "halving", "random")
LOG, FRONT, ATTENDED = "search.jsonl", "front.png", "attended.png"
COST = "multiply_adds"  # what scores are held against
TOGETHER = 100  # sequences that are explained at once: their weights from token to token are kept meanwhile
MEAN = {"attention_score": "uniform", "pooling": "mean"}  # all tokens weigh the same: no attention is left


@dataclass(frozen=True)
class Task:
    """A data set as sequences, what learns them, and where to search.

    Attributes
    ----------
    title : str
        What tables and pictures call it.
    training, test : Part
        Their inputs are sequences as the estimator takes them.
    estimator : AttentionClassifier
        With the parameters that are not searched.
    parameters : mapping of str to sequence
        Values to try, by the name of the parameter.
    """

    title: str
    training: Part
    test: Part
    estimator: Any
    parameters: Mapping[str, Sequence[Any]]


class Outcome(NamedTuple):
    """What came of a task.

    Parameters
    ----------
    search : Search
        Every fit of the search.
    attention, mean : AttentionClassifier
        Trained on the whole training part with the parameters that were found: as they are, and with all tokens of the
        same weight.
    scores : (float, float)
        Shares of the test part that these two tell right.
    """

    search: Any
    attention: Any
    mean: Any
    scores: tuple[float, float]


def build_parser(description: str, epilog: str, hidden: str, window: str, folder: str) -> argparse.ArgumentParser:
    """Return a parser with the options of these scripts; `hidden` and `window` are what is searched by default."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog)
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="the wheel or the files from it, where there is no network")
    add("--hidden", type=sizes, default=hidden, metavar="N,N", help="hidden sizes to try; default %(default)s")
    add("--window", type=windows, default=window, metavar="N,N", help="windows to try; default %(default)s")
    add("--method", choices=METHODS, default="grid", help="default %(default)s")
    add("--folds", type=int, default=5, help="of the cross-validation; default %(default)s")
    add("--epochs", type=int, metavar="N", help="of each training; default: what the script has chosen")
    add("--samples", type=int, metavar="N", help="train on so many of the training part alone, for a quick look")
    add("--jobs", type=int, default=1, help="processes of the search; default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("-o", "--output", type=Path, default=Path(folder), metavar="FOLDER", help="for log and pictures; %(default)s")
    add("--force", action="store_true", help="replace pictures that exist")
    return parser


def sizes(words: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(word) for word in words.split(",")]


def windows(words: str) -> list[int | str | None]:
    """Return the windows of a list with commas: none, adaptive, or so many positions to each side."""
    known: dict[str, str | None] = {"none": None, "adaptive": "adaptive"}
    return [known[word] if word in known else int(word) for word in words.split(",")]


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be, before any work."""
    for name, least in (("folds", 2), ("epochs", 1), ("samples", 2 * options.folds), ("jobs", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; at least {least} is needed")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in (FRONT, ATTENDED):
        check_output(options.output / name, options.force, (".png",))


def chosen(options: argparse.Namespace, estimator: Any) -> tuple[Any, dict[str, Sequence[Any]]]:
    """Return the estimator and where to search, as the options have it."""
    if strange := [size for size in options.hidden if size < 1 or size % estimator.heads]:
        raise Failure(f"--hidden holds {strange[0]}; multiples of the {estimator.heads} heads are needed")
    if strange := [reach for reach in options.window if isinstance(reach, int) and reach < 0]:
        raise Failure(f"--window holds {strange[0]}; at least 0 positions are needed")
    changes = {"random_state": options.seed} | ({} if options.epochs is None else {"epochs": options.epochs})
    return estimator.set_params(**changes), {"hidden_size": options.hidden, "window": options.window}


def some_of(part: Part, count: int | None) -> Part:
    """Return `count` samples of a part, evenly spread over it; all of them if it is None or more than there are."""
    if count is None or count >= len(part):
        return part
    places = np.linspace(0, len(part) - 1, count).astype(int)
    inputs = part.inputs[places] if isinstance(part.inputs, np.ndarray) else [part.inputs[n] for n in places]
    return Part(inputs, part.labels[places])


def classify(task: Task, options: argparse.Namespace) -> Outcome:
    """Search on the training part, train the best on all of it, and score it on the test part, once.

    The model beside it has the same parameters and is trained on the same samples, but all tokens weigh the same.
    A search that was stopped goes on from its log.
    """
    inputs, labels = task.training.inputs, task.training.labels
    if (least := np.bincount(labels)[np.unique(labels)].min()) < options.folds:
        raise Failure(f"a class has {least} training samples; {options.folds} folds need as many of each")
    search = an.search(
        task.estimator, inputs, labels, task.parameters, method=options.method, folds=options.folds,
        log=options.output / LOG, jobs=options.jobs, random_state=options.seed,
    )  # fmt: skip
    mean = clone(search.estimator).set_params(**MEAN).fit(inputs, labels)
    first, second = (model.score(task.test.inputs, task.test.labels) for model in (search.estimator, mean))
    return Outcome(search, search.estimator, mean, (first, second))


def relevance(model: Any, inputs: Sequence[Any]) -> list[NDArray[Any]]:
    """Return for each sequence how much each of its tokens counts, `(L,)`: shares of what is pooled, together 1.

    The weights of the blocks say how much of each token there is in each state, those of the pooling how much of each
    state there is in the end.

    Parameters
    ----------
    model : AttentionClassifier
        Fitted.
    inputs : sequence
        As the model takes them.

    References
    ----------
    S. Abnar and W. Zuidema (2020), "Quantifying attention flow in transformers" (rollout).
    """
    found: list[NDArray[Any]] = []
    for begin in range(0, len(inputs), TOGETHER):
        attended = model.explain(inputs[begin : begin + TOGETHER])
        shares = attended.pooling.mean(axis=1)
        if attended.layers:
            shares = np.einsum("bi,bij->bj", shares, an.rollout(attended.layers))
        found += [row[:length] for row, length in zip(shares, attended.lengths, strict=True)]
    return found


def report(task: Task, outcome: Outcome, options: argparse.Namespace) -> None:
    """Print the search and the scores, and draw score against cost."""
    outcome.search.plot(options.output / FRONT, COST, overwrite=options.force)
    print_table(f"{task.title}: cross-validation on {len(task.training)} training samples", *outcome.search.table(COST))
    rows = []
    for name, model, score in zip(("attention", "mean of all tokens"), outcome[1:3], outcome.scores, strict=True):
        cost, error = model.cost(task.test.inputs), math.sqrt(score * (1 - score) / len(task.test))
        sizes = (str(model.hidden_size), _word(model.window), str(cost.parameters), f"{cost.multiply_adds:.0f}")
        rows.append((name, *sizes, f"{score:.4f}", f"{error:.4f}"))
    columns = ("model", "hidden size", "window", "parameters", "multiply-adds", "right", "standard error")
    print_table(f"{task.title}: share of the {len(task.test)} test samples told right", columns, rows)


def _word(value: object) -> str:
    return "none" if value is None else str(value)
