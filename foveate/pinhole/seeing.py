"""The encoder learns to tell drawn words and shapes: its last blocks and the projector name them.

Of a drawn word every patch under it shall be near the word's embedding, and of one block's output a
linear head shall tell the letter; of a shape every patch shall be near its names (``Names``). All
else keeps the features and the projection that it has, so what the language model knows stays true.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate.pinhole.align import SHARPNESS, Covered, Names, embedded
from foveate.pinhole.bank import normalise, resized
from foveate.pinhole.features import SIDE, stacked
from foveate.pinhole.mix import Row, Writer
from foveate.pinhole.packed import Student
from foveate.pinhole.runs import save, share
from foveate.tasks.photos import Photos
from foveate.tasks.scenes import SIZE, Scene, Written, draw, page, vocabulary

FIRST, SPELLED = 4, 8  # the first block that learns, and the one after which letters are told
LETTERS = 26
PAGES, WORDS, SHAPES, PHOTOS = 7, 6, 15, 4  # images a step
KEEP = 3.0
LR = 1e-3


class Reading:
    """What a patch of a drawn word should be near: the word."""

    scene = "words"

    def __init__(self, writer: Writer, table: Tensor) -> None:
        self._mean = table.float().mean(0)
        words = embedded(vocabulary(), writer, table)
        self._words = F.normalize(words - words.mean(0), dim=-1)
        self._index = {word: i for i, word in enumerate(vocabulary())}

    def of(self, words: Iterable[Written]) -> Tensor:
        """(tokens, 2): the word over a patch and its letter there, -1 for none."""
        labels = torch.full((SIDE, SIDE, 2), -1)
        middle = ((np.arange(SIDE) + 0.5) * SIZE / SIDE).astype(int)
        for one in words:
            place = torch.from_numpy(np.asarray(one.letters)[np.ix_(middle, middle)].astype(int))
            letters = torch.tensor([-1, *(ord(c) - ord("a") for c in one.word)])
            labels[place > 0, 0] = self._index[one.word]
            labels[place > 0, 1] = letters[place[place > 0]]
        return labels.flatten(0, 1)

    def all(self, scenes: Iterable[Row | Scene]) -> Tensor:
        """``of`` every scene: (B, tokens, 2)."""
        return torch.stack([self.of(scene.words) for scene in scenes])

    def scores(self, patches: Tensor) -> Tensor:
        """How near projected patches (N, D) are to each word: (N, words)."""
        return F.normalize(patches.float() - self._mean, dim=-1) @ self._words.T * SHARPNESS

    def loss(self, student: Student, covered: Covered) -> Tensor:
        """Cross-entropy over the words, of these patches as projected."""
        patches = student.project(covered.features.to(student.dtype))
        return F.cross_entropy(self.scores(patches), covered.words[:, 0])


class Seeing:
    """One run of it; leaves a checkpoint in ``out`` and goes on from there.

    Args:
        student: learns; what it makes of a picture as given is what it is held to.
        photos: pictures to hold still.
        backgrounds: what stands behind the words and shapes.
    """

    def __init__(
        self,
        student: Student,
        out: Path,
        photos: Photos,
        backgrounds: Sequence[Image.Image],
        names: Names,
        reading: Reading,
        *,
        seed: int = 0,
    ) -> None:
        self.student, self.seed, self._photos = student, seed, photos
        self._grounds, self.names, self.reading = backgrounds, names, reading
        self._file = out / "encoder.pt"
        self._before = copy.deepcopy(student.projector).requires_grad_(False)
        with torch.no_grad():
            self._given = student.vision_weights()
        self._spell = nn.Linear(student.get("positions").shape[-1], LETTERS)
        for parameter in self._spell.parameters():
            nn.init.zeros_(parameter)
        self._learning = [
            *student.vision.parameters(),
            *student.projector.parameters(),
            *self._spell.parameters(),
        ]
        self._optimizer = torch.optim.AdamW(
            self._learning, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.seconds, self.step = 0.0, 0

    def run(self, minutes: float, lr: float = LR) -> Iterator[str]:
        """By the clock; yields a line a step, and saves every two minutes."""
        self._resume()
        begun = time.monotonic() - self.seconds
        saved = self.seconds
        while self.seconds < minutes * 60:
            done = self.seconds / (minutes * 60)
            self._optimizer.param_groups[0]["lr"] = lr * share(done)
            said = self._update()
            self.step += 1
            self.seconds = time.monotonic() - begun
            if self.seconds - saved > 120:
                saved = self.seconds
                self._save()
            yield f"encoder step {self.step} {self.seconds / self.step:.1f} s/step {said}"
        self._save()

    def _update(self) -> str:
        rng = random.Random(f"{self.seed} encoder {self.step}")
        pixels, words, shapes = self._images(rng)
        middle, new, old = self._seen(pixels)
        written, drawn = words[..., 0] >= 0, shapes[..., 0] >= 0
        told, letters = words[written].unbind(-1)
        spelt = F.cross_entropy(self._spell(middle[written].float()), letters)
        read = self.reading.loss(self.student, Covered(new[written], told[:, None]))
        named = self.names.loss(self.student, Covered(new[drawn], shapes[drawn]))
        free = ~(written | drawn)
        kept = _moved(new[free], old[free]) + _moved(
            self.student.project(new[free]), self.student.project(old[free], self._before)
        )
        self._optimizer.zero_grad()
        (spelt + read + named + KEEP * kept).backward()
        torch.nn.utils.clip_grad_norm_(self._learning, 1.0)
        self._optimizer.step()
        return f"letters {spelt:.3f} words {read:.3f} shapes {named:.3f} moved {kept:.4f}"

    def _images(self, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels of a step's images, and the labels of ``Reading`` and ``Names``."""
        scenes = [page(rng, self._grounds) for _ in range(PAGES)]
        scenes += [draw("words", rng, self._grounds, many=True) for _ in range(WORDS)]
        scenes += [draw("count", rng, self._grounds, many=True) for _ in range(SHAPES)]
        shown = rng.sample(range(len(self._photos)), PHOTOS)
        photos = [Scene(self._photos.image(i), ()) for i in shown]
        drawn = torch.from_numpy(np.stack([np.asarray(s.image).transpose(2, 0, 1) for s in scenes]))
        pixels = normalise(torch.cat([resized(drawn), stacked(p.image for p in photos)]))
        every = [*scenes, *photos]
        return pixels, self.reading.all(every), self.names.all(every)

    def _seen(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches after block ``SPELLED`` and as features, and the features as given."""
        student, end = self.student, self.student.sizes.vision_layers
        with torch.no_grad():
            x = student.encoded(student.embedded(pixels), self._given, range(FIRST))
            old = student.encoded(x, self._given, range(FIRST, end))
        weights = student.vision_weights()
        middle = student.encoded(x, weights, range(FIRST, SPELLED))
        new = student.encoded(middle, weights, range(SPELLED, end))
        return middle[:, 1:], new[:, 1:], old[:, 1:]

    def _save(self) -> None:
        state = {
            "vision": self.student.vision.state_dict(),
            "projector": self.student.projector.state_dict(),
            "spell": self._spell.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
        }
        save(state, self._file)

    def _resume(self) -> None:
        if not self._file.is_file():
            return
        state = torch.load(self._file, weights_only=True)
        self.student.vision.load_state_dict(state["vision"])
        self.student.projector.load_state_dict(state["projector"])
        self._spell.load_state_dict(state["spell"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.seconds, self.step = state["seconds"], state["step"]


def _moved(new: Tensor, old: Tensor) -> Tensor:
    """Mean squared difference over the variance of ``old``."""
    new, old = new.float(), old.float()
    return (new - old).square().mean() / old.var()
