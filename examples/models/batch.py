"""Answers to several prompts at once: sequences join the batch and leave it as they begin and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .smollm2 import PAGE, Caches, SmolLM2


@dataclass(eq=False)
class Answer:
    """An answer under way: to which prompt, in which sequence, its newest token, and how many may still be written."""

    prompt: int
    sequence: int
    token: int
    left: int


class Batch:
    """The most likely answers to some prompts.

    A step of the model writes one token of each answer under way. As soon as one ends, the next prompt takes its place.
    What all prompts begin with is read once, and its pages are shared.

    Parameters
    ----------
    model : SmolLM2
        Who answers.
    prompts : sequence of sequence of int
        Token ids of each prompt; at least one of each.
    limit : int
        Tokens of the longest answer; at least 1.
    most : int
        Answers under way at the same time, at most.
    dtype : str
        How keys and values are stored.

    Attributes
    ----------
    shared : sequence of int
        What all prompts begin with; nothing of a single one.
    caches : Caches
        Keys and values of the sequences under way.
    """

    def __init__(
        self, model: SmolLM2, prompts: Sequence[Sequence[int]], limit: int, *, most: int = 8, dtype: str = "float32"
    ) -> None:
        self.model, self.prompts, self.limit, self.most = model, prompts, limit, min(most, len(prompts))
        self.shared: Sequence[int] = []
        if len(prompts) > 1:
            # Each reads at least its last token itself: the answer follows from that.
            columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
            self.shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        longest = max(map(len, prompts)) + limit
        own = -(-longest // PAGE) - len(self.shared) // PAGE
        self.caches = Caches(model.config, dtype, pages=-(-len(self.shared) // PAGE) + self.most * own)

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        """Yield the number of a prompt and a token of its answer, as they are written; None where an answer ends."""
        waiting = deque(range(len(self.prompts)))
        running: list[Answer] = []
        if self.shared:
            self.model.forward([self.shared], self.caches)
        while waiting or running:
            while waiting and len(running) < self.most:
                running.append(self._begin(waiting.popleft()))
                yield from self._say(running[-1], running)
            if running:
                tokens, sequences = [[answer.token] for answer in running], [answer.sequence for answer in running]
                logits = self.model.forward(tokens, self.caches, sequences)
                for answer, token in zip(list(running), logits.argmax(axis=1).tolist(), strict=True):
                    answer.token = token
                    yield from self._say(answer, running)

    def _begin(self, prompt: int) -> Answer:
        """Read what a prompt has of its own, and choose the first token of its answer."""
        sequence = self.caches.fork()
        own = self.prompts[prompt][len(self.shared) :]
        [logits] = self.model.forward([own], self.caches, [sequence])
        return Answer(prompt, sequence, int(logits.argmax()), self.limit)

    def _say(self, answer: Answer, running: list[Answer]) -> Iterator[tuple[int, int | None]]:
        """Yield the newest token of an answer, which leaves if it ends."""
        ends = answer.token == self.model.config.end
        if not ends:
            answer.left -= 1
            yield answer.prompt, answer.token
        if ends or not answer.left:
            running.remove(answer)
            self.caches.free(answer.sequence)
            yield answer.prompt, None
