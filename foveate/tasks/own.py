"""A task of one's own: a JSONL file, one question about one image or video a line.

    {"image": "photos/1.jpg", "question": "What colour is the car?", "answer": "red"}
    {"image": "2.png", "question": "…", "answer": ["two", "2"]}
    {"image": "3.mp4", "question": "…", "answer": "B", "choices": ["A", "B", "C"]}

Paths are relative to the file. Of several answers any will do; choices go by likelihood. Of a video
8 frames are taken, or 4 as the task ``mine.jsonl:frames=4``.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foveate.loading import Clip, opened
from foveate.tasks.example import Example, matches

FRAMES = 8  # of a video


@dataclass(frozen=True)
class Own:
    """The questions of ``file``, shuffled by ``seed``; every line is checked before the first."""

    file: Path
    seed: int = 0
    limit: int | None = None
    frames: int | None = None

    @property
    def name(self) -> str:
        return self.file.stem + (f":frames={self.frames}" if self.frames else "")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        try:
            lines = self.file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file} is not UTF-8 text ({error}); save it as that.") from None
        rows = [
            _row(line, f"{self.file}, line {n}", self.file.parent)
            for n, line in enumerate(lines, 1)
            if line.strip()
        ]
        random.Random(self.seed).shuffle(rows)
        return rows[: self.limit]

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Example:
        row = self.rows[index]
        first, *more = row["answers"]
        shown = opened(self.file.parent / row["image"], self.frames or FRAMES)
        clip = shown if isinstance(shown, Clip) else None
        image = shown.frames[0] if isinstance(shown, Clip) else shown
        choices = tuple(row["choices"])
        return Example(image, row["question"], first, choices, also=tuple(more), clip=clip)

    def score(self, example: Example, answer: str) -> float:
        right = (example.answer, *example.also)
        if example.choices:
            return float(answer in right)
        return max(matches(said, answer) for said in right)


def _row(line: str, where: str, folder: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        choices = list(row.get("choices", ()))
        texts = (row["image"], row["question"], *answers, *choices)
        if not answers or not all(isinstance(t, str) and t.strip() for t in texts):
            raise TypeError
        if choices and not set(answers) <= set(choices):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'{where} is not of the form {{"image": "a.jpg", "question": "…", "answer": "…"}} '
            f'(optional "choices": [...], of which every answer is one): {line[:80]}'
        ) from None
    if not (folder / row["image"]).is_file():
        raise ValueError(f"{where} names the image {row['image']}, which is not in {folder}.")
    return {"answers": answers, "choices": choices} | {k: row[k] for k in ("image", "question")}
