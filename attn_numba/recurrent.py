"""Attention step by step: hidden states attend to each other, are updated, and attend again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from attn_numba import problem as problems
from attn_numba.api import attention
from attn_numba.rules import Dropout
from attn_numba.rules.arguments import ACCUMULATORS
from attn_numba.rules.data import AnyArray, as_array, real_number, whole_number
from attn_numba.rules.philox import philox4x32

__all__ = ["Recurrence", "recurrent_attention"]

Update: TypeAlias = Callable[[AnyArray, AnyArray, int], Any]

WORD = 2**32 - 1


class Recurrence(NamedTuple):
    """What `recurrent_attention` returns if the trajectory is asked for."""

    hidden: AnyArray  # (B, H, L, D)
    trajectory: AnyArray  # (steps taken + 1, B, H, L, D)

    @property
    def steps(self) -> int:
        """Steps taken, fewer than asked for if the states came to rest."""
        return len(self.trajectory) - 1


def recurrent_attention(
    hidden: Any,
    steps: int,
    *,
    update: str | Update = "replace",
    trajectory: bool = False,
    tolerance: float | None = None,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
) -> Any:
    """Return the hidden states after they have attended to each other for a number of steps.

    Parameters
    ----------
    hidden : array (B, H, L, D)
        Hidden states at the start: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Never
        written.
    steps : int
        Number of steps, at least 0; 0 gives a copy of the states.
    update : {"replace", "add", "gated"} or function ``(hidden, context, step) -> array``
        How the next states are made of the states and their context (Notes). A function gets both in the shape and
        dtype of `hidden`, the states read-only, and the number of the step, the first being 0. It returns real numbers
        in that shape, which are copied and rounded to that dtype.
    trajectory : bool
        Whether to return the states of all steps too.
    tolerance : float, optional
        Stop after a step that changed no element by more than this, in absolute terms; at least 0. Without it all
        steps are taken. An element that stays NaN, or the same infinity, has not changed.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset : optional
        The rules of each step, as `attention` takes them, for L queries and the same L keys.
    dropout : Dropout, optional
        Zeroes weights at random, other ones at each step (Notes).
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attention`.

    Returns
    -------
    hidden : array (B, H, L, D)
        The last states, a new array in the dtype and rank of the input. With `trajectory` a named tuple of it and:
    trajectory : array (steps taken + 1, B, H, L, D)
        The states at the start and after each step, in the rank of the input and one axis more. The tuple's property
        ``steps`` is the number of steps taken.

    Raises
    ------
    TypeError
        For arguments of the wrong kind; if the function given as `update` does not return real numbers.
    ValueError
        For shapes and values that do not fit: negative `steps`, a negative `tolerance` or NaN, an unknown `update`; if
        the function returns another shape.
    NotImplementedError
        For arrays on a GPU, and for what the backend does not offer.

    Notes
    -----
    At each step every state is scored against all of its sequence and head: ``context = attention(hidden, hidden,
    hidden)`` with the rules given. Then

    - ``"replace"``: ``hidden = context``;
    - ``"add"``: ``hidden = hidden + context``, the residual connection;
    - ``"gated"``: ``hidden = g * context + (1 - g) * hidden``, with one gate for each state, ``g = sigmoid(sum_d
      hidden_d * context_d / sqrt(D))``: the more a state and its context agree, the more of it is replaced. The gate
      has no parameters and is the same whatever `scale` and `score` are;

    and the next step starts from these. They are rounded to the dtype of `hidden` at each step; the gate is computed in
    float64 for float64, else in float32. Two steps are the same as one step and then one of its result, but for dropout
    and for functions that look at the number of the step.

    Dropout takes its own seed at step 0, and so drops there what `attention` drops. At step n it takes the seed whose
    low and high halves are the first two words of Philox4x32-10 with counter ``(n, 2**32 - 1, 0, 0)``, which no weight
    has, and the own seed as key. So it depends on seed and step alone, and neighboring seeds share nothing.

    Memory is that of a few states, of the trajectory (twice while it is put together) and of one `attention`.

    References
    ----------
    Attention repeated with shared parameters: M. Dehghani et al. (2019), "Universal transformers". A gate between the
    old and the new state: K. Cho et al. (2014), "Learning phrase representations using RNN encoder-decoder for
    statistical machine translation". As the sigmoid of an inner product of the state with what comes in: M. Henaff et
    al. (2017), "Tracking the world state with recurrent entity networks"; the division by ``sqrt(D)`` is ours, after
    A. Vaswani et al. (2017), "Attention is all you need", section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> hidden = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> an.recurrent_attention(hidden, 1, mask=an.Causal(), scale=0)
    array([[1.        , 0.        ],
           [0.5       , 0.5       ],
           [0.33333333, 0.66666667]])

    Averaged again and again, all states approach the first, which attends to itself alone:

    >>> last, states = an.recurrent_attention(hidden, 100, mask=an.Causal(), scale=0, trajectory=True, tolerance=1e-3)
    >>> states.shape
    (12, 3, 2)
    >>> last.round(2)
    array([[1., 0.],
           [1., 0.],
           [1., 0.]])

    An update of one's own, here a smaller and smaller step towards the context:

    >>> def towards(hidden, context, step):
    ...     return hidden + (context - hidden) / (step + 1)
    >>> an.recurrent_attention(hidden, 2, update=towards).shape
    (3, 2)
    """
    new_states = _update(update)
    count = whole_number("recurrent_attention", "steps", steps)
    if count < 0:
        raise ValueError(f"recurrent_attention: steps is {count}; needed at least 0")
    limit = None if tolerance is None else _tolerance(tolerance)
    start = _states(hidden)
    rules: dict[str, Any] = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset,
    }  # fmt: skip
    problems.check(start, start, start, dropout=dropout, **rules)
    nothing = start[..., :0, :]
    attention(nothing, nothing, nothing, backend=backend)  # a backend that cannot run is refused, whatever the steps

    states = start
    passed = [start]
    for step in range(count):
        context = attention(states, states, states, dropout=_dropout_at(dropout, step), backend=backend, **rules)
        before, states = states, _updated(new_states, states, context, step)
        if trajectory:
            passed.append(states)
        if limit is not None and _largest_change(before, states) <= limit:
            break
    last = np.array(states) if states is start else states
    return Recurrence(last, np.stack(passed)) if trajectory else last


def _tolerance(x: object) -> float:
    tolerance = real_number("recurrent_attention", "tolerance", x)
    if not tolerance >= 0:
        raise ValueError(f"recurrent_attention: tolerance is {tolerance}; needed a number of at least 0")
    return tolerance


def _states(hidden: object) -> AnyArray:
    """Return the hidden states as an array with the axes they came with."""
    if problems.is_device_array(hidden):
        raise NotImplementedError("hidden is on a GPU; recurrent_attention takes arrays in host memory")
    states = problems.host_array(hidden, "hidden")
    if not 2 <= states.ndim <= 4:
        raise ValueError(f"hidden has {states.ndim} axes, shape {states.shape}; needed 2 to 4, (B, H, L, D)")
    if states.shape[-1] < 1:
        raise ValueError("hidden has states of size 0; needed at least 1")
    if states.ndim > 2 and states.shape[-3] < 1:
        raise ValueError("hidden has 0 heads; needed at least 1")
    return states


def _update(update: object) -> Update:
    """Return the function that makes new states."""
    if isinstance(update, str):
        if update not in UPDATES:
            names = ", ".join(map(repr, UPDATES))
            raise ValueError(f"update is {update!r}; needed {names} or a function of (hidden, context, step)")
        return UPDATES[update]
    if not callable(update):
        names = ", ".join(map(repr, UPDATES))
        raise TypeError(f"update is {type(update).__name__}; needed {names} or a function of (hidden, context, step)")
    return update


def _replace(hidden: AnyArray, context: AnyArray, step: int) -> AnyArray:
    return context


def _add(hidden: AnyArray, context: AnyArray, step: int) -> AnyArray:
    with np.errstate(all="ignore"):  # padding may hold anything
        return hidden + context


def _gated(hidden: AnyArray, context: AnyArray, step: int) -> AnyArray:
    h, c = _accumulated(hidden), _accumulated(context)
    with np.errstate(all="ignore"):
        # Rows lie one after the other, so that the order of a sum depends on D alone.
        products = np.multiply(h, c, order="C")
        agreement = products.sum(axis=-1, keepdims=True) / np.sqrt(np.asarray(h.shape[-1], h.dtype))
        g = 0.5 + 0.5 * np.tanh(0.5 * agreement)  # the sigmoid, without overflow
        return g * c + (1 - g) * h


UPDATES: dict[str, Update] = {"replace": _replace, "add": _add, "gated": _gated}


def _updated(update: Update, states: AnyArray, context: AnyArray, step: int) -> AnyArray:
    """Return the new states, an array of their own: a function may return one that it writes again later."""
    shown = states.view()
    shown.flags.writeable = False
    result = as_array(update(shown, context, step), f"update, at step {step},")
    if result.dtype.kind not in "iuf" and result.dtype.name not in ACCUMULATORS:
        raise TypeError(f"update returns dtype {result.dtype} at step {step}; needed real numbers")
    if result.shape != states.shape:
        raise ValueError(f"update returns shape {result.shape} at step {step}; needed that of hidden, {states.shape}")
    with np.errstate(all="ignore"):
        return np.array(result, states.dtype, order="C")


def _dropout_at(dropout: Dropout | None, step: int) -> Dropout | None:
    """Return the dropout of a step, which drops other weights than those of all other steps."""
    if dropout is None or step == 0:
        return dropout
    if dropout.by_sequence:
        return Dropout(dropout.rate, np.array([_seed_at(int(seed), step) for seed in dropout.seed], np.uint64))
    return Dropout(dropout.rate, _seed_at(dropout.seed, step))


def _seed_at(seed: int, step: int) -> int:
    low, high, *_ = philox4x32((step, WORD, 0, 0), (seed & WORD, seed >> 32))
    return int(low) | int(high) << 32


def _largest_change(before: AnyArray, after: AnyArray) -> float:
    """Return by how much an element changed at most; NaN if one became or ceased to be NaN."""
    x, y = _accumulated(before), _accumulated(after)
    unchanged = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(all="ignore"):
        return float(np.where(unchanged, 0, np.abs(y - x)).max(initial=0))


def _accumulated(x: AnyArray) -> AnyArray:
    """Return an array in the dtype of sums."""
    return x.astype(ACCUMULATORS[x.dtype.name], copy=False)
