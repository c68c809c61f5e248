"""Searches for parameters by cross-validation: against scikit-learn's, killed and resumed, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed; it belongs to the extra sklearn")

from scipy.stats import uniform
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris, make_regression
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  makes HalvingGridSearchCV importable
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import make_scorer
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    ParameterGrid,
    RandomizedSearchCV,
    ShuffleSplit,
    StratifiedKFold,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

import attn_numba as an
from attn_numba.integrations.sklearn import log as logs
from attn_numba.selection import COSTS, Candidate, Search

X, Y = load_iris(return_X_y=True)
NEIGHBORS = {"n_neighbors": [1, 9], "weights": ["uniform", "distance"]}
FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)


class Counting(KNeighborsClassifier):
    """Neighbors that count how often they are fitted, and tell a cost."""

    fits = 0

    def fit(self, X, y):
        Counting.fits += 1
        return super().fit(X, y)

    def cost(self, X):
        return an.learning.cost.Cost(7, 10.0 * self.n_neighbors)


@pytest.fixture(autouse=True)
def _count_from_zero():
    Counting.fits = 0


def find(estimator=None, parameters=NEIGHBORS, data=(X, Y), **options) -> Search:
    estimator = KNeighborsClassifier() if estimator is None else estimator
    return an.search(estimator, *data, parameters, **{"folds": 3, "progress": False} | options)


def same(found: Search, expected) -> None:
    """Hold a search to what scikit-learn's own finds on the same folds."""
    table = expected.cv_results_
    assert [one.parameters for one in found.candidates] == list(table["params"])
    np.testing.assert_allclose([one.score for one in found.candidates], table["mean_test_score"], rtol=1e-12)
    np.testing.assert_allclose([one.deviation for one in found.candidates], table["std_test_score"], atol=1e-12)
    assert found.best == expected.best_params_
    assert found.best_score == pytest.approx(expected.best_score_, rel=1e-12)
    assert type(found.estimator) is type(expected.estimator)
    assert found.estimator.get_params() == expected.best_estimator_.get_params()
    assert (found.estimator.predict(X) == expected.best_estimator_.predict(X)).all()


def test_grid_is_that_of_scikit_learn():
    same(find(), GridSearchCV(KNeighborsClassifier(), NEIGHBORS, cv=FOLDS).fit(X, Y))


def test_halving_is_that_of_scikit_learn():
    expected = HalvingGridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 2, 3, 5, 6]}, cv=FOLDS, random_state=3)
    found = find(parameters={"n_neighbors": [1, 2, 3, 5, 6]}, method="halving", folds=FOLDS, random_state=3)
    same(found, expected.fit(X, Y))
    assert len({one.resource for one in found.candidates}) == 2
    assert {one.resource for one in found.front()} == {max(one.resource for one in found.candidates)}


@pytest.mark.parametrize("parameters", [NEIGHBORS, {"n_neighbors": [3, 4, 5], "leaf_size": [10, 20]}])
def test_random_is_that_of_scikit_learn(parameters):
    expected = RandomizedSearchCV(KNeighborsClassifier(), parameters, n_iter=3, cv=FOLDS, random_state=2)
    same(find(parameters=parameters, method="random", count=3, folds=FOLDS, random_state=2), expected.fit(X, Y))


def test_distributions_are_drawn_from():
    found = find(LogisticRegression(max_iter=300), {"C": uniform(0.1, 2)}, method="random", count=3, folds=2)
    values = [one.parameters["C"] for one in found.candidates]
    assert len(set(values)) == 3
    assert all(0.1 <= value <= 2.1 for value in values)


def test_random_search_tries_no_combination_twice():
    assert len(find(method="random", count=99, folds=2).candidates) == len(ParameterGrid(NEIGHBORS))


def test_several_grids_and_another_scoring():
    grids = [{"n_neighbors": [1]}, {"weights": ["distance"], "p": [1, 2]}]
    expected = GridSearchCV(KNeighborsClassifier(), grids, cv=FOLDS, scoring="f1_macro").fit(X, Y)
    same(find(parameters=grids, scoring="f1_macro"), expected)


def test_regression():
    data = make_regression(60, 5, n_targets=2, noise=9.0, random_state=0)
    folds = KFold(4, shuffle=True, random_state=1)
    expected = GridSearchCV(Ridge(), {"alpha": [0.1, 10.0]}, cv=folds).fit(*data)
    found = find(Ridge(), {"alpha": [0.1, 10.0]}, data, folds=4, random_state=1)
    np.testing.assert_allclose([one.score for one in found.candidates], expected.cv_results_["mean_test_score"])


