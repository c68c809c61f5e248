"""Search for an estimator's parameters by cross-validation, with a log from which a search that was killed goes on."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  makes the next line possible
from sklearn.metrics import check_scoring
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    ParameterGrid,
    ParameterSampler,
    StratifiedKFold,
)
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length, get_tags
from sklearn.utils.metaestimators import _safe_split

from attn_numba.integrations.sklearn import log as logs
from attn_numba.selection import Candidate, Search

__all__ = ["METHODS", "search"]

METHODS = ("grid", "halving", "random")
GLANCE = 0.2  # seconds between two looks at how far a search has come

Rows = NDArray[np.integer[Any]]
Folds = list[tuple[Rows, Rows]]
Parameters = Mapping[str, Any]


def search(
    estimator: Any,
    X: Any,
    y: Any,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    method: str = "grid",
    folds: Any = 5,
    count: int = 20,
    scoring: Any = None,
    log: str | Path | None = None,
    jobs: int = 1,
    progress: bool = True,
    random_state: int = 0,
    refit: bool = True,
) -> Search:
    """Search for the parameters of an estimator that score best in cross-validation, and tell what each costs.

    Parameters
    ----------
    estimator : estimator
        Any of scikit-learn's conventions, with the parameters that are not searched for.
    X : sequences or array (n, ...)
        The samples, as the estimator takes them.
    y : array (n,) or (n, outputs)
        What it shall tell of each.
    parameters : mapping of str to sequence, or sequence of these
        Values to try, by the name of the parameter; several mappings are tried one after the other. Of a random search
        also distributions, which have a method ``rvs``.
    method : {"grid", "halving", "random"}
        Try all combinations; all of them on few samples, then the best third on three times as many, and so on; or
        `count` combinations at random.
    folds : int, splitter, or sequence of (rows, rows)
        Number of parts that the samples are divided into at random; each is scored once, by what is trained on the
        others. Of a classifier, all parts have their share of each class. Or what scikit-learn calls a splitter; or
        the rows to train on and the rows to score, for each fold.
    count : int
        Of a random search, how many combinations are tried.
    scoring : str or callable, optional
        As scikit-learn has it: greater is better. Without it, the estimator's own ``score``.
    log : path, optional
        File to which each finished fit is appended, as one line of JSON. Fits that it holds already are not made again,
        so a search that was stopped goes on, and a larger one uses what a smaller one has found. Fits of other samples,
        other parameters, another scoring or another version of the code have other keys, and are left alone.
    jobs : int
        Processes that fit at the same time, -1 for one on each core.
    progress : bool
        Whether a bar on standard error counts the fits, where that is a terminal and ``tqdm`` is installed.
    random_state : int
        Of the folds, of a random search and of the samples of a halving one; from 0 up.
    refit : bool
        Whether the best is fitted to all samples in the end.

    Returns
    -------
    Search
        The best parameters and the estimator that has them; each candidate's score and cost; table, picture, front.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If an argument is out of its range, the estimator has no such parameter, the log is a file of another kind, X
        and y are of different lengths, or a score is not finite.
    OSError
        If the log cannot be read or written.
    Exception
        What the estimator raises, with a note of the parameters with which it did. The fits before it are in the log.

    See Also
    --------
    AttentionClassifier, AttentionRegressor : Estimators that tell their cost.

    Notes
    -----
    The searching is scikit-learn's: `GridSearchCV`, `HalvingGridSearchCV`, `ParameterSampler`. A search that goes on
    from its log ends with the numbers it would have had, if the estimator's ``random_state`` is a number.

    A fit's key is a digest of the estimator's class and the version of its library, or its source if that has none; of
    all its parameters but ``n_jobs`` and ``verbose``; of the samples, the rows of the fold and the scoring. Its line
    has, beside the key, ``estimator`` (the class), ``parameters`` (those searched for), ``fold`` (from 0), ``resource``
    (samples trained on), ``score``, ``fit_seconds``, ``seconds_per_sample`` (to predict and score one), and, where the
    estimator has a method ``cost``, ``parameter_count`` and ``multiply_adds``.

    References
    ----------
    Halving: K. Jamieson and A. Talwalkar (2016), "Non-stochastic best arm identification and hyperparameter
    optimization", section 3. At random: J. Bergstra and Y. Bengio (2012), "Random search for hyper-parameter
    optimization".

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> import attn_numba as an
    >>> X, y = load_iris(return_X_y=True)
    >>> estimator = an.AttentionClassifier(epochs=20, random_state=0)
    >>> found = an.search(estimator, X, y, {"hidden_size": [4, 8], "window": [None, 1]}, folds=2)
    >>> bool(found.best_score > 0.9), len(found.candidates), len(found.records)
    (True, 4, 8)
    >>> cheapest = found.front("multiply_adds")[0]
    >>> cheapest.parameters["hidden_size"]
    4
    """
    _check(estimator, method, count, jobs, random_state)
    candidates = _candidates(estimator, parameters, method, count, random_state)
    task = _task(estimator, X, y, candidates, scoring, folds, random_state)
    with tempfile.TemporaryDirectory() as folder:
        path, visits = Path(log or Path(folder, "log.jsonl")), Path(folder, "visits")
        known = {key: record["score"] for key, record in logs.prepare(path).items()}
        task = replace(task, known=known, log=path, visits=visits)
        searching, total = _searching(task, method, jobs, random_state)
        with _progress(visits, total, progress):
            searching.fit(np.arange(_length(y)), y)  # row numbers are its samples
        tried, records = _outcome(task, searching)
    best = candidates[searching.best_params_["number"]]
    fitted = task.configured(best).fit(X, y) if refit else None
    return Search(best, float(searching.best_score_), tried, records, fitted)


@dataclass(frozen=True)
class _Task:
    """What all fits of a search share.

    Attributes
    ----------
    estimator : estimator
        What is searched.
    X, y : sequences
        All samples.
    scorer : callable
        Takes an estimator and samples, returns a number.
    candidates : list of mappings
        The parameters to try; a candidate goes by its number in this list.
    digests : list of str
        Of each candidate, with the samples and the scoring.
    folds : list of (rows, rows)
        To train on and to score, of the whole.
    known : mapping of str to float
        The scores that the log held at the beginning.
    log, visits : Path
        Where finished fits go; where every fit that the search asks for leaves its candidate's number and its key.
    """

    estimator: Any
    X: Any
    y: Any
    scorer: Any
    candidates: Sequence[Parameters]
    digests: Sequence[str]
    folds: Folds
    known: Mapping[str, float] = field(default_factory=dict)
    log: Path = Path()
    visits: Path = Path()

    def configured(self, parameters: Parameters) -> Any:
        """Return a new estimator with some parameters."""
        return clone(self.estimator).set_params(**clone(dict(parameters), safe=False))

    def score(self, number: int, training: Rows, test: Rows) -> float:
        """Return a candidate's score on a fold: that of the log, or that of a fit which then goes there."""
        key = logs.digest(self.digests[number], training, test)
        score = self.known.get(key)
        if score is None:
            record = self._fitted(self.candidates[number], training, test)
            score = record["score"]
            logs.append(self.log, json.dumps({"key": key} | record, allow_nan=False))
        logs.append(self.visits, f"{number} {key}")
        return score

    def _fitted(self, parameters: Parameters, training: Rows, test: Rows) -> dict[str, Any]:
        """Fit with some parameters on some rows, score others, and return the line of the log but for its key."""
        model = self.configured(parameters)
        X, y = _safe_split(model, self.X, self.y, training)
        X_test, y_test = _safe_split(model, self.X, self.y, test, training)  # of a kernel, test by training
        begin = time.perf_counter()
        try:
            model.fit(X, y)
            fitted = time.perf_counter()
            score = float(self.scorer(model, X_test, y_test))
        except Exception as error:
            error.add_note(f"in a search, with {logs.plain(parameters)}")
            raise
        scored = time.perf_counter()
        if not np.isfinite(score):
            raise ValueError(f"scoring gave {score} with {logs.plain(parameters)}; needed a finite number")
        return {
            "estimator": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": logs.plain(parameters),
            "fold": self._fold(training, test),
            "resource": len(training),
            "score": score,
            "fit_seconds": fitted - begin,
            "seconds_per_sample": (scored - fitted) / len(test),
        } | _cost(model, X_test)

    def _fold(self, training: Rows, test: Rows) -> int:
        """Return which fold some rows are of, or are taken from."""
        return next(
            number
            for number, (whole, scored) in enumerate(self.folds)
            if np.isin(test, scored).all() and np.isin(training, whole).all()
        )


