"""InternVL: tiles of 448 px, 32 × 32 patches, pixel shuffle 4 → 1 before the projector.

Quirks: the model is not told which tiles belong to one image, so every tile is a group of its own.
A token is four patches; their queries and keys are averaged to the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Adapter, Observed, Seen, Shrink, Shrunk, resized, whole_images


class InternVL(Adapter):
    """InternVL 2.5, 3, 3.5 in their Hugging Face form."""

    family: ClassVar[str] = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        stride = round(1 / cast(Any, model.config).downsample_ratio)
        return whole_images(seen, has_cls=True, stride=stride)

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        config = cast(Any, model.config)
        pixels, patch = call["pixel_values"], config.vision_config.patch_size[0]
        step = patch * round(1 / config.downsample_ratio)
        side = pixels.shape[-1] // step
        small = math.isqrt(math.prod(shape((side, side))))  # must stay square
        smaller = {**call, "pixel_values": resized(pixels, small * step, small * step)}
        return smaller, [((side, side), (small, small))] * pixels.shape[0]
