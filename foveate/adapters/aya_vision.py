"""Aya Vision and Command A Vision: SigLIP tiles, pixel shuffle 4 → 1 in the projector, Cohere2.

Quirks: the model is not told which tiles belong to one image, so every tile is a group of its own.
A token is four patches, put together inside the projector: methods of site ``features`` act on
projected tokens, and queries and keys are averaged to the token grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapters.llava import Llava


class AyaVision(Llava):
    """Aya Vision (SigLIP, pixel shuffle, Cohere2)."""

    family: ClassVar[str] = "Aya Vision"
    model_types: ClassVar[tuple[str, ...]] = ("aya_vision",)
    aligned: ClassVar[bool] = False

    def stride(self, model: nn.Module) -> int:
        return cast(int, cast(Any, model.config).downsample_factor)


class Cohere2Vision(AyaVision):
    """Command A Vision: as Aya Vision, its encoder always without [CLS]."""

    family: ClassVar[str] = "Command A Vision"
    model_types: ClassVar[tuple[str, ...]] = ("cohere2_vision",)

    def has_cls(self, model: nn.Module, call: Mapping[str, Any]) -> bool:
        return False
