"""``easyvqa``: coloured shapes and 13 answers, from the package easy-vqa (MIT).

https://github.com/vzhou842/easy-VQA
"""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from foveate.tasks.example import Example, matches


def folder(data: str | Path | None = None) -> Path:
    """The package's data folder, found without importing the package."""
    spec = None if data else importlib.util.find_spec("easy_vqa")
    if data:
        return Path(data)
    if spec is None or spec.origin is None:
        raise ImportError("the task easyvqa needs the package easy-vqa: pip install easy-vqa==1.0")
    return Path(spec.origin).parent / "data"


def sentence(question: str) -> str:
    """The question as a user would type it: "What color is the box?"."""
    return question[:1].upper() + question[1:]


@dataclass(frozen=True)
class EasyVQA:
    """The questions of one split; any but ``train`` is the package's test split."""

    data: str | Path | None = None
    split: str = "validation"
    seed: int = 0
    limit: int | None = None
    name: str = "easyvqa"

    @cached_property
    def _folder(self) -> Path:
        return folder(self.data) / ("train" if self.split == "train" else "test")

    @cached_property
    def rows(self) -> list[tuple[str, str, int]]:
        """(question, answer, image number), shuffled."""
        rows = [tuple(r) for r in json.loads((self._folder / "questions.json").read_text())]
        random.Random(self.seed).shuffle(rows)
        return rows[: self.limit]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, number: int) -> Image.Image:
        with Image.open(self._folder / "images" / f"{number}.png") as image:
            return image.convert("RGB")

    def example(self, index: int) -> Example:
        text, answer, number = self.rows[index]
        return Example(self.image(number), sentence(text), answer)

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)
