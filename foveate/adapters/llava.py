"""LLaVA-1.5 and everything behind ``LlavaForConditionalGeneration``: CLIP, SigLIP, DINOv2 encoders.

Quirks: the select strategy ``default`` drops the first row, which then is [CLS]; ``full`` keeps
every row, and an encoder used so (SigLIP) has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Adapter, Observed, Seen, Shrink, Shrunk, resized, whole_images


class Llava(Adapter):
    """LLaVA-1.5 (vision tower, two-layer projector, Llama)."""

    family: ClassVar[str] = "LLaVA-1.5"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        strategy = call.get("vision_feature_select_strategy")
        strategy = strategy or cast(Any, model.config).vision_feature_select_strategy
        return whole_images(seen, has_cls=strategy == "default")

    def shrink(
        self,
        model: nn.Module,
        modality: str,
        call: Mapping[str, Any],
        shape: Shrink,
        count: Callable[[int], int],
    ) -> Shrunk:
        tower = cast(nn.Module, self.base(model).vision_tower)
        patch = cast(Any, tower.config).patch_size
        pixels = call["pixel_values"]
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        small = shape(grid, count(grid[0] * grid[1]))
        smaller = {**call, "pixel_values": resized(pixels, small[0] * patch, small[1] * patch)}
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            smaller["interpolate_pos_encoding"] = (
                True  # CLIP and SigLIP ask; DINOv2 does it unasked
            )
        return smaller, [(grid, small)] * pixels.shape[0]
