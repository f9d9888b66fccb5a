"""Qwen3-VL: dynamic resolution, 2 × 2 patch merger, M-RoPE, deepstack.

Quirks: features of earlier encoder layers are added to the vision rows after the first LLM layers;
a survivor gets those of the slot whose place it takes, also when a method blended its vector. Video
features come from the call for images. Timestamps stand between the frames of a video.
"""

from __future__ import annotations

from typing import ClassVar

from foveate.adapters.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL, dense and mixture of experts."""

    family: ClassVar[str] = "Qwen3-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")
    deepstack: ClassVar[bool] = True
