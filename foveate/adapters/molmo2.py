"""Molmo 2: a whole image and overlapping crops, or frames; a table says which patches a token has.

Quirks: an image is two groups, the whole in low resolution and the raster of its crops; every frame
of a video is one. Column and start tokens between them are text. All vision rows of a sample and
the tokens around them see each other in both directions. Features are added to the embeddings of
their placeholders. Images and video share one placeholder, and a prompt has one kind only. A
token's patches are pooled by an attention of their own; queries and keys of the encoder's last
layer are averaged over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Grid, Observed, Seen


class Molmo2(Adapter):
    """Molmo 2 (SigLIP 2, pooling by attention, Qwen3 or OLMo 3)."""

    family: ClassVar[str] = "Molmo 2"
    model_types: ClassVar[tuple[str, ...]] = ("molmo2",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    aligned: ClassVar[bool] = False
    fixed: ClassVar[str] = "its table of patches is made for the image as it came"

    def blocks(self, call: Mapping[str, Any]) -> Tensor | None:
        types = call.get("mm_token_type_ids")
        return None if types is None else torch.where(types == 1, 0, -1)

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        return [[h * w for h, w in item] for item in _rasters(modality, call)]

    def grids(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[Grid | None]:
        return [grid for item in _rasters(modality, call) for grid in item]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        patches = call[f"{modality}_token_pooling"]
        sizes = [h * w for item in _rasters(modality, call) for h, w in item]

        def tokens(rows: Tensor) -> Sequence[Tensor]:  # (crops, H, patches, d)
            pooled = _pooled(rows.transpose(0, 1).flatten(1, 2), patches)
            return cast(Sequence[Tensor], pooled.split(sizes, dim=1))

        q, k = (tokens(torch.cat([getattr(s, name) for s in seen])) for name in ("q", "k"))
        return [
            Observed(a, b, torch.arange(a.shape[1], device=a.device), None, seen[0].scale)
            for a, b in zip(q, k, strict=True)
        ]


def _rasters(modality: str, call: Mapping[str, Any]) -> list[list[Grid]]:
    """(height, width) in tokens of each group of each image or video."""
    if modality == "video":
        return [[(h, w)] * frames for frames, h, w in call["video_grids"].tolist()]
    pairs = call["image_grids"].unflatten(1, (2, 2)).tolist()  # the whole, then the crops
    return [[(h, w) for h, w in image if h * w] for image in pairs]


def _pooled(rows: Tensor, patches: Tensor) -> Tensor:
    """The means (H, tokens, d) of the patches (H, L, d) of each token; -1 is no patch."""
    real = patches >= 0
    real, patches = (part[real.any(-1)] for part in (real, patches))
    total = (rows[:, patches.clamp(min=0)] * real[..., None]).sum(2)
    return total / real.sum(-1)[:, None]
