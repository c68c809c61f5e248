"""Pictures of weights, entropies, rollouts, masks and of score against cost; needs ``matplotlib`` (the extra ``plot``).

Each function returns a `matplotlib.figure.Figure` of its own, as large as its labels need, and leaves matplotlib's
state alone: nothing is shown, and no figure has to be closed. Long sequences are averaged over cells, and the title
says so.

Examples
--------
>>> import numpy as np
>>> import attn_numba as an
>>> from attn_numba.integrations import matplotlib as pictures
>>> q, k = np.random.default_rng(0).standard_normal((2, 4, 6, 8))
>>> tokens = "the cat sat on the mat".split()
>>> figure = pictures.plot_weights(an.weights_of(q, k), queries=tokens, keys=tokens)
>>> [axes.get_title() for axes in figure.axes[:4]]
['head 0', 'head 1', 'head 2', 'head 3']
"""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'pictures need {error.name}, which is not installed: pip install "attn-numba[plot]"', name="matplotlib"
    ) from error

from attn_numba.integrations.matplotlib.attention import (
    MOST_PANELS,
    plot_entropy,
    plot_mask,
    plot_rollout,
    plot_weights,
)
from attn_numba.integrations.matplotlib.figures import SUFFIXES, save
from attn_numba.integrations.matplotlib.fronts import plot_front

__all__ = [
    "MOST_PANELS",
    "SUFFIXES",
    "plot_entropy",
    "plot_front",
    "plot_mask",
    "plot_rollout",
    "plot_weights",
    "save",
]
