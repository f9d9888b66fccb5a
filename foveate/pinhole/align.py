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
    """Patches that drawn shapes cover: features (N, D), and their words (N, 4) as in ``Names``."""

    features: Tensor
    words: Tensor

    @classmethod
    def by(cls, scenes: Iterable[Row | Scene], features: Tensor) -> Covered:
        """Those of ``features`` (B, tokens, D), which are of these scenes."""
        words = torch.stack([Names.of(scene.items) for scene in scenes])
        covered = words[..., 0] >= 0
        return cls(features[covered], words[covered])

    def some(self, count: int, draw: torch.Generator) -> Covered:
        index = torch.randint(0, len(self.words), (count,), generator=draw)
        return Covered(self.features[index], self.words[index])

    def loss(self, names: Names, student: Student) -> Tensor:
        """How far these patches, as projected, are from their words."""
        return names.loss(names.near(student.project(self.features.to(student.dtype))), self.words)


class Names:
    """What a patch of a drawn shape should be near: its colour, its shape and its place, in words.

    Words are told apart within each kind only, so a patch can be near one of each.
    """

    KINDS = (tuple(COLOURS), SHAPES, ("top", "bottom"), ("left", "right"))

    def __init__(self, writer: Writer, table: Tensor) -> None:
        self._mean = table.float().mean(0)
        self._directions = []
        for words in self.KINDS:
            made = embedded(words, writer, table)
            self._directions.append(F.normalize(made - made.mean(0), dim=-1))

    @classmethod
    def of(cls, items: Sequence[Item]) -> Tensor:
        """(tokens, 4): which word of each kind the shape says that a patch lies in, -1 for none."""
        told = [(i.colour, i.shape, *PLACES[i.place].split()) for i in items]
        words = [[k.index(w) for k, w in zip(cls.KINDS, one, strict=True)] for one in told]
        table = torch.tensor(words, dtype=torch.long).view(-1, len(cls.KINDS))
        return by_owner(owners(items), table)

    def near(self, patches: Tensor) -> Tensor:
        """Projected ``patches`` (n, D) as directions from the mean of all embeddings."""
        return F.normalize(patches.float() - self._mean, dim=-1)

    def loss(self, near: Tensor, words: Tensor) -> Tensor:
        """Cross-entropy over the words of each kind: of directions (n, D), ``words`` (n, 4)."""
        scores = [near @ kind.T * SHARPNESS for kind in self._directions]
        pairs = zip(scores, words.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(*pair) for pair in pairs]).sum()

    def told(self, near: Tensor) -> Tensor:
        """The nearest word of each kind: (n, D) -> (n, 4)."""
        return torch.stack([(near @ kind.T).argmax(-1) for kind in self._directions], 1)


def owners(items: Sequence[Item]) -> Tensor:
    """(tokens,): which of the shapes a patch lies in, -1 for none."""
    middle = (torch.arange(SIDE) + 0.5) * SIZE / SIDE
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    owner = torch.full((SIDE, SIDE), -1)
    for number, item in enumerate(items):
        owner[torch.maximum((x - item.x).abs(), (y - item.y).abs()) < 0.8 * item.half] = number
    return owner.flatten()


def by_owner(owner: Tensor, rows: Tensor) -> Tensor:
    """The row of ``rows`` (n, k) that owns each patch, -1 for none: (tokens, k)."""
    none = rows.new_full((1, rows.shape[1]), -1)
    return torch.cat([rows, none])[owner]


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
        named = scenes[1].some(1024, draw).loss(scenes[0], student) if scenes else 0.0
        optimizer.zero_grad()
        (loss + size + named).backward()
        optimizer.step()
        schedule.step()
        yield step, float(loss.detach())
