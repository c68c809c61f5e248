"""Sequence models that learn: a network with attention and hand-written gradients, its training, and its cost.

The estimators of `attn_numba.integrations.sklearn` are made of these parts; other models can be, too.
"""

from attn_numba.learning.attending import Attention, Pooling, Rules
from attn_numba.learning.cost import Cost, multiply_adds
from attn_numba.learning.explanation import Explanation, cost_of, explain
from attn_numba.learning.layers import MLP, Features, Linear, Norm, Table, normalize, normalize_vjp, rows
from attn_numba.learning.losses import cross_entropy, log_sum, squared_error
from attn_numba.learning.network import Batch, Block, Design, Network, gathered, sinusoids
from attn_numba.learning.optimizers import AdamW, Settings, minimize
from attn_numba.learning.sequences import Ragged, Scale
from attn_numba.learning.training import Training, outputs_of, train_in_batches, train_on_all

__all__ = [
    "MLP",
    "AdamW",
    "Attention",
    "Batch",
    "Block",
    "Cost",
    "Design",
    "Explanation",
    "Features",
    "Linear",
    "Network",
    "Norm",
    "Pooling",
    "Ragged",
    "Rules",
    "Scale",
    "Settings",
    "Table",
    "Training",
    "cost_of",
    "cross_entropy",
    "explain",
    "gathered",
    "log_sum",
    "minimize",
    "multiply_adds",
    "normalize",
    "normalize_vjp",
    "outputs_of",
    "rows",
    "sinusoids",
    "squared_error",
    "train_in_batches",
    "train_on_all",
]
