"""Mistral 3 and Pixtral: images of any size in rows of tokens with a break token after each row.

Quirks: break tokens are text, so they stay. The encoder sees all images of a call in one row, under
a mask of blocks. Mistral 3 merges 2 × 2 patches before its projector, Pixtral merges none; queries
and keys are averaged alike. Pixtral comes as a LLaVA with another encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Grid, Observed, Seen, Shrink, Shrunk, averaged, resized


class Mistral3(Adapter):
    """Mistral Small 3.1 and later."""

    family: ClassVar[str] = "Mistral 3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    aligned: ClassVar[bool] = False

    def grids(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[Grid | None]:
        steps = [math.isqrt(h * w // n) for (h, w), n in zip(_sizes(call), sizes, strict=True)]
        return [(h // s, w // s) for (h, w), s in zip(_sizes(call), steps, strict=True)]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        merge, patch = self._merge(model), cast(Any, model.config).vision_config.patch_size
        sizes = [(h // patch, w // patch) for h, w in _sizes(call)]

        def tokens(rows: Tensor) -> list[Tensor]:  # (H, patches of all images, d)
            parts = rows.split([h * w for h, w in sizes], dim=1)
            return [averaged(part, size, merge) for part, size in zip(parts, sizes, strict=True)]

        return [
            Observed(q, k, torch.arange(q.shape[1], device=q.device), None, s.scale)
            for s in seen
            for q, k in zip(tokens(s.q[0]), tokens(s.k[0]), strict=True)
        ]

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        step = self._merge(model) * cast(Any, model.config).vision_config.patch_size
        images, changes = [], []
        for pixels, (h, w) in zip(call["pixel_values"], _sizes(call), strict=True):
            old: Grid = (h // step, w // step)
            new = shape(old)
            images.append(resized(pixels[None, :, :h, :w], new[0] * step, new[1] * step)[0])
            changes.append((old, new))
        sizes = call["image_sizes"].new_tensor([image.shape[1:] for image in images])
        high, wide = (max(image.shape[i] for image in images) for i in (1, 2))
        padded = [
            nn.functional.pad(image, (0, wide - image.shape[2], 0, high - image.shape[1]))
            for image in images
        ]
        return {**call, "pixel_values": torch.stack(padded), "image_sizes": sizes}, changes

    def _merge(self, model: nn.Module) -> int:
        """Patches on a side of a token."""
        return int(getattr(model.config, "spatial_merge_size", 1))


class Pixtral(Mistral3):
    """Pixtral 12B and other LLaVAs with its encoder."""

    family: ClassVar[str] = "Pixtral"
    model_types: ClassVar[tuple[str, ...]] = ("llava+pixtral",)


def _sizes(call: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image."""
    return [(h, w) for h, w in torch.as_tensor(call["image_sizes"]).tolist()]