def test_kernels_are_cut_along_both_axes():
    kernel, parameters = X @ X.T, {"C": [0.1, 1]}
    expected = GridSearchCV(SVC(kernel="precomputed"), parameters, cv=FOLDS).fit(kernel, Y)
    found = find(SVC(kernel="precomputed"), parameters, (kernel, Y))
    assert [one.score for one in found.candidates] == pytest.approx(expected.cv_results_["mean_test_score"])


def test_steps_of_pipelines_can_be_exchanged():
    pipeline = make_pipeline(StandardScaler(), KNeighborsClassifier())
    parameters = {"standardscaler": ["passthrough", StandardScaler()], "kneighborsclassifier__n_neighbors": [3, 5]}
    expected = GridSearchCV(pipeline, parameters, cv=FOLDS).fit(X, Y)
    found = find(pipeline, parameters)
    assert [one.score for one in found.candidates] == pytest.approx(expected.cv_results_["mean_test_score"])


def test_sequences_of_any_lengths():
    random = np.random.default_rng(0)
    sequences = [random.standard_normal((length, 2)) for length in random.integers(1, 7, 40)]
    labels = [int(sequence[-1, 0] > 0) for sequence in sequences]
    estimator = an.AttentionClassifier(hidden_size=4, heads=2, epochs=2, random_state=0)
    found = find(estimator, {"window": [None, 1]}, (sequences, labels), folds=2)
    wide, narrow = found.candidates
    assert wide.parameter_count == narrow.parameter_count
    assert wide.multiply_adds > narrow.multiply_adds  # pairs that the window hides cost nothing
    assert found.estimator.predict(sequences).shape == (40,)


def test_processes_find_the_same(tmp_path):
    alone, together = (find(log=tmp_path / f"{jobs}.jsonl", folds=3, jobs=jobs) for jobs in (1, 2))
    timed = {"fit_seconds", "seconds_per_sample"}
    plain = [[{name: record[name] for name in record if name not in timed} for record in each.records]
             for each in (alone, together)]  # fmt: skip
    assert plain[0] == plain[1]
    assert together.best == alone.best
    assert set(logs.read(tmp_path / "1.jsonl")) == set(logs.read(tmp_path / "2.jsonl"))


