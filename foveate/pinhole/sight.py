"""The encoder's last blocks learn to tell what is drawn, before the language model does.

Features of the frozen encoder say little of written words and of how many shapes are alike. Of
drawn images all is known patch by patch, so low-rank deltas on the last blocks and the projector
can learn it without a forward of the language model: a patch of a shape comes to lie near the words
for the shape, and tells where its middle is and how many are like it; a patch of a written word
comes to lie near that word. Photos and easy-VQA images hold encoder and projector where they were.

Most steps show the encoder the patches that something covers and some others, a third of all.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate.pinhole.align import SHARPNESS, Names, by_owner, embedded, owners
from foveate.pinhole.assembly import IMAGE_TOKENS
from foveate.pinhole.bank import normalise
from foveate.pinhole.features import SIDE, picked, stacked
from foveate.pinhole.mix import Row, Writer
from foveate.pinhole.packed import Student
from foveate.tasks.scenes import SIZE, Scene, draw, vocabulary

FIRST = 4  # blocks below stay as they are
SHOWN = 96  # patches of an image in most steps
WHOLE = 0.75  # after this share of the time, all of them
WORDS, SHAPES, HELD = 10, 8, 6  # images in a step
LETTERS = 5  # of the longest word
ALIKE = 9  # at most this many shapes are told from one more
HOLD_WEIGHT, PLACE_WEIGHT, SIZE_WEIGHT = 20.0, 4.0, 1.0


@dataclass(frozen=True)
class Marks:
    """What is known of every patch of drawn images, -1 where nothing is.

    Attributes:
        names: (B, N, 4) words of the shape there, as in ``Names``.
        alike: (B, N, 3) how many shapes have its colour and form, its form, its colour; less one.
        middle: (B, N, 2) x and y of the shape's middle, -1 to 1.
        word: (B, N) number in the vocabulary of the word written there.
    """

    names: Tensor
    alike: Tensor
    middle: Tensor
    word: Tensor

    @classmethod
    def of(cls, scenes: Iterable[Row | Scene]) -> Marks:
        made = [cls._one(scene) for scene in scenes]
        return cls(*(torch.stack(one) for one in zip(*made, strict=True)))

    @staticmethod
    def _one(scene: Row | Scene) -> tuple[Tensor, ...]:
        items, owner = scene.items, owners(scene.items)
        same = [
            [(a.colour == b.colour, a.shape == b.shape) for b in items] for a in items
        ]
        alike = [
            [sum(c and s for c, s in row), sum(s for _, s in row), sum(c for c, _ in row)]
            for row in same
        ]
        counts = torch.tensor(alike, dtype=torch.long).view(-1, 3).clamp(max=ALIKE) - 1
        middle = torch.tensor([[i.x, i.y] for i in items]).view(-1, 2) * 2 / SIZE - 1
        known = {word: n for n, word in enumerate(vocabulary())}
        word = torch.full((SIDE, SIDE), -1)
        for one in scene.written:
            left, top, right, bottom = (round(v * SIDE / SIZE) for v in one.box)
            word[top : max(bottom, top + 1), left : max(right, left + 1)] = known[one.word]
        parts = by_owner(owner, counts), by_owner(owner, middle)
        return Names.of(items), *parts, word.flatten()

    def at(self, chosen: Tensor) -> Marks:
        """Those of the patches ``chosen`` (B, n)."""
        return Marks(*(_gathered(getattr(self, f.name), chosen) for f in fields(self)))

    def shown(self, count: int, generator: torch.Generator) -> Tensor:
        """(B, count) patches, ascending: what is covered or beside it first, then random others."""
        covered = ((self.names[..., 0] >= 0) | (self.word >= 0)).float().view(-1, 1, SIDE, SIDE)
        beside = F.max_pool2d(covered, 3, 1, 1)
        order = (covered + beside).flatten(1) + torch.rand(
            covered.shape[0], SIDE * SIDE, generator=generator
        )
        return order.topk(count).indices.sort(-1).values


def _letter(letter: str) -> int:
    return ord(letter) - ord("a") + 1 if letter.isalpha() else 0


def _gathered(values: Tensor, chosen: Tensor) -> Tensor:
    return picked(values, chosen) if values.ndim == 3 else values.gather(1, chosen)


class Reader(nn.Module):
    """What patches tell, once projected; the heads are for training only.

    Letters are asked for one by one as well, because a word is read sooner when its parts are.
    """

    def __init__(self, writer: Writer, table: Tensor) -> None:
        super().__init__()
        self.names = Names(writer, table)
        words = embedded(vocabulary(), writer, table)
        self._words = F.normalize(words - words.mean(0), dim=-1)
        self._norm = float(table.float().norm(dim=-1).mean())
        self._spelt = torch.tensor([[*map(_letter, word.ljust(LETTERS))] for word in vocabulary()])
        self.alike = nn.Linear(table.shape[1], 3 * ALIKE)
        self.middle = nn.Linear(table.shape[1], 2)
        self.letters = nn.Linear(table.shape[1], 27 * LETTERS)

    def loss(self, projected: Tensor, marks: Marks) -> Tensor:
        """Of the covered among the patches (B, n, D)."""
        shape, word = marks.names[..., 0] >= 0, marks.word >= 0
        near = self.names.near(projected)
        total = SIZE_WEIGHT * (projected.float().norm(dim=-1) / self._norm - 1).square().mean()
        if bool(shape.any()):
            scores = self.alike(near[shape]).view(-1, ALIKE, 3)
            total = total + self.names.loss(near[shape], marks.names[shape])
            total = total + 3 * F.cross_entropy(scores, marks.alike[shape])
            off = self.middle(near[shape]) - marks.middle[shape]
            total = total + PLACE_WEIGHT * off.square().mean()
        if bool(word.any()):
            scores = near[word] @ self._words.T * SHARPNESS
            total = total + F.cross_entropy(scores, marks.word[word])
            letters = self.letters(near[word]).view(-1, 27, LETTERS)
            total = total + 2 * F.cross_entropy(letters, self._spelt[marks.word[word]])
        return total

    @torch.no_grad()
    def told(self, projected: Tensor, marks: Marks) -> dict[str, float]:
        """Share of covered patches told rightly, by what is asked; the distance of middles."""
        shape, word = marks.names[..., 0] >= 0, marks.word >= 0
        near = self.names.near(projected)
        said = self.names.told(near[shape]).eq(marks.names[shape]).float().mean(0)
        count = self.alike(near[shape]).view(-1, ALIKE, 3).argmax(1)
        right = count.eq(marks.alike[shape]).float().mean(0)
        off = (self.middle(near[shape]) - marks.middle[shape]).abs().mean()
        read = (near[word] @ self._words.T).argmax(-1).eq(marks.word[word]).float().mean()
        letters = self.letters(near[word]).view(-1, 27, LETTERS).argmax(1)
        spelt = letters.eq(self._spelt[marks.word[word]]).float().mean()
        names = ("colour", "shape", "top", "left", "both", "shapes", "colours", "off")
        names += ("word", "letters")
        values = [*said.tolist(), *right.tolist(), off.item(), read.item(), spelt.item()]
        return {name: round(value, 3) for name, value in zip(names, values, strict=True)}


class Sight:
    """One run of the encoder's training, by the clock; it goes on where it stopped.

    Args:
        student: its vision deltas and its projector are trained.
        out: ``seen.pt`` and lines of ``log.jsonl`` go here.
        held: images whose tokens are to stay what they are.
        backgrounds: photos to draw on.
    """

    def __init__(
        self,
        student: Student,
        writer: Writer,
        out: Path,
        held: Sequence[Image.Image],
        backgrounds: Sequence[Image.Image],
        *,
        seed: int = 0,
    ) -> None:
        self.student, self.out, self.held = student, out, held
        self.backgrounds, self.seed = backgrounds, seed
        self.reader = Reader(writer, student.get("model.language_model.embed_tokens.weight"))
        self._encoder = [w.detach() for w in student.vision_weights()]
        self._projector = {k: v.detach().clone() for k, v in student.projector.items()}
        self.seconds, self.step = 0.0, 0

    def run(self, minutes: float, check_every: float = 300.0) -> Iterator[str]:
        """Train until the time is spent; yields a line a step."""
        groups = [
            {"params": list(self.student.vision.parameters()), "peak": 3e-4},
            {"params": list(self.student.projector.parameters()), "peak": 4e-4},
            {"params": list(self.reader.parameters()), "peak": 3e-3},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self._resume(optimizer)
        if self.seconds >= minutes * 60:
            return
        begun = time.monotonic() - self.seconds
        checked = self.seconds
        while self.seconds < minutes * 60:
            done = self.seconds / (minutes * 60)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, done / 0.03) * (1 - done) ** 0.7
            loss, moved = self._update(optimizer, SHOWN if done < WHOLE else IMAGE_TOKENS)
            self.step += 1
            self.seconds = time.monotonic() - begun
            if self.seconds - checked > check_every:
                paused, checked = time.monotonic(), self.seconds
                self._check()
                self._save(optimizer)
                begun += time.monotonic() - paused
            rate = self.seconds / self.step
            yield f"step {self.step} loss {loss:.3f} moved {moved:.4f} {rate:.2f} s/step"
        self._check()
        self._save(optimizer)

    def _drawn(self, rng: random.Random, words: int, shapes: int) -> list[Scene]:
        kinds = ["words"] * words + [rng.choice(("where", "count")) for _ in range(shapes)]
        return [draw(kind, rng, self.backgrounds, many=True) for kind in kinds]

    def _update(self, optimizer: torch.optim.Optimizer, count: int) -> tuple[float, float]:
        rng = random.Random(f"{self.seed} see {self.step}")
        draws = torch.Generator().manual_seed(rng.randrange(2**31))
        scenes = self._drawn(rng, WORDS, SHAPES)
        held = [self.held[rng.randrange(len(self.held))] for _ in range(HELD)]
        marks = Marks.of(scenes)
        chosen = torch.cat([marks.shown(count, draws), _some(len(held), count, draws)])
        x = self._below([*(s.image for s in scenes), *held], chosen)
        drawn = len(scenes)
        optimizer.zero_grad()
        encoded = self.student.encode(x, FIRST)
        projected = self.student.project(encoded[:, 1:])
        with torch.no_grad():
            before = self.student.encode(x[drawn:], FIRST, weights=self._encoder)
            wanted = self.student.project(before[:, 1:], self._projector)
        moved = _apart(encoded[drawn:], before) + _apart(projected[drawn:], wanted)
        loss = self.reader.loss(projected[:drawn], marks.at(chosen[:drawn]))
        (loss + HOLD_WEIGHT * moved).backward()
        parts = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step()
        return float(loss.detach()), float(moved.detach())

    @torch.no_grad()
    def _below(self, images: Sequence[Image.Image], chosen: Tensor) -> Tensor:
        """What block ``FIRST`` is given of these patches: (B, 1 + n, D)."""
        x = self.student.embedded(normalise(stacked(images)))
        x = torch.cat([x[:, :1], picked(x[:, 1:], chosen)], 1)
        return self.student.encode(x, 0, FIRST, self._encoder)

    def _check(self) -> None:
        scenes = self._drawn(random.Random(f"{self.seed} see check"), 48, 48)
        every = torch.arange(IMAGE_TOKENS).expand(len(scenes), -1)
        shown = [s.image for s in scenes]
        with torch.no_grad():
            parts = [
                self.student.encode(self._below(shown[i : i + 16], every[i : i + 16]), FIRST)
                for i in range(0, len(shown), 16)
            ]
            told = self.reader.told(self.student.project(torch.cat(parts)[:, 1:]), Marks.of(scenes))
        entry = {"seeing": round(self.seconds), "step": self.step, "scores": told}
        print(json.dumps(entry), flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "student": {k: v for k, v in self.student.named_parameters() if v.requires_grad},
            "reader": self.reader.state_dict(),
            "optimizer": optimizer.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
        }
        torch.save(state, self.out / "seen.part")
        (self.out / "seen.part").replace(self.out / "seen.pt")

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        file = self.out / "seen.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        self.student.load_state_dict(state["student"], strict=False)
        self.reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.step = state["seconds"], state["step"]


def _some(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """(B, count) random patches, ascending."""
    order = torch.rand(batch, IMAGE_TOKENS, generator=generator)
    return order.topk(count).indices.sort(-1).values


def _apart(now: Tensor, before: Tensor) -> Tensor:
    """Mean square of what changed over that of what was."""
    now, before = now.float(), before.float()
    return (now - before).square().mean() / (before - before.mean((0, 1))).square().mean()
