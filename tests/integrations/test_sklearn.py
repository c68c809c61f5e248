"""The estimators: scikit-learn's own checks, every kind of input, searches, files, and what is refused."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import attn_numba as an

pytest.importorskip("sklearn", reason="scikit-learn is not installed; it belongs to the extra sklearn")

from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

ESTIMATORS = (an.AttentionClassifier, an.AttentionRegressor)
SMALL = {"hidden_size": 8, "heads": 2, "random_state": 0}
EXPECTED_TO_FAIL = {
    "check_sample_weight_equivalence_on_dense_data": "weights and repetitions give the same loss and gradient but for "
    "rounding (tests/learning/test_gradients.py), and the same model for the first steps (below); the loss is not "
    "convex, so that later steps of L-BFGS make of a difference in the last place another minimum"
}


def ragged(count: int = 60, seed: int = 0):
    """Sequences of 2 to 6 vectors, and whether the last is larger than the first."""
    random = np.random.default_rng(seed)
    X = [random.standard_normal((length, 3)) for length in random.integers(2, 7, count)]
    return X, np.array(["falls", "rises"])[[int(x[-1, 0] > x[0, 0]) for x in X]]


def texts(count: int = 60, seed: int = 0):
    """Sequences of 1 to 7 ids, and how many of them are 105."""
    random = np.random.default_rng(seed)
    X = [random.integers(100, 108, length) for length in random.integers(1, 8, count)]
    return X, np.array([float((x == 105).sum()) for x in X])


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_scikit_learns_own_checks(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks that are skipped, and columns where y should be flat
        found = check_estimator(
            kind(hidden_size=8, heads=2, epochs=12), expected_failed_checks=EXPECTED_TO_FAIL, on_skip=None
        )
    assert len(found) > 50
    may_skip = {"check_array_api_input"}  # only run where SciPy is told to take arrays of other libraries
    if importlib.util.find_spec("pandas") is None:
        may_skip |= {"check_sample_weights_pandas_series"}
        may_skip |= {"check_classifier_data_not_an_array", "check_regressor_data_not_an_array"}
    assert {check["check_name"] for check in found if check["status"] == "skipped"} <= may_skip
    failed = {check["check_name"] for check in found if check["status"] not in ("passed", "skipped")}
    assert failed <= set(EXPECTED_TO_FAIL)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_weights_count_like_repetitions(kind):
    random = np.random.default_rng(0)
    X, y, weights = random.random((15, 6)), random.integers(0, 3, 15), random.integers(0, 4, 15)
    weighed = kind(**SMALL, epochs=8).fit(X, y, weights)
    repeated = kind(**SMALL, epochs=8).fit(X.repeat(weights, 0), y.repeat(weights))
    np.testing.assert_allclose(weighed.loss_curve_, repeated.loss_curve_, rtol=1e-8)


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_sequences_of_vectors(solver):
    (X, y), (other, answers) = ragged(120), ragged(60, seed=1)
    model = an.AttentionClassifier(**SMALL, solver=solver, epochs=40, learning_rate=1e-2).fit(X, y)
    assert model.inputs_ == "vectors"
    assert model.n_features_in_ == 3
    assert model.score(other, answers) > 0.7  # by chance it is 0.5
    probabilities = model.predict_proba(other)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(other))
    np.testing.assert_allclose(model.predict_proba(other[7:8])[0], probabilities[7], rtol=1e-4)
    array = np.stack([x[:2] for x in other])
    np.testing.assert_allclose(model.predict_proba(array), model.predict_proba(list(array)), rtol=1e-6)


def test_sequences_of_ids():
    (X, y), (other, answers) = texts(150), texts(60, seed=1)
    model = an.AttentionRegressor(**SMALL, solver="lbfgs").fit(X, y)
    assert model.inputs_ == "ids"
    np.testing.assert_array_equal(model.vocabulary_, np.arange(100, 108))
    assert model.score(other, answers) > 0.8
    assert np.isfinite(model.predict([[105, 999, -3], []])).all()  # ids not seen, and no token at all
    table = np.full((3, 4), 101)
    np.testing.assert_array_equal(model.predict(table), model.predict(list(table)))


def test_several_numbers_for_a_sample():
    X, _ = load_iris(return_X_y=True)
    model = an.AttentionRegressor(**SMALL, epochs=30).fit(X[::3, :2], X[::3, 2:])
    assert model.predict(X[:5, :2]).shape == (5, 2)
    assert model.score(X[1::3, :2], X[1::3, 2:]) > 0.6


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": (2, 0), "layers": 2},
        {"window": "adaptive", "largest_span": 4, "ramp": 2},
        {"attention_score": "cosine", "temperature": 0.2},
        {"attention_score": "bilinear", "normalizer": "sparsemax"},
        {"attention_score": "additive", "normalizer": "entmax15"},
        {"attention_score": "uniform", "pooling": "mean"},
        {"normalizer": "double_softmax", "positions": "none", "layers": 0},
        {"dropout": 0.1},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_choice_trains_and_is_the_same_again(options):
    X, y = ragged(30)
    model = an.AttentionClassifier(**SMALL, **options, epochs=8)
    first = clone(model).fit(X, y)
    assert first.loss_curve_[-1] < first.loss_curve_[0]
    np.testing.assert_array_equal(first.predict_proba(X), model.fit(X, y).predict_proba(X))
    assert first.cost(X).multiply_adds > 0


def test_explanations():
    X, y = ragged(30)
    model = an.AttentionClassifier(**SMALL, layers=2, window=1, epochs=3).fit(X, y)
    found = model.explain(X[:5])
    L = max(map(len, X[:5]))
    assert [weights.shape for weights in found.layers] == [(5, 2, L, L)] * 2
    np.testing.assert_array_equal(found.lengths, [len(x) for x in X[:5]])
    far = abs(np.arange(L)[:, None] - np.arange(L)) > 1
    assert all((weights[..., far] == 0).all() for weights in found.layers)
    np.testing.assert_allclose(found.pooling.sum(-1), 1, rtol=1e-5)
    assert found.mean_span is None
    plots = pytest.importorskip("attn_numba.integrations.matplotlib", reason="matplotlib is not installed")
    length = found.lengths[0]
    figure = plots.plot_weights(found.layers[0][0, :, :length, :length])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["head 0", "head 1"]


def test_cost_goes_with_window_and_size():
    X, y = ragged(20)

    def cost(**options):
        return an.AttentionClassifier(**SMALL | options, epochs=1).fit(X, y).cost(X)

    assert cost(window=1).multiply_adds < cost().multiply_adds
    assert cost(window=1).parameters == cost().parameters
    assert cost(hidden_size=16).parameters > cost().parameters
    assert cost(attention_score="uniform").parameters < cost().parameters


def test_partial_fit_goes_on(tmp_path):
    X, y = ragged(64)
    options = SMALL | {"learning_rate": 1e-2}
    model = an.AttentionClassifier(**options)
    for _ in range(5):
        for begin in (0, 32):
            model.partial_fit(X[begin : begin + 32], y[begin : begin + 32], classes=["falls", "level", "rises"])
    assert model.classes_.tolist() == ["falls", "level", "rises"]
    assert len(model.loss_curve_) == model.n_iter_ == 10
    assert model.loss_curve_[-1] < model.loss_curve_[0]
    other = pickle.loads(pickle.dumps(model))
    for each in (model, other):
        each.partial_fit(X[:32], y[:32])
    np.testing.assert_array_equal(other.predict_proba(X), model.predict_proba(X))
    with pytest.raises(ValueError, match="y holds 'turns', which is none of the classes"):
        model.partial_fit(X[:2], ["turns", "falls"])
    import joblib

    joblib.dump(model, tmp_path / "model.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "model.joblib").predict(X), model.predict(X))


def test_warm_start_goes_on():
    X, y = load_iris(return_X_y=True)
    model = an.AttentionClassifier(**SMALL, warm_start=True, epochs=5).fit(X, y)
    before = model.loss_curve_[-1]
    assert model.fit(X, y).loss_curve_[-1] < before
    assert model.set_params(warm_start=False).fit(X, y).loss_curve_[-1] == before


def test_searches_pipelines_and_workers():
    X, y = ragged(48)
    model = an.AttentionClassifier(**SMALL, epochs=3)
    grid = GridSearchCV(model, {"window": [None, "adaptive"], "hidden_size": [4, 8]}, cv=2).fit(X, y)
    assert grid.best_params_["hidden_size"] in (4, 8)
    assert (grid.cv_results_["mean_test_score"] > 0).all()
    halving = HalvingGridSearchCV(model, {"window": [None, 1, 2]}, cv=2, random_state=0, min_resources=24).fit(X, y)
    assert halving.n_iterations_ >= 1
    alone = cross_val_score(model, X, y, cv=2)
    np.testing.assert_array_equal(cross_val_score(model, X, y, cv=2, n_jobs=2), alone)
    flowers, kinds = load_iris(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), an.AttentionClassifier(**SMALL, epochs=30)).fit(flowers, kinds)
    assert pipeline.score(flowers, kinds) > 0.9


def test_progress_is_printed_if_asked_for(capsys):
    X, y = ragged(10)
    an.AttentionClassifier(**SMALL, epochs=2, solver="adam", verbose=1).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("[AttentionClassifier] loss ")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 10, "heads": 4}, ValueError, "hidden_size is 10, not a multiple of heads, 4"),
        ({"heads": 2.0}, TypeError, "heads is 2.0; needed an integer"),
        ({"layers": -1}, ValueError, "layers is -1; needed at least 0"),
        ({"attention_score": "mean"}, ValueError, "attention_score is 'mean'; needed one of 'dot', 'cosine'"),
        ({"normalizer": None}, ValueError, "normalizer is None; needed one of 'softmax'"),
        ({"temperature": 0}, ValueError, "temperature is 0; needed above 0, below inf"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0; needed at least 0, below 1"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate is 'fast'; needed a number"),
        ({"window": "wide"}, ValueError, "window is 'wide'; needed None, an integer, two integers, or 'adaptive'"),
        ({"window": -1}, ValueError, "window is -1; needed"),
        ({"window": (1, 2, 3)}, ValueError, r"window is \(1, 2, 3\); needed"),
        ({"window": 1.5}, TypeError, "window is 1.5; needed"),
        ({"window": "adaptive", "normalizer": "sparsemax"}, ValueError, "window='adaptive' needs 'softmax'"),
        ({"solver": "lbfgs", "dropout": 0.5}, ValueError, "dropout is 0.5; solver='lbfgs' needs 0"),
    ],
    ids=str,
)
def test_parameters_that_are_refused(options, error, message):
    X, y = ragged(4)
    with pytest.raises(error, match=message):
        an.AttentionClassifier(**options).fit(X, y)


def test_samples_that_are_refused():
    X, y = ragged(20)
    model = an.AttentionClassifier(**SMALL, epochs=1)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        model.explain(X)
    with pytest.raises(ValueError, match="requires y to be passed, but the target y is None"):
        model.fit(X, None)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X, y[:-1])
    with pytest.raises(ValueError, match="sample_weight holds -1; needed 0 and more"):
        model.fit(X, y, np.r_[-1.0, np.ones(19)])
    with pytest.raises(ValueError, match="0 throughout|at least one non-zero"):
        model.fit(X, y, np.zeros(20))
    model.fit(X, y)
    with pytest.raises(ValueError, match="X has vectors of 4 numbers, but AttentionClassifier is expecting 3"):
        model.predict([np.zeros((2, 4))])
    with pytest.raises(ValueError, match=r"X has shape \(2, 3\); inputs='vectors' needs \(n, L, D\)"):
        model.predict(np.zeros((2, 3)))
    regressor = an.AttentionRegressor(**SMALL).partial_fit(X, np.zeros(20))
    with pytest.raises(ValueError, match="y has 2 outputs; the model was fitted to 1"):
        regressor.partial_fit(X, np.zeros((20, 2)))


def test_what_cannot_be_trained_is_refused():
    X, y = ragged(20)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+; learning_rate is 1e\+20: too large"):
        an.AttentionClassifier(**SMALL, solver="adam", learning_rate=1e20).fit(X, y)
    with pytest.raises(ValueError, match="in size; float64 must hold the squares"):
        an.AttentionRegressor(**SMALL).fit(np.eye(4) * 1e200, np.arange(4))


def test_without_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = None
import attn_numba as an
try:
    an.AttentionClassifier
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'estimators need sklearn, which is not installed: pip install "attn-numba[sklearn]"' in done.stdout
