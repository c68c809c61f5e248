"""What tuned kernels gain on this machine over the usual choices, for every named workload, forward and backward.

python benchmarks/kernel_tuning.py --threads 1 --profile profile.json

Each line is what `attn-numba tune-kernels` finds: the time of a call as usual, the usual time over the chosen one as
the median of turns, and how far the usual time over itself is from 1 in the same turns. No bit of any result changes;
the search compares the bits of every choice that it keeps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import attn_numba as an
from attn_numba.profiles import write_profile
from attn_numba.tune_kernels_command import COLUMNS, measurements_of, rows_of
from attn_numba.tuning import PASSES, Effort, tuned
from attn_numba.workloads import WORKLOADS, named_dtype
from timing import RESULTS, bind, machine, markdown, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="(default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES, help="(default: both)")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed for each idea (default: 6)")
    parser.add_argument("--turns", type=int, default=5, help="at least, whatever they take (default: 5)")
    parser.add_argument("--profile", type=Path, help="where to write the profile, too (default: nowhere)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    parser.add_argument("--name", help="of the file there (default: tuning-DTYPE-THREADS)")
    arguments = parser.parse_args()
    bind(arguments.threads)
    dtype, found = named_dtype(arguments.dtype), []
    workloads = [WORKLOADS[name] for name in arguments.workloads or WORKLOADS]
    effort = Effort(arguments.seconds, arguments.turns, max(15, arguments.turns))
    with an.threads(arguments.threads):
        for one in tuned(workloads, dtype, arguments.passes, effort):
            found.append(one)
            print(" | ".join(rows_of([one])[0]), flush=True)
            content = {"dtype": dtype.name, "machine": machine(arguments.threads), "rows": measurements_of(found)}
            name = arguments.name or f"tuning-{dtype.name}-{arguments.threads}"
            save(name, content, arguments.folder)  # whole after every line
    if arguments.profile:
        choices = {one.shape_class: one.choice for one in found if one.changed}
        write_profile(arguments.profile, choices, measurements_of(found), overwrite=True)
    print()
    print(markdown(COLUMNS, rows_of(found)))


if __name__ == "__main__":
    main()
