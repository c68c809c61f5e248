"""A classifier and a regressor of sequences that attend, by scikit-learn's conventions."""

from __future__ import annotations

import textwrap
from typing import Any, Self, TypeVar

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from attn_numba.integrations.sklearn.base import Array, SequenceEstimator
from attn_numba.learning.losses import cross_entropy, log_sum, squared_error
from attn_numba.learning.sequences import Scale

__all__ = ["AttentionClassifier", "AttentionRegressor"]

PARAMETERS = """
Parameters
----------
hidden_size : int
    Size C of a state, a multiple of `heads`.
heads : int
    Number of attention heads.
layers : int
    Number of blocks of attention and MLP; 0 leaves embedding and pooling.
expansion : int
    How many times larger a state is inside the MLP.
window : None, int, (int, int) or "adaptive"
    How many tokens a token sees to each side, or before and after itself, in positions, -1 for an open side; None for
    all. With "adaptive" each head chooses for each token, to be learned.
largest_span : float
    Of the adaptive window: the most that can be chosen, in positions.
ramp : float
    Of the adaptive window: positions over which the weight falls to 0 beyond what was chosen.
span_penalty : float
    Of the adaptive window: what is added to the loss for each position of the mean span.
attention_score : {"dot", "cosine", "bilinear", "additive", "uniform"}
    How a query and a key are scored; the weights of "bilinear" and "additive" are learned. With "uniform" all keys
    weigh the same, in the pooling too: means in place of attention.
normalizer : {"softmax", "sparsemax", "entmax15", "double_softmax"}
    What makes weights of scores.
temperature : float
    What scores are divided by; above 0.
pooling : {"attention", "mean"}
    How the states of all tokens become one: each head attends to them with a learned query, or takes the mean.
positions : {"sinusoidal", "none"}
    Whether tokens are told where they are. Features are told apart in any case.
inputs : {"auto", "vectors", "ids", "features"}
    What X holds, see `fit`. With "auto", an array of three axes and a list of arrays of two are vectors, a list of
    integer arrays of one axis is ids, and all else is features.
solver : {"auto", "lbfgs", "adam"}
    L-BFGS in float64 over all samples at once, or AdamW in float32 over batches; with "auto" the former for up to 2048
    tokens without dropout.
epochs : int
    Most passes over the samples; of L-BFGS most steps.
batch_size : int
    Samples of a step of AdamW.
learning_rate : float
    Largest rate of AdamW, which rises at first and then falls along a cosine.
weight_decay : float
    Of AdamW, the share of each matrix taken away in a step, times the rate. Of L-BFGS, half of it times the sum of the
    squares of matrices, over the number of samples, is added to the loss.
dropout : float
    Share of the numbers set to 0 in training, after attention, MLP and pooling; from 0 to below 1.
tolerance : float
    L-BFGS stops where no number of the gradient is larger or a step makes the loss smaller by less than a hundredth of
    it, AdamW where ten epochs have not made the loss smaller by it.
warm_start : bool
    Whether `fit` goes on from the last one, with its scales, ids and classes.
random_state : int, RandomState or None
    Of the initial weights, the batches and the dropout.
verbose : int
    Above 0, the loss of each epoch is printed.
"""
ATTRIBUTES = """
inputs_ : str
    What X held: "vectors", "ids" or "features".
n_features_in_ : int
    Size of the vectors, or number of features; not of ids.
vocabulary_ : int array
    The ids seen in training, in ascending order. Others count as 0 vectors.
scale_ : Scale
    Mean and deviation of each number of the vectors, or of each feature, to which X is brought to 0 and 1.
network_ : Network
    The model.
loss_curve_ : list of float
    Mean loss of each epoch; of L-BFGS after each step, with what is added for the weights.
n_iter_ : int
    Their number.
"""
Class = TypeVar("Class", bound=type)


