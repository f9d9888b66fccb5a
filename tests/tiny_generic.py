"""Tiny models of types that have no adapter."""

from __future__ import annotations

from typing import Any

from tiny import IMAGE, Family, _clip, _pixels, _ready, text_config


def deepseek_vl() -> Any:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    config = DeepseekVLConfig(
        vision_config=_clip("siglip_vision_model"),
        text_config=text_config("llama"),
        image_token_id=IMAGE,
    )
    return _ready(DeepseekVLForConditionalGeneration(config))


FAMILIES = {"generic": Family("generic", deepseek_vl, 36, _pixels(48))}
