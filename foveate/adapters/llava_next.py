"""LLaVA-NeXT: images as one crop of the whole plus anyres tiles, unpadded, with newline tokens.

Quirks: packing (unpad, newline tokens at the end of each row of tiles) lies between the projector
and the LLM, so methods of site ``features`` act on the packed tokens. An image is one group: crop,
tiles and newline tokens, which are vision tokens like others. What the encoder's attention saw goes
through the very same packing; newline tokens were seen by nobody and get zero queries and keys. Of
the [CLS] rows, one for each tile, the one of the crop of the whole image is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Grid, Observed, Seen, select_strategy


class LlavaNext(Adapter):
    """LLaVA-NeXT, also called LLaVA-1.6 (CLIP, two-layer projector, Vicuna, Mistral or Llama 3)."""

    family: ClassVar[str] = "LLaVA-NeXT"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    aligned: ClassVar[bool] = False
    fixed: ClassVar[str] = "its packing of tiles is tied to the input size"

    def grids(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[Grid | None]:
        if modality == "image":
            return [None] * len(sizes)  # the number of packed tokens can be a square by accident
        return super().grids(modality, call, sizes)

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        first = int(select_strategy(model, call) == "default")
        q, k = (self._packed(model, call, rows, first) for rows in together(seen))
        at = [torch.arange(first, image.shape[1], device=image.device) for image in q]
        cls, scale = 0 if first else None, seen[0].scale
        return [Observed(*rows, cls, scale) for rows in zip(q, k, at, strict=True)]

    def tiles(self, model: nn.Module, call: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, as ``get_image_features`` counts them."""
        return [tiles_of(model, size) for size in call["image_sizes"]]

    def pack(
        self, model: nn.Module, call: Mapping[str, Any], tiles: Sequence[Tensor]
    ) -> list[Tensor]:
        """The model's own packing of (tiles, N, D) for each image, newline tokens zero."""
        packed, _ = cast(Any, self.base(model)).pack_image_features(
            tiles,
            call["image_sizes"],
            vision_feature_select_strategy=select_strategy(model, call),
            image_newline=tiles[0].new_zeros(tiles[0].shape[-1]),
        )
        return cast(list[Tensor], packed)

    def _packed(
        self, model: nn.Module, call: Mapping[str, Any], rows: Tensor, first: int
    ) -> list[Tensor]:
        """(tiles, H, [CLS] + N, d) to one (H, [CLS] + tokens, d) for each image."""
        heads, flat, tiles = rows.shape[1], rows.transpose(1, 2).flatten(2), self.tiles(model, call)
        packed = self.pack(model, call, flat[:, first:].split(tiles))
        images = [
            torch.cat([crops[0, :first], image])
            for crops, image in zip(flat.split(tiles), packed, strict=True)
        ]
        return [image.unflatten(1, (heads, -1)).transpose(0, 1) for image in images]


def together(seen: Sequence[Seen]) -> tuple[Tensor, Tensor]:
    """Queries and keys of all calls, (B, H, L, d) each."""
    return torch.cat([s.q for s in seen]), torch.cat([s.k for s in seen])


def tiles_of(model: nn.Module, size: Any) -> int:
    """Tiles of an image of ``size`` (height, width), the crop of the whole included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = cast(Any, model.config)
    side = config.vision_config.image_size
    return cast(int, image_size_to_num_patches(size, config.image_grid_pinpoints, side))