def _with_parameters(cls: Class) -> Class:
    """Put the parameters and attributes that both estimators have into a docstring, where it says so."""
    for mark, text in (("{parameters}", PARAMETERS), ("{attributes}", ATTRIBUTES)):
        cls.__doc__ = (cls.__doc__ or "").replace(f"    {mark}\n", textwrap.indent(text[1:], "    "))
    return cls


@_with_parameters
class AttentionClassifier(ClassifierMixin, SequenceEstimator):
    """Tell of which class a sequence is, by a small transformer in NumPy.

    {parameters}

    Attributes
    ----------
    classes_ : array (classes,)
        The classes, in ascending order.
    {attributes}

    See Also
    --------
    AttentionRegressor : Numbers in place of classes.

    Notes
    -----
    Tokens become states of size C, with positions added; blocks of attention and MLP change them, each of normalized
    states and added to them; normalized, they are pooled to one, and a matrix makes logits of it. Trained is the
    cross-entropy.

    The same samples and `random_state` give the same model, bit for bit, with one version of the libraries and one
    number of their threads. A result of AdamW depends on the order of the samples, one of L-BFGS but by rounding.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need". Pooling: Z. Yang et al. (2016), "Hierarchical attention
    networks for document classification", section 2.2. Features as tokens: Y. Gorishniy et al. (2021), "Revisiting
    deep learning models for tabular data", section 3.3. Adaptive windows: S. Sukhbaatar et al. (2019), "Adaptive
    attention span in transformers", section 2.3.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import GridSearchCV
    >>> from attn_numba import AttentionClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> search = GridSearchCV(AttentionClassifier(epochs=20, random_state=0), {"hidden_size": [4, 8]}, cv=2)
    >>> bool(search.fit(X, y).best_score_ > 0.9)
    True
    >>> search.best_estimator_.explain(X[:2]).pooling.shape  # two flowers, four heads, four features
    (2, 4, 4)
    """

    numeric = False
    loss = staticmethod(cross_entropy)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on sequences and their classes.

        Parameters
        ----------
        X : array (n, L, D), or list of arrays (L_i, D); array (n, L) or list of (L_i,) of ids; array (n, features)
            The samples: sequences of vectors, sequences of token ids, or numbers each of which is a token.
        y : array (n,)
            The class of each.
        sample_weight : array (n,), optional
            How much each counts, 0 and more; without it, all the same.

        Returns
        -------
        AttentionClassifier
            The estimator itself.

        Raises
        ------
        TypeError
            If a parameter, X or y is of the wrong kind.
        ValueError
            If a parameter is out of its range, X and y do not fit, or a number is not finite.
        """
        return self._fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Take the steps of one epoch of AdamW on some samples, at the same rate each time.

        Parameters
        ----------
        X : sequences
            As `fit` takes them. The first call learns their scale, or which ids there are.
        y : array (n,)
            The class of each.
        classes : array (classes,), optional
            In the first call, all classes there are; without it, those of `y`.
        sample_weight : array (n,), optional
            How much each counts, 0 and more.

        Returns
        -------
        AttentionClassifier
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            As `fit`; and for a class that is none of the first call's.
        """
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: Any) -> Array:
        """Return the most likely class of each sample.

        Parameters
        ----------
        X : sequences
            As `fit` takes them.

        Returns
        -------
        array (n,)
            Classes.
        """
        places = self._network_outputs(X).argmax(axis=1)
        found: Array = self.classes_[places]
        return found

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class for each sample.

        Parameters
        ----------
        X : sequences
            As `fit` takes them.

        Returns
        -------
        array (n, classes)
            In the order of ``classes_``; each row sums to 1.
        """
        found: Array = np.exp(self.predict_log_proba(X))
        return found

    def predict_log_proba(self, X: Any) -> Array:
        """Return the logarithm of the probability of each class for each sample.

        Parameters
        ----------
        X : sequences
            As `fit` takes them.

        Returns
        -------
        array (n, classes)
            Natural logarithms, in the order of ``classes_``.
        """
        logits = self._network_outputs(X)
        return logits - log_sum(logits)

    def _outputs(self) -> int:
        return len(self.classes_)

    def _targets(self, y: Any, weights: Array, again: bool, classes: Any) -> Array:
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if not again:
            self.classes_ = np.unique(y if classes is None else classes)
        places = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
        if (strange := self.classes_[places] != y).any():
            raise ValueError(
                f"y holds {y[strange].tolist()[0]!r}, which is none of the classes {self.classes_.tolist()}"
            )
        return places


@_with_parameters
class AttentionRegressor(RegressorMixin, SequenceEstimator):
    """Tell numbers that belong to a sequence, by a small transformer in NumPy.

    {parameters}

    Attributes
    ----------
    target_scale_ : Scale
        Mean and deviation of y, or of its columns, which the network gives as 0 and 1.
    {attributes}

    See Also
    --------
    AttentionClassifier : Classes in place of numbers; and what the model is made of.

    Notes
    -----
    Trained is half the squared error, of y brought to mean 0 and deviation 1.

    Examples
    --------
    How far apart the two largest numbers of a sequence are:

    >>> import numpy as np
    >>> from attn_numba import AttentionRegressor
    >>> random = np.random.default_rng(0)
    >>> X = [random.random((length, 1)) for length in random.integers(2, 6, 120)]
    >>> y = [np.ptp(np.sort(x[:, 0])[-2:]) for x in X]
    >>> model = AttentionRegressor(hidden_size=16, epochs=50, random_state=0).fit(X[:80], y[:80])
    >>> model.predict(X[80:]).shape, bool(model.score(X[:80], y[:80]) > 0.5)
    ((40,), True)
    """

    numeric = True
    loss = staticmethod(squared_error)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on sequences and their numbers.

        Parameters
        ----------
        X : array (n, L, D), or list of arrays (L_i, D); array (n, L) or list of (L_i,) of ids; array (n, features)
            The samples: sequences of vectors, sequences of token ids, or numbers each of which is a token.
        y : array (n,) or (n, outputs)
            The number of each, or its numbers.
        sample_weight : array (n,), optional
            How much each counts, 0 and more; without it, all the same.

        Returns
        -------
        AttentionRegressor
            The estimator itself.

        Raises
        ------
        TypeError
            If a parameter, X or y is of the wrong kind.
        ValueError
            If a parameter is out of its range, X and y do not fit, or a number is not finite.
        """
        return self._fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Take the steps of one epoch of AdamW on some samples, at the same rate each time.

        Parameters
        ----------
        X : sequences
            As `fit` takes them. The first call learns the scales of X and y, or which ids there are.
        y : array (n,) or (n, outputs)
            The number of each, or its numbers.
        sample_weight : array (n,), optional
            How much each counts, 0 and more.

        Returns
        -------
        AttentionRegressor
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            As `fit`; and for another number of outputs than in the first call.
        """
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X: Any) -> Array:
        """Return the number of each sample, or its numbers.

        Parameters
        ----------
        X : sequences
            As `fit` takes them.

        Returns
        -------
        array (n,) or (n, outputs)
            As `fit` was given y.
        """
        outputs = self._network_outputs(X)
        found = self.target_scale_.undone(outputs)
        return found[:, 0] if self._flat else found

    def _outputs(self) -> int:
        return len(self.target_scale_.mean)

    def _targets(self, y: Any, weights: Array, again: bool, classes: Any) -> Array:
        columns = y[:, None] if y.ndim == 1 else y
        if not again:
            self._flat = y.ndim == 1
            self.target_scale_ = Scale.of(columns, weights)
        elif columns.shape[1] != self._outputs():
            raise ValueError(f"y has {columns.shape[1]} outputs; the model was fitted to {self._outputs()}")
        return self.target_scale_.applied(columns)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
