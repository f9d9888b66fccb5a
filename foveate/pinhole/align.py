"""The projector alone learns words, before and beside the language model.

Of captioned images it is known which words apply, of drawn scenes even to which patch. No forward
of the language model is needed, so thousands of images a second can be learned from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.pinhole.features import SIDE, Features, cells, picked
from foveate.pinhole.mix import Row, Writer
from foveate.pinhole.packed import Student
from foveate.tasks.scenes import COLOURS, PLACES, SHAPES, SIZE, Item, Scene

SHARPNESS = 12.0


def embedded(words: Iterable[str], writer: Writer, table: Tensor) -> Tensor:
    """(words, D): the mean embedding of each word's tokens, as it stands after a space."""
    return torch.stack([table[list(writer.ids(" " + w))].float().mean(0) for w in words])


class Vocabulary:
    """The words that captions use often, their embeddings, and which image has which."""

    def __init__(
        self, texts: Sequence[str], writer: Writer, table: Tensor, least: int = 12
    ) -> None:
        found = [set(re.findall(r"[a-z]{3,}", text.lower())) for text in texts]
        counts = Counter(word for words in found for word in words)
        self.words = sorted(w for w, n in counts.items() if least <= n <= len(texts) // 3)
        if not self.words:
            raise ValueError(
                f"No word is in the captions of {least} and at most a third of {len(texts)} "
                "images, so there is nothing to align with; use more photos (--limit)."
            )
        self.embeddings = embedded(self.words, writer, table)
        place = {w: i for i, w in enumerate(self.words)}
        self.labels = torch.zeros(len(texts), len(self.words))
        for i, words in enumerate(found):
            self.labels[i, [place[w] for w in words if w in place]] = 1.0


@dataclass(frozen=True)
class Covered:
    """Patches that drawn shapes cover: features (N, D), and their words (N, kinds) of ``Names``."""

    features: Tensor
    words: Tensor

    @classmethod
    def by(cls, words: Tensor, features: Tensor) -> Covered:
        """Those of ``features`` (B, tokens, D) that have ``words`` (B, tokens, kinds)."""
        covered = words[..., 0] >= 0
        return cls(features[covered], words[covered])

    def some(self, count: int, draw: torch.Generator) -> Covered:
        index = torch.randint(0, len(self.words), (count,), generator=draw)
        return Covered(self.features[index], self.words[index])


def covered_first(words: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """(B, count) patches, ascending: what a shape covers, then what is beside, then random ones.

    Shapes cover the patches that have ``words`` (B, tokens, kinds).
    """
    covered = (words[..., 0] >= 0).float()
    beside = F.max_pool2d(covered.view(-1, 1, SIDE, SIDE), 3, 1, 1).flatten(1)
    order = covered + beside + torch.rand(covered.shape, generator=draw)
    return order.topk(count).indices.sort(-1).values


class Names:
    """What a patch of a drawn shape should be near, in words: its colour, shape, place and part.

    Words are told apart within each kind only, so a patch can be near one of each. One patch a
    shape is its center, so that shapes can be counted, and not only the area that they cover.
    """

    scene = "shapes"
    PARTS = ("center", "edge")
    KINDS = (tuple(COLOURS), SHAPES, ("top", "bottom"), ("left", "right"), PARTS)

    def __init__(self, writer: Writer, table: Tensor) -> None:
        self._mean = table.float().mean(0)
        self._directions = []
        for words in self.KINDS:
            made = embedded(words, writer, table)
            self._directions.append(F.normalize(made - made.mean(0), dim=-1))

    @classmethod
    def of(cls, items: Iterable[Item]) -> Tensor:
        """(tokens, kinds): of each kind the word for the shape over a patch, -1 for none."""
        middle = (torch.arange(SIDE) + 0.5) * SIZE / SIDE
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        labels = torch.full((SIDE, SIDE, len(cls.KINDS)), -1)
        for item in items:
            inside = torch.maximum((x - item.x).abs(), (y - item.y).abs()) < 0.8 * item.half
            told = (item.colour, item.shape, *PLACES[item.place].split(), "edge")
            found = [kind.index(word) for kind, word in zip(cls.KINDS, told, strict=True)]
            center = int(item.y * SIDE / SIZE), int(item.x * SIDE / SIZE)
            inside[center] = True
            labels[inside] = torch.tensor(found)
            labels[(*center, -1)] = cls.PARTS.index("center")
        return labels.flatten(0, 1)

    @classmethod
    def all(cls, scenes: Iterable[Row | Scene]) -> Tensor:
        """``of`` every scene: (B, tokens, kinds)."""
        return torch.stack([cls.of(scene.items) for scene in scenes])

    def loss(self, student: Student, covered: Covered) -> Tensor:
        """Cross-entropy over the words of each kind, of these patches as projected."""
        patches = student.project(covered.features.to(student.dtype)).float()
        near = F.normalize(patches - self._mean, dim=-1)
        scores = [near @ kind.T * SHARPNESS for kind in self._directions]
        words = covered.words.unbind(1)
        return torch.stack([F.cross_entropy(*s) for s in zip(scores, words, strict=True)]).sum()


def align(
    student: Student,
    features: Features,
    vocabulary: Vocabulary,
    *,
    steps: int,
    scenes: tuple[Names, Covered] | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, float]]:
    """Teach the projector the words: yields (step, loss).

    An image has a word when some patch lies near its embedding: log-sum-exp over patches of the
    cosine, a bias per word, binary cross-entropy; and patches keep the norm of embeddings. Of
    scenes it is known which patch has which word.
    """
    target = F.normalize(vocabulary.embeddings - vocabulary.embeddings.mean(0), dim=-1)
    norm = vocabulary.embeddings.norm(dim=-1).mean()
    rate = vocabulary.labels.mean(0).clamp(1e-4, 1 - 1e-4)
    bias = nn.Parameter(torch.log(rate / (1 - rate)) - 4.0)
    parts = list(student.projector.parameters())
    optimizer = torch.optim.AdamW([{"params": parts, "lr": 2e-3}, {"params": [bias], "lr": 2e-2}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-3, 2e-2], total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        index = torch.randint(0, features.count, (96,), generator=draw).tolist()
        chosen = cells(len(index), 2, draw)
        x = picked(features.take(index), chosen)
        patches = student.project(x.to(student.dtype)).float()
        near = F.normalize(patches - vocabulary.embeddings.mean(0), dim=-1) @ target.T
        score = (near * SHARPNESS).logsumexp(1) + bias
        loss = F.binary_cross_entropy_with_logits(score, vocabulary.labels[index], reduction="sum")
        loss = loss / len(index)
        size = (patches.norm(dim=-1) / norm - 1).square().mean()
        named = scenes[0].loss(student, scenes[1].some(1024, draw)) if scenes else 0.0
        optimizer.zero_grad()
        (loss + size + named).backward()
        optimizer.step()
        schedule.step()
        yield step, float(loss.detach())
