"""The command ``attn-numba``: what is here, one call on files, backends side by side, timings, pictures, searches.

Exit codes: 0 done, 1 a comparison failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from attn_numba import __version__, files
from attn_numba.api import attention
from attn_numba.cluster import ranks
from attn_numba.comparison import Agreement, check_workload, compare_backends, contenders, plain_table, time_call
from attn_numba.environment import backends, config_report, warmup
from attn_numba.job import Job
from attn_numba.options import add_inputs, add_rules, add_threads, positive, rules_of, threads_of
from attn_numba.parallel import thread_count
from attn_numba.plotting import add_plots
from attn_numba.rules.arguments import DTYPES
from attn_numba.rules.blocks import Block
from attn_numba.tune_command import add_tune
from attn_numba.tune_kernels_command import add_tune_kernels
from attn_numba.workloads import WORKLOADS, named_dtype

__all__ = ["main"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
PIECE_FLOP = 2**35
"""Operations of a piece of `run`, about a third of a second on one core; less than two pieces show no bar."""
PIECES_OF_A_RANK = 8
"""At least, where the call has as many."""
PLOT_HELP = "draw weights, entropies, masks or rollouts into a .png, .svg or .pdf file"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The words after the command's name; those of the process if left out.

    Returns
    -------
    int
        0 done, 1 a comparison failed, 2 bad usage or input, 130 interrupted.

    Examples
    --------
    >>> main(["run", "missing.npz", "-o", "out.npy"])
    2
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        print("attn-numba: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone: nothing more may be written, not even by the interpreter as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError) as error:
        if arguments.traceback:
            raise
        print(f"attn-numba: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def _info(arguments: argparse.Namespace) -> int:
    sections = dict(config_report())
    states = {name: ("yes" if available else "no", reason) for name, (available, reason) in backends().items()}
    for section, settings in (sections | {"backends": states}).items():
        print(section)
        width = max((len(setting) for setting in settings), default=0)
        for setting, (value, source) in settings.items():
            print(f"  {setting:<{width}}  {value}" + (f"  ({source})" if source else ""))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    chosen = partial(attention, backend=arguments.backend)
    if ranks()["count"][0] > 1:
        return _run_on_ranks(arguments, chosen)
    job, pieces = _checked_run(arguments)
    with threads_of(arguments), _progress(arguments, "attention", job.pairs if len(pieces) > 1 else 0) as advance:
        results = job.run(chosen, pieces, advance, lse=arguments.lse, weights=arguments.weights)
    files.write_arrays(arguments.output, results, arguments.force)
    return 0


def _checked_run(arguments: argparse.Namespace, workers: int = 1) -> tuple[Job, list[Block]]:
    """Return the call and its pieces, several for each worker, once it is known that the output can be written."""
    output = files.check_output(arguments.output, arguments.force)
    job = _job(arguments)
    wanted = [name for name in ("lse", "weights") if getattr(arguments, name)]
    files.check_contents(output, {"out": job.q.dtype} | dict.fromkeys(wanted, np.dtype(np.float32)))
    sizes = job.problem.sizes
    most = PIECE_FLOP // (2 * (sizes.D + sizes.E))
    return job, job.pieces(most if workers == 1 else min(most, job.pairs // (PIECES_OF_A_RANK * workers)))


def _run_on_ranks(arguments: argparse.Namespace, chosen: Callable[..., Any]) -> int:
    """Compute a call together with the other processes that a launcher started; rank 0 writes and speaks for all."""
    from attn_numba.integrations.mpi.command import run_on_ranks

    try:
        with threads_of(arguments):
            run_on_ranks(
                partial(_checked_run, arguments),
                lambda job, piece: job.compute(chosen, piece, arguments.lse, arguments.weights),
                partial(_progress, arguments, "attention"),
                lambda results: files.write_arrays(arguments.output, results, arguments.force),
            )
    except Exception:
        if ranks()["rank"][0] == 0 or arguments.traceback:
            raise
        return BAD_INPUT
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    job = _job(arguments) if arguments.inputs else Job(*_random_arrays(arguments), rules_of(arguments))
    rows, failed, reference_seconds = [], False, float("nan")
    with threads_of(arguments):
        for backend, agreement, seconds, reason in compare_backends(
            job, arguments.repeat, partial(_progress, arguments)
        ):
            if agreement is None:
                rows.append((backend, "", "", "", "", f"skipped: {reason}"))
                continue
            if backend == "reference":
                reference_seconds = seconds
            failed |= not agreement.passed
            ratio = f"{reference_seconds / seconds:.1f}"
            rows.append((backend, *_verdict(agreement), f"{1e3 * seconds:.3f}", ratio, _note(agreement)))
    shapes = ", ".join(f"{name} {x.shape}" for name, x in zip("qkv", (job.q, job.k, job.v), strict=True))
    columns = ("backend", "largest difference", "allowed", "ms", "reference / this", "")
    _print_table(f"{job.q.dtype.name}; {shapes}", columns, rows)
    return FAILED if failed else 0


def _bench(arguments: argparse.Namespace) -> int:
    from attn_numba.cpu.peak import peak_rate

    names = arguments.workloads or list(WORKLOADS)
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise ValueError(f"unknown workload {unknown[0]}; known are {', '.join(WORKLOADS)}")
    dtype, failed, rows = named_dtype(arguments.dtype), False, []
    with threads_of(arguments):
        peak = peak_rate(dtype.name) * thread_count()[0]
        for workload in (WORKLOADS[name].small() if arguments.small else WORKLOADS[name] for name in names):
            arrays = workload.arrays(dtype)
            for name, call in contenders(workload, arrays).items():
                if isinstance(call, str):
                    rows.append((workload.name, name, "", "", "", "", "", f"skipped: {call}"))
                    continue
                agreement = check_workload(workload, arrays, call())
                failed |= not agreement.passed
                seconds = time_call(call, 1 if name == "reference" else arguments.repeat)
                rate = workload.flop / seconds
                numbers = (f"{1e3 * seconds:.3f}", f"{rate / 1e9:.1f}", f"{rate / peak:.2f}" if name == "cpu" else "")
                rows.append((workload.name, name, *numbers, *_verdict(agreement), _note(agreement)))
    columns = ("workload", "what", "ms", "GFLOP/s visible", "of tile's peak", "largest difference", "allowed", "")
    _print_table(f"{dtype.name}, fastest of {arguments.repeat}", columns, rows)
    return FAILED if failed else 0


def _verdict(agreement: Agreement) -> tuple[str, str]:
    return f"{agreement.difference:.1e}", f"{agreement.tolerance:.1e}"


def _note(agreement: Agreement) -> str:
    return "" if agreement.passed else "FAILED"


def _warmup(arguments: argparse.Namespace) -> int:
    if (arguments.cuda is None) != (arguments.folder is None):
        raise ValueError("--cuda and --folder go together, as in --cuda sm_90a --folder kernels")
    if arguments.cuda is not None:
        from attn_numba.gpu.ahead import compile_ahead, plain_calls

        calls = plain_calls(arguments.dtypes, arguments.head_sizes)
        count = compile_ahead(
            arguments.cuda, arguments.folder, calls, lambda program: print(f"{program.name} {program.options}")
        )
        print(f"{count} kernels compiled into {arguments.folder}")
        return 0
    for dtype, seconds in warmup(tuple(arguments.dtypes), arguments.every, gradients=arguments.gradients).items():
        print(f"{dtype}: {seconds:.2f} s")
    return 0


def _job(arguments: argparse.Namespace) -> Job:
    """Return the call that the command line describes, its arrays mapped from files."""
    paths, names = arguments.inputs, arguments.names
    if len(paths) == 3:
        q, k, v = (files.read_array(path) for path in paths)
    elif len(paths) == 1:
        arrays = files.read_arrays(paths[0], names)
        q, k, v = (arrays[name] for name in names)
    else:
        raise ValueError(f"inputs are one file that holds q, k and v or three with one each, not {len(paths)} files")
    return Job(q, k, v, rules_of(arguments))


def _random_arrays(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    B, H, Hk, M, N, D, E = arguments.sizes
    dtype, random = named_dtype(arguments.dtype), np.random.default_rng(arguments.seed)
    q, k, v = (random.standard_normal(shape).astype(dtype) for shape in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, E)))
    return q, k, v


def _progress(arguments: argparse.Namespace, label: str, pairs: int) -> AbstractContextManager[Callable[[int], object]]:
    """Return a progress bar, or nothing where none is wanted or can be drawn."""
    try:
        from attn_numba.integrations.tqdm import progress_bar
    except ImportError:
        return nullcontext(lambda pairs: None)
    return progress_bar(label, pairs, hidden=arguments.quiet or pairs == 0)


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from attn_numba.integrations.rich import print_table
    except ImportError:
        print(title)
        print(plain_table(columns, rows))
    else:
        print_table(title, columns, rows)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _add(commands: Any, name: str, command: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=help, description=help)
    sub.set_defaults(command=command)
    sub.add_argument("--traceback", action="store_true", help="show where an error came from")
    return sub


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attn-numba", description="Attention without PyTorch: a NumPy reference and Numba kernels."
    )
    parser.add_argument("--version", action="version", version=f"attn-numba {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = partial(_add, commands)
    add("info", _info, "versions, CPU features, threads, cache folder, GPU: every setting and where it comes from")

    run = add("run", _run, "compute attention of q, k, v from files into a file")
    add_inputs(run, "+")
    add_rules(run)
    run.add_argument("-o", "--output", required=True, help="where to write: .npy, or .npz or .safetensors by name")
    run.add_argument("--force", action="store_true", help="replace the output file if it exists")
    run.add_argument("--lse", action="store_true", help="also write each query's log of the sum of exponentials")
    run.add_argument("--weights", action="store_true", help="also write the attention weights (B, H, M, N)")
    run.add_argument("--backend", default="auto", help="auto, reference, cpu or cuda (default: auto)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")

    compare = add("compare", _compare, "run every backend here on one input and hold it to the reference")
    add_inputs(compare, "*")
    add_rules(compare)
    compare.add_argument(
        "--sizes",
        type=int,
        nargs=7,
        default=(1, 8, 2, 512, 512, 64, 64),
        metavar=("B", "H", "Hk", "M", "N", "D", "E"),
        help="of random input, where no file is given (default: 1 8 2 512 512 64 64)",
    )
    compare.add_argument("--dtype", default="float32", choices=DTYPES, help="of random input (default: float32)")
    compare.add_argument("--seed", type=int, default=0, help="of random input (default: 0)")
    compare.add_argument("--repeat", type=positive, default=3, help="runs of which the fastest counts (default: 3)")
    compare.add_argument("--quiet", action="store_true", help="no progress bar")

    bench = add("bench", _bench, "time the named workloads, each held to the reference first")
    bench.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="some of the table (default: all)")
    bench.add_argument("--small", action="store_true", help="at a sixteenth of their length")
    bench.add_argument("--dtype", default="float32", choices=DTYPES, help="(default: float32)")
    bench.add_argument("--repeat", type=positive, default=3, help="runs of which the fastest counts (default: 3)")

    plot = commands.add_parser("plot", help=PLOT_HELP, description=PLOT_HELP)
    add_plots(partial(_add, plot.add_subparsers(required=True, metavar="KIND")))

    add_tune(add, _print_table)
    add_tune_kernels(add, _print_table)

    compile_ahead = add("warmup", _warmup, "compile ahead into the cache folder")
    compile_ahead.add_argument(
        "dtypes", nargs="*", default=["float32"], help=f"of {', '.join(DTYPES)} (default: float32)"
    )
    compile_ahead.add_argument("--every", action="store_true", help="all kernels, not just that of plain calls")
    compile_ahead.add_argument("--gradients", action="store_true", help="those of gradients too")
    compile_ahead.add_argument(
        "--cuda", metavar="ARCHITECTURE", help="CUDA kernels instead, such as for sm_90a; no card is needed"
    )
    compile_ahead.add_argument(
        "--folder", help="of --cuda: where to write; a machine uses it by ATTN_NUMBA_CUDA_CODE=FOLDER"
    )
    compile_ahead.add_argument(
        "--head-sizes", type=positive, nargs="+", default=(64, 128, 256), help="of --cuda (default: 64 128 256)"
    )

    for sub in (run, compare, bench):
        add_threads(sub)
    return parser
