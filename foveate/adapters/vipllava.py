"""ViP-LLaVA: LLaVA-1.5 whose projector gets the features of several encoder layers side by side.

Quirks: [CLS] is always dropped. What is observed is the last attention all the same, deeper than
the deepest layer that the projector gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from foveate.adapters.llava import Llava


class VipLlava(Llava):
    """ViP-LLaVA (CLIP, two-layer projector, Vicuna)."""

    family: ClassVar[str] = "ViP-LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)

    def has_cls(self, model: nn.Module, call: Mapping[str, Any]) -> bool:
        return True
