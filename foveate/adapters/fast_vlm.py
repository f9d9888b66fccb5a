"""FastVLM: a convolutional encoder of total stride 64, a few tokens of much depth each.

Quirks: the encoder (FastViTHD, run by timm) has no queries and keys for the most part, and those of
its last stages are not shown, so methods that need the encoder's attention refuse. The grid follows
the image, which must come in the size that the config's ``image_seq_length`` stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Adapter, Observed, Seen, Shrink, Shrunk, resized


class FastVLM(Adapter):
    """FastVLM (FastViTHD, two-layer projector, Qwen2)."""

    family: ClassVar[str] = "FastVLM"
    model_types: ClassVar[tuple[str, ...]] = ("fast_vlm",)
    blind: ClassVar[str] = "its convolutional encoder shows none"

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        raise NotImplementedError(self.blind)

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        pixels = call["pixel_values"]
        side = math.isqrt(cast(Any, model.config).image_seq_length)
        high, wide = shape((side, side))
        step = pixels.shape[-1] // side
        smaller = {**call, "pixel_values": resized(pixels, high * step, wide * step)}
        return smaller, [((side, side), (high, wide))] * pixels.shape[0]
