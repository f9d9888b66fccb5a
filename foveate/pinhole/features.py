"""What the frozen encoder makes of images, kept in a file, and which patches of it are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate.pinhole.assembly import IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE
from foveate.pinhole.bank import normalise
from foveate.pinhole.packed import Student

Array = NDArray[Any]
SIDE = IMAGE_SIZE // PATCH_SIZE


class Features:
    """Features (N, tokens, D) of a list of images in a file, made once and in order."""

    def __init__(self, file: Path, count: int, width: int = 384) -> None:
        self.file, self.count, self.width = file, count, width
        self._done = file.with_suffix(".done")
        shape = (max(count, 1), IMAGE_TOKENS, width)  # an empty file cannot be mapped
        mode: Literal["r+", "w+"] = "r+" if file.is_file() else "w+"
        if mode == "r+" and file.stat().st_size != np.prod(shape) * 2:
            raise ValueError(
                f"{file} was made for another number of images than {count}: run with the same "
                f"--limit and --check as before, or delete {file} and {self._done}."
            )
        self.values: Array = np.memmap(file, np.float16, mode, shape=shape)

    @property
    def done(self) -> int:
        return int(self._done.read_text()) if self._done.is_file() else 0

    def fill(self, images: Sequence[Any], student: Student, batch: int = 16) -> Iterator[int]:
        """Encode what is missing; yields how many images are done after each batch."""
        for start in range(self.done, self.count, batch):
            stop = min(start + batch, self.count)
            pixels = stacked(images[i] for i in range(start, stop))
            with torch.no_grad():
                made = student.features(normalise(pixels)).float()
            self.values[start:stop] = made.numpy().astype(np.float16)
            self.values.flush()  # type: ignore[attr-defined]
            self._done.write_text(str(stop))
            yield stop

    def take(self, index: Sequence[int]) -> Tensor:
        """(B, tokens, D) in float32."""
        return torch.from_numpy(np.stack([self.values[i] for i in index]).astype(np.float32))


def stacked(images: Iterable[Image.Image]) -> Tensor:
    """Images at working size, (N, 3, S, S), in 0..255."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    arrays = [np.asarray(i.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for i in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()


def cells(batch: int, stride: int, generator: torch.Generator) -> Tensor:
    """One random patch of each ``stride`` × ``stride`` cell, (B, (SIDE / stride)²), ascending."""
    per = SIDE // stride
    row, column = torch.randint(0, stride, (2, batch, per, per), generator=generator).unbind(0)
    row = row + torch.arange(per)[:, None] * stride
    column = column + torch.arange(per) * stride
    return (row * SIDE + column).flatten(1).sort(-1).values


def picked(features: Tensor, chosen: Tensor) -> Tensor:
    """The patches ``chosen`` (B, n) of ``features`` (B, tokens, D)."""
    return features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1]))


class Lazy(Sequence[Image.Image]):
    """A sequence of images made one by one."""

    def __init__(self, make: Callable[[int], Image.Image], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._make(index)
