"""PerceptionLM: tiles and frames through one encoder (Perception Encoder), pooled 2 × 2.

Quirks: images and video go through the same call, so both are tiles there, each a group of its own;
where a prompt has both, survivors are counted on the device. Pooling lies inside the projector:
methods of site ``features`` act on projected tokens. The encoder is run by timm, whose attention
transformers does not see, so methods that need the encoder's attention refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from foveate.adapter import Adapter, Observed, Seen


class PerceptionLM(Adapter):
    """PerceptionLM (Perception Encoder, pooling projector, Llama 3)."""

    family: ClassVar[str] = "PerceptionLM"
    model_types: ClassVar[tuple[str, ...]] = ("perception_lm",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    aligned: ClassVar[bool] = False
    blind: ClassVar[str] = "its encoder, run by timm, shows none"
    fixed: ClassVar[str] = "its encoder's positions are made for one image size"

    def encoders(self, model: nn.Module) -> Sequence[str]:
        return ["image"]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        raise NotImplementedError(self.blind)
