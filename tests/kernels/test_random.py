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
        _, label, z, arrays, kwargs = random_call(seed)
        if z.D > 100:  # few sums of that length are too few to measure what the reference errs
            continue
        check_attention(*arrays, backend, name=label, last_places=16, **kwargs)  # small calls vary more
