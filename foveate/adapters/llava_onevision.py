"""LLaVA-OneVision: images as one crop plus anyres tiles with newline tokens, video pooled to 14².

Quirks: packing (unpad, interpolate, newline tokens) lies between the projector and the LLM, so
methods of site ``features`` act on the packed tokens. What the encoder's attention saw goes
through the very same packing; newline tokens were seen by nobody and get zero queries and keys. A
video is one item: its frames are groups, and the newline token at its end is a group of one that
entrance methods keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Observed, Seen


class LlavaOnevision(Adapter):
    """LLaVA-OneVision (SigLIP, two-layer projector, Qwen2)."""

    family: ClassVar[str] = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    aligned: ClassVar[bool] = False

    def placeholders(self, model: nn.Module) -> Mapping[str, int]:
        config = cast(Any, model.config)
        return {"image": config.image_token_id, "video": config.video_token_id}

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        if modality == "image":
            return [[size] for size in sizes]
        frames = call["pixel_values_videos"].shape[1]
        return [[(size - 1) // frames] * frames + [1] for size in sizes]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        q, k = (torch.cat([getattr(s, name) for s in seen]) for name in ("q", "k"))
        pack = self._packed_images if modality == "image" else self._packed_frames
        return [
            Observed(a, b, torch.arange(a.shape[1], device=a.device), None, seen[0].scale)
            for a, b in zip(pack(model, call, q), pack(model, call, k), strict=True)
        ]

    def _packed_images(
        self, model: nn.Module, call: Mapping[str, Any], rows: Tensor
    ) -> list[Tensor]:
        """(tiles, H, N, d) to one (H, tokens, d) per image, packed as the features are."""
        base = cast(Any, self.base(model))
        heads, flat = rows.shape[1], rows.transpose(1, 2).flatten(2)
        tiles = self._tiles(base, call)
        aspect = call.get("vision_aspect_ratio") or base.config.vision_aspect_ratio
        packed, _ = base.pack_image_features(
            flat.split(tiles),
            call["image_sizes"],
            image_newline=flat.new_zeros(flat.shape[-1]),
            vision_aspect_ratio=aspect,
        )
        return [image.unflatten(1, (heads, -1)).transpose(0, 1) for image in packed]

    def _tiles(self, base: Any, call: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, as ``get_image_features`` counts them."""
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            image_size_to_num_patches,
        )

        sizes, images = call["image_sizes"], call.get("batch_num_images")
        alone = (
            [True] * len(sizes) if images is None else [n == 1 for n in images for _ in range(n)]
        )
        config = base.config
        return [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            if patched
            else 1
            for size, patched in zip(sizes, alone, strict=True)
        ]

    def _packed_frames(
        self, model: nn.Module, call: Mapping[str, Any], rows: Tensor
    ) -> list[Tensor]:
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
