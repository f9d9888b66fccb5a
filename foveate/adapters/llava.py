"""LLaVA-1.5 and everything behind ``LlavaForConditionalGeneration``: CLIP, SigLIP, DINOv2 encoders.

Quirks: the select strategy ``default`` drops the first row, which then is [CLS]; ``full`` keeps
every row, and an encoder used so (SigLIP) has none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import (
    Adapter,
    Observed,
    Seen,
    Shrink,
    Shrunk,
    resized,
    select_strategy,
    whole_images,
)


class Llava(Adapter):
    """LLaVA-1.5 (vision tower, two-layer projector, Llama)."""

    family: ClassVar[str] = "LLaVA-1.5"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def tower(self, model: nn.Module, modality: str) -> nn.Module:
        """The vision encoder of a modality."""
        return cast(nn.Module, self.base(model).vision_tower)

    def has_cls(self, model: nn.Module, call: Mapping[str, Any]) -> bool:
        """Whether the encoder's first row is [CLS], which the LLM does not get."""
        return select_strategy(model, call) == "default"

    def stride(self, model: nn.Module) -> int:
        """Side of the square of patches that becomes one token."""
        return 1

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        return whole_images(seen, has_cls=self.has_cls(model, call), stride=self.stride(model))

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        tower = self.tower(model, modality)
        stride = self.stride(model)
        step = cast(Any, tower.config).patch_size * stride
        pixels = call["pixel_values"]
        grid = (pixels.shape[-2] // step, pixels.shape[-1] // step)
        small = shape(grid)
        if stride > 1:  # pixel shuffle takes squares only
            small = (math.isqrt(math.prod(small)),) * 2
        smaller = {**call, "pixel_values": resized(pixels, small[0] * step, small[1] * step)}
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            smaller["interpolate_pos_encoding"] = (
                True  # CLIP and SigLIP ask; DINOv2 does it unasked
            )
        return smaller, [(grid, small)] * pixels.shape[0]
