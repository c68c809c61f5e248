"""recurrent_attention against its formulas written out, properties of repeated attention, and what it refuses."""

import itertools
import re

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules.philox import philox4x32

UPDATES = ["replace", "add", "gated"]


def written_out(hidden, steps, update="replace", allowed=True):
    """The formulas one after the other: the states at the start and after each step."""
    states = [hidden]
    for step in range(steps):
        h, D = states[-1], hidden.shape[-1]
        scores = np.where(allowed, h @ h.swapaxes(-1, -2) / np.sqrt(D), -np.inf)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = powers / powers.sum(axis=-1, keepdims=True) @ h
        g = 1 / (1 + np.exp(-(h * context).sum(axis=-1, keepdims=True) / np.sqrt(D)))
        kinds = {"replace": context, "add": h + context, "gated": g * context + (1 - g) * h}
        states.append(update(h, context, step) if callable(update) else kinds[update])
    return np.stack(states)


def towards(hidden, context, step):
    """An update of one's own that looks at everything it is given."""
    return hidden + (context - hidden) / (step + 2)


def states(*shape, dtype=np.float64, seed=0):
    shape = shape or (2, 3, 20, 8)
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def masks(L):
    pattern = np.random.default_rng(1).random((2, 3, L, L)) < 0.4
    padded = np.arange(L) < np.array([L, L - 6])[:, None, None, None]
    causal = np.tri(L, dtype=bool)
    return {
        "none": (None, True),
        "causal": (an.Causal(), causal),
        "padding": (an.Padding([L, L - 6]), padded),
        "both": (an.Causal() & an.Padding([L, L - 6]), causal & padded),
        "array": (pattern | np.eye(L, dtype=bool), pattern | np.eye(L, dtype=bool)),
    }


@pytest.mark.parametrize("name", masks(20))
@pytest.mark.parametrize("update", [*UPDATES, towards])
def test_formulas(update, name, backend):
    mask, allowed = masks(20)[name]
    hidden = states()
    expected = written_out(hidden, 4, update, allowed)
    last, path = an.recurrent_attention(hidden, 4, update=update, mask=mask, trajectory=True, backend=backend)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(path[0], hidden)
    np.testing.assert_array_equal(last, path[-1])


