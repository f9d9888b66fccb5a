"""Idefics3 and SmolVLM: tiles and a small whole image, pixel shuffle inside the connector.

Quirks: an item is all that one sample shows; every tile of it is a group. Samples with fewer tiles
are filled up with empty ones, which the model leaves out. The encoder has no [CLS]; the queries and
keys of the patches of a token are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from foveate.adapter import Adapter, Observed, Seen, Shrink, Shrunk, resized, whole_images


class Idefics3(Adapter):
    """Idefics3, SmolVLM, SmolVLM2."""

    family: ClassVar[str] = "SmolVLM / Idefics3"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    aligned: ClassVar[bool] = False

    def text(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, self.base(model).text_model)

    def vision_attention(self, model: nn.Module) -> nn.Module:
        layers = cast(Any, self.base(model)).vision_model.encoder.layers
        return cast(nn.Module, layers[-1].self_attn)

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        tiles = _real(call).sum(-1).tolist()
        return [[size // n] * n if n else [] for size, n in zip(sizes, tiles, strict=True)]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        connector = cast(Any, self.base(model)).connector
        return whole_images(seen, has_cls=False, stride=connector.scale_factor)

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        config, pixels = cast(Any, model.config), call["pixel_values"]
        step = config.vision_config.patch_size * config.scale_factor
        side = pixels.shape[-1] // step
        small = math.isqrt(math.prod(shape((side, side))))  # must stay square
        smaller = {**call, "pixel_values": resized(pixels, small * step, small * step)}
        if (mask := call.get("pixel_attention_mask")) is not None:
            size = (small * step, small * step)
            smaller["pixel_attention_mask"] = nn.functional.interpolate(mask.float(), size).long()
        return smaller, [((side, side), (small, small))] * int(_real(call).sum())


def _real(call: Mapping[str, Any]) -> Tensor:
    """Which tiles of each sample are not filling, (samples, tiles) bool; told as the model does."""
    return cast(Tensor, (call["pixel_values"] != 0).flatten(2).any(-1))
