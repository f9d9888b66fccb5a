"""InternVL: tiles of 448 px, 32 × 32 patches, pixel shuffle 4 → 1 before the projector.

Quirks: the model is not told which tiles belong to one image, so every tile is a group of its own.
A token is four patches; their queries and keys are averaged to the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Observed, Seen, Shrink, Shrunk, resized


class InternVL(Adapter):
    """InternVL 2.5, 3, 3.5 in their Hugging Face form."""

    family: ClassVar[str] = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        found = []
        for s in seen:
            q, k, at = self._pooled(model, s.q, s.k)
            pairs = zip(q.unbind(0), k.unbind(0), strict=True)
            found += [Observed(*pair, at=at, cls=0, scale=s.scale) for pair in pairs]
        return found

    def _pooled(self, model: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (B, H, 1 + patches, d) to (B, H, 1 + tokens, d) by the model's own pixel shuffle."""
        base = cast(Any, self.base(model))
        side = math.isqrt(q.shape[2] - 1)
        index = torch.arange(side * side, device=q.device).view(1, side, side, 1)
        patches = base.pixel_shuffle(index, scale_factor=base.config.downsample_ratio)
        patches = patches.reshape(-1, patches.shape[-1])  # (tokens, 4)

        def pool(rows: Tensor) -> Tensor:
            return torch.cat([rows[:, :, :1], rows[:, :, 1:][:, :, patches].mean(3)], dim=2)

        return pool(q), pool(k), torch.arange(1, patches.shape[0] + 1, device=q.device)

    def shrink(
        self,
        model: nn.Module,
        modality: str,
        call: Mapping[str, Any],
        shape: Shrink,
        count: Callable[[int], int],
    ) -> Shrunk:
        config = cast(Any, model.config)
        pixels, patch = call["pixel_values"], config.vision_config.patch_size[0]
        step = patch * round(1 / config.downsample_ratio)
        side = pixels.shape[-1] // step
        small = math.isqrt(math.prod(shape((side, side), count(side * side))))  # must stay square
        smaller = {**call, "pixel_values": resized(pixels, small * step, small * step)}
        return smaller, [((side, side), (small, small))] * pixels.shape[0]
