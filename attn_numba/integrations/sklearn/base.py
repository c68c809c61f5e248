"""What the classifier and the regressor share: reading of X, training, cost and explanation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from attn_numba.integrations.sklearn.parameters import check_parameters, design_of, training_of
from attn_numba.learning.cost import Cost
from attn_numba.learning.explanation import Explanation, cost_of, explain
from attn_numba.learning.network import Loss, Network
from attn_numba.learning.optimizers import AdamW, Settings
from attn_numba.learning.sequences import Ragged, Scale, as_ragged, kind_of
from attn_numba.learning.training import outputs_of, train_in_batches, train_on_all, train_once

Array = NDArray[Any]
SMALL = 2048  # tokens of a training set up to which L-BFGS goes over all of them in each step


class SequenceEstimator(BaseEstimator):
    """An estimator of sequences; a subclass says what y is and what the outputs of the network mean.

    Attributes
    ----------
    numeric : bool
        Whether y is numbers.
    loss : callable
        As `Network.gradients` takes it.
    """

    numeric: bool
    loss: Loss
    inputs_: str
    network_: Network
    _generator: np.random.Generator
    _moments: tuple[dict[str, Array], dict[str, Array], int] | None

    def __init__(
        self,
        *,
        hidden_size: int = 32,
        heads: int = 4,
        layers: int = 1,
        expansion: int = 2,
        window: Any = None,
        largest_span: float = 16.0,
        ramp: float = 4.0,
        span_penalty: float = 0.01,
        attention_score: str = "dot",
        normalizer: str = "softmax",
        temperature: float = 1.0,
        pooling: str = "attention",
        positions: str = "sinusoidal",
        inputs: str = "auto",
        solver: str = "auto",
        epochs: int = 100,
        batch_size: int = 32,
        learning_rate: float = 3e-3,
        weight_decay: float = 1.0,
        dropout: float = 0.0,
        tolerance: float = 1e-4,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.hidden_size = hidden_size
        self.heads = heads
        self.layers = layers
        self.expansion = expansion
        self.window = window
        self.largest_span = largest_span
        self.ramp = ramp
        self.span_penalty = span_penalty
        self.attention_score = attention_score
        self.normalizer = normalizer
        self.temperature = temperature
        self.pooling = pooling
        self.positions = positions
        self.inputs = inputs
        self.solver = solver
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.tolerance = tolerance
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def cost(self, X: Any) -> Cost:
        """Return what the fitted model costs.

        Parameters
        ----------
        X : sequences
            As `fit` takes them: their lengths count, and with an adaptive window what their tokens choose to see.

        Returns
        -------
        Cost
            ``parameters``, the numbers that are learned, and ``multiply_adds``, the products for a sample, in the mean.
        """
        sequences = self._sequences(X)
        return cost_of(self.network_, sequences)

    def explain(self, X: Any) -> Explanation:
        """Return what the fitted model attends to in each sample.

        Parameters
        ----------
        X : sequences
            As `fit` takes them. The weights are ``n H L**2`` numbers for each block, L the greatest length.

        Returns
        -------
        Explanation
            ``layers``, weights (n, H, L, L) of each block; ``pooling``, those (n, H, L) with which tokens make one
            state; ``lengths`` (n,); ``spans`` and ``mean_span`` of an adaptive window. The pictures of
            `attn_numba.integrations.matplotlib` take what is of one sample.
        """
        sequences = self._sequences(X)
        return explain(self.network_, sequences)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _outputs(self) -> int:
        """Return how many numbers the network gives for a sequence."""
        raise NotImplementedError

    def _targets(self, y: Array, weights: Array, again: bool, classes: Any) -> Array:
        """Return what the loss compares outputs with; not `again`, learn what the outputs mean."""
        raise NotImplementedError

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """Train from the start, or with `warm_start` from where the last training ended."""
        check_parameters(self)
        again = self.warm_start and hasattr(self, "network_")
        training_set = self._training_set(X, y, sample_weight, again)
        exact = self._solver(training_set[0]) == "lbfgs"
        if not again:
            self._begin("float64" if exact else "float32")
        known = self._encoded(training_set[0]), *training_set[1:], self.loss, training_of(self)
        if exact:
            losses = train_on_all(self.network_, *known)
        else:
            losses = train_in_batches(self.network_, *known, self._generator)
        self._moments = None
        self.loss_curve_ = losses
        self.n_iter_ = max(1, len(losses))  # L-BFGS takes no step where the loss cannot fall
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Any:
        """Take the steps of one epoch from where the model is; the first call learns scales, ids and classes."""
        check_parameters(self)
        again = hasattr(self, "network_")
        sequences, targets, weights = self._training_set(X, y, sample_weight, again, classes)
        if not again:
            self._begin("float32")
        settings = Settings(steps=1, rate=self.learning_rate, final=1.0, warmup=0, weight_decay=self.weight_decay)
        optimizer, step = AdamW(self.network_.parameters, settings), 0
        if self._moments is not None:
            optimizer.first, optimizer.second, step = self._moments
        loss, step = train_once(
            self.network_, self._encoded(sequences), targets, weights, self.loss, training_of(self), self._generator,
            optimizer, step,
        )  # fmt: skip
        self._moments = optimizer.first, optimizer.second, step
        self.loss_curve_ = [*self.loss_curve_, loss] if again else [loss]
        self.n_iter_ = len(self.loss_curve_)
        return self

    def _solver(self, sequences: Ragged) -> str:
        if self.solver != "auto":
            return self.solver
        return "lbfgs" if len(sequences.values) <= SMALL and not self.dropout else "adam"

    def _begin(self, dtype: str) -> None:
        """Make the network, and the generator of all that is drawn."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        self._generator, self._moments = np.random.default_rng(seed), None
        size = len(self.vocabulary_) if self.inputs_ == "ids" else self.n_features_in_
        self.network_ = Network(design_of(self, self.inputs_, size, self._outputs()), dtype, self._generator)

    def _training_set(
        self, X: Any, y: Any, sample_weight: Any, again: bool, classes: Any = None
    ) -> tuple[Ragged, Array, Array]:
        """Return sequences, targets and weights, without the samples that weigh nothing."""
        sequences, y = self._read(X, y, again)
        weights = _check_sample_weight(sample_weight, np.empty((len(sequences), 1)), dtype=np.float64)
        if (weights < 0).any():
            raise ValueError(f"sample_weight holds {weights.min():.6g}; needed 0 and more")
        counting = np.flatnonzero(weights)
        if not len(counting):
            raise ValueError("sample_weight is 0 throughout; needed a sample that weighs more")
        targets = self._targets(y, weights, again, classes)
        if len(counting) < len(weights):
            sequences, targets, weights = sequences.take(counting), targets[counting], weights[counting]
        if not again:
            self._learn_scale(sequences, weights)
        return sequences, targets, weights

    def _read(self, X: Any, y: Any, again: bool) -> tuple[Ragged, Array]:
        """Return the samples end to end, and y as an array."""
        kind = self.inputs_ if again else kind_of(X) if self.inputs == "auto" else self.inputs
        if kind == "features":
            options = {"y_numeric": self.numeric, "multi_output": self.numeric}
            X, y = validate_data(self, X, y, dtype=np.float64, reset=not again, **options)
            sequences = _rows_of(X)
        else:
            if y is None:
                raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None.")
            sequences = self._checked(X, kind, again)
            if self.numeric:
                y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
            check_consistent_length(sequences.lengths, y)
        self.inputs_ = kind
        return sequences, y

    def _sequences(self, X: Any) -> Ragged:
        """Return samples as the network of a fitted model takes them."""
        check_is_fitted(self, "network_")
        if self.inputs_ == "features":
            return self._encoded(_rows_of(validate_data(self, X, dtype=np.float64, reset=False)))
        return self._encoded(self._checked(X, self.inputs_, again=True))

    def _network_outputs(self, X: Any) -> Array:
        sequences = self._sequences(X)
        return outputs_of(self.network_, sequences).astype(np.float64)

    def _checked(self, X: Any, kind: str, again: bool) -> Ragged:
        """Return sequences of vectors or ids end to end; vectors are of the size that the model was fitted to."""
        sequences = as_ragged(X, kind)
        if kind == "vectors":
            size = sequences.values.shape[1]
            if not again:
                self.n_features_in_ = size
            elif size != self.n_features_in_:
                name = type(self).__name__
                raise ValueError(f"X has vectors of {size} numbers, but {name} is expecting {self.n_features_in_}")
        return sequences

    def _learn_scale(self, sequences: Ragged, weights: Array) -> None:
        """Learn by what the numbers of a training set are scaled, or which ids there are."""
        if self.inputs_ == "ids":
            self.vocabulary_: Array = np.unique(sequences.values)
        elif self.inputs_ == "features":
            self.scale_ = Scale.of(sequences.values.reshape(len(sequences), -1), weights)
        else:
            self.scale_ = Scale.of(sequences.values, np.repeat(weights, sequences.lengths))

    def _encoded(self, sequences: Ragged) -> Ragged:
        """Return sequences as the network takes them: scaled, or as rows of its table, -1 for an unknown id."""
        values, dtype = sequences.values, self.network_.dtype
        if self.inputs_ == "ids":
            found = np.minimum(np.searchsorted(self.vocabulary_, values), len(self.vocabulary_) - 1)
            values = np.where(self.vocabulary_[found] == values, found, -1)
        elif self.inputs_ == "features":
            values = self.scale_.applied(values.reshape(len(sequences), -1)).reshape(-1).astype(dtype)
        else:
            values = self.scale_.applied(values).astype(dtype)
        return Ragged(values, sequences.lengths)


def _rows_of(X: Array) -> Ragged:
    """Return the rows of an array (n, features) as sequences of one token for each feature."""
    return Ragged(X.reshape(-1), np.full(len(X), X.shape[1]))
