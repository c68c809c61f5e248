"""Ours against one peer: the same arrays, turns taken one after the other, one process per peer and number of threads.

    python benchmarks/ratios.py                          every peer that is installed, with 1 and 2 threads
    python benchmarks/ratios.py --peer torch --threads 1 --dtype bfloat16
    python benchmarks/ratios.py --peer torch --what backward        or `both`: forward and backward

Thread pools of several libraries disturb each other, so a process holds ours and one peer and no more. Each process is
bound to as many cores as it has threads. Results go to ``benchmarks/results/`` as JSON, and to the screen as a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import attn_numba as an
from attn_numba.workloads import named_dtype
from timing import RESULTS, bind, interleave, machine, markdown, ratio, save

Peer = tuple[Callable[[], Any], Callable[[Any], Any]]
"""A call, and what makes arrays (B,H,N,D) of its answer, one or a tuple of gradients; only the call is timed."""

# What is timed -> products of two matrices in it: scores and values; five of gradients; all seven.
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
TRAINING = ("torch",)  # peers that are asked for gradients

PEERS = {"torch": "torch", "onnxruntime": "onnxruntime", "jax": "jax", "numpy": "numpy"}
DTYPES = {
    "torch": ("float32", "float64", "float16", "bfloat16"),
    "onnxruntime": ("float32",),
    "jax": ("float32",),
    "numpy": ("float32", "float64"),
}


class Row(NamedTuple):
    """One shape: sequences, heads, queries = keys, head size = value size, and whether it is causal."""

    B: int
    H: int
    N: int
    D: int
    causal: bool


def rows() -> Iterator[Row]:
    """Yield the shapes: head sizes of published models, lengths in powers of two, with and without a causal mask."""
    for causal in (False, True):
        for N in (64, 128, 256, 512, 1024, 2048):
            for D in (32, 64, 128):
                yield Row(1, 8, N, D, causal)
        yield Row(1, 8, 1024, 80, causal)
        yield Row(1, 2, 4096, 64, causal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, help="default: every one that is installed")
    parser.add_argument("--threads", type=int, help="default: 1, then 2 where there are two cores")
    parser.add_argument("--dtype", help="default: every one the peer computes")
    parser.add_argument("--what", choices=PRODUCTS, default="forward", help="the gradients of torch alone")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="timed per turn and side")
    parser.add_argument("--only", default="", help="rows whose label contains this, as M512 or causal")
    parser.add_argument("--folder", type=Path, help="where results go (default: benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.peer and arguments.dtype and arguments.dtype not in DTYPES[arguments.peer]:
        parser.error(
            f"{arguments.peer} computes attention in {', '.join(DTYPES[arguments.peer])} here, not {arguments.dtype}"
        )
    peers = [arguments.peer] if arguments.peer else list(PEERS)
    if arguments.what != "forward":
        if arguments.peer not in (None, *TRAINING):
            parser.error(f"--what {arguments.what} is measured against {', '.join(TRAINING)}, not {arguments.peer}")
        peers = list(TRAINING)
    if arguments.peer and arguments.threads and arguments.dtype:
        measure(arguments)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for peer in peers:
        if find_spec(PEERS[peer]) is None:
            print(f"{peer}: skipped, not installed")
            continue
        for dtype in DTYPES[peer] if arguments.dtype is None else {arguments.dtype}.intersection(DTYPES[peer]):
            for threads in [arguments.threads] if arguments.threads else [n for n in (1, 2) if n <= cores]:
                words = ["--peer", peer, "--threads", str(threads), "--dtype", dtype, "--turns", str(arguments.turns)]
                words += ["--seconds", str(arguments.seconds), "--only", arguments.only, "--what", arguments.what]
                words += ["--folder", str(arguments.folder)] if arguments.folder else []
                subprocess.run([sys.executable, __file__, *words], check=True)


def measure(arguments: argparse.Namespace) -> None:
    """Measure one peer in this process and write the result."""
    peer, threads, dtype, what = arguments.peer, arguments.threads, arguments.dtype, arguments.what
    bind(threads)
    prepare = {"torch": _torch, "onnxruntime": _onnxruntime, "jax": _jax, "numpy": _numpy}[peer](threads)
    if what != "forward":
        prepare = partial(_torch_gradients(threads), what)
    results, lines = [], []
    for row in rows():
        label = f"B{row.B} H{row.H} M{row.N} D{row.D} {'causal' if row.causal else 'full'}"
        if arguments.only not in label:
            continue
        options = {"mask": an.Causal()} if row.causal else {}
        random = np.random.default_rng(0)
        arrays = [random.standard_normal((row.B, row.H, row.N, row.D)).astype(named_dtype(dtype)) for _ in "qkv"]
        ours = _ours(what, arrays, options)
        theirs, read = prepare(*arrays, row.causal)
        _same(ours(), read(theirs()), dtype, label)
        calls = {"ours": ours, peer: theirs}
        with an.threads(threads):
            times = interleave(calls, arguments.turns, arguments.seconds)
        found = {
            **row._asdict(),
            "label": label,
            "ours_ms": 1e3 * statistics.median(times["ours"]),
            "peer_ms": 1e3 * statistics.median(times[peer]),
            "ratio": ratio(times, peer, "ours"),
            "flop": 2 * PRODUCTS[what] * row.D * row.B * row.H * (row.N * (row.N + 1) // 2 if row.causal else row.N**2),
        }
        results.append(found)
        rates = (f"{found['flop'] / found[side] / 1e6:.1f}" for side in ("ours_ms", "peer_ms"))
        lines.append((label, f"{found['ours_ms']:.3f}", f"{found['peer_ms']:.3f}", *rates, f"{found['ratio']:.2f}"))
        print(" | ".join(lines[-1]), flush=True)
    content = {
        "peer": peer,
        "what": what,
        "dtype": dtype,
        "turns": arguments.turns,
        "machine": machine(threads, peer),
        "rows": results,
    }
    part = "" if what == "forward" else f"{what}-"
    save(f"ratios-{part}{peer}-{dtype}-{threads}", content, arguments.folder or RESULTS)
    columns = ("shape", "ours ms", f"{peer} ms", "ours GFLOP/s", f"{peer} GFLOP/s", f"{peer} / ours")
    print(f"\n{peer}, {what}, {dtype}, {threads} thread(s)\n\n{markdown(columns, lines)}\n")


def _ours(what: str, arrays: list[Any], options: dict[str, Any]) -> Callable[[], Any]:
    """Return our call of what is timed."""
    if what == "forward":
        return partial(an.attention, *arrays, **options)
    dout = _by_output(arrays)

    def gradients(saved: Any) -> tuple[Any, ...]:
        found = an.attention_vjp(*arrays, dout, saved=saved, **options)
        return found.q, found.k, found.v

    if what == "both":
        return lambda: gradients(tuple(an.attention(*arrays, return_lse=True, **options)))
    return partial(gradients, tuple(an.attention(*arrays, return_lse=True, **options)))


def _by_output(arrays: list[Any]) -> Any:
    """Return the gradient by the output that both sides get."""
    q, _, v = arrays
    shape = (*q.shape[:-1], v.shape[-1])
    return np.random.default_rng(1).standard_normal(shape).astype(q.dtype)


def _same(ours: Any, theirs: Any, dtype: str, label: str) -> None:
    """Raise unless both computed the same: a ratio of different work means nothing."""
    if isinstance(ours, tuple):
        for mine, other in zip(ours, theirs, strict=True):
            _same(mine, other, dtype, label)
        return
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max()
    allowed = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-3, "bfloat16": 4e-2}[dtype]
    if not difference <= allowed:
        raise SystemExit(f"{label} {dtype}: the results differ by {difference:.1e}, more than {allowed:.0e}")


def _torch(threads: int) -> Callable[..., Peer]:
    import torch

    torch.set_num_threads(threads)

    def prepare(q: Any, k: Any, v: Any, causal: bool) -> Peer:
        q, k, v = _tensor(q), _tensor(k), _tensor(v)

        def call() -> Any:
            with torch.inference_mode():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call, lambda out: out.double().numpy()

    return prepare


def _tensor(array: Any) -> Any:
    import torch

    if array.dtype.name == "bfloat16":  # from_numpy does not know it; the bits are the same
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_gradients(threads: int) -> Callable[..., Peer]:
    import torch

    torch.set_num_threads(threads)

    def prepare(what: str, q: Any, k: Any, v: Any, causal: bool) -> Peer:
        dout = _tensor(_by_output([q, k, v]))
        inputs = [_tensor(x).requires_grad_() for x in (q, k, v)]
        forward = partial(torch.nn.functional.scaled_dot_product_attention, *inputs, is_causal=causal)
        kept = forward()

        def backward() -> Any:
            return torch.autograd.grad(kept, inputs, dout, retain_graph=True)

        def both() -> Any:
            return torch.autograd.grad(forward(), inputs, dout)

        return (both if what == "both" else backward), lambda found: tuple(x.double().numpy() for x in found)

    return prepare


def _onnxruntime(threads: int) -> Callable[..., Peer]:
    import onnxruntime
    from onnx import TensorProto, helper

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    domain = "com.microsoft"

    def prepare(q: Any, k: Any, v: Any, causal: bool) -> Peer:
        B, H, N, D = q.shape
        shape = [B, N, H * D]  # its layout; bringing the arrays into it is not timed
        feed = {name: x.swapaxes(1, 2).reshape(shape).copy() for name, x in zip("qkv", (q, k, v), strict=True)}
        names = list(feed)
        node = helper.make_node(
            "MultiHeadAttention", names, ["out"], domain=domain, num_heads=H, unidirectional=int(causal)
        )
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*names, "out")]
        graph = helper.make_graph([node], "attention", values[:3], values[3:])
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feed)[0], lambda out: out.reshape(B, N, H, D).swapaxes(1, 2)

    return prepare


def _jax(threads: int) -> Callable[..., Peer]:
    import jax  # takes as many threads as the process has cores

    def prepare(q: Any, k: Any, v: Any, causal: bool) -> Peer:
        compiled = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal))
        arrays = [jax.numpy.asarray(x.swapaxes(1, 2)) for x in (q, k, v)]  # its layout is (B,N,H,D)
        return lambda: compiled(*arrays).block_until_ready(), lambda out: out.swapaxes(1, 2)

    return prepare


def _numpy(threads: int) -> Callable[..., Peer]:
    from attn_numba.comparison import plain_attention

    def prepare(q: Any, k: Any, v: Any, causal: bool) -> Peer:
        allowed = np.tri(q.shape[2], dtype=bool) if causal else None
        return lambda: plain_attention(q, k, v, allowed), lambda out: out

    return prepare


if __name__ == "__main__":
    main()