def test_line_of_a_fit(tmp_path):
    found = find(Counting(), {"n_neighbors": [3, 5]}, folds=3, log=tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert list(found.records) == lines  # one process fits in this order
    first = lines[0]
    assert first | {"key": "", "fit_seconds": 0, "seconds_per_sample": 0, "estimator": "", "score": 0} == {
        "key": "", "estimator": "", "parameters": {"n_neighbors": 3}, "fold": 0, "resource": 100, "score": 0,
        "fit_seconds": 0, "seconds_per_sample": 0, "parameter_count": 7, "multiply_adds": 30.0,
    }  # fmt: skip
    assert first["estimator"].endswith("test_search.Counting")
    assert min(first["fit_seconds"], first["seconds_per_sample"]) > 0
    assert [line["fold"] for line in lines] == [0, 1, 2] * 2
    assert found.candidates[0].score == pytest.approx(np.mean([line["score"] for line in lines[:3]]))


@pytest.mark.parametrize("method", ["grid", "halving", "random"])
@pytest.mark.parametrize("kept", [0, 4, 11])
def test_search_goes_on_from_its_log(method, kept, tmp_path):
    options = {"method": method, "folds": 3, "count": 4, "log": tmp_path / "log", "refit": False}
    parameters = {"n_neighbors": [1, 5, 9, 25]}
    whole = find(Counting(), parameters, **options)
    lines = options["log"].read_text().splitlines(keepends=True)
    options["log"].write_text("".join(lines[:kept]) + lines[kept][: 5 + 20 * kept])  # killed while a line was written
    Counting.fits = 0
    resumed = find(Counting(), parameters, **options)
    assert Counting.fits == len(lines) - kept
    assert resumed.best == whole.best
    assert [one[:4] for one in resumed.candidates] == [one[:4] for one in whole.candidates]
    assert list(resumed.records[:kept]) == [json.loads(line) for line in lines[:kept]] or method == "halving"
    Counting.fits = 0
    assert find(Counting(), parameters, **options) == resumed  # with all the seconds that were measured
    assert Counting.fits == 0


SLOW = """
import time
from sklearn.neighbors import KNeighborsClassifier

class Slow(KNeighborsClassifier):
    fits = 0

    def fit(self, X, y):
        Slow.fits += 1
        time.sleep(0.05)
        return super().fit(X, y)
"""
SCRIPT = """
import sys
from sklearn.datasets import load_iris
import attn_numba as an
from slow_neighbors import Slow

an.search(Slow(), *load_iris(return_X_y=True), {"n_neighbors": [1, 5, 9, 25]}, folds=3, log=sys.argv[1])
"""


def test_killed_process_goes_on(tmp_path, monkeypatch):
    log = tmp_path / "log"
    for name, text in (("slow_neighbors.py", SLOW), ("script.py", SCRIPT)):
        (tmp_path / name).write_text(text)
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(log)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = log.read_text().splitlines()
    assert 3 <= len(before) < 12

    monkeypatch.syspath_prepend(tmp_path)
    slow = importlib.import_module("slow_neighbors").Slow
    found = find(slow(), {"n_neighbors": [1, 5, 9, 25]}, folds=3, log=log, refit=False)
    assert slow.fits == 12 - len(before)
    assert log.read_text().splitlines()[: len(before)] == before
    whole = find(parameters={"n_neighbors": [1, 5, 9, 25]}, folds=3)
    assert (found.best, found.best_score) == (whole.best, whole.best_score)


def test_larger_search_uses_a_smaller_one(tmp_path):
    find(Counting(), {"n_neighbors": [3, 5]}, folds=3, log=tmp_path / "log", refit=False)
    find(Counting(), {"n_neighbors": [5, 7, 3]}, folds=3, log=tmp_path / "log", refit=False)
    assert Counting.fits == 9


@pytest.mark.parametrize(
    "change",
    [
        {"data": (X + 1e-9, Y)},
        {"data": (X, np.roll(Y, 1))},
        {"data": (X, Y.astype(str))},
        {"scoring": "f1_macro"},
        {"random_state": 1},
        {"folds": 4},
        {"estimator": Counting(leaf_size=29)},
        {"estimator": KNeighborsClassifier()},
    ],
    ids=["samples", "labels", "kind of labels", "scoring", "folds' seed", "number of folds", "parameter", "class"],
)
def test_fits_of_something_else_are_not_taken(change, tmp_path):
    options = {"estimator": Counting(), "parameters": {"n_neighbors": [5]}, "folds": 3, "log": tmp_path / "log"}
    find(**options)
    find(**options | change)
    assert len(logs.read(tmp_path / "log")) == 3 + change.get("folds", 3)


def test_fits_of_another_version_are_not_taken(tmp_path, monkeypatch):
    import sklearn

    options = {"parameters": {"n_neighbors": [5]}, "folds": 2, "log": tmp_path / "log"}
    find(**options)
    monkeypatch.setattr(sklearn, "__version__", "99")
    find(**options)
    assert len(logs.read(tmp_path / "log")) == 4


def test_parameters_without_effect_have_the_same_fits(tmp_path):
    options = {"parameters": {"n_neighbors": [5]}, "folds": 2, "log": tmp_path / "log", "refit": False}
    find(Counting(), **options)
    find(Counting(n_jobs=1), **options)
    assert Counting.fits == 2


def test_functions_of_one_name_are_told_apart(tmp_path):
    pipeline = make_pipeline(FunctionTransformer(), KNeighborsClassifier())
    parameters = {"functiontransformer__func": [lambda x: x[:, :1], lambda x: x[:, 2:]]}
    found = find(pipeline, parameters, log=tmp_path / "log", folds=2)
    assert len(logs.read(tmp_path / "log")) == 4
    assert found.candidates[0].score < found.candidates[1].score
    scorers = [make_scorer(lambda y, z: np.mean(y == z)), make_scorer(lambda y, z: -np.mean(y == z))]
    names = {logs.digest(scorer) for scorer in scorers}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0), (1, True), ("1", 1), (None, "None"), ([1, 2], [12]), (["ab", "c"], ["a", "bc"]), ((1,), [1]),
        (np.zeros(2), np.zeros(2, np.float32)), (np.zeros((2, 3)), np.zeros((3, 2))), ({"a": 1}, {"b": 1}),
        (np.array(["a", None], object), np.array(["a", "None"], object)), (Ridge(alpha=1), Ridge(alpha=2)),
        (Ridge, KMeans), (np.float64(1), np.float32(1)), ([[1], [2]], [[1, 2]]), (uniform(0, 1), uniform(0, 2)),
    ],
)  # fmt: skip
def test_digests_differ_where_values_do(one, other):
    assert logs.digest(one) != logs.digest(other)
    assert logs.digest(one) == logs.digest(clone(one, safe=False))


