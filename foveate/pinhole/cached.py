"""Training pinhole where there is no GPU: the encoder is run once, few vision tokens a row.

0. ``see``, if asked for: the encoder's last blocks learn words and shapes (``seeing``). Then it
   is frozen.
1. Every photo is encoded once; its features stay in a file that an interrupted run goes on with.
2. ``align``: the projector alone learns to send patches near the word embeddings of what the
   captions say, and of what drawn shapes are and where, without the language model (thousands of
   photos a second).
3. ``tune``: the language model's low-rank deltas and the projector learn to answer. A row holds one
   random patch of each 4 × 4, later 2 × 2 cell of the image, at its own position, so the text
   stands where it will stand in use and pinhole learns to live with missing tokens from the start;
   at the end every patch is shown. Photos and easy-VQA come from the file, scenes are drawn anew,
   and patches that something covers are shown first.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate.pinhole.align import Covered, Names, Vocabulary, align, covered_first
from foveate.pinhole.assembly import IMAGE_TOKENS
from foveate.pinhole.bank import normalise, rank_loss, resized
from foveate.pinhole.features import Features, Lazy, cells, picked
from foveate.pinhole.mix import ClipRows, EasyRows, PhotoRows, Row, Segment, Writer, scene_row
from foveate.pinhole.packed import Rows, Student
from foveate.pinhole.runs import save, share
from foveate.pinhole.seeing import Reading, Seeing
from foveate.tasks import video
from foveate.tasks.example import Example
from foveate.tasks.photos import Photos
from foveate.tasks.scenes import Scene
from foveate.tasks.scenes import draw as draw_scene

Array = NDArray[Any]
TEXT = 208
FRAMES = (3, 4, 6)
SHOWN = {4: 40, 2: 96, 1: IMAGE_TOKENS}  # patches of a drawn scene, by the stride of the others
SCENES = 480  # to align with
EASY = 0.15  # the share of easy-VQA among rows about stored images
RANK_WEIGHT = 0.5
NAME_WEIGHT = 0.5


class Naming(Protocol):
    """What patches of a drawn ``scene`` should be near: ``Names`` of shapes or ``Reading``."""

    scene: str

    def all(self, scenes: Iterable[Row | Scene]) -> Tensor: ...

    def loss(self, student: Student, covered: Covered) -> Tensor: ...


class Lessons:
    """Batches of rows: photos and easy-VQA images by cached features, scenes drawn anew each time.

    Cached features hold the photos first, then ``easy_count`` easy-VQA images; clips are of both.
    """

    def __init__(
        self,
        photos: PhotoRows,
        easy: EasyRows,
        easy_count: int,
        writer: Writer,
        backgrounds: Sequence[Image.Image] = (),
        clips: Sequence[ClipRows] = (),
    ) -> None:
        self.photos, self.easy, self.easy_count, self.writer = photos, easy, easy_count, writer
        self.backgrounds, self.clips = backgrounds, clips

    def stored(
        self, features: Features, rng: random.Random, draw: torch.Generator, size: int, stride: int
    ) -> tuple[Rows, Tensor]:
        """``size`` rows about stored images, and which of them (B,) begin with ranked captions."""
        made = [self._one(rng) for _ in range(size)]
        easy = len(self.photos.captions)
        index = [r.index + easy * (r.source == "easy") for r in made]
        rows = self.rows(features.take(index), cells(size, stride, draw), self._laid(made))
        return rows, torch.tensor([bool(r.ranked) for r in made])

    def drawn(
        self,
        student: Student,
        naming: Naming,
        rng: random.Random,
        draw: torch.Generator,
        size: int,
        count: int,
    ) -> tuple[Rows, Covered]:
        """``size`` rows about scenes that were never shown before, ``count`` patches of each."""
        made = [scene_row(naming.scene, rng, self.backgrounds) for _ in range(size)]
        pixels = np.stack([r.pixels for r in made if r.pixels is not None])
        with torch.no_grad():
            features = student.features(normalise(resized(torch.from_numpy(pixels)))).float()
        words = naming.all(made)
        rows = self.rows(features, covered_first(words, count, draw), self._laid(made))
        return rows, Covered.by(words, features)

    def filmed(
        self, features: Features, rng: random.Random, draw: torch.Generator, size: int, stride: int
    ) -> Rows:
        """``size`` rows about clips of stored images, all of as many frames."""
        frames = rng.choice(FRAMES)
        made = [rng.choice(self.clips).row(rng, frames) for _ in range(size)]
        shown = features.take([i for row in made for i in row.frames])
        chosen = cells(size * frames, stride, draw).view(size, frames, -1)
        chosen = chosen + torch.arange(frames)[:, None] * IMAGE_TOKENS
        text = self._laid(made, frames)
        return self.rows(shown.view(size, -1, features.width), chosen.flatten(1), text, frames)

    def _laid(self, made: Sequence[Row], images: int = 1) -> dict[str, Tensor]:
        """The arrays of ``Writer.lay``, (B, S), with no more padding than the longest row needs."""
        laid = [self.writer.lay(one.segments, TEXT, images=images) for one in made]
        length = max(int((one["segment"] >= 0).sum()) for one in laid)
        return {k: torch.from_numpy(np.stack([one[k][:length] for one in laid])) for k in laid[0]}

    def rows(
        self, features: Tensor, chosen: Tensor, arrays: dict[str, Tensor], images: int = 1
    ) -> Rows:
        """Rows over ``features`` (B, images · tokens, D) that show the patches ``chosen`` (B, n).

        Every row shows as many of each image, in ascending order.
        """
        ids, at = map(torch.tensor, self.writer.prefix(images))
        is_text = torch.ones(len(ids), dtype=torch.bool).index_fill(0, at, False)
        text = is_text.nonzero()[:, 0].expand(len(chosen), -1)
        places = torch.cat([text, at[chosen]], dim=1).sort(-1).values
        image = (~is_text[places[0]]).nonzero()[:, 0]
        return Rows(picked(features, chosen), ids[places[0]], image, **arrays, places=places)

    def _one(self, rng: random.Random) -> Row:
        easy = rng.random() < EASY
        return self.easy.row(rng, self.easy_count) if easy else self.photos.row(rng)


def right(
    student: Student,
    lessons: Lessons,
    features: Features,
    laid: Sequence[dict[str, Array]],
    first: int,
) -> list[bool]:
    """Whether each answer is what greedy decoding would say, all tokens shown.

    Example i has the image ``first + i`` of ``features``.
    """
    hits: list[bool] = []
    every = torch.arange(IMAGE_TOKENS)[None]
    for start in range(0, len(laid), 16):
        part = laid[start : start + 16]
        arrays = {k: torch.from_numpy(np.stack([one[k] for one in part])) for k in part[0]}
        shown = features.take(range(first + start, first + start + len(part)))
        rows = lessons.rows(shown, every.expand(len(part), -1), arrays)
        with torch.no_grad():
            _, best, asked = student(rows)
        wrong = torch.zeros(len(part))
        wrong.index_add_(0, asked // rows.text.shape[1], (~best).float())
        hits += (wrong == 0).tolist()
    return hits


class CachedRun:
    """One run of the steps; every step leaves a file, and ``run`` goes on where it stopped.

    Args:
        student: with deltas apart (``merged=False``).
        out: features, checkpoint, ``log.jsonl`` and ``weights.safetensors`` go here.
        photos: the training photos, the first ``counts[0]`` of which are used.
        checks: ``(name, examples)`` of validation tasks, a few hundred in all.
        counts: photos and easy-VQA images to encode.
        rows: in every step of tuning, about stored images, drawn shapes, clips and drawn words.
    """

    def __init__(
        self,
        student: Student,
        out: Path,
        photos: Photos,
        checks: dict[str, list[Example]],
        counts: tuple[int, int],
        *,
        rows: tuple[int, int, int, int],
        seed: int = 0,
    ) -> None:
        self.student, self.out, self.seed = student, out, seed
        self.stored, self.shapes, self.clips, self.words = rows
        self.writer = Writer(out / "processor" / "tokenizer.json")
        some = photos.first(counts[0])
        self.easy = EasyRows()
        drawn = self.shapes or self.words
        grounds = _grounds(some) if drawn else []
        lessons = PhotoRows(some), self.easy, counts[1], self.writer, grounds
        self.lessons = Lessons(*lessons, _clips(some, counts) if self.clips else ())
        self._photos, self._checks, self._counts = some, checks, counts
        table = student.get("model.language_model.embed_tokens.weight")
        self.names, self.reading = Names(self.writer, table), Reading(self.writer, table)
        self.features = Features(out / "train.features", sum(counts))
        self.checked = Features(out / "check.features", sum(map(len, checks.values())))
        self.scenes = Features(out / "scenes.features", SCENES if self.shapes else 0)
        self.seconds, self.step = 0.0, 0

    def see(self, minutes: float) -> Iterator[tuple[float, str]]:
        """Step 0, unless it was done: yields seconds and a line a step."""
        grounds = self.lessons.backgrounds or _grounds(self._photos)
        named = self.names, self.reading
        seeing = Seeing(self.student, self.out, self._photos, grounds, *named, seed=self.seed)
        for line in seeing.run(minutes):
            yield seeing.seconds, line

    def encode(self) -> Iterator[int]:
        """Step 1: yields images encoded."""
        photos, easy = self._counts
        images = Lazy(
            lambda i: (
                self._photos.image(i)
                if i < photos
                else self.easy.task.image(self.easy.numbers[i - photos])
            ),
            photos + easy,
        )
        yield from self.features.fill(images, self.student)
        shown = [e.image for examples in self._checks.values() for e in examples]
        yield from self.checked.fill(shown, self.student)

    def align(self, steps: int) -> Iterator[tuple[int, float]]:
        """Step 2, unless its result is there."""
        file = self.out / "aligned.pt"
        if file.is_file():
            self.student.projector.load_state_dict(torch.load(file, weights_only=True))
            return
        texts = [" ".join(c) for _, c in self._photos.rows]
        texts += [self._said(n) for n in self.easy.numbers[: self._counts[1]]]
        table = self.student.get("model.language_model.embed_tokens.weight")
        words = Vocabulary(texts, self.writer, table)
        scenes = (self.names, self._covered()) if self.shapes else None
        yield from align(
            self.student, self.features, words, steps=steps, scenes=scenes, seed=self.seed
        )
        torch.save(self.student.projector.state_dict(), file)

    def _scene(self, number: int) -> Scene:
        """A scene to align with; its shapes follow from the seed and its number."""
        rng = random.Random(f"{self.seed} align {number}")
        return draw_scene("count", rng, self.lessons.backgrounds, many=True)

    def _covered(self) -> Covered:
        every = range(self.scenes.count)
        images = Lazy(lambda i: self._scene(i).image, len(every))
        for _ in self.scenes.fill(images, self.student):  # here: only alignment needs them
            pass
        return Covered.by(Names.all(map(self._scene, every)), self.scenes.take(every))

    def _said(self, number: int) -> str:
        return " ".join(
            s.answer for s in self.easy.by_image[number] if s.answer not in ("yes", "no")
        )

    def tune(
        self, minutes: float, check_every: float, lr: float, *, new: bool = True
    ) -> Iterator[str]:
        """Step 3, by the clock: a checkpoint every five minutes, checks as often as told (s).

        ``lr`` is the peak of the deltas' rate; the projector's is a quarter of it. A ``new``
        pinhole is shown few patches for longer than one that goes on from trained weights.
        """
        parts = list(self.student.projector.parameters())
        deltas = list(self.student.language.parameters())
        optimizer = torch.optim.AdamW(
            [{"params": parts}, {"params": deltas}],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        self._resume(optimizer)
        begun = time.monotonic() - self.seconds
        saved = checked = self.seconds
        while self.seconds < minutes * 60:
            done = self.seconds / (minutes * 60)
            for group, peak in zip(optimizer.param_groups, (lr / 4, lr), strict=True):
                group["lr"] = peak * share(done)
            losses = self._update(optimizer, [*parts, *deltas], _stride(done, new=new))
            self.step += 1
            self.seconds = time.monotonic() - begun
            paused = time.monotonic()
            if self.seconds - checked > check_every:
                checked = self.seconds
                self._check()
            if self.seconds - saved > 300:
                saved = self.seconds
                self._save(optimizer)
            begun += time.monotonic() - paused  # the clock counts training only
            said = " ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
            rate = self.seconds / self.step
            yield f"step {self.step} loss {sum(losses.values()):.3f} {rate:.1f} s/step {said}"
        self._check()
        self._save(optimizer)

    def _update(
        self, optimizer: torch.optim.Optimizer, parts: list[Any], stride: int
    ) -> dict[str, float]:
        rng = random.Random(f"{self.seed} {self.step}")
        draw = torch.Generator().manual_seed(rng.randrange(2**31))
        optimizer.zero_grad()
        rows, ranked = self.lessons.stored(self.features, rng, draw, self.stored, stride)
        losses = {"stored": self._learn(rows, ranked)}
        taught: list[tuple[Naming, int]] = [(self.names, self.shapes), (self.reading, self.words)]
        for naming, size in taught:
            if size:
                shown = rng, draw, size, SHOWN[stride]
                rows, covered = self.lessons.drawn(self.student, naming, *shown)
                losses[naming.scene] = self._learn(rows)
                named = NAME_WEIGHT * naming.loss(self.student, covered)
                (self._part(rows) * named).backward()
        if self.clips:
            few = min(2 * stride, 4)
            filmed = self.lessons.filmed(self.features, rng, draw, self.clips, few)
            losses["clips"] = self._learn(filmed)
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()
        return losses

    def _learn(self, rows: Rows, ranked: Tensor | None = None) -> float:
        """Add the gradients of these rows; their loss.

        Of ranked rows the first caption has to be likelier than the others, those of other photos.
        A loss is a mean over its rows, and is weighted by their part of the step: else one row of
        words would count as much as eleven of shapes.
        """
        logp, _, asked = self.student(rows)
        weight = rows.weight.flatten()[asked]
        loss = -(logp * weight).sum() / weight.sum()
        if ranked is not None:
            loss = loss + RANK_WEIGHT * rank_loss(rows, logp, asked, ranked)
        (self._part(rows) * loss).backward()
        return float(loss.detach())

    def _part(self, rows: Rows) -> float:
        """What part these are of all rows of a step."""
        return len(rows.text) / (self.stored + self.shapes + self.clips + self.words)

    def _check(self) -> None:
        scores, first = {}, 0
        for name, examples in self._checks.items():
            laid = [self.writer.lay([Segment(e.question, e.answer)], 48) for e in examples]
            hits = right(self.student, self.lessons, self.checked, laid, first)
            scores[name] = round(sum(hits) / len(hits), 4)
            first += len(examples)
        entry = {"seconds": round(self.seconds), "step": self.step, "scores": scores}
        print(json.dumps(entry), flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "student": {k: v for k, v in self.student.named_parameters() if v.requires_grad},
            "optimizer": optimizer.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
        }
        save(state, self.out / "tuned.pt")

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        file = self.out / "tuned.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        self.student.load_state_dict(state["student"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.step = state["seconds"], state["step"]


def _stride(done: float, *, new: bool) -> int:
    """Few patches while much is new, all of them at the end."""
    if new:
        return 4 if done < 0.2 else 2 if done < 0.8 else 1
    return 2 if done < 0.15 else 1


def _grounds(photos: Photos) -> list[Image.Image]:
    """Every tenth photo, to draw on."""
    return [photos.image(i) for i in range(0, len(photos), 10)]


def _clips(some: Photos, counts: tuple[int, int]) -> list[ClipRows]:
    """Clips of the stored photos, and of the stored easy-VQA images."""
    shown = video.photo_gallery(some), video.shape_gallery("train")
    return [ClipRows(shown[0], 0, counts[0]), ClipRows(shown[1], *counts)]
