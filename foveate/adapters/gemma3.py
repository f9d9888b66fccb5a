"""Gemma 3: 64 × 64 patches pooled 4 × 4 to 256 tokens, sliding-window layers, image blocks.

Quirks: an image's rows see each other in both directions, in every layer, so masks come ready made
and by kind of layer; rotary tables, too, differ by kind of layer. A window as long as the prompt is
no window, and a shorter one is refused. The encoder has no [CLS].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Observed, Seen, whole_images


class Gemma3(Adapter):
    """Gemma 3 with its vision encoder (SigLIP)."""

    family: ClassVar[str] = "Gemma 3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)
    aligned: ClassVar[bool] = False

    def blocks(self, call: Mapping[str, Any]) -> Tensor | None:
        if (types := call.get("token_type_ids")) is None:
            return None
        image = types == 1
        start = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
        return torch.where(image, start.cumsum(-1) - 1, -1)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        projector = cast(Any, self.base(model)).multi_modal_projector
        return whole_images(seen, has_cls=False, stride=projector.kernel_size)
