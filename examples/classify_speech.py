"""Tell who of nine men speaks, by attention over the frames of one vowel: hidden size and window by cross-validation.

    python examples/classify_speech.py --jobs 2

The recordings have 7 to 29 frames; a mask hides what fills them up. Hidden size and window are searched on the official
training part alone; the best is then trained on all of it and scored on the official test part, once, beside the same
model in which all frames weigh the same. Writes the search (`search.jsonl`, from which a stopped one goes on), score
against cost (`front.png`) and what is attended (`attended.png`).
"""

from __future__ import annotations

import sys

from models import command

with command.optional_imports("demo,plot,sklearn"):
    import numpy as np
    from matplotlib.figure import Figure

    import attn_numba as an
    from attn_numba.integrations import matplotlib as pictures
    from data import speech
    from models import classification

TITLE = "JapaneseVowels"


def main() -> None:
    parser = classification.build_parser(
        "Tell who of nine men speaks, by attention over the frames of one vowel.",
        "The recordings (JapaneseVowels, UCI) come out of the wheel aeon (6 MB) and are kept in a cache folder.",
        hidden="16,32",
        window="none,2,4",
        folder="classified/speech",
    )
    options = parser.parse_args()
    classification.check_options(parser, options)
    estimator, parameters = classification.chosen(options, an.AttentionClassifier(solver="adam", epochs=40))
    data = speech.japanese_vowels(options.data)
    training = classification.some_of(data.training, options.samples)
    task = classification.Task(TITLE, training, data.test, estimator, parameters)
    outcome = classification.classify(task, options)
    classification.report(task, outcome, options)
    path = options.output / classification.ATTENDED
    pictures.save(draw(task, outcome.attention, data.names), path, overwrite=options.force)
    print(path)


def draw(task: classification.Task, model: an.AttentionClassifier, names: tuple[str, ...]) -> Figure:
    """Return a picture of how much the frames count in the first recording of each speaker."""
    firsts = [int(np.flatnonzero(task.test.labels == label)[0]) for label in range(len(names))]
    shares = classification.relevance(model, [task.test.inputs[n] for n in firsts])
    real = np.arange(max(map(len, shares))) < np.array([[len(share)] for share in shares])
    table = np.zeros(real.shape)
    table[real] = np.concatenate(shares)
    return pictures.plot_weights(
        table,
        queries=[f"speaker {name}" for name in names],
        keys=[str(frame) for frame in range(table.shape[1])],
        mask=real,
        quantity="share",
        title=f"{TITLE}: how much each frame counts",
    )


if __name__ == "__main__":
    sys.exit(command.run(main))
