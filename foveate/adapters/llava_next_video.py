"""LLaVA-NeXT-Video: images as LLaVA-NeXT's, video frames pooled by a stride, without newline.

Quirks: pooling lies before the projector and packing behind it, so methods of site ``features`` act
on projected tokens. A video is one item and its frames are groups, each with its own [CLS]; what
the encoder's attention saw is averaged to the pooled grid, also where a model pools by maximum or
convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Observed, Seen, select_strategy, whole_images
from foveate.adapters.llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video (CLIP, spatial pooling, Vicuna, Mistral or Yi)."""

    family: ClassVar[str] = "LLaVA-NeXT-Video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        if modality == "image":
            return super().groups(modality, call, sizes)
        frames = call["pixel_values_videos"].shape[1]
        return [[size // frames] * frames for size in sizes]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        if modality == "image":
            return super().observe(model, modality, call, seen)
        stride = cast(Any, model.config).spatial_pool_stride
        has_cls = select_strategy(model, call) == "default"
        return whole_images(seen, has_cls=has_cls, stride=stride)
