"""The command ``attn-numba plot``: pictures of weights, entropies, masks and rollouts from files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attn_numba import files
from attn_numba.averages import CELLS, average_entropy, average_mask, average_weights
from attn_numba.explain import entropy, rollout
from attn_numba.job import Job
from attn_numba.options import (
    add_inputs,
    add_masks,
    add_names,
    add_rules,
    add_threads,
    positive,
    rules_of,
    sizes_by_x,
    threads_of,
)
from attn_numba.panels import pixels_of
from attn_numba.rules.blocks import Block

__all__ = ["add_plots"]


def add_plots(add: Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]) -> None:
    """Add the kinds of pictures to the command line.

    Parameters
    ----------
    add : callable
        Takes a name, what to call and a line of help, and returns the new command.
    """
    weights = add("weights", _plot, "the weights of heads as heat maps; long sequences are averaged over cells")
    add_inputs(weights, "+", "qk")
    weights.add_argument("--sequence", type=int, default=0, metavar="B", help="which one (default: 0)")
    weights.add_argument("--heads", type=int, nargs="+", metavar="H", help="which ones (default: all)")
    weights.add_argument("--rows", type=_rows, metavar="FIRST:END", help="of the queries, as 100:200 (default: all)")
    add_rules(weights)
    _add_labels(weights)
    _add_computing(weights)

    entropies = add("entropy", _plot, "the mean entropy of every layer and head, in nats")
    entropies.add_argument(
        "inputs", nargs="+", help=".npz or .safetensors files that hold q and k, one for each layer, the first first"
    )
    add_names(entropies, "qk")
    add_rules(entropies)
    _add_computing(entropies)

    mask = add("mask", _plot, "which keys each query may attend to")
    mask.add_argument("--shape", type=sizes_by_x, required=True, metavar="BxHxMxN", help="of the call, as 1x8x64x64")
    add_masks(mask, "a key must be allowed by every mask given; at least one is needed")
    _add_labels(mask)

    rollouts = add("rollout", _plot, "attention rollout over layers, as a heat map or over an image")
    rollouts.add_argument(
        "inputs", nargs="+", help="files with the weights (B, H, M, M) of each layer, as run --weights writes them"
    )
    rollouts.add_argument("--residual", type=float, default=0.5, help="share around attention, 0 to 1 (default: 0.5)")
    rollouts.add_argument("--sequence", type=int, default=0, metavar="B", help="which one (default: 0)")
    rollouts.add_argument("--image", metavar="FILE", help="array (height, width) or (height, width, channels)")
    rollouts.add_argument("--patch", type=positive, metavar="PIXELS", help="side of the patches of --image")
    rollouts.add_argument(
        "--query",
        type=int,
        metavar="ROW",
        help="what to explain by --image, whose patches are the last tokens (default: 0)",
    )
    _add_labels(rollouts)

    for kind, draw in (
        (weights, _plot_weights), (entropies, _plot_entropy), (mask, _plot_mask), (rollouts, _plot_rollout)
    ):  # fmt: skip
        kind.set_defaults(draw=draw)
        kind.add_argument("-o", "--output", required=True, help="where to write: .png, .svg or .pdf by name")
        kind.add_argument("--force", action="store_true", help="replace the output file if it exists")
        kind.add_argument("--title", help="above the picture")
    for kind in (weights, rollouts):
        kind.add_argument("--highest", type=float, metavar="WEIGHT", help="top of the color scale (default: largest)")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels", nargs="+", metavar="FILE", help="tokens, one a line in UTF-8: a file for both, or of queries, keys"
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu or cuda (default: auto)")
    add_threads(parser)


def _plot(arguments: argparse.Namespace) -> int:
    from attn_numba.integrations import matplotlib as pictures

    output = files.check_output(arguments.output, arguments.force, pictures.SUFFIXES)
    options = {} if arguments.title is None else {"title": arguments.title}
    figure = arguments.draw(pictures, arguments, options)
    pictures.save(figure, output, overwrite=arguments.force)
    return 0


def _plot_weights(pictures: Any, arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    q, k = _queries_and_keys(arguments.inputs, arguments.names)
    job = Job(q, k, k, rules_of(arguments))  # weights do not depend on values
    sizes = job.problem.sizes
    b = _index("--sequence", arguments.sequence, sizes.B)
    heads = [_index("--heads", h, sizes.H) for h in arguments.heads or range(sizes.H)]
    if not 0 < len(heads) <= pictures.MOST_PANELS:
        raise ValueError(
            f"q has {len(heads)} heads; needed 1 to {pictures.MOST_PANELS} in a picture: choose by --heads"
        )
    start, stop = arguments.rows or (0, sizes.M)
    if not 0 <= start < stop <= sizes.M:
        raise ValueError(f"--rows is {start}:{stop}; needed a part of 0:{sizes.M}")
    queries, keys = _labels(arguments.labels, sizes.M, sizes.N)
    if queries is None and arguments.rows:
        queries = [str(row) for row in range(sizes.M)]

    group = sizes.H // sizes.Hk
    key_heads = slice(min(heads) // group, max(heads) // group + 1)
    query_heads = slice(key_heads.start * group, key_heads.stop * group)
    places = [h - query_heads.start for h in heads]
    (q, k, _), rules = job.part(Block(slice(b, b + 1), query_heads, key_heads, slice(start, stop), slice(0, sizes.N)))
    cells = CELLS if len(heads) == 1 else CELLS // 2
    with threads_of(arguments):
        weights = average_weights(q, k, cells=cells, backend=arguments.backend, **rules)
    if rules["mask"] is not None:
        offsets = rules["query_offset"], rules["key_offset"]
        allowed = average_mask(rules["mask"], (*q.shape[:3], sizes.N), *offsets, cells=cells)
        options["mask"] = allowed._replace(values=np.stack([allowed.at(0, h).values for h in places]))
    named = f", sequence {b}" * (sizes.B > 1) + f", head {heads[0]}" * (len(heads) == 1 < sizes.H)
    return pictures.plot_weights(
        weights._replace(values=weights.values[0, places]),
        queries=queries and queries[start:stop],
        keys=keys,
        highest=arguments.highest,
        names=[f"head {h}" for h in heads] if len(heads) > 1 else None,
        **{"title": f"Attention weights{named}"} | options,
    )


def _plot_entropy(pictures: Any, arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    rules = rules_of(arguments).options()
    arrays = [_queries_and_keys([path], arguments.names) for path in arguments.inputs]
    with threads_of(arguments):
        layers = [entropy(q, k, backend=arguments.backend, **rules) for q, k in arrays]
    keys = max(k.shape[-2] for _, k in arrays)
    return pictures.plot_entropy(average_entropy(layers), keys=keys, **options)


def _plot_mask(pictures: Any, arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    rules = rules_of(arguments).options()
    if rules["mask"] is None:
        raise ValueError("no mask is given; needed one, such as --causal")
    if len(arguments.shape) != 4:
        raise ValueError(f"--shape is {'x'.join(map(str, arguments.shape))}; needed four sizes, as 1x8x64x64")
    queries, keys = _labels(arguments.labels, *arguments.shape[2:])
    offsets = {name: rules[name] for name in ("query_offset", "key_offset")}
    return pictures.plot_mask(rules["mask"], arguments.shape, queries=queries, keys=keys, **offsets, **options)


def _plot_rollout(pictures: Any, arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    layers = []
    for path in arguments.inputs:
        arrays = files.read_arrays(path)
        if len(arrays) > 1 and "weights" not in arrays:
            raise ValueError(f"{path}: has no array weights; it holds {', '.join(sorted(arrays))}")
        layers.append(arrays["weights"] if len(arrays) > 1 else next(iter(arrays.values())))
    found = rollout(layers, arguments.residual)
    relevance = found[_index("--sequence", arguments.sequence, len(found))]
    if (arguments.image is None) != (arguments.patch is None):
        raise ValueError("--image and --patch go together, as in --image image.npy --patch 16")
    if arguments.image is None:
        if arguments.query is not None:
            raise ValueError("--query is for a picture with --image")
        queries, keys = _labels(arguments.labels, *relevance.shape)
        labels = {"queries": queries, "keys": keys, "quantity": "share"}
        return pictures.plot_weights(
            relevance, **labels, highest=arguments.highest, **{"title": "Attention rollout"} | options
        )
    if arguments.labels is not None or arguments.highest is not None:
        raise ValueError("--labels and --highest are for a picture without --image")
    image = pixels_of(files.read_array(arguments.image))
    row = relevance[_index("--query", arguments.query or 0, len(relevance))]
    patches = (-(-image.shape[0] // arguments.patch)) * (-(-image.shape[1] // arguments.patch))
    return pictures.plot_rollout(row[-patches:], image, arguments.patch, **options)


def _queries_and_keys(paths: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if len(paths) > 2:
        raise ValueError(f"inputs are one file that holds q and k or two with one each, not {len(paths)} files")
    if len(paths) == 2:
        return files.read_array(paths[0]), files.read_array(paths[1])
    arrays = files.read_arrays(paths[0], names)
    return arrays[names[0]], arrays[names[1]]


def _labels(paths: Sequence[str] | None, M: int, N: int) -> tuple[list[str] | None, list[str] | None]:
    """Return the labels of queries and keys, the lines of one file for both or of one file each."""
    if paths is None:
        return None, None
    if len(paths) > 2:
        raise ValueError(f"--labels are in one file, or in two for queries and keys, not in {len(paths)}")
    found = []
    for path, count, what in ((paths[0], M, "queries"), (paths[-1], N, "keys")):
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
        lines = lines[:-1] if lines[-1] == "" else lines
        if len(lines) != count:
            raise ValueError(f"{path} has {len(lines)} lines; there are {count} {what}")
        found.append(lines)
    return found[0], found[1]


def _index(name: str, number: int, count: int) -> int:
    if not 0 <= number < count:
        raise ValueError(f"{name} has {number}; needed 0 to {count - 1}")
    return number


def _rows(text: str) -> tuple[int, int]:
    try:
        start, stop = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 100:200") from None
    return start, stop
