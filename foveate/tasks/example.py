"""What every task deals in: one example, and how a short answer is compared."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from foveate.loading import Clip


@dataclass(frozen=True)
class Example:
    """One question about one image, or about a clip, of which ``image`` is then the first frame.

    ``choices`` empty: the answer is generated and compared. Otherwise the model's likelihood picks
    among ``choices``, of which ``answer`` is one. ``meta`` says which kind of example it is, and
    ``also`` holds further answers that are right. A generated answer is cut after ``new_tokens``.
    """

    image: Image.Image
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    meta: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    new_tokens: int = 12
    clip: Clip | None = None

    @property
    def shown(self) -> Image.Image | Clip:
        """What the question is about."""
        return self.clip or self.image


class Task(Protocol):
    """A deterministic list of examples and the rule that scores an answer."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def example(self, index: int) -> Example: ...

    def score(self, example: Example, answer: str) -> float: ...


def matches(expected: str, answer: str) -> float:
    """1.0 when the answer's first line says the expected short answer and nothing else."""
    return float(normal(answer) == normal(expected))


def normal(answer: str) -> str:
    """Lower case, first line, no punctuation (unless there is nothing else), single spaces."""
    line = answer.strip().lower().split("\n", 1)[0]
    return " ".join(re.findall(r"\w+", line)) or line.strip()
