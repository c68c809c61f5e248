"""Rules made of another framework's arrays: when a call is computed, not before, so that gradients go back to them.

A rule copies the arrays it is made of, so a framework that traces or differentiates loses sight of them there. `defer`
keeps the class of a rule and its arguments apart; a bridge takes the arrays out of all the rules of a call, passes them
through the framework beside q, k and v, and has the rules made of what comes out at the other end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules.base import as_mask
from attn_numba.rules.data import require_function
from attn_numba.rules.modifiers import Modifier
from attn_numba.rules.normalizers import Normalizer
from attn_numba.rules.results import Gradients
from attn_numba.rules.scores import Score

__all__ = ["Deferred", "Operand", "Template", "defer", "gradients_of"]


class Operand(NamedTuple):
    """An array that rules of a call are made of."""

    array: Any
    label: str  # what to call it in messages
    learned: bool  # whether it has a gradient

    def refusal(self, what: str, cure: str) -> str:
        """Return the message for an array, of which `what` is said, that has no gradient where it should."""
        if self.label == "scale":
            cure += ", or modifiers=defer(Temperature, 1 / scale)"
        return f"{self.label} {what}, and has no gradient here: {cure}"


@dataclass(frozen=True, eq=False)
class Deferred:
    """A rule that is not made yet.

    Parameters
    ----------
    maker : class of a rule, or function that returns one
        What to call.
    keys : tuple of int and str
        For each argument its place, or the name it is given by.
    names : tuple of str
        What the maker calls them.
    values : tuple
        The arguments.
    """

    maker: Callable[..., Any]
    keys: tuple[int | str, ...]
    names: tuple[str, ...]
    values: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"defer({', '.join((_name_of(self.maker), *self.names))})"

    def made(self) -> Any:
        """Return the rule."""
        pairs = [*zip(self.keys, self.values, strict=True)]
        by_place = [value for key, value in pairs if isinstance(key, int)]
        return self.maker(*by_place, **{key: value for key, value in pairs if isinstance(key, str)})


def defer(maker: Callable[..., Any], *arguments: Any, **named: Any) -> Deferred:
    """Return a rule that a bridge makes when it computes a call, of what its arguments hold then.

    So gradients reach the arrays that have them: those of `Bias`, `ALiBi`, `Temperature`, `AdaptiveSpan`, `Bilinear`
    and `Additive`, and the sink of `Softmax`. And any rule can follow an array that is known only then: lengths, seeds.

    Parameters
    ----------
    maker : class of a rule, or function that returns one
        What to call. A function's arrays have no gradients.
    *arguments, **named
        What to call it with: arrays of the framework, and anything else as it is.

    Returns
    -------
    Deferred
        For `mask`, `modifiers`, `score`, `normalizer` or `dropout` of the `attention` of a bridge.

    Raises
    ------
    TypeError
        If `maker` cannot be called, or not with these arguments.

    Examples
    --------
    >>> import attn_numba as an
    >>> defer(an.ALiBi, [0.5, 0.25])
    defer(ALiBi, slopes)
    >>> defer(lambda lengths: an.Causal() & an.Padding(lengths), [3, 4])
    defer(<lambda>, lengths)
    """
    require_function("defer", "maker", maker)
    signature = inspect.signature(maker)
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        raise TypeError(f"defer: {_name_of(maker)} cannot be called so: {error}") from None
    known = [*signature.parameters]
    by_place = tuple(known[n] if n < len(known) else f"argument {n}" for n in range(len(arguments)))
    return Deferred(maker, (*range(len(arguments)), *named), (*by_place, *named), (*arguments, *named.values()))


class Template:
    """The rules of a call with empty places where arrays of another framework belong.

    Parameters
    ----------
    rules : dict of str to object
        Arguments of `attention` by their names.
    is_operand : function (object) -> bool
        Whether something is an array that is to be taken out. NumPy's stay, as copies: they may change before the
        gradient is computed.
    """

    def __init__(self, rules: dict[str, Any], is_operand: Callable[[Any], bool]) -> None:
        self._is_operand = is_operand
        self._operands: list[Operand] = []
        given = rules.get("modifiers")
        self._is_sequence = isinstance(given, (tuple, list))
        chain: Any = given if self._is_sequence else () if given is None else (given,)
        self._modifiers = [self._emptied(x, f"modifiers[{n}]") for n, x in enumerate(chain)]
        self._others = {name: self._emptied(x, name) for name, x in rules.items() if name != "modifiers"}
        if not isinstance(self._others["mask"], (_Place, Deferred)):
            self._others["mask"] = as_mask(self._others["mask"], keep=True)

    @property
    def parts(self) -> list[Any]:
        """All that rules are made of, operands apart: the same objects make the same rules."""
        everything = (*self._others.values(), *self._modifiers, self._is_sequence)
        return [(x.maker, *x.keys, *x.values) if isinstance(x, Deferred) else x for x in everything]

    def take_operands(self) -> list[Operand]:
        """Return what was taken out, and forget it."""
        operands, self._operands = self._operands, []
        return operands

    def filled(
        self, arrays: Sequence[Any], known_only: bool = False
    ) -> tuple[dict[str, Any], list[tuple[Any, str] | None]]:
        """Return the arguments of `attention`, and for each operand with a gradient its rule and the argument's name.

        Parameters
        ----------
        arrays : sequence of arrays
            NumPy's, in the place of the operands; they must not change while the rules are in use.
        known_only : bool
            Whether the arrays have shape and dtype alone, so that rules that ask for more are left out.
        """
        owners: list[tuple[Any, str] | None] = [None] * len(arrays)

        def full(x: Any) -> Any:
            if isinstance(x, _Place):
                return arrays[x.index]
            if not isinstance(x, Deferred):
                return x
            learned = _learned_names(x.maker)
            if known_only and not learned:
                return None
            rule = replace(x, values=tuple(map(full, x.values))).made()
            for name, value in zip(x.names, x.values, strict=True):
                if isinstance(value, _Place) and name in learned:
                    owners[value.index] = rule, name
            return rule

        rules = {name: full(x) for name, x in self._others.items()}
        modifiers = [full(x) for x in self._modifiers]
        if known_only:
            modifiers = [x for x in modifiers if x is not None]
        one = not self._is_sequence and len(modifiers) == 1
        return {**rules, "modifiers": modifiers[0] if one else modifiers}, owners

    def _emptied(self, x: Any, label: str) -> Any:
        if not isinstance(x, Deferred):
            return self._place(x, label, False)
        learned, kind = _learned_names(x.maker), _name_of(x.maker)
        pairs = zip(x.names, x.values, strict=True)
        values = (self._place(value, f"{kind}: {name}", name in learned) for name, value in pairs)
        return replace(x, values=tuple(values))

    def _place(self, x: Any, label: str, learned: bool) -> Any:
        if not self._is_operand(x):
            return x.copy() if isinstance(x, np.ndarray) and label != "mask" else x
        self._operands.append(Operand(x, label, learned))
        return _Place(len(self._operands) - 1)


@dataclass(frozen=True)
class _Place:
    """Where an operand belongs."""

    index: int


def gradients_of(owners: Sequence[tuple[Any, str] | None], found: Gradients) -> list[Any]:
    """Return for each operand its gradient, None for one that has none; `owners` are as `Template.filled` gave them."""
    result: list[Any] = []
    for owner in owners:
        arrays = None if owner is None else found.of(owner[0])
        result.append(getattr(arrays, owner[1]) if owner and isinstance(arrays, tuple) else arrays)
    return result


def _learned_names(maker: Any) -> tuple[str, ...]:
    """Return the arguments of a rule's class that have gradients."""
    if not isinstance(maker, type):
        return ()
    if issubclass(maker, Modifier):
        return () if maker.learned is None else maker.learned[:1]
    if issubclass(maker, (Normalizer, Score)) and is_dataclass(maker):
        return tuple(field.name for field in fields(maker))  # all that they have
    return ()


def _name_of(maker: Any) -> str:
    return getattr(maker, "__name__", type(maker).__name__)
