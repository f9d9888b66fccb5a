"""Video-LLaVA: two encoders, one for images and one for video, and [CLS] among a frame's tokens.

Quirks: both LanguageBind encoders are watched. A video comes as its frames, each an item. Images
lose their [CLS] before the projector, frames keep it: it is a group of one that entrance methods
keep, so that the rest of a frame is a full grid. The processor still calls images
``pixel_values_images`` unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Observed, Seen, Shrink, Shrunk, last_attention, whole_images
from foveate.adapters.llava import Llava


class VideoLlava(Llava):
    """Video-LLaVA (two LanguageBind encoders, two-layer projector, Vicuna)."""

    family: ClassVar[str] = "Video-LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def tower(self, model: nn.Module, modality: str) -> nn.Module:
        return cast(nn.Module, getattr(self.base(model), f"{modality}_tower"))

    def vision_attentions(self, model: nn.Module) -> Sequence[nn.Module]:
        return [last_attention(self.tower(model, modality)) for modality in ("image", "video")]

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        return [[size] if modality == "image" else [1, size - 1] for size in sizes]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        if modality == "image":
            return super().observe(model, modality, call, seen)
        frames = whole_images(seen, has_cls=True)
        return [part for frame in frames for part in (replace(frame, at=frame.at[:1] * 0), frame)]

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        if modality == "image":
            images = call.get("pixel_values", call.get("pixel_values_images"))
            rest = {name: value for name, value in call.items() if name != "pixel_values_images"}
            call = {**rest, "pixel_values": images}
            return super().shrink(model, modality, call, shape)
        video = call["pixel_values_videos"]
        frames = {"pixel_values": video.flatten(0, 1)}
        smaller, changes = super().shrink(model, modality, frames, shape)
        video = smaller.pop("pixel_values").unflatten(0, video.shape[:2])
        cls = ((1, 1), (1, 1))
        both = [part for change in changes for part in (cls, change)]
        return {**call, **smaller, "pixel_values_videos": video}, both
