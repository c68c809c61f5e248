"""The command ``attn-numba tune``: a search for the parameters of an attention estimator, on sequences from files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from attn_numba import files
from attn_numba.options import positive
from attn_numba.selection import COSTS, Search

__all__ = ["add_tune", "choices", "sequences_of"]

METHODS = ("grid", "halving", "random")
HELP = "search by cross-validation for the parameters of an attention classifier or regressor, score against cost"


def add_tune(
    add: Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser],
    print_table: Callable[[str, Sequence[str], Sequence[Sequence[str]]], None],
) -> None:
    """Add the search to the command line.

    Parameters
    ----------
    add : callable
        Takes a name, what to call and a line of help, and returns the new command.
    print_table : callable
        Takes a title, the headings of columns, and rows of texts.
    """
    tune = add("tune", _tune, HELP)
    tune.set_defaults(print_table=print_table)
    tune.add_argument(
        "inputs",
        nargs="+",
        help="X and y: two .npy files, or one .npz or .safetensors file that holds both, and lengths if they differ. "
        "X is (n, L, D) vectors, (n, features), or with --lengths (n, L) ids; or all tokens, sequence after sequence",
    )
    tune.add_argument("--lengths", metavar="FILE", help="tokens of each sequence (n,); what fills X up is left out")
    tune.add_argument("--task", choices=("classify", "regress"), help="(default: regress where y is of type float)")
    tune.add_argument(
        "--set",
        action="append",
        required=True,
        type=choices,
        metavar="NAME=VALUES",
        help="values to try, as window=none,4,8:0 (8:0 is 8 to the left, 0 to the right); one value is a setting. "
        "Once for each parameter",
    )
    tune.add_argument("--method", choices=METHODS, default="grid", help="(default: grid)")
    tune.add_argument("--count", type=positive, default=20, help="of --method random, combinations (default: 20)")
    tune.add_argument("--folds", type=positive, default=5, help="of the cross-validation (default: 5)")
    tune.add_argument("--scoring", help="by scikit-learn's names, as f1_macro (default: accuracy; of numbers, R2)")
    tune.add_argument("--seed", type=int, default=0, help="of folds, models and random search (default: 0)")
    tune.add_argument("--jobs", type=positive, default=1, help="fits at the same time (default: 1)")
    tune.add_argument(
        "--log", metavar="FILE", help="keeps each finished fit; a search that was stopped goes on from it"
    )
    tune.add_argument("--cost", choices=COSTS, help="what the score is held against (default: multiply_adds)")
    tune.add_argument("--plot", metavar="FILE", help="picture of score against cost: .png, .svg or .pdf by name")
    tune.add_argument("-o", "--output", metavar="FILE", help="best parameters and all scores and costs, as .json")
    tune.add_argument("--force", action="store_true", help="replace the picture and the output if they exist")
    tune.add_argument("--quiet", action="store_true", help="no progress bar")


def choices(text: str) -> tuple[str, list[Any]]:
    """Return the name and the values of a word such as ``window=none,4,8:0``.

    Parameters
    ----------
    text : str
        A name, and values joined by commas: ``none``, ``true``, ``false``, numbers, whole numbers joined by a colon,
        or other words.

    Returns
    -------
    name : str
    values : list
        None, truth values, numbers, tuples of numbers, or texts.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is of another form, or has a value twice.

    Examples
    --------
    >>> choices("window=none,4,8:0")
    ('window', [None, 4, (8, 0)])
    """
    name, sign, values = text.partition("=")
    words = values.split(",")
    if not (sign and name.isidentifier() and all(words)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form window=none,4,8")
    if len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r} has a value twice")
    return name, [_value(word) for word in words]


def sequences_of(X: Any, lengths: Any) -> list[np.ndarray]:
    """Return sequences of unequal length as an estimator takes them.

    Parameters
    ----------
    X : array (n, L, D), or (n, L) of ids, or (tokens, D), or (tokens,) of ids
        Sequences filled up at their ends to one length, or end to end.
    lengths : int array (n,)
        Tokens of each.

    Returns
    -------
    list of array
        n arrays (length, D), or (length,) of ids.

    Raises
    ------
    TypeError
        If `lengths` are not integers.
    ValueError
        If they do not fit X.

    Examples
    --------
    >>> sequences_of(np.array([[5, 6, 7], [8, 0, 0]]), np.array([3, 1]))
    [array([5, 6, 7]), array([8])]
    """
    X, lengths = np.asarray(X), np.asarray(lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths has dtype {lengths.dtype}; needed integers")
    if lengths.ndim != 1 or not lengths.size or lengths.min() < 0:
        least = "" if not lengths.size else f" and goes down to {lengths.min()}"
        raise ValueError(f"lengths has shape {lengths.shape}{least}; needed (n,), 0 and more")
    padded = X.ndim == 3 or (X.ndim == 2 and X.dtype.kind in "iu" and len(X) == len(lengths))
    if padded and len(X) == len(lengths) and lengths.max() <= X.shape[1]:
        return [sequence[:length] for sequence, length in zip(X, lengths, strict=True)]
    if not padded and X.ndim in (1, 2) and len(X) == lengths.sum():
        return np.split(X, np.cumsum(lengths)[:-1])
    needed = f"{len(lengths)} sequences of {lengths.max()} tokens or more" if padded else f"{lengths.sum()} tokens"
    raise ValueError(f"X has shape {X.shape}; lengths needs {needed}")


def _tune(arguments: argparse.Namespace) -> int:
    from attn_numba.integrations.sklearn import AttentionClassifier, AttentionRegressor, search

    _check_outputs(arguments)
    parameters = dict(arguments.set)
    if len(parameters) < len(arguments.set):
        raise ValueError("--set names a parameter twice; needed each once, with its values joined by commas")
    X, y = _samples(arguments)
    task = arguments.task or ("regress" if y.dtype.kind == "f" else "classify")
    estimator = {"classify": AttentionClassifier, "regress": AttentionRegressor}[task](random_state=arguments.seed)
    found = search(
        estimator,
        X,
        y,
        parameters,
        method=arguments.method,
        folds=arguments.folds,
        count=arguments.count,
        scoring=arguments.scoring,
        log=arguments.log,
        jobs=arguments.jobs,
        progress=not arguments.quiet,
        random_state=arguments.seed,
        refit=False,
    )
    title = f"{type(estimator).__name__}, {len(y)} samples, {arguments.folds} folds: best score {found.best_score:.4f}"
    arguments.print_table(title, *found.table(arguments.cost))
    if arguments.plot:
        found.plot(arguments.plot, arguments.cost, overwrite=arguments.force)
    if arguments.output:
        _write(arguments, task, found)
    return 0


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse files that cannot be written before the search begins."""
    if arguments.plot:
        from attn_numba.integrations import matplotlib as pictures

        files.check_output(arguments.plot, arguments.force, pictures.SUFFIXES)
    if arguments.output:
        files.check_output(arguments.output, arguments.force, (".json",))


