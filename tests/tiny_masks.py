"""Tiny models whose rows see each other both ways, tiles in one item, and rows with breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import IMAGE, LAYERS, Family, Picture, _clip, _noise, _pixels, _ready, text_config
from torch import Tensor, nn

BREAK, END, TILE = 96, 97, 98


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = text_config(
        "gemma3_text",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=256,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3),
    )
    config = Gemma3Config(
        vision_config=_clip("siglip_vision_model") | {"image_size": 64},
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    return _small(_ready(Gemma3ForConditionalGeneration(config)))


def _small(model: Any) -> Any:
    """Gemma's norms multiply by 1 + weight; without the 1 logits are as small as elsewhere."""
    model.model.language_model.norm.weight.data -= 1
    return model


def paligemma() -> Any:
    return _paligemma(text_config("gemma", head_dim=8))


def paligemma2() -> Any:
    more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256}
    return _paligemma(text_config("gemma2", **more))


def _paligemma(text: dict[str, Any]) -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=_clip("siglip_vision_model") | {"projection_dim": 32},
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=100,
    )
    return _small(_ready(PaliGemmaForConditionalGeneration(config)))


def smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _ready(SmolVLMForConditionalGeneration(_idefics(SmolVLMConfig, "smolvlm_vision")))


def idefics3() -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _ready(Idefics3ForConditionalGeneration(_idefics(Idefics3Config, "idefics3_vision")))


def _idefics(kind: Any, vision: str) -> Any:
    text = text_config("llama")
    return kind(vision_config=_clip(vision), text_config=text, image_token_id=IMAGE, scale_factor=2)


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        vision_config=_clip("pixtral"),
        text_config=text_config("mistral", sliding_window=None, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return _ready(Mistral3ForConditionalGeneration(config))


def pixtral() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_clip("pixtral"),
        text_config=text_config("mistral", sliding_window=None, head_dim=8),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _ready(LlavaForConditionalGeneration(config))


def _images(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def _prefix(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(ids)}


def _tiles(n: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"pixel_values": _noise(seed, 1, n, 3, 48, 48)}


def _tiled(n: int) -> list[int]:
    """Ids of an image of n tiles of nine tokens."""
    return [i for _ in range(n) for i in (TILE, *[IMAGE] * 9)]


def _filled(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The tiles of each sample, filled up with empty ones: (samples, tiles, 3, H, W)."""
    shown = [torch.cat([p["pixel_values"][0] for p in s]) if s else None for s in samples]
    most = max(len(tiles) for tiles in shown if tiles is not None)
    full = torch.zeros(len(samples), most, 3, 48, 48)
    for b, tiles in enumerate(shown):
        if tiles is not None:
            full[b, : len(tiles)] = tiles
    return {"pixel_values": full}


def _sized(high: int, wide: int) -> Callable[[int], dict[str, Any]]:
    def make(seed: int) -> dict[str, Any]:
        pixels = _noise(seed, 1, 3, high, wide)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[high, wide]])}

    return make


def _broken(high: int, wide: int) -> list[int]:
    """Ids of rows of tokens with breaks between them."""
    rows = [i for _ in range(high) for i in (*[IMAGE] * wide, BREAK)]
    return [*rows[:-1], END]


def _bottom_right(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Images padded to the largest."""
    images = [p for sample in samples for p in sample]
    sizes = torch.cat([p["image_sizes"] for p in images])
    high, wide = sizes.amax(0).tolist()
    pixels = [
        nn.functional.pad(p["pixel_values"], (0, wide - w, 0, high - h))
        for p, (h, w) in zip(images, sizes.tolist(), strict=True)
    ]
    return {"pixel_values": torch.cat(pixels), "image_sizes": sizes}


def _many(make: Callable[[int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
    return lambda n, seed: make(seed)  # prompts are made of one image at a time


def _of_tiles(name: str, build: Callable[[], Any]) -> Family:
    return Family(
        name,
        build,
        27,
        _many(_tiles(3)),
        ids=_tiled(3),
        groups=[9, 9, 9],
        collate=_filled,
        more={"small": Picture(_tiled(1), [9], _tiles(1))},
        mixed=[[["small", "image"], [], ["image"], ["small"]]],
    )


def _of_rows(name: str, build: Callable[[], Any], step: int) -> Family:
    """Images of 6 × 4 tokens, and of 2 × 8, each token ``step`` pixels wide."""
    wide = Picture(_broken(2, 8), [16], _sized(2 * step, 8 * step))
    return Family(
        name,
        build,
        24,
        _many(_sized(6 * step, 4 * step)),
        ids=_broken(6, 4),
        collate=_bottom_right,
        more={"wide": wide},
        mixed=[[["wide", "image"], [], ["image", "wide", "wide"]]],
    )


FAMILIES = {
    family.name: family
    for family in (
        Family("gemma-3", gemma3, 16, _pixels(64), _images),
        Family("paligemma", paligemma, 36, _pixels(48), _prefix),
        Family("paligemma-2", paligemma2, 36, _pixels(48), _prefix),
        _of_tiles("smolvlm", smolvlm),
        _of_tiles("idefics3", idefics3),
        _of_rows("mistral-3", mistral3, 16),
        _of_rows("pixtral", pixtral, 8),
    )
}
