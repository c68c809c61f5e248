"""NaN and infinity: where they are not allowed they change no bit; elsewhere they reach the rows that see them.

Random cases, as many as `random_cases` says.
"""

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules import places_of
from attn_numba.testing import LAST_PLACES
from cases import allowed
from processes import run_python
from random_cases import BATCHES, RULES, random_call, random_sizes, seeds

BACKENDS = [name for name, (available, _) in an.backends().items() if available and name != "reference"]
BAD = (np.nan, np.inf, -np.inf, 1e38, -6e4, 1e-38)


def seen_scores(z, kwargs, seen):
    """Which scores reach a result: those of seen keys that are not replaced."""
    modifier = kwargs.get("modifiers")
    if isinstance(modifier, an.ReplaceExcluded):
        return seen & modifier.mask.evaluate(places_of(z), z)
    return seen


def poisoned(rng, k, v, seen_k, seen_v):
    """Copies of k and v with bad numbers in all places no query sees, and in a few that some see; (B, Hk, N) both."""
    k, v = k.copy(), v.copy()
    with np.errstate(over="ignore"):
        bad = np.array(BAD, np.float64).astype(k.dtype)
    for array, seen in ((k, seen_k), (v, seen_v)):
        hidden = np.argwhere(~seen)
        if rng.random() < 0.5:
            array[tuple(hidden.T)] = rng.choice(bad, (len(hidden), array.shape[-1]))
        else:
            array[tuple(hidden.T)] = rng.choice(bad, (len(hidden), 1))
    which = rng.integers(3)  # nothing that is seen; a few values; a key
    visible = np.argwhere(seen_v if which == 1 else seen_k)
    if which and len(visible):
        places = visible[rng.integers(len(visible), size=int(rng.integers(1, 4)))]
        if which == 1:
            v[tuple(places.T)] = np.where(
                rng.random(v.shape[-1]) < 0.4, rng.choice(bad[:3], v.shape[-1]), v[tuple(places.T)]
            )
        else:
            k[(*places.T, rng.integers(k.shape[-1]))] = np.nan
    return k, v


def check_case(seed, backend):
    rng, label, z, (q, k, v), kwargs = random_call(seed)
    seen = allowed(z, kwargs)
    scored = seen_scores(z, kwargs, seen)
    by_key_head = (z.B, z.Hk, z.H // z.Hk * z.M, z.N)
    bad_k, bad_v = poisoned(rng, k, v, scored.reshape(by_key_head).any(2), seen.reshape(by_key_head).any(2))

    asked = {"return_lse": isinstance(kwargs.get("normalizer", an.Softmax()), an.Softmax), "return_weights": True}
    clean = an.attention(q, k, v, backend=backend, **kwargs, **asked)
    spoiled = np.full_like(clean.out, np.nan)
    found = an.attention(q, bad_k, bad_v, out=spoiled, backend=backend, **kwargs, **asked)

    spoiled_keys = ~np.isfinite(bad_k.astype(np.float32)).all(-1).repeat(z.H // z.Hk, 1)  # (B, H, N)
    rows = (scored & spoiled_keys[:, :, None]).any(-1)  # (B, H, M)
    spoiled_values = ~np.isfinite(bad_v.astype(np.float32)).repeat(z.H // z.Hk, 1)  # (B, H, N, E)
    elements = (seen.astype(np.float32) @ spoiled_values.astype(np.float32) > 0) | rows[..., None]
    reached_by = {"out": elements, "lse": rows, "weights": seen & rows[..., None]}
    for name, reached in ((name, reached_by[name]) for name in clean._fields):
        before, after = (getattr(x, name).astype(np.float64) for x in (clean, found))
        same = before == after
        if name == "out":  # a row may add a key with a bad value last: its other columns may round differently
            near = np.abs(after - before) <= 8 * LAST_PLACES[q.dtype.name] * np.abs(v.astype(np.float64)).max()
            same |= near & elements.any(-1, keepdims=True)
        assert (same | reached).all(), f"{label}: {name} {first(before, after, ~(same | reached))}"
        finite = np.isfinite(after) & reached
        assert not finite.any(), f"{label}: {name} stays finite {first(before, after, finite)}"


def first(before, after, where):
    at = tuple(np.argwhere(where)[0])
    return f"at {tuple(map(int, at))}: {before[at]} became {after[at]}"


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(batch, backend):
    for seed in seeds(batch):
        check_case(seed, backend)


def test_generator_is_varied():
    """Over the cases of a normal run: every rule, tiles of all kinds, hidden keys, rows without keys."""
    rng = np.random.default_rng(0)
    several, hidden, empty, partly = 0, 0, 0, 0
    for _ in range(200):
        z = random_sizes(rng)
        seen = allowed(z, RULES[rng.integers(len(RULES))](rng, z))
        several += z.D > 100
        hidden += not seen.any((1, 2)).all()
        empty += not seen.any(-1).all()
        partly += seen.any() and not seen.all()
    assert min(several, hidden, empty, partly) >= 10


def test_a_huge_hidden_value_moves_nothing(backend):
    """1e38 times a weight that is tiny but not 0 would be seen at once."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 16)).astype(np.float32) for n in (9, 40, 40))
    mask = an.Padding(25)
    expected = an.attention(q, k, v, mask=mask, backend=backend)
    k[:, :, 25:] = v[:, :, 25:] = np.finfo(np.float32).max
    np.testing.assert_array_equal(an.attention(q, k, v, mask=mask, backend=backend), expected)


def test_memory_outside_the_arrays_is_not_read(backend):
    """Views into an array of NaN: what lies around q, k and v does not count."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3, n, 20)).astype(np.float32) for n in (11, 37, 37)]
    expected = an.attention(*arrays, backend=backend)
    views = []
    for array in arrays:
        wide = np.full((3, 5, array.shape[2] + 7, 29), np.nan, np.float32)
        view = wide[1:3, 1:4, 3 : 3 + array.shape[2], 4:24]
        view[...] = array
        views.append(view)
    np.testing.assert_array_equal(an.attention(*views, backend=backend), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_query_spoils_its_own_row_only(value, backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 16)).astype(np.float32) for n in (30, 40, 40))
    expected = an.attention(q, k, v, backend=backend, return_lse=True)
    q[0, 1, 7, 3] = value
    found = an.attention(q, k, v, backend=backend, return_lse=True)
    assert not np.isfinite(found.out[0, 1, 7]).any()
    for name in ("out", "lse"):
        kept, before = (np.delete(getattr(x, name)[0, 1], 7, 0) for x in (found, expected))
        np.testing.assert_array_equal(kept, before)
        np.testing.assert_array_equal(getattr(found, name)[0, 0], getattr(expected, name)[0, 0])


DENORMALS = """
import numpy as np, torch
import attn_numba as an

q, k, v = (np.random.default_rng(n).standard_normal((1, 4, 200, 16)) for n in range(3))
v *= 2.0**-1040  # denormals in float64
an.set_threads(THREADS)
torch.set_flush_denormal(True)
flushed = an.attention(q, k, v, backend="cpu")
print(np.array([2.0**-1040]) * 0.5 == 0.0)
torch.set_flush_denormal(False)
usual = an.attention(q, k, v, backend="cpu")
print(np.abs(usual).max() > 0, np.array_equal(flushed, usual))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_do_not_depend_on_the_mode_of_the_calling_thread(threads):
    """A thread that takes denormals for zeros, as XLA's do, gets the same numbers, and keeps its mode."""
    pytest.importorskip("torch")
    assert run_python(DENORMALS.replace("THREADS", str(threads))) == "[ True]\nTrue True\n"
