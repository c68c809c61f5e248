"""Estimators for scikit-learn; needs the package ``scikit-learn`` (the extra ``sklearn``).

Examples
--------
Which class a sequence is of, by its vectors; sequences of any lengths:

>>> import numpy as np
>>> import attn_numba as an
>>> random = np.random.default_rng(0)
>>> X = [random.standard_normal((length, 3)) for length in random.integers(2, 9, 60)]
>>> y = ["rising" if x[-1, 0] > x[0, 0] else "falling" for x in X]
>>> model = an.AttentionClassifier(hidden_size=8, heads=2, random_state=0).fit(X, y)
>>> bool(model.score(X, y) > 0.9)
True
"""

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'estimators need {error.name}, which is not installed: pip install "attn-numba[sklearn]"', name="sklearn"
    ) from error

from attn_numba.integrations.sklearn.estimators import AttentionClassifier, AttentionRegressor
from attn_numba.integrations.sklearn.searching import search

__all__ = ["AttentionClassifier", "AttentionRegressor", "search"]
