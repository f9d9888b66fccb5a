"""LLaVA-OneVision: images as one crop plus anyres tiles with newline tokens, video pooled to 14².

Quirks: as LLaVA-NeXT's, and large images are interpolated to at most nine tiles' worth of tokens
while they are packed. SigLIP has no [CLS]. A video is one item: its frames are groups, and the
newline token at its end is a group of one that entrance methods keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Observed, Seen, select_strategy
from foveate.adapters.llava_next import LlavaNext, tiles_of, together


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision (SigLIP, two-layer projector, Qwen2)."""

    family: ClassVar[str] = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        if modality == "image":
            return super().groups(modality, call, sizes)
        frames = call["pixel_values_videos"].shape[1]
        return [[(size - 1) // frames] * frames + [1] for size in sizes]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        if modality == "image":
            return super().observe(model, modality, call, seen)
        first = int(select_strategy(model, call) == "default")
        q, k = (self._frames(model, call, rows[:, :, first:]) for rows in together(seen))
        return [
            Observed(a, b, torch.arange(a.shape[1], device=a.device), None, seen[0].scale)
            for a, b in zip(q, k, strict=True)
        ]

    def tiles(self, model: nn.Module, call: Mapping[str, Any]) -> list[int]:
        """One tile for each of several images in a sample; anyres tiles for an image alone."""
        sizes, images = call["image_sizes"], call.get("batch_num_images")
        if images is None:
            return super().tiles(model, call)
        alone = [n == 1 for n in images for _ in range(n)]
        return [tiles_of(model, s) if a else 1 for s, a in zip(sizes, alone, strict=True)]

    def pack(
        self, model: nn.Module, call: Mapping[str, Any], tiles: Sequence[Tensor]
    ) -> list[Tensor]:
        aspect = call.get("vision_aspect_ratio") or cast(Any, model.config).vision_aspect_ratio
        packed, _ = cast(Any, self.base(model)).pack_image_features(
            tiles,
            call["image_sizes"],
            image_newline=tiles[0].new_zeros(tiles[0].shape[-1]),
            vision_aspect_ratio=aspect,
        )
        return cast(list[Tensor], packed)

    def _frames(self, model: nn.Module, call: Mapping[str, Any], rows: Tensor) -> list[Tensor]:
        """(videos·frames, H, N, d) to one (H, tokens, d) per frame, and one row a newline."""
        base = cast(Any, self.base(model))
        heads, flat = rows.shape[1], rows.transpose(1, 2).flatten(2)
        pooled = base.apply_pooling(flat).unflatten(2, (heads, -1)).transpose(1, 2)
        videos, frames = call["pixel_values_videos"].shape[:2]
        newline = pooled.new_zeros(heads, 1, pooled.shape[-1])
        return [
            group
            for video in pooled.unflatten(0, (videos, frames)).unbind(0)
            for group in (*video.unbind(0), newline)
        ]