@pytest.mark.parametrize("shape", [(20, 8), (3, 20, 8), (2, 3, 20, 8), (2, 1, 1, 1), (0, 2, 5, 4), (1, 0, 4)])
@pytest.mark.parametrize("update", [*UPDATES, towards])
def test_ranks_and_sizes(update, shape, backend):
    hidden = states(*shape)
    last, path = an.recurrent_attention(hidden, 2, update=update, trajectory=True, backend=backend)
    assert last.shape == shape
    assert path.shape == (3, *shape)
    if hidden.size:
        np.testing.assert_allclose(path, written_out(hidden, 2, update), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("update", [*UPDATES, towards])
def test_dtypes(update, dtype, backend):
    """Each step is the formula's, rounded: compared from the very states that it started from."""
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    unit = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    options = {"update": update, "mask": an.Causal(), "trajectory": True, "backend": backend}
    last, path = an.recurrent_attention(states(dtype=kind), 3, **options)
    assert last.dtype == path.dtype == np.dtype(kind)
    for step in range(3):
        start = path[step].astype(float)
        shifted = (lambda h, c, _, n=step: towards(h, c, n)) if callable(update) else update
        expected = written_out(start, 1, shifted, np.tri(20, dtype=bool))[1]
        bound = 12 * unit * np.abs(start).max()
        np.testing.assert_allclose(path[step + 1].astype(float), expected, rtol=0, atol=bound)


def test_other_rules_apply_at_each_step(backend):
    hidden = states()
    rules = {
        "mask": an.SlidingWindow(3, 1), "modifiers": [an.SoftCap(2.0), an.ALiBi([0.5, 0.25, 0.125])],
        "normalizer": an.Softmax(sink=0.5), "scale": 0.7, "key_offset": 5, "backend": backend,
    }  # fmt: skip
    expected = hidden
    for _ in range(3):
        expected = an.attention(expected, expected, expected, **rules)
    np.testing.assert_array_equal(an.recurrent_attention(hidden, 3, **rules), expected)


def scores_and_normalizers():
    rng = np.random.default_rng(2)
    W, Wq, Wk, w = (rng.standard_normal(shape) for shape in ((8, 8), (5, 8), (5, 8), (5,)))
    rules = [{"normalizer": kind()} for kind in (an.Sparsemax, an.Entmax15, an.DoubleSoftmax)]
    return [*rules, {"score": an.Cosine()}, {"score": an.Bilinear(W)}, {"score": an.Additive(Wq, Wk, w)}]


@pytest.mark.parametrize("rules", scores_and_normalizers(), ids=lambda rules: repr(next(iter(rules.values())))[:12])
def test_scores_and_normalizers(rules, backend):
    expected = hidden = states()
    options = {"mask": an.Causal(), "backend": backend, **rules}
    for _ in range(3):
        expected = an.attention(expected, expected, expected, **options)
    np.testing.assert_array_equal(an.recurrent_attention(hidden, 3, **options), expected)
    assert np.abs(expected - an.recurrent_attention(hidden, 3, mask=an.Causal(), backend=backend)).max() > 1e-3


@pytest.mark.parametrize("update", UPDATES)
def test_the_trajectory_is_one_step_after_the_other(update, backend):
    options = {"update": update, "mask": an.Causal(), "backend": backend}
    last, path = an.recurrent_attention(states(), 4, trajectory=True, **options)
    assert len(path) == 5
    for before, after in itertools.pairwise(path):
        np.testing.assert_array_equal(an.recurrent_attention(before, 1, **options), after)
    np.testing.assert_array_equal(an.recurrent_attention(states(), 4, **options), last)
    middle = an.recurrent_attention(states(), 2, **options)
    np.testing.assert_array_equal(an.recurrent_attention(middle, 2, **options), last)


def test_what_is_returned():
    hidden = states()
    alone = an.recurrent_attention(hidden, 3)
    found = an.recurrent_attention(hidden, 3, trajectory=True)
    assert isinstance(alone, np.ndarray)
    assert found._fields == ("hidden", "trajectory")
    assert found.steps == 3
    np.testing.assert_array_equal(found.hidden, alone)


@pytest.mark.parametrize("trajectory", [False, True])
def test_no_steps_give_a_copy(trajectory, backend):
    hidden = states()
    found = an.recurrent_attention(hidden, 0, trajectory=trajectory, backend=backend)
    copies = found if trajectory else [found]
    for copy in copies:
        assert not np.shares_memory(copy, hidden)
        assert copy.flags.writeable
    np.testing.assert_array_equal(copies[0], hidden)
    if trajectory:
        assert found.steps == 0
        np.testing.assert_array_equal(found.trajectory, hidden[None])


@pytest.mark.parametrize("update", [*UPDATES, lambda h, c, step: h, lambda h, c, step: c])
def test_inputs_are_not_written_nor_shared(update, backend):
    hidden = states()
    before = hidden.copy()
    last, path = an.recurrent_attention(hidden, 2, update=update, trajectory=True, backend=backend)
    np.testing.assert_array_equal(hidden, before)
    assert not np.shares_memory(last, hidden)
    assert not np.shares_memory(last, path)
    hidden.flags.writeable = False
    np.testing.assert_array_equal(an.recurrent_attention(hidden, 2, update=update, backend=backend), last)
    assert last.flags.writeable


def test_strides_and_byte_order(backend):
    hidden = states(2, 3, 20, 200)
    expected = an.recurrent_attention(hidden, 2, update="gated", backend=backend)
    strided = np.ascontiguousarray(hidden.swapaxes(1, 2)).swapaxes(1, 2)
    swapped = hidden.astype(hidden.dtype.newbyteorder())
    for other in (strided, swapped, np.asfortranarray(hidden), hidden[..., ::-1].copy()[..., ::-1]):
        found = an.recurrent_attention(other, 2, update="gated", backend=backend)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
        if backend != "reference":  # whose matrix products may go in another order
            np.testing.assert_array_equal(found, expected)
        assert found.dtype.isnative


# Updates of one's own


def test_a_function_sees_states_context_and_step(backend):
    seen = []

    def update(hidden, context, step):
        seen.append((hidden.copy(), context.copy(), step))
        assert not hidden.flags.writeable
        return 0.5 * context

    hidden = states(5, 4, dtype=np.float32)
    an.recurrent_attention(hidden, 3, update=update, mask=an.Causal(), backend=backend)
    assert [step for *_, step in seen] == [0, 1, 2]
    np.testing.assert_array_equal(seen[0][0], hidden)
    for n, (before, context, _) in enumerate(seen):
        assert before.shape == context.shape == (5, 4)
        assert before.dtype == context.dtype == np.float32
        np.testing.assert_array_equal(context, an.attention(before, before, before, mask=an.Causal(), backend=backend))
        if n:
            np.testing.assert_array_equal(before, np.float32(0.5) * seen[n - 1][1])


def test_a_function_may_write_the_context_and_reuse_its_result():
    hidden, reused = states(), np.empty((2, 3, 20, 8))

    def update(h, context, step):
        context += h
        reused[...] = context
        return reused

    last, path = an.recurrent_attention(hidden, 3, update=update, trajectory=True)
    expected = an.recurrent_attention(hidden, 3, update="add", trajectory=True)
    np.testing.assert_array_equal(path, expected.trajectory)
    assert not np.shares_memory(last, reused)


def test_what_a_function_returns_is_rounded():
    hidden = states(dtype=np.float32)
    found = an.recurrent_attention(hidden, 1, update=lambda h, c, step: h.astype(np.float64) + 1e-12)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, hidden)
    found = an.recurrent_attention(hidden, 1, update=lambda h, c, step: np.ones(h.shape, int).tolist())
    np.testing.assert_array_equal(found, np.ones_like(hidden))


