"""GLM-4V: dynamic resolution, 2 × 2 convolution before the merger, M-RoPE.

Quirks: frames of a video stand on placeholders of images, so one call takes images or video.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapters.qwen2_vl import Qwen2VL


class Glm4V(Qwen2VL):
    """GLM-4.1V, GLM-4.5V."""

    family: ClassVar[str] = "GLM-4V"
    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe")

    def placeholders(self, model: nn.Module) -> Mapping[str, int]:
        number = cast(Any, model.config).image_token_id
        return {"image": number, "video": number}