def test_digest_is_of_what_an_array_holds():
    array = np.arange(12).reshape(3, 4)
    assert logs.digest(array.T) == logs.digest(array.T.copy()) == logs.digest(np.asfortranarray(array.T))
    assert logs.digest({"a": 1, "b": 2}) == logs.digest({"b": 2, "a": 1})
    twice = np.ones(2)
    assert logs.digest([twice, twice]) == logs.digest([twice, twice.copy()])


def test_values_without_a_name_in_json():
    values = {"a": np.int64(3), "b": (1, None), "c": float("inf"), "d": np.mean, "e": {"f": True}, "g": Ridge()}
    assert json.loads(json.dumps(logs.plain(values), allow_nan=False)) == {
        "a": 3, "b": [1, None], "c": "inf", "d": "numpy.mean", "e": {"f": True}, "g": "Ridge()",
    }  # fmt: skip


def test_splitters_and_folds_of_ones_own():
    splitter = ShuffleSplit(3, test_size=0.3, random_state=0)
    expected = GridSearchCV(KNeighborsClassifier(), NEIGHBORS, cv=splitter).fit(X, Y)
    same(find(folds=splitter), expected)
    found = find(folds=list(splitter.split(X)))
    same(found, expected)
    assert [record["fold"] for record in found.records[:3]] == [0, 1, 2]


def test_samples_are_not_changed_and_the_estimator_neither():
    estimator, inputs, labels = KNeighborsClassifier(), X.copy(), Y.copy()
    find(estimator, data=(inputs, labels), folds=2)
    assert (inputs == X).all()
    assert (labels == Y).all()
    assert not hasattr(estimator, "classes_")
    assert estimator.get_params() == KNeighborsClassifier().get_params()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"estimator": KNeighborsClassifier}, TypeError, "estimator is .*; needed an object with fit"),
        ({"estimator": 3}, TypeError, "estimator is 3"),
        ({"method": "all"}, ValueError, "method is 'all'; needed one of grid, halving, random"),
        ({"count": 0}, ValueError, "count is 0"),
        ({"jobs": 0}, ValueError, "jobs is 0"),
        ({"jobs": 1.5}, TypeError, "jobs is 1.5"),
        ({"random_state": None}, TypeError, "random_state is None; needed an integer"),
        ({"folds": 1}, ValueError, "folds is 1; needed 2 to 150"),
        ({"folds": "five"}, TypeError, "folds is 'five'"),
        ({"folds": []}, ValueError, "folds has none"),
        ({"parameters": {}}, TypeError, "parameters is {}"),
        ({"parameters": {"neighbors": [1]}}, ValueError, "parameters has 'neighbors'; Counting has algorithm"),
        ({"parameters": {"n_neighbors": 3}}, TypeError, r"parameters\['n_neighbors'\] is 3; needed a sequence"),
        ({"parameters": {"weights": "uniform"}}, TypeError, "is 'uniform'; needed a sequence"),
        ({"parameters": {"n_neighbors": []}}, ValueError, "is empty"),
        ({"parameters": {"p": uniform()}}, ValueError, "is a distribution, which is for method='random'"),
        ({"data": (X, Y[:-1])}, ValueError, r"inconsistent numbers of samples: \[150, 149\]"),
        ({"data": (X, None)}, TypeError, "y is None"),
        ({"scoring": "beauty"}, ValueError, "beauty"),
    ],
)
def test_bad_arguments_are_named_before_any_work(changes, error, message, tmp_path):
    options = {"estimator": Counting(), "log": tmp_path / "log"} | changes
    with pytest.raises(error, match=message):
        find(**options)
    assert Counting.fits == 0
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "hello", '{"score": 1}\n'])
def test_files_of_another_kind_are_refused_and_kept(text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match="whose line 1 is no fit of a search"):
        find(Counting(), log=tmp_path / "file")
    assert (tmp_path / "file").read_text() == text
    assert Counting.fits == 0


