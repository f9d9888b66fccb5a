"""PaliGemma 1 and 2: SigLIP, a linear projector, Gemma; the prompt is a prefix that sees itself.

Quirks: all rows of the prefix (image, question) see each other in both directions, rows of a suffix
in training do not. Positions count from one. PaliGemma 2 has sliding-window layers, and soft caps
on logits and attention scores; methods see the scores before the cap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Observed, Seen, whole_images
from foveate.adapters.llava import Llava


class PaliGemma(Llava):
    """PaliGemma, PaliGemma 2."""

    family: ClassVar[str] = "PaliGemma"
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)

    def blocks(self, call: Mapping[str, Any]) -> Tensor | None:
        types = call.get("token_type_ids")
        return None if types is None else torch.where(types == 0, 0, -1)

    def answered(self, call: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
        if (types := call.get("token_type_ids")) is None:
            return call
        answer = torch.arange(types.shape[1], device=types.device) >= types.shape[1] - rows
        return {**call, "token_type_ids": types.masked_fill(answer, 1)}

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        logits = super().head(model, hidden)
        cap = getattr(cast(Any, self.text(model).config), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        return whole_images(seen, has_cls=False)
