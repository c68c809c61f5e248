"""What comes back: an array, or a named tuple of what was asked for, which survives a trip to another process."""

import copy
import itertools
import pickle

import numpy as np
import pytest

import attn_numba as an

Q = np.random.default_rng(0).standard_normal((4, 3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("lse", "weights"), list(itertools.product((False, True), repeat=2)))
def test_what_was_asked_for(backend, lse, weights):
    found = an.attention(Q, Q, Q, return_lse=lse, return_weights=weights, backend=backend)
    same = an.reference.attention(Q, Q, Q, return_lse=lse, return_weights=weights)
    if not lse and not weights:
        assert type(found) is type(same) is np.ndarray
        return
    fields = ("out", *["lse"] * lse, *["weights"] * weights)
    assert type(found) is type(same)
    assert type(found).__name__ == "Attention"
    assert found._fields == fields
    assert [x.shape for x in found] == [{"lse": (4,), "weights": (4, 4)}.get(name, (4, 3)) for name in fields]
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert type(again) is type(found)
        for x, y in zip(again, found, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("merge", [an.merge, an.reference.merge])
def test_merged(merge):
    found = merge([Q], [np.zeros(4)])
    assert found._fields == ("out", "lse")
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is type(found)
    np.testing.assert_array_equal(again.out, Q)