def test_an_error_in_a_function_passes():
    def update(hidden, context, step):
        raise ZeroDivisionError("of one's own")

    with pytest.raises(ZeroDivisionError, match="of one's own"):
        an.recurrent_attention(states(), 1, update=update)


# Coming to rest


def test_stops_after_the_first_small_step(backend):
    hidden, tolerance = states(20, 8), 1e-3
    whole = an.recurrent_attention(hidden, 60, trajectory=True, backend=backend).trajectory
    changes = np.abs(np.diff(whole, axis=0)).max(axis=(1, 2))
    taken = int(np.argmax(changes <= tolerance)) + 1
    assert 1 < taken < 60
    found = an.recurrent_attention(hidden, 60, tolerance=tolerance, trajectory=True, backend=backend)
    assert found.steps == taken
    np.testing.assert_array_equal(found.trajectory, whole[: taken + 1])
    alone = an.recurrent_attention(hidden, 60, tolerance=tolerance, backend=backend)
    np.testing.assert_array_equal(alone, whole[taken])


def steps_taken(hidden, tolerance, update, most=7):
    return an.recurrent_attention(hidden, most, update=update, tolerance=tolerance, trajectory=True).steps


def test_a_change_equal_to_the_tolerance_is_small():
    hidden = np.zeros((4, 2))
    assert steps_taken(hidden, 0.5, lambda h, c, step: h + 0.5) == 1
    assert steps_taken(hidden, 0.49, lambda h, c, step: h - 0.5) == 7
    assert steps_taken(hidden, 0.25, lambda h, c, step: h + 0.5 ** (step + 1)) == 2
    assert steps_taken(hidden, np.inf, "add") == 1


def test_zero_tolerance_stops_at_rest_only():
    assert steps_taken(np.zeros((4, 2)), 0, "add") == 1
    assert steps_taken(np.ones((4, 2)), 0, "add") == 7
    assert steps_taken(np.ones((4, 2)), 0, lambda h, c, step: np.minimum(h + 1, 3)) == 3


def test_one_moving_element_keeps_all_going():
    hidden = np.zeros((3, 2, 4, 2))

    def update(h, context, step):
        moved = h.copy()
        moved[2, 1, 3, 1] += 1
        return moved

    assert steps_taken(hidden, 0.5, update) == 7


def test_what_stays_nan_or_infinite_is_at_rest():
    hidden = np.zeros((4, 2))
    hidden[0], hidden[1] = np.nan, np.inf
    assert steps_taken(hidden, 1e-6, lambda h, c, step: h) == 1
    assert steps_taken(hidden, 1e-6, lambda h, c, step: -h) == 7
    becomes_nan = np.array([[0.0, 0.0], [np.nan, 0.0]])
    assert steps_taken(np.zeros((2, 2)), 1e6, lambda h, c, step: becomes_nan) == 2


def test_narrow_differences_do_not_overflow():
    assert steps_taken(np.full((2, 2), 60000, np.float16), 1e5, lambda h, c, step: -h) == 7
    assert steps_taken(np.full((2, 2), 60000, np.float16), 1.2e5, lambda h, c, step: -h) == 1


# Properties


@pytest.mark.parametrize("update", ["replace", "gated"])
def test_equal_states_stay(update, backend):
    hidden = np.broadcast_to(states(2, 3, 1, 8), (2, 3, 20, 8))
    found = an.recurrent_attention(hidden, 10, update=update, backend=backend)
    np.testing.assert_allclose(found, hidden, rtol=1e-13)


