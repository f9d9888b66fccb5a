"""Questions about noise, and a small model that answers them: for what asks or searches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from foveate.tasks import Example
from foveate.tasks.example import matches

WORDS = [chr(97 + i) + chr(97 + j) for i in range(8) for j in range(10)]


@dataclass
class Listed:
    """A task that is a list."""

    examples: list[Example]
    name: str = "listed"
    drawn: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        self.drawn.append(index)
        return self.examples[index]

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)


def noise(seed: int, width: int = 60) -> Image.Image:
    """Coarse noise, so that pictures really differ."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((width, 44))


def asked(count: int = 7) -> Listed:
    """Questions of different lengths about different pictures."""
    some = [Example(noise(i), " ".join(WORDS[i : 2 * i + 2]), WORDS[i]) for i in range(count)]
    return Listed(some)


def chosen(count: int = 7) -> Listed:
    """Choices, every other time of different lengths."""
    made = []
    for i in range(count):
        spans = [(3 * i + k, 3 * i + k + 2 + (i % 2) * k) for k in range(3)]
        choices = tuple(" ".join(WORDS[start:stop]) for start, stop in spans)
        made.append(Example(noise(i), " ".join(WORDS[i : i + 2 + i % 3]), choices[1], choices))
    return Listed(made)
