"""Rules: what is computed, written once, as scalar functions and their data.

A rule is used by the reference by broadcasting over arrays, and by the kernels as compiled code made from its
formula.
"""

from attn_numba.rules.adaptive import AdaptiveSpan, adapt
from attn_numba.rules.base import MaskFormula
from attn_numba.rules.dropout import Dropout
from attn_numba.rules.masks import (
    AllOf,
    AnyOf,
    BlockSparse,
    Causal,
    CustomMask,
    Dense,
    Mask,
    Neighborhood,
    Not,
    Padding,
    PrefixLM,
    SameDocument,
    SlidingWindow,
    as_mask,
)
from attn_numba.rules.modifiers import (
    ALiBi,
    Bias,
    CustomModifier,
    Modifier,
    ReplaceExcluded,
    SoftCap,
    Temperature,
    as_modifiers,
)
from attn_numba.rules.normalizers import DoubleSoftmax, Entmax15, Normalizer, Softmax, Sparsemax
from attn_numba.rules.places import SYMBOLS, Places, Sizes, places_of
from attn_numba.rules.scores import Additive, Bilinear, Cosine, Dot, Score

__all__ = [
    "SYMBOLS",
    "ALiBi",
    "AdaptiveSpan",
    "Additive",
    "AllOf",
    "AnyOf",
    "Bias",
    "Bilinear",
    "BlockSparse",
    "Causal",
    "Cosine",
    "CustomMask",
    "CustomModifier",
    "Dense",
    "Dot",
    "DoubleSoftmax",
    "Dropout",
    "Entmax15",
    "Mask",
    "MaskFormula",
    "Modifier",
    "Neighborhood",
    "Normalizer",
    "Not",
    "Padding",
    "Places",
    "PrefixLM",
    "ReplaceExcluded",
    "SameDocument",
    "Score",
    "Sizes",
    "SlidingWindow",
    "SoftCap",
    "Softmax",
    "Sparsemax",
    "Temperature",
    "adapt",
    "as_mask",
    "as_modifiers",
    "places_of",
]