def test_equal_states_double_when_added(backend):
    hidden = np.broadcast_to(0.1 * states(1, 8), (20, 8))
    found = an.recurrent_attention(hidden, 5, update="add", backend=backend)
    np.testing.assert_allclose(found, 32 * hidden, rtol=1e-13)


def test_a_state_that_sees_itself_alone_stays(backend):
    hidden = states()
    found = an.recurrent_attention(hidden, 6, mask=an.Causal(), backend=backend)
    np.testing.assert_allclose(found[..., 0, :], hidden[..., 0, :], rtol=1e-14)
    itself = np.eye(20, dtype=bool)
    for update in ("replace", "gated"):
        found = an.recurrent_attention(hidden, 6, mask=itself, update=update, backend=backend)
        np.testing.assert_allclose(found, hidden, rtol=1e-13, atol=1e-15)


def test_a_state_that_sees_nothing(backend):
    hidden = states(20, 8)
    mask = np.ones((20, 20), bool)
    mask[4] = False
    replaced = an.recurrent_attention(hidden, 1, mask=mask, backend=backend)
    added = an.recurrent_attention(hidden, 3, mask=mask, update="add", backend=backend)
    gated = an.recurrent_attention(hidden, 1, mask=mask, update="gated", backend=backend)
    np.testing.assert_array_equal(replaced[4], 0)
    np.testing.assert_array_equal(added[4], hidden[4])
    np.testing.assert_allclose(gated[4], hidden[4] / 2, rtol=1e-15)  # nothing agrees with nothing: the gate is half


@pytest.mark.parametrize("update", ["replace", "gated"])
@pytest.mark.parametrize("mask", [None, an.Causal()])
def test_states_stay_in_the_convex_hull_of_those_before(mask, update, backend):
    """In every direction, the farthest state is no farther than the farthest of the step before."""
    directions = states(8, 50, seed=3)
    options = {"mask": mask, "update": update, "backend": backend}
    path = an.recurrent_attention(states(), 12, trajectory=True, **options).trajectory
    reach = (path @ directions).max(axis=-2)
    assert (np.diff(reach, axis=0) <= 1e-12).all()
    assert (reach[-1] < 0.9 * reach[0]).any()


@pytest.mark.parametrize("update", UPDATES)
def test_large_states_do_not_overflow_the_gate(update, backend):
    with np.errstate(all="raise"):
        found = an.recurrent_attention(1e3 * states(20, 8), 1, update=update, backend=backend)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("update", UPDATES)
def test_nan_in_the_padding_reaches_nothing(update, backend):
    hidden = states()
    mask = an.Padding([20, 14], query_lengths=[20, 14])
    clean = an.recurrent_attention(hidden, 3, mask=mask, update=update, backend=backend)
    hidden[1, :, 14:] = np.nan
    found = an.recurrent_attention(hidden, 3, mask=mask, update=update, backend=backend)
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(found[1, :, :14], clean[1, :, :14])


@pytest.mark.parametrize("update", UPDATES)
def test_a_sequence_and_a_head_do_not_depend_on_others(update):
    hidden = states(2, 3, 20, 200, dtype=np.float32)
    whole = an.recurrent_attention(hidden, 4, update=update, backend="cpu")
    for b in range(2):
        for h in range(3):
            alone = an.recurrent_attention(hidden[b, h], 4, update=update, backend="cpu")
            np.testing.assert_array_equal(alone, whole[b, h])


# Dropout


