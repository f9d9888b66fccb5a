"""Tuning pinhole with a recipe attached, PruMerge's optional step: what it can learn of few tokens.

    python -m foveate.pinhole.train --recipe prumerge:keep=0.125 --minutes 12 --out runs/tuned

The released pinhole answers validation questions, gets low-rank deltas (peft) in its language model
and learns them and its projector on training questions while the recipe drops its tokens, then
answers again. Every step leaves a file; the same command goes on where it was stopped. Nothing here
is particular to pinhole but the questions: docs/tuning.md has the same for any model.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import foveate
from foveate.bench import DENSE
from foveate.evaluate import Case, evaluate
from foveate.journal import Journal
from foveate.loading import missing
from foveate.pinhole.mix import END, TURN, EasyRows, PhotoRows, Segment, Writer
from foveate.pinhole.runs import save
from foveate.recipe import Recipe
from foveate.statistics import difference, interval, mcnemar
from foveate.tasks import Task
from foveate.tasks.photos import Photos

LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
PROJECTOR = "multi_modal_projector"
RANK = 16
EASY_SHARE = 0.3
PER_IMAGE = 3
SAVE_EVERY = 120.0  # seconds
_IGNORED = -100

Scores = Mapping[tuple[str, str], list[float]]  # of each (task, recipe), example by example


@dataclass(frozen=True)
class Lesson:
    """An image and what is asked about it."""

    image: Image.Image
    asked: tuple[Segment, ...]


class Lessons:
    """Questions about training photos and easy-VQA's training images, each image drawn anew."""

    def __init__(self, photos: Photos, easy: EasyRows) -> None:
        self._photos, self._rows, self._easy = photos, PhotoRows(photos), easy

    def draw(self, rng: random.Random, rows: int) -> list[Lesson]:
        """Lessons with ``rows`` questions in all."""
        found: list[Lesson] = []
        while (left := rows - sum(len(lesson.asked) for lesson in found)) > 0:
            lesson = self._one(rng, min(left, PER_IMAGE))
            found += [lesson] if lesson.asked else []
        return found

    def _one(self, rng: random.Random, most: int) -> Lesson:
        if rng.random() < EASY_SHARE:
            number = rng.choice(self._easy.numbers)
            asked = rng.sample(self._easy.by_image[number], len(self._easy.by_image[number]))
            return Lesson(self._easy.task.image(number), tuple(asked[:most]))
        i = rng.randrange(len(self._photos))
        asked = self._rows.yes_no(i, rng)
        asked = [one for one in asked if rng.random() < one.weight]  # the model's loss knows none
        return Lesson(self._photos.image(i), tuple(asked[:most]))


def batch(lessons: Sequence[Lesson], writer: Writer) -> dict[str, Any]:
    """A row for every question, padded on the left: ids and mask (B, L), labels of the last n.

    ``logits_to_keep`` is n: the head need not look at rows that nothing is learnt from.
    """
    prefix, _ = writer.prefix()
    segments = [segment for lesson in lessons for segment in lesson.asked]
    said = [writer.ids(segment.answer + END) for segment in segments]
    whole = [
        (*prefix, *writer.ids(segment.question + TURN), *answer)
        for segment, answer in zip(segments, said, strict=True)
    ]
    keep = 1 + max(map(len, said))
    return {
        "input_ids": _flush(whole, max(map(len, whole)), 0),
        "attention_mask": _flush([[1] * len(row) for row in whole], max(map(len, whole)), 0),
        "labels": _flush(said, keep, _IGNORED),
        "logits_to_keep": keep,
    }


def _flush(rows: Sequence[Sequence[int]], width: int, filler: int) -> Tensor:
    """Rows flush right, (B, width)."""
    return torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows])


