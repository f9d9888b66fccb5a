"""Ovis2: tiles whose patches, four to a token, become a mixture of rows of a visual vocabulary.

Quirks: every tile is a group of its own, as the model is not told which belong to one image. The
table of the visual vocabulary is linear, so merging behind it is merging before it: methods of site
``features`` act on its rows. Indicator tokens around the tiles are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Adapter, Observed, Seen, whole_images


class Ovis2(Adapter):
    """Ovis2 (AIMv2 encoder, visual vocabulary, Qwen2.5)."""

    family: ClassVar[str] = "Ovis2"
    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    aligned: ClassVar[bool] = False
    fixed: ClassVar[str] = "its encoder's positions are made for one image size"

    def stride(self, model: nn.Module) -> int:
        """Side of the square of patches that becomes one token."""
        return cast(int, cast(Any, model.config).vision_config.hidden_stride)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        return whole_images(seen, has_cls=False, stride=self.stride(model))
