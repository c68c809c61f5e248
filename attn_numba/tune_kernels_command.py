"""The command ``attn-numba tune-kernels``: what is fastest on this processor, as a table and a profile."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attn_numba import files
from attn_numba.options import add_threads, threads_of
from attn_numba.profiles import VARIABLE, write_profile
from attn_numba.rules.arguments import DTYPES
from attn_numba.tuning import PASSES, QUICK, USUAL_EFFORT, Measurement, tuned
from attn_numba.workloads import WORKLOADS, named_dtype

__all__ = ["add_tune_kernels", "measurements_of", "rows_of"]

COLUMNS = ("workload", "ms", "gain", "noise", "best instead of the usual")
PrintTable = Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]


def add_tune_kernels(
    add: Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser], print_table: PrintTable
) -> None:
    """Add the command to the command line.

    Parameters
    ----------
    add : callable
        Takes a name, what to call and a line of help, and returns the new command.
    print_table : callable
        Takes a title, headings and rows of texts.
    """

    def command(arguments: argparse.Namespace) -> int:
        return _tune_kernels(arguments, print_table)

    parser = add("tune-kernels", command, "measure what makes the CPU kernels fastest here; results keep every bit")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="some of the table of bench (default: all)")
    parser.add_argument("-o", "--output", help=f"profile to write (.json); {VARIABLE} or an.use_profile uses it")
    parser.add_argument("--force", action="store_true", help="replace the profile if it exists")
    parser.add_argument("--quick", action="store_true", help="a sixth of the time: finds large gains only")
    parser.add_argument("--small", action="store_true", help="the workloads at a sixteenth of their length")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=DTYPES, help="of the arrays (default: float32)"
    )
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES, help="(default: both)")
    parser.add_argument("--quiet", action="store_true", help="say nothing before the table")
    add_threads(parser)


def measurements_of(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Return measurements as a file holds them.

    Parameters
    ----------
    found : sequence of Measurement
        What `tuned` yields.

    Returns
    -------
    list of dict
    """
    return [one._asdict() | {"choice": one.choice._asdict()} for one in found]


def rows_of(found: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Return measurements as rows of a table: workload, time as usual, gain, noise, what is chosen.

    Parameters
    ----------
    found : sequence of Measurement
        What `tuned` yields.

    Returns
    -------
    list of tuple of str
    """
    return [
        (one.workload, f"{one.milliseconds:.3f}", f"{one.gain:.3f}", f"{one.noise:.3f}", _words(one.changed))
        for one in found
    ]


def _words(changed: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "the usual"


def _tune_kernels(arguments: argparse.Namespace, print_table: PrintTable) -> int:
    names = arguments.workloads or list(WORKLOADS)
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise ValueError(f"unknown workload {unknown[0]}; known are {', '.join(WORKLOADS)}")
    output = arguments.output and files.check_output(arguments.output, arguments.force, (".json",))
    dtypes = [named_dtype(name) for name in arguments.dtype]
    workloads = [WORKLOADS[name].small() if arguments.small else WORKLOADS[name] for name in names]
    effort, found = QUICK if arguments.quick else USUAL_EFFORT, []
    with threads_of(arguments):
        for dtype in dtypes:
            for one in tuned(workloads, dtype, arguments.passes, effort):
                found.append(one._replace(workload=f"{one.workload}, {dtype.name}"))
                if not arguments.quiet:
                    print(f"{found[-1].workload}: {_words(one.changed)}", file=sys.stderr, flush=True)
    print_table("time as usual over time as chosen; results keep every bit", COLUMNS, rows_of(found))
    if output:
        choices = {one.shape_class: one.choice for one in found if one.changed}
        write_profile(output, choices, measurements_of(found), arguments.force)
        print(f"{output}: {len(choices)} of {len(found)} classes of calls have gains; used by {VARIABLE}={output}")
    return 0