class Tuning:
    """One run. It goes on from ``out/tuning.pt``, if that is there.

    Args:
        model: pinhole, without a recipe attached; it gets the deltas.
        pixels: images to ``pixel_values`` (N, 3, H, W).
        out: the checkpoint and ``log.jsonl`` go here.
    """

    def __init__(
        self,
        model: Any,
        pixels: Callable[[list[Image.Image]], Tensor],
        writer: Writer,
        lessons: Lessons,
        recipe: Recipe,
        out: Path,
        *,
        lr: float,
        rows: int,
        seed: int = 0,
    ) -> None:
        self._model, self._pixels, self._writer, self._lessons = model, pixels, writer, lessons
        self._recipe, self._out, self._lr, self._rows, self._seed = recipe, out, lr, rows, seed
        torch.manual_seed(seed)
        self.tuned = with_deltas(model)
        self._learnt = {n: p for n, p in self.tuned.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._learnt.values(), lr=0.0, weight_decay=0.0)
        self.seconds, self.step = 0.0, 0
        self._resume()

    def run(self, minutes: float, max_steps: int | None = None) -> Iterator[str]:
        """Train for ``minutes``, or ``max_steps`` if that is sooner; yields a line each step.

        The rate falls with whichever is nearer its end.
        """
        self.tuned.train()
        saved = self.seconds
        with foveate.reduced(self.tuned, self._recipe):
            while self.seconds < minutes * 60 and self.step != max_steps:
                begun = time.monotonic()
                done = max(self.seconds / (minutes * 60), self.step / (max_steps or math.inf))
                for group in self._optimizer.param_groups:
                    group["lr"] = self._lr * min(1.0, (self.step + 1) / 5) * (1 - done) ** 0.7
                loss = self._update()
                self.step += 1
                self.seconds += time.monotonic() - begun
                self._log({"step": self.step, "seconds": round(self.seconds), "loss": loss})
                if self.seconds - saved > SAVE_EVERY:
                    saved = self.seconds
                    self._save()
                yield f"step {self.step} loss {loss:.3f}"
        self.tuned.eval()
        self._save()

    def _update(self) -> float:
        rng = random.Random(f"{self._seed} {self.step}")
        lessons = self._lessons.draw(rng, self._rows)
        loss = self._loss(lessons)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learnt.values(), 1.0)
        self._optimizer.step()
        return float(loss.detach())

    def _loss(self, lessons: Sequence[Lesson]) -> Tensor:
        """Every image is encoded and reduced once, whatever number of rows ask about it."""
        place = self._model.device
        made = self._model.get_image_features(
            pixel_values=self._pixels([lesson.image for lesson in lessons]).to(place)
        )
        features = zip(made.pooler_output, lessons, strict=True)
        made.pooler_output = [x for x, lesson in features for _ in lesson.asked]
        given = batch(lessons, self._writer)
        inputs = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in given.items()}
        inputs |= {"mm_encoder_outputs": {"image": made}, "use_cache": False}
        loss: Tensor = self.tuned(**inputs).loss
        return loss

    def _log(self, entry: Mapping[str, Any]) -> None:
        with (self._out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        state = {
            "learnt": {n: p.detach() for n, p in self._learnt.items()},
            "optimizer": self._optimizer.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
        }
        save(state, self._out / "tuning.pt")

    def _resume(self) -> None:
        file = self._out / "tuning.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True, map_location=self._model.device)
        self.tuned.load_state_dict(state["learnt"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.step = state["seconds"], state["step"]


def require_peft() -> None:
    """Complain about an absent extra before anything long runs."""
    if importlib.util.find_spec("peft") is None:
        raise missing("peft", "tune")


def with_deltas(model: Any) -> Any:
    """``model`` wrapped by peft: deltas in the language model, the projector trained whole."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, modules_to_save=[PROJECTOR]
    )
    return get_peft_model(model, config)


def answered(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    recipes: Mapping[str, Recipe],
    journal: Journal,
    advance: Callable[[str, int], object],
) -> Scores:
    """What the untouched model and each recipe score; ``journal`` has what was answered before."""
    evaluate(model, processor, tasks, recipes, journal=journal, advance=advance)
    cases = [Case(DENSE), *(Case(name, recipe) for name, recipe in recipes.items())]
    return {
        (task.name, case.name): [journal.of(task.name)[case.key][i].score for i in range(len(task))]
        for task in tasks
        for case in cases
    }


def comparison(before: Scores, after: Scores) -> list[dict[str, Any]]:
    """A row per task and recipe: both scores with 95 % intervals, and what the change is worth."""
    rows = []
    for (task, name), old in before.items():
        new = after[task, name]
        worse, better = difference(new, old)
        rows.append(
            {
                "task": task,
                "recipe": name,
                "n": len(old),
                "before": sum(old) / len(old),
                "before_interval": interval(old),
                "after": sum(new) / len(new),
                "after_interval": interval(new),
                "difference_interval": (worse, better),
                "mcnemar_p": mcnemar(new, old),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`comparison` in markdown."""
    lines = ["| task | recipe | n | before | after | change | p |", "|---|---|--:|---|---|---|--:|"]
    for row in rows:
        before, after = (
            f"{row[k]:.1%} ({low:.1%} – {high:.1%})"
            for k in ("before", "after")
            for low, high in (row[f"{k}_interval"],)
        )
        low, high = (100 * bound for bound in row["difference_interval"])
        change = f"{100 * (row['after'] - row['before']):+.1f} ({low:+.1f} – {high:+.1f})"
        lines.append(
            f"| {row['task']} | `{row['recipe']}` | {row['n']} | {before} | {after} | {change} "
            f"| {row['mcnemar_p']:.3f} |"
        )
    return "\n".join(lines)
