"""What every operation is tested with: backends, dtypes, and rules that combine with every case."""

import attn_numba as an
from attn_numba import rules
from cases import additive

BACKENDS = [name for name, (available, _) in an.backends().items() if available]
DTYPES = ("float64", "float32", "float16", "bfloat16")
OTHER_RULES = {
    "Sparsemax": {"normalizer": an.Sparsemax()},
    "Entmax15": {"normalizer": an.Entmax15()},
    "DoubleSoftmax": {"normalizer": an.DoubleSoftmax()},
    "Additive": {"score": additive},
}


def fits(case, other):
    """Whether a case says nothing of the same argument, and nothing that is for softmax alone."""
    kwargs = case.kwargs()
    softmax_only = any(modifier.softmax_only for modifier in rules.as_modifiers(kwargs.get("modifiers")))
    return not other.keys() & kwargs and not (softmax_only and "normalizer" in other)
