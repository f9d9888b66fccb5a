"""Qwen2-VL: dynamic resolution, 2 × 2 patch merger, M-RoPE.

Quirks: those of Qwen2.5-VL without its windows; patches already lie four by four in raster order.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from foveate.adapters.qwen2_5_vl import Qwen25VL


class Qwen2VL(Qwen25VL):
    """Qwen2-VL."""

    family: ClassVar[str] = "Qwen2-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)

    def raster(self, visual: Any, grid_thw: Tensor) -> Tensor | None:
        return None