def test_folder_of_the_log_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find(Counting(), log=tmp_path / "none" / "log")
    assert Counting.fits == 0


class Choosy(KNeighborsClassifier):
    """Neighbors of which there may not be 9."""

    def fit(self, X, y):
        if self.n_neighbors == 9:
            raise ValueError("9 is too much")
        return super().fit(X, y)


def test_error_of_a_fit_names_its_parameters_and_loses_nothing(tmp_path):
    with pytest.raises(ValueError, match="9 is too much") as caught:
        find(Choosy(), {"n_neighbors": [1, 9]}, folds=3, log=tmp_path / "log")
    assert "in a search, with {'n_neighbors': 9}" in caught.value.__notes__
    assert len(logs.read(tmp_path / "log")) == 3


def test_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="scoring gave nan with {'n_neighbors': 1}; needed a finite number"):
        find(parameters={"n_neighbors": [1]}, scoring=lambda *words: np.nan)


def candidate(score: float, cost: float | None, resource: int = 90, **parameters: object) -> Candidate:
    return Candidate(parameters, resource, score, 0.01, 1.0, cost or 0.0, None, cost)


def brute_force(candidates: list[Candidate]) -> set[int]:
    return {
        n
        for n, one in enumerate(candidates)
        if not any(
            (other.score >= one.score and other.multiply_adds < one.multiply_adds)
            or (other.score > one.score and other.multiply_adds <= one.multiply_adds)
            for other in candidates
        )
    }


def test_front_by_brute_force():
    random = np.random.default_rng(0)
    for _ in range(200):
        candidates = [
            candidate(float(score), float(cost), number=n)
            for n, (score, cost) in enumerate(random.integers(0, 5, (9, 2)))
        ]
        front = Search({}, 0.0, candidates, []).front("multiply_adds")
        assert {one.parameters["number"] for one in front} == brute_force(candidates)
        assert [one.multiply_adds for one in front] == sorted(one.multiply_adds for one in front)


def test_only_candidates_with_the_most_samples_are_compared():
    cheap, dear = candidate(1.0, 1.0, resource=30, n=1), candidate(0.5, 2.0, n=1)
    assert Search({}, 0.5, [cheap, dear], []).front() == [dear]


def test_costs_that_are_not_known():
    search = Search({}, 0.9, [candidate(0.9, None, n=1)], [])
    assert search.table()[0][-1] == "front by seconds per sample"
    with pytest.raises(ValueError, match="the estimator does not tell"):
        search.front("multiply_adds")
    with pytest.raises(ValueError, match=f"cost is 'money'; needed one of {', '.join(COSTS)}"):
        search.front("money")


def test_table():
    candidates = [candidate(0.5, 10.0, size=8), candidate(0.75, 30.0, size=16), candidate(0.7, 40.0, size=None)]
    columns, rows = Search({}, 0.75, candidates, []).table("multiply_adds")
    assert columns == (
        "size", "samples", "score", "deviation", "multiply-adds", "seconds per sample", "seconds of a fit",
        "front by multiply-adds",
    )  # fmt: skip
    assert rows == [
        ("16", "90", "0.7500", "0.0100", "30", "3.00e+01", "1.00", "yes"),
        ("none", "90", "0.7000", "0.0100", "40", "4.00e+01", "1.00", ""),
        ("8", "90", "0.5000", "0.0100", "10", "1.00e+01", "1.00", "yes"),
    ]


def test_bar_counts_every_fit(monkeypatch):
    from attn_numba.integrations import tqdm as bars

    shown = []

    class Bar:
        def __init__(self, **options):
            shown.append(options["total"])

        def __enter__(self):
            return self

        def __exit__(self, *words):
            pass

        def update(self, count):
            shown.append(count)

    monkeypatch.setattr(bars, "tqdm", Bar)
    an.search(KNeighborsClassifier(), X, Y, NEIGHBORS, folds=2)
    assert shown[0] == sum(shown[1:]) == 8


def test_pictures_are_written_whole(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it belongs to the extra plot")
    found = find(folds=2)
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError):
        found.plot(tmp_path / "front.png", "fit_seconds")
    found.plot(tmp_path / "front.png", "fit_seconds", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["front.png"]
