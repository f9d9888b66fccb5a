"""Tiny models with M-RoPE: any image size, video, deepstack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tiny
import torch
from tiny import IMAGE, VIDEO, Family, Picture, _noise, _ready, modalities, text_config
from torch import Tensor

BEGIN_VIDEO, END_VIDEO, TIME = 94, 95, 7
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    } | more


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config=_vision(embed_dim=32, mlp_ratio=2),
        text_config=text_config("qwen2_vl_text", rope_parameters=ROPE),
        **IDS,
    )
    return _ready(Qwen2VLForConditionalGeneration(config))


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = _vision(
        intermediate_size=32,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1, 2],
    )
    text = text_config("qwen3_vl_text", head_dim=8, rope_parameters=ROPE)
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **IDS)
    return _ready(Qwen3VLForConditionalGeneration(config))


def glm4v() -> Any:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    vision = _vision(intermediate_size=32, out_hidden_size=32, image_size=32)
    config = Glm4vConfig(
        vision_config=vision,
        text_config=text_config("glm4v_text", rope_parameters=ROPE),
        image_start_token_id=92,
        image_end_token_id=93,
        video_start_token_id=BEGIN_VIDEO,
        video_end_token_id=END_VIDEO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return _ready(Glm4vForConditionalGeneration(config))


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    vision = _vision(
        intermediate_size=32,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1, 2],
    )
    text = text_config("qwen3_vl_moe_text", head_dim=8, rope_parameters=ROPE, **experts)
    config = Qwen3VLMoeConfig(vision_config=vision, text_config=text, **IDS)
    return _ready(Qwen3VLMoeForConditionalGeneration(config))


def glm4v_moe() -> Any:
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    rope = ROPE | {"mrope_section": [1, 1, 0]}
    text = text_config("glm4v_moe_text", head_dim=8, rope_parameters=rope, **experts)
    config = Glm4vMoeConfig(
        vision_config=_vision(intermediate_size=32, out_hidden_size=32, image_size=32),
        text_config=text | {"n_group": 1, "topk_group": 1},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return _ready(Glm4vMoeForConditionalGeneration(config))


def _patches(modality: str, t: int, h: int, w: int) -> Callable[[int], dict[str, Any]]:
    name = "pixel_values" if modality == "image" else "pixel_values_videos"

    def make(seed: int) -> dict[str, Any]:
        grid = torch.tensor([[t, h, w]])
        return {name: _noise(seed, 1, t * h * w, 96)[0], f"{modality}_grid_thw": grid}

    return make


def _ordinary(n: int, seed: int) -> dict[str, Any]:
    made = [_patches("image", 1, 8, 12)(seed + i) for i in range(n)]
    return {name: torch.cat([m[name] for m in made]) for name in made[0]}


def _glm_modalities(ids: Tensor) -> dict[str, Tensor]:
    """Frames of a video stand on placeholders of images, between marks."""
    inside = (ids == BEGIN_VIDEO).cumsum(-1) - (ids == END_VIDEO).cumsum(-1)
    return {"mm_token_type_ids": ((ids == IMAGE) * (1 + inside)).int()}


SMALL = Picture([IMAGE] * 8, [8], _patches("image", 1, 4, 8))
WHOLE = Picture([VIDEO] * 24, [12, 12], _patches("video", 2, 6, 8))
TIMED = Picture([VIDEO] * 12 + [TIME, 6] + [VIDEO] * 12, [12, 12], _patches("video", 2, 6, 8))
MARKED = Picture(
    [BEGIN_VIDEO, *[IMAGE] * 12, TIME, *[IMAGE] * 12, END_VIDEO],
    [12, 12],
    _patches("video", 2, 6, 8),
)
MIXED = [["small", "image"], [], ["video", "image"], ["video"]]

FAMILIES = {
    "qwen2.5-vl": replace(
        tiny.FAMILIES["qwen2.5-vl"], more={"small": SMALL, "video": WHOLE}, mixed=[MIXED]
    ),
    "qwen2-vl": Family(
        "qwen2-vl",
        qwen2_vl,
        24,
        _ordinary,
        modalities,
        more={"small": SMALL, "video": WHOLE},
        mixed=[MIXED],
    ),
    "qwen3-vl": Family(
        "qwen3-vl",
        qwen3_vl,
        24,
        _ordinary,
        modalities,
        more={"small": SMALL, "video": TIMED},
        mixed=[MIXED],
    ),
    "glm-4v": Family(
        "glm-4v",
        glm4v,
        24,
        _ordinary,
        _glm_modalities,
        more={"small": SMALL, "video": MARKED},
        mixed=[[["small", "image"], [], ["image"]], [["video", "video"], [], ["video"]]],
    ),
}