def seed_at(seed, step):
    low, high, _, _ = philox4x32((step, 2**32 - 1, 0, 0), (seed % 2**32, seed // 2**32))
    return int(low) + int(high) * 2**32 if step else seed


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_dropout_of_each_step(seed, backend):
    hidden = states()
    expected = hidden
    for step in range(3):
        dropout = an.Dropout(0.3, seed_at(seed, step))
        expected = an.attention(expected, expected, expected, dropout=dropout, backend=backend)
    found = an.recurrent_attention(hidden, 3, dropout=an.Dropout(0.3, seed), backend=backend)
    np.testing.assert_array_equal(found, expected)


def test_dropout_with_one_seed_for_each_sequence(backend):
    hidden, seeds = states(), np.array([5, 2**63 + 1], np.uint64)
    options = {"mask": an.Causal(), "backend": backend}
    found = an.recurrent_attention(hidden, 3, dropout=an.Dropout(0.3, seeds), **options)
    for b in range(2):
        alone = an.recurrent_attention(hidden[b : b + 1], 3, dropout=an.Dropout(0.3, seeds[b : b + 1]), **options)
        np.testing.assert_allclose(found[b], alone[0], rtol=1e-12, atol=1e-14)


def test_each_step_drops_other_weights(backend):
    """With scale 0 and states that are kept, a context shows the weights that are left."""
    contexts = []
    hidden = np.eye(40)

    def update(h, context, step):
        contexts.append(context > 0)
        return h

    for seed in (3, 4):
        an.recurrent_attention(hidden, 4, update=update, scale=0, dropout=an.Dropout(0.5, seed), backend=backend)
    again = len(contexts)
    an.recurrent_attention(hidden, 4, update=update, scale=0, dropout=an.Dropout(0.5, 3), backend=backend)
    for first, second in zip(contexts[:4], contexts[again:], strict=True):
        np.testing.assert_array_equal(first, second)
    for n, one in enumerate(contexts[:again]):
        assert 0.44 < one.mean() < 0.56
        for other in contexts[:n]:
            assert 0.44 < (one == other).mean() < 0.56  # as often equal as two that know nothing of each other


# What is refused


def never(hidden, context, step):
    raise AssertionError("work was started")


def call(hidden=None, steps=2, **options):
    hidden = states(5, 4) if hidden is None else hidden
    return lambda: an.recurrent_attention(hidden, steps, **{"update": never, **options})


class OnDevice:
    __cuda_array_interface__ = {}  # noqa: RUF012


REFUSED = [
    (call(steps=2.0), TypeError, "steps is float; needed an integer"),
    (call(steps=True), TypeError, "steps is True; needed an integer"),
    (call(steps=-1), ValueError, "steps is -1; needed at least 0"),
    (call(update="sum"), ValueError, "update is 'sum'; needed 'replace', 'add', 'gated' or a function"),
    (call(update=None), TypeError, "update is NoneType; needed 'replace', 'add', 'gated' or a function"),
    (call(tolerance=-1e-9), ValueError, "tolerance is -1e-09; needed a number of at least 0"),
    (call(tolerance=np.nan), ValueError, "tolerance is nan; needed a number of at least 0"),
    (call(tolerance="small"), TypeError, "tolerance is str"),
    (call(tolerance=[0.1]), TypeError, "tolerance is list; needed a number"),
    (call([[1.0]]), TypeError, "hidden is list; needed an array"),
    (call(np.zeros((3, 4), int)), TypeError, "hidden has dtype int64"),
    (call(np.zeros(4)), ValueError, "hidden has 1 axes, shape (4,); needed 2 to 4, (B, H, L, D)"),
    (call(np.zeros((1, 1, 1, 3, 4))), ValueError, "hidden has 5 axes, shape (1, 1, 1, 3, 4)"),
    (call(np.zeros((3, 0))), ValueError, "hidden has states of size 0; needed at least 1"),
    (call(np.zeros((0, 3, 4))), ValueError, "hidden has 0 heads; needed at least 1"),
    (call(OnDevice()), NotImplementedError, "hidden is on a GPU"),
    (call(mask=np.ones((5, 5))), TypeError, "mask has dtype float64; needed a boolean array"),
    (call(mask=np.ones((4, 5), bool)), ValueError, "(4, 5)"),
    (call(modifiers=an.Causal()), TypeError, "modifiers is Causal; needed a modifier"),
    (call(scale=np.nan), ValueError, "scale"),
    (call(dropout=0.1), TypeError, "dropout"),
    (call(backend="metal"), ValueError, "backend is 'metal'"),
    (call(backend="metal", steps=0), ValueError, "backend is 'metal'"),
    (call(backend="cuda", steps=0), NotImplementedError, "backend 'cuda' cannot run"),
    (call(update=lambda h, c, step: None), TypeError, "update, at step 0, is NoneType of dtype object; needed numbers"),
    (call(update=lambda h, c, step: h > 0), TypeError, "update returns dtype bool at step 0; needed real numbers"),
    (call(update=lambda h, c, step: 1j * h), TypeError, "update returns dtype complex128 at step 0"),
    (call(update=lambda h, c, step: h if step < 1 else h[:1]), ValueError, "update returns shape (1, 4) at step 1"),
    (
        call(update=lambda h, c, step: 0.0),
        ValueError,
        "update returns shape () at step 0; needed that of hidden, (5, 4)",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_a_function_cannot_write_the_states():
    def update(hidden, context, step):
        hidden += context
        return hidden

    with pytest.raises(ValueError, match="read-only"):
        an.recurrent_attention(states(), 1, update=update)
