"""A few calls of every CUDA kernel, each held to the reference: for compute-sanitizer, and to see whether a card works.

python benchmarks/few_calls.py                                   in several processes, which share what they compile
compute-sanitizer --tool racecheck python benchmarks/few_calls.py --tiny     small enough for that, in one process
NUMBA_ENABLE_CUDASIM=1 python benchmarks/few_calls.py --tiny     the general kernel in Numba's simulator
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

import attn_numba as an
from attn_numba.testing import check_attention
from attn_numba.workloads import named_dtype
from launches import KERNELS, Without, expected, recorded

Rules = Callable[[int, int], dict[str, Any]]
"""Takes the number of heads and the length, returns arguments of `attention`."""


class Call(NamedTuple):
    """One call: the kernel that is to serve it, and what of."""

    kernel: str
    dtype: str
    D: int
    what: str
    rules: Rules

    @property
    def label(self) -> str:
        """What it is called."""
        return f"{self.kernel} {self.dtype} D{self.D} {self.what}"


def causal(H: int, N: int) -> dict[str, Any]:
    return {"mask": an.Causal()}


def own(H: int, N: int) -> dict[str, Any]:
    mask = an.CustomMask(lambda b, h, i, j, p: (i - j) % p[0] < 2, params=(3,))
    return {"mask": mask & an.SlidingWindow(40, 20), "modifiers": an.SoftCap(5.0), "normalizer": an.Softmax(sink=0.5)}


def arrays(H: int, N: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((H, N, N)).astype(np.float32)
    return {"mask": rng.random((N, N)) < 0.7, "modifiers": an.Bias(bias), "dropout": an.Dropout(0.2, 3)}


def sparse(H: int, N: int) -> dict[str, Any]:
    return {"normalizer": an.Entmax15(), "mask": an.Causal()}


def cosine(H: int, N: int) -> dict[str, Any]:
    return {"score": an.Cosine(), "scale": 5.0}


CALLS = (
    Call("wgmma", "bfloat16", 64, "causal", causal),
    Call("wgmma", "bfloat16", 128, "causal", causal),
    Call("wgmma", "float16", 128, "a mask, a cap, a sink", own),
    Call("wgmma", "bfloat16", 256, "arrays and dropout", arrays),
    Call("mma", "bfloat16", 64, "causal", causal),
    Call("mma", "float16", 128, "a mask, a cap, a sink", own),
    Call("mma", "bfloat16", 256, "arrays and dropout", arrays),
    Call("general", "float32", 64, "causal", causal),
    Call("general", "float32", 128, "a mask, a cap, a sink", own),
    Call("general", "float64", 40, "arrays and dropout", arrays),
    Call("general", "float32", 33, "entmax", sparse),
    Call("general", "float16", 40, "cosine", cosine),
)


def capability() -> tuple[int, int]:
    """Return that of the first card; (0, 0) in the simulator."""
    from attn_numba.gpu import driver
    from attn_numba.gpu.target import SIMULATED

    return (0, 0) if SIMULATED else driver.card(0).capability


def make(index: int, tiny: bool) -> tuple[bool, str]:
    """Make one call; return whether it is right, and what to say."""
    call, start = CALLS[index], time.perf_counter()
    order, fastest = KERNELS, expected(call.dtype, capability())
    if order.index(call.kernel) < order.index(fastest):
        return True, f"{call.label}: not on this card"
    simulated = capability() == (0, 0)
    N, D = (9, min(call.D, 5)) if simulated else (150, call.D) if tiny else (700, call.D)
    rng = np.random.default_rng(index)
    q, k, v = (rng.standard_normal((1, heads, N, D)).astype(named_dtype(call.dtype)) for heads in (2, 1, 1))
    rules = call.rules(2, N)
    try:
        with Without(*order[: order.index(call.kernel)]), recorded() as started:
            check_attention(q, k, v, "cuda", name=call.label, **rules)
        if call.kernel not in started or (call.kernel != "general" and "general" in started):
            return False, f"{call.label}: served by {started}"
    except Exception as error:  # the others are to be tried too
        return False, f"{call.label}: {type(error).__name__}: {error}"
    return True, f"{call.label}: right, by {'+'.join(dict.fromkeys(started))}, {time.perf_counter() - start:.1f} s"


def compile_into(folder: str, architecture: str) -> int:
    """Compile what these calls and the benchmark need, for a machine that cannot; return how many kernels that is."""
    from attn_numba.gpu.ahead import compile_ahead, plain_calls
    from attn_numba.gpu.engine import sample

    plain = plain_calls(("bfloat16", "float16", "float32", "float64"), (128, 64, 256))
    mine = [sample(call.dtype, call.D, call.D, **call.rules(1, 128)) for call in CALLS if call.rules is not cosine]
    count = 0
    for left_out in ((), ("wgmma",)):
        with Without(*left_out):
            count += compile_ahead(
                architecture, folder, [*mine, *plain], lambda program: print(program.name, flush=True)
            )
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, in one process")
    parser.add_argument("--into", metavar="FOLDER", help="compile into a folder instead, for a card that is elsewhere")
    parser.add_argument("--architecture", default="sm_90a", help="of --into (default: sm_90a)")
    arguments = parser.parse_args()
    if arguments.into:
        print(compile_into(arguments.into, arguments.architecture), "kernels")
        return 0
    available, reason = an.backends()["cuda"]
    if not available:
        print(f"backend 'cuda' cannot run: {reason}")
        return 2
    print(reason, flush=True)
    wrong = 0

    def tell(right: bool, text: str) -> None:
        nonlocal wrong
        wrong += not right
        print(f"{'ok   ' if right else 'WRONG'} {text}", flush=True)

    if arguments.tiny:
        for index in range(len(CALLS)):
            tell(*make(index, True))
    else:
        workers = max(1, min(len(CALLS), (os.cpu_count() or 2) - 1))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(make, index, False) for index in range(len(CALLS))]):
                try:
                    tell(*future.result())
                except Exception as error:  # a process that died
                    tell(False, f"{type(error).__name__}: {error}")
    print(f"{len(CALLS) - wrong} of {len(CALLS)} calls are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