def _samples(arguments: argparse.Namespace) -> tuple[Any, np.ndarray]:
    """Return X and y, sequences of unequal length as a list."""
    paths, lengths = arguments.inputs, None
    if len(paths) == 1:
        arrays = files.read_arrays(paths[0])
        if missing := [name for name in ("X", "y") if name not in arrays]:
            raise ValueError(f"{paths[0]}: has no array {missing[0]}; it holds {', '.join(sorted(arrays)) or 'none'}")
        X, y, lengths = arrays["X"], arrays["y"], arrays.get("lengths")
    elif len(paths) == 2:
        X, y = files.read_array(paths[0]), files.read_array(paths[1])
    else:
        raise ValueError(f"inputs are one file that holds X and y or two with one each, not {len(paths)} files")
    if arguments.lengths:
        lengths = files.read_array(arguments.lengths)
    return (np.asarray(X) if lengths is None else sequences_of(X, lengths)), np.asarray(y)


def _write(arguments: argparse.Namespace, task: str, found: Search) -> None:
    """Write what was found, and by what search, as JSON."""
    contents = {
        "task": task,
        "method": arguments.method,
        "folds": arguments.folds,
        "scoring": arguments.scoring,
        "seed": arguments.seed,
        "best": found.best,
        "best_score": found.best_score,
        "candidates": [candidate._asdict() for candidate in found.candidates],
    }

    def write(_: Path, file: IO[bytes]) -> None:
        file.write(json.dumps(contents, indent=1).encode() + b"\n")

    files.write_whole(arguments.output, write, arguments.force, (".json",))


def _value(word: str) -> Any:
    """Return what a word of the command line means."""
    known = {"none": None, "true": True, "false": False}
    if word.lower() in known:
        return known[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    try:
        return tuple(int(part) for part in word.split(":")) if ":" in word else word
    except ValueError:
        return word
