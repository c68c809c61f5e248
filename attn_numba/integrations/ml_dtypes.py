"""The NumPy dtype called bfloat16; needs the package ``ml_dtypes``."""

from __future__ import annotations

import ml_dtypes
import numpy as np

__all__ = ["bfloat16"]

bfloat16 = np.dtype(ml_dtypes.bfloat16)
