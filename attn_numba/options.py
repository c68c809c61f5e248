"""Words of the command line that several commands take: inputs, rules, threads; and what they mean."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from attn_numba import files
from attn_numba.job import NORMALIZERS, SCORES, RuleSet
from attn_numba.parallel import threads

__all__ = [
    "add_inputs",
    "add_masks",
    "add_names",
    "add_rules",
    "add_threads",
    "positive",
    "rules_of",
    "sizes_by_x",
    "threads_of",
]

MASKS_ONLY = {
    "alibi_slopes": None, "bias": None, "soft_cap": None, "score": "dot", "normalizer": "softmax", "sink": None,
    "scale": None,
}  # fmt: skip


def add_inputs(parser: argparse.ArgumentParser, count: str, arrays: str = "qkv") -> None:
    """Add the files that hold arrays, and the names of these arrays.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command.
    count : str
        How many files, as `argparse` writes it.
    arrays : str
        The arrays' letters.
    """
    letters = " and ".join(", ".join(arrays).rsplit(", ", 1))
    number = {2: "two", 3: "three"}[len(arrays)]
    parser.add_argument(
        "inputs",
        nargs=count,
        help=f"one .npz or .safetensors file that holds {letters}, or {number} .npy files in that order",
    )
    add_names(parser, arrays)


def add_names(parser: argparse.ArgumentParser, arrays: str) -> None:
    """Add the names of arrays in one file.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command.
    arrays : str
        The arrays' letters.
    """
    parser.add_argument(
        "--names",
        nargs=len(arrays),
        default=tuple(arrays),
        metavar=tuple(arrays.upper()),
        help=f"of the arrays in one file (default: {' '.join(arrays)})",
    )


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Add all masks and modifiers, scores and normalizers, the sink and the scale.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command.
    """
    group = add_masks(parser, "a key must be allowed by every mask given; modifiers: ALiBi, bias, cap, in this order")
    group.add_argument("--alibi-slopes", metavar="NUMBERS", help="one per query head: 0.5,0.25 or a file")
    group.add_argument("--bias", metavar="FILE", help="added to the scores; broadcasts to (B, H, M, N)")
    group.add_argument("--soft-cap", type=float, metavar="CAP", help="scores become CAP * tanh(score / CAP)")
    group.add_argument("--score", choices=SCORES, default="dot", help="of a query and a key (default: dot)")
    group.add_argument(
        "--normalizer", choices=NORMALIZERS, default="softmax", help="scores to weights (default: softmax)"
    )
    group.add_argument(
        "--sink", type=float, metavar="SCORE", help="a score that takes part in every sum and has no value"
    )
    group.add_argument("--scale", type=float, help="of the scores (default: 1/sqrt(D); of cosines 1)")


def add_masks(parser: argparse.ArgumentParser, description: str) -> argparse._ArgumentGroup:
    """Add the masks and the offsets.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command.
    description : str
        What stands above them in its help.

    Returns
    -------
    argparse._ArgumentGroup
        The group they are in.
    """
    parser.set_defaults(**MASKS_ONLY)
    group = parser.add_argument_group("rules", description)
    group.add_argument("--causal", action="store_true", help="keys up to the query's own position")
    group.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="keys this near; -1: open")
    group.add_argument("--neighborhood", type=sizes_by_x, metavar="SIZE", help="nearest keys on a grid, as 13x13")
    group.add_argument("--grid", type=sizes_by_x, metavar="SHAPE", help="of --neighborhood, as 64x64")
    group.add_argument("--padding-lengths", metavar="NUMBERS", help="keys of each sequence: 7,12,9 or a file")
    group.add_argument(
        "--prefix-lengths", metavar="NUMBERS", help="causal but for a prefix of each sequence: 7,12,9 or a file"
    )
    group.add_argument("--documents", metavar="FILE", help="which document each position belongs to, (B, N)")
    group.add_argument("--mask", metavar="FILE", help="boolean array that broadcasts to (B, H, M, N); True: may attend")
    group.add_argument("--query-offset", type=int, metavar="POSITION", help="of query row 0")
    group.add_argument("--key-offset", type=int, default=0, metavar="POSITION", help="of key row 0 (default: 0)")
    return group


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add the number of threads.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command.
    """
    parser.add_argument("--threads", type=positive, help="how many threads compute (default: see info)")


def rules_of(arguments: argparse.Namespace) -> RuleSet:
    """Return the rules that a command line names, their arrays mapped from files.

    Parameters
    ----------
    arguments : argparse.Namespace
        With what `add_rules` or `add_masks` adds.

    Returns
    -------
    RuleSet

    Raises
    ------
    ValueError
        If words do not go together, or a file does not hold what it should.
    """
    grid, neighborhood = arguments.grid, arguments.neighborhood
    if (grid is None) != (neighborhood is None):
        raise ValueError("--neighborhood and --grid go together, as in --grid 64x64 --neighborhood 13x13")
    return RuleSet(
        causal=arguments.causal,
        window=None if arguments.window is None else tuple(arguments.window),
        neighborhood=None if grid is None else (grid, neighborhood),
        padding_lengths=_numbers(arguments.padding_lengths, int),
        prefix_lengths=_numbers(arguments.prefix_lengths, int),
        documents=_array(arguments.documents),
        mask=_array(arguments.mask),
        soft_cap=arguments.soft_cap,
        score=arguments.score,
        normalizer=arguments.normalizer,
        bias=_array(arguments.bias),
        alibi_slopes=_numbers(arguments.alibi_slopes, float),
        sink=arguments.sink,
        scale=arguments.scale,
        query_offset=arguments.query_offset,
        key_offset=arguments.key_offset,
    )


def _numbers(text: str | None, kind: type) -> np.ndarray | None:
    """Return the numbers of ``3,5,8`` or of the file of that name."""
    if text is None or Path(text).suffix in files.SUFFIXES:
        return _array(text)
    try:
        return np.array([kind(part) for part in text.split(",")])
    except ValueError:
        raise ValueError(
            f"{text!r} is neither numbers joined by commas nor a file ({', '.join(files.SUFFIXES)})"
        ) from None


def _array(path: str | None) -> np.ndarray | None:
    return None if path is None else files.read_array(path)


def threads_of(arguments: argparse.Namespace) -> AbstractContextManager[object]:
    """Return a block in which calls use the number of threads asked for.

    Parameters
    ----------
    arguments : argparse.Namespace
        With what `add_threads` adds.

    Returns
    -------
    context manager
    """
    return nullcontext() if arguments.threads is None else threads(arguments.threads)


def sizes_by_x(text: str) -> tuple[int, ...]:
    """Return the sizes of a word such as ``64x64``.

    Parameters
    ----------
    text : str
        The word.

    Returns
    -------
    tuple of int

    Raises
    ------
    argparse.ArgumentTypeError
        If it is of another form.

    Examples
    --------
    >>> sizes_by_x("1x8x64x64")
    (1, 8, 64, 64)
    """
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 64x64") from None


def positive(text: str) -> int:
    """Return a whole number from 1 up.

    Parameters
    ----------
    text : str
        The number.

    Returns
    -------
    int

    Raises
    ------
    argparse.ArgumentTypeError
        If it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
