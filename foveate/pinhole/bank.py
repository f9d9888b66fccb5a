"""Images for training, kept as bytes on the training device, and the quick check meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foveate.pinhole.assembly import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD
from foveate.pinhole.mix import RANKED, Segment, Writer
from foveate.pinhole.packed import Rows, Student
from foveate.tasks import Example, Task

Batch = dict[str, Any]
RANK_SHARPNESS = 6.0


@dataclass(frozen=True)
class Bank:
    """Stored images (N, 3, H, W) uint8 on ``device``; makes normalised pixels of a batch there."""

    photos: Tensor
    easy: Tensor
    prefix: Tensor
    image: Tensor

    def rows(self, batch: Batch) -> Rows:
        """A batch of arrays as ``Rows`` on the device, images augmented."""
        device = self.photos.device
        parts = [
            self._photos(torch.from_numpy(batch["photo"]), torch.from_numpy(batch["flip"])),
            resized(self.easy[torch.from_numpy(batch["easy"]).to(device)]),
            resized(torch.from_numpy(batch["drawn"]).to(device)),
        ]
        text = {
            k: torch.from_numpy(batch[k]).to(device)
            for k in ("text", "segment", "position", "target", "weight")
        }
        return Rows(normalise(torch.cat(parts)), self.prefix, self.image, **text)

    def _photos(self, index: Tensor, flip: Tensor) -> Tensor:
        device = self.photos.device
        x = self.photos[index.to(device)]
        x = torch.where(flip.to(device)[:, None, None, None], x.flip(-1), x)
        if torch.rand(()) < 0.5:
            return resized(x)
        return _cropped(x.float())


def resized(x: Tensor) -> Tensor:
    """(B, 3, H, W) of any size to working size, as the processor does it (bicubic), in 0..255."""
    if x.shape[0] == 0:
        return x.new_zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float32)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    y = F.interpolate(x.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return y.round().clamp(0, 255)


def normalise(x: Tensor) -> Tensor:
    """0..255 to the encoder's scale."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
    return (x / 255 - mean) / std


def _cropped(x: Tensor) -> Tensor:
    """A random 85-100 % crop with a mild change of brightness and contrast."""
    n = x.shape[0]
    scale = torch.empty(n, 2).uniform_(0.85, 1.0)
    shift = (torch.rand(n, 2) * 2 - 1) * (1 - scale)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = scale[:, 0], scale[:, 1], shift
    grid = F.affine_grid(matrix, [n, 3, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    y = F.grid_sample(
        x, grid.to(x.device), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    gain, lift = torch.empty(2, n, 1, 1, 1).uniform_(-0.12, 0.12).to(x.device).unbind(0)
    middle = y.mean((1, 2, 3), keepdim=True)
    return ((y - middle) * (1 + gain) + middle * (1 + lift)).clamp(0, 255)


def stored(images: Iterable[Image.Image], side: int) -> Tensor:
    """Images as uint8 (N, 3, side, side)."""
    arrays = [np.asarray(i.resize((side, side), Image.Resampling.BICUBIC)) for i in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


class Check:
    """A fixed sample of a task, scored by the training forward.

    Right when every token is the argmax, as greedy decoding gives it. Choices go by likelihood.
    """

    def __init__(self, task: Task, writer: Writer, count: int, batch: int) -> None:
        self.name = task.name
        examples = [task.example(i) for i in range(min(count, len(task)))]
        self.examples, self.batch = examples, batch
        self.pixels = stored((e.image for e in examples), IMAGE_SIZE)
        self.laid = [writer.lay(_segments(e)) for e in examples]

    @torch.no_grad()
    def run(self, student: Student, bank: Bank, *, blank: bool = False) -> dict[str, float]:
        right: list[float] = []
        by_sum: list[float] = []
        for start in range(0, len(self.examples), self.batch):
            span = [min(i, len(self.examples) - 1) for i in range(start, start + self.batch)]
            rows = self._rows(span, bank, blank)
            logp, best, asked = student(rows)
            real = self.examples[start : start + self.batch]
            if real[0].choices:
                mean, total = _segment_logp(rows, logp, asked, len(real[0].choices))
                want = [e.choices.index(e.answer) for e in real]
                right += _hits(mean, want)
                by_sum += _hits(total, want)
            else:
                miss = torch.zeros(len(span), device=logp.device)
                miss.index_add_(0, asked // rows.text.shape[1], (~best).float())
                right += (miss == 0).float().tolist()[: len(real)]
        out = {self.name: sum(right) / len(right)}
        if by_sum:
            out[f"{self.name} (sum)"] = sum(by_sum) / len(by_sum)
        return out

    def _rows(self, span: Sequence[int], bank: Bank, blank: bool) -> Rows:
        device = bank.prefix.device
        pixels = normalise(self.pixels[list(span)].to(device).float())
        text = {
            k: torch.from_numpy(np.stack([self.laid[i][k] for i in span])).to(device)
            for k in self.laid[0]
        }
        return Rows(pixels * (not blank), bank.prefix, bank.image, **text)


def rank_loss(rows: Rows, logp: Tensor, asked: Tensor, ranked: Tensor) -> Tensor:
    """How much likelier the first caption of the rows ``ranked`` (B,) is than their others."""
    scores = _segment_logp(rows, logp, asked, RANKED)[0] * RANK_SHARPNESS
    return -(scores.log_softmax(-1)[:, 0] * ranked).sum() / ranked.sum().clamp(min=1)


def _segment_logp(rows: Rows, logp: Tensor, asked: Tensor, count: int) -> tuple[Tensor, Tensor]:
    length = rows.text.shape[1]
    segment = rows.segment.flatten()[asked]
    inside = (segment >= 0) & (segment < count)
    place = (asked // length) * count + segment.clamp(0, count - 1)
    total = logp.new_zeros(rows.text.shape[0] * count)
    number = torch.zeros_like(total)
    total = total.index_add(0, place, logp * inside)
    number = number.index_add(0, place, inside.to(logp.dtype))
    mean = total / number.clamp(min=1)
    return mean.view(-1, count), total.view(-1, count)


def _segments(example: Example) -> list[Segment]:
    answers = example.choices or (example.answer,)
    return [Segment(example.question, a) for a in answers]


def _hits(scores: Tensor, want: list[int]) -> list[float]:
    return [float(a == b) for a, b in zip(scores.argmax(-1).tolist(), want, strict=False)]