class Trial(BaseEstimator):
    """What scikit-learn searches in place of the estimator: samples are row numbers, and its fit only keeps them.

    Parameters
    ----------
    task : object
        Scores a candidate on a fold, or looks the score up.
    number : int
        Which candidate.
    """

    def __init__(self, task: Any, number: int = 0) -> None:
        self.task = task
        self.number = number

    def fit(self, X: Rows, y: Any = None) -> Self:
        """Keep the rows to train on.

        Parameters
        ----------
        X : int array (n,)
            Row numbers.
        y : object
            Is not used.

        Returns
        -------
        Trial
            The estimator itself.
        """
        self.rows_ = X
        return self

    def score(self, X: Rows, y: Any = None) -> float:
        """Return the score on some rows of what is trained on the others.

        Parameters
        ----------
        X : int array (n,)
            Row numbers.
        y : object
            Is not used.

        Returns
        -------
        float
        """
        score: float = self.task.score(self.number, self.rows_, X)
        return score

    def __sklearn_clone__(self) -> Trial:
        return Trial(self.task, self.number)  # the samples are not copied

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.estimator_type = get_tags(self.task.estimator).estimator_type
        return tags


def _check(estimator: Any, method: str, count: int, jobs: int, random_state: int) -> None:
    """Refuse arguments that cannot be."""
    if not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")) or isinstance(estimator, type):
        raise TypeError(f"estimator is {estimator!r}; needed an object with fit and get_params")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; needed one of {', '.join(METHODS)}")
    for name, value, least in (("count", count, 1), ("jobs", jobs, -1), ("random_state", random_state, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} is {value!r}; needed an integer")
        if value < least:
            raise ValueError(f"{name} is {value}; needed at least {least}")
    if jobs == 0:
        raise ValueError("jobs is 0; needed 1 or more, or -1 for one on each core")


def _candidates(estimator: Any, parameters: Any, method: str, count: int, random_state: int) -> list[dict[str, Any]]:
    """Return the combinations of parameters to try."""
    grids = [parameters] if isinstance(parameters, Mapping) else parameters
    known = estimator.get_params()
    if not isinstance(grids, Sequence) or not grids or not all(isinstance(grid, Mapping) and grid for grid in grids):
        raise TypeError(f"parameters is {parameters!r}; needed a mapping of names to values, or a sequence of these")
    drawn = False
    for name, values in ((name, values) for grid in grids for name, values in grid.items()):
        if name not in known and name.partition("__")[0] not in known:
            raise ValueError(f"parameters has {name!r}; {type(estimator).__name__} has {', '.join(sorted(known))}")
        if hasattr(values, "rvs"):
            drawn = True
            if method != "random":
                raise ValueError(f"parameters[{name!r}] is a distribution, which is for method='random' alone")
        elif isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
            raise TypeError(f"parameters[{name!r}] is {values!r}; needed a sequence of values to try")
        elif not len(values):
            raise ValueError(f"parameters[{name!r}] is empty; needed at least one value")
    grids = [dict(grid) for grid in grids]
    if method == "random":
        count = count if drawn else min(count, len(ParameterGrid(grids)))
        return list(ParameterSampler(grids, count, random_state=random_state))
    return list(ParameterGrid(grids))


def _task(
    estimator: Any, X: Any, y: Any, candidates: list[dict[str, Any]], scoring: Any, folds: Any, random_state: int
) -> _Task:
    """Return what the fits share, but for what the log holds."""
    if y is None:
        raise TypeError("y is None; needed what the estimator shall tell of each sample")
    check_consistent_length(X, y)
    scorer = check_scoring(estimator, scoring)
    splits = _folds(estimator, folds, y, random_state)
    task, samples = _Task(clone(estimator), X, y, scorer, candidates, [], splits), logs.digest(X, y, scoring)
    return replace(task, digests=[logs.digest(task.configured(each), samples) for each in candidates])


def _folds(estimator: Any, folds: Any, y: Any, random_state: int) -> Folds:
    """Return the rows to train on and those to score, of each fold."""
    rows = np.arange(_length(y))
    if isinstance(folds, int | np.integer) and not isinstance(folds, bool):
        if not 2 <= folds <= len(rows):
            raise ValueError(f"folds is {folds}; needed 2 to {len(rows)}, the number of samples")
        kind = StratifiedKFold if is_classifier(estimator) else KFold
        folds = kind(int(folds), shuffle=True, random_state=random_state)
    elif isinstance(folds, str) or not (hasattr(folds, "split") or isinstance(folds, Iterable)):
        raise TypeError(f"folds is {folds!r}; needed an integer, a splitter, or a sequence of pairs of rows")
    found = [
        (rows[training], rows[test]) for training, test in (folds.split(rows, y) if hasattr(folds, "split") else folds)
    ]
    if not found or not all(len(training) and len(test) for training, test in found):
        raise ValueError("folds has none, or an empty one; needed rows to train on and rows to score")
    return found


def _length(y: Any) -> int:
    return int(y.shape[0]) if hasattr(y, "shape") else len(y)


def _searching(task: _Task, method: str, jobs: int, random_state: int) -> tuple[Any, int]:
    """Return scikit-learn's search, and how many fits it takes, 0 for a number that only the search can tell."""
    numbers = {"number": list(range(len(task.candidates)))}
    options = {"cv": task.folds, "n_jobs": jobs, "refit": False, "error_score": "raise", "return_train_score": False}
    if method == "halving":
        return HalvingGridSearchCV(Trial(task), numbers, random_state=random_state, **options), 0
    return GridSearchCV(Trial(task), numbers, **options), len(task.candidates) * len(task.folds)


def _outcome(task: _Task, searching: Any) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Return the candidates in the order in which scikit-learn has tried them, and the lines of their fits.

    One that was tried with several numbers of samples has as many fits with each; they come in that order.
    """
    log = logs.read(task.log)
    fits: list[list[dict[str, Any]]] = [[] for _ in task.candidates]
    for number, key in (line.split() for line in task.visits.read_text().splitlines()):
        fits[int(number)].append(log[key])
    for records in fits:
        records.sort(key=lambda record: record["resource"])
    table, tried, in_order = searching.cv_results_, [], []
    for chosen, score, deviation in zip(
        table["params"], table["mean_test_score"], table["std_test_score"], strict=True
    ):
        waiting = fits[chosen["number"]]
        records, waiting[:] = waiting[: len(task.folds)], waiting[len(task.folds) :]
        means = {name: _mean(records, name) for name in Candidate._fields[4:]}
        resource = round(float(np.mean([record["resource"] for record in records])))
        tried.append(Candidate(task.candidates[chosen["number"]], resource, float(score), float(deviation), **means))
        in_order += sorted(records, key=lambda record: record["fold"])
    return tried, in_order


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the mean of a field of some lines, None if one lacks it."""
    values = [record[name] for record in records if name in record]
    return float(np.mean(values)) if len(values) == len(records) else None


def _cost(model: Any, X: Any) -> dict[str, float]:
    """Return what a fitted model tells of its cost; of a pipeline, what its last step does."""
    if isinstance(model, Pipeline) and hasattr(model[-1], "cost"):
        model, X = model[-1], (model[:-1].transform(X) if len(model) > 1 else X)
    if not hasattr(model, "cost"):
        return {}
    cost = model.cost(X)
    return {"parameter_count": int(cost.parameters), "multiply_adds": float(cost.multiply_adds)}


@contextmanager
def _progress(visits: Path, total: int, wanted: bool) -> Iterator[None]:
    """Show while the block runs how many fits have been visited, whichever process has made them."""
    try:
        from attn_numba.integrations.tqdm import progress_bar
    except ImportError:
        wanted = False
    with progress_bar("search", total, unit="fit") if wanted else nullcontext() as advance:
        ended = threading.Event()
        watching = threading.Thread(target=_watch, args=(visits, ended, advance), daemon=True)
        if wanted:
            watching.start()
        try:
            yield
        finally:
            ended.set()
            if wanted:
                watching.join()


def _watch(visits: Path, ended: threading.Event, advance: Callable[[int], None]) -> None:
    """Tell a bar of the lines that are added to a file, until the search has ended and after."""
    shown, last = 0, False
    while not last:
        last = ended.wait(GLANCE)
        found = visits.read_bytes().count(b"\n") if visits.exists() else 0
        advance(found - shown)
        shown = found
