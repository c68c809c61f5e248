"""Every backend against the reference, over random calls."""

import pytest

import attn_numba as an
from attn_numba.testing import check_attention
from random_cases import BATCHES, random_call, seeds

BACKENDS = [name for name, (available, _) in an.backends().items() if available and name != "reference"]


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(batch, backend):
    for seed in seeds(batch):
        _, label, _, arrays, kwargs = random_call(seed)
        check_attention(*arrays, backend, name=label, **kwargs)
