"""Tiny models of the families whose images are tiles, and of the LLaVA families with video."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from tiny import IMAGE, VIDEO, Family, _clip, _noise, _ready, text_config

PINPOINTS = [[48, 96], [96, 48], [96, 96]]
# (height, width) of image i and the tokens it becomes: 36 of the whole, then the rows of the tiles,
# each with a newline token. The second is unpadded, from 12 × 6 to 12 × 4.
ANYRES = [((48, 96), 36 + 6 * 13), ((80, 30), 36 + 12 * 5), ((90, 90), 36 + 12 * 13)]
AT_MOST_TWO_TILES = [*ANYRES[:2], ((90, 90), 36 + 8 * 9)]
FRAMES = 3


def _model(kind: str, **config: Any) -> Any:
    made = getattr(transformers, f"{kind}Config")(**config)
    return _ready(getattr(transformers, f"{kind}ForConditionalGeneration")(made))


def llava_next(kind: str = "LlavaNext", **more: Any) -> Any:
    return _model(
        kind,
        vision_config=_clip("clip_vision_model"),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        **more,
    )


def llava_next_video() -> Any:
    return llava_next("LlavaNextVideo", video_token_index=VIDEO)


def onevision() -> Any:
    return _model(
        "LlavaOnevision",
        vision_config=_clip("siglip_vision_model"),
        text_config=text_config("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )


def video_llava() -> Any:
    return _model(
        "VideoLlava",
        vision_config=_clip("clip_vision_model"),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def vipllava() -> Any:
    return _model(
        "VipLlava",
        vision_config=_clip("clip_vision_model"),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=[-1, -2, 0],
    )


def aya_vision() -> Any:
    return _model(
        "AyaVision",
        vision_config=_clip("siglip_vision_model"),
        text_config=text_config("cohere2"),
        image_token_index=IMAGE,
    )


def cohere2_vision() -> Any:
    return _model(
        "Cohere2Vision",
        vision_config=_clip("siglip_vision_model"),
        text_config=text_config("cohere2"),
        image_token_id=IMAGE,
        alignment_intermediate_size=32,
    )


def ovis2() -> Any:
    vision = _clip("ovis2") | {"hidden_stride": 2, "vocab_size": 40}
    del vision["model_type"]
    return _model(
        "Ovis2",
        vision_config=vision,
        text_config=text_config("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[92, 93, 94, 95, 96],
        hidden_size=32,
        vocab_size=100,
    )


def perception_lm() -> Any:
    """SigLIP stands in for the Perception Encoder, which needs timm."""
    vision = _clip("siglip_vision_model") | {"model_args": {"embed_dim": 24}}
    return _model(
        "PerceptionLM",
        vision_config=vision,
        text_config=text_config("llama"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
    )


def fast_vlm() -> Any:
    """ConvNeXt stands in for FastViTHD, which needs timm: stride 32 instead of 64."""
    vision = {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 24], "depths": [1, 1, 1, 1]}
    return _model(
        "FastVlm",
        vision_config=vision | {"hidden_size": 24},
        text_config=text_config("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def _sized(sizes: list[Any]) -> tuple[Callable[[int], list[int]], Callable[..., dict[str, Any]]]:
    """Tokens of image i, and its crop and tiles with its size."""

    def images(n: int, seed: int) -> dict[str, Any]:
        height, width = sizes[seed % 3][0]
        tiles = 1 + -(-height // 48) * -(-width // 48)
        size = torch.tensor([[height, width]] * n)
        return {"pixel_values": _noise(seed, n, tiles, 3, 48, 48), "image_sizes": size}

    return lambda seed: [sizes[seed % 3][1]], images


def _videos(n: int, seed: int) -> dict[str, Any]:
    return {"pixel_values_videos": _noise(seed, n, FRAMES, 3, 48, 48)}


def _tiles(side: int, tokens: int) -> tuple[Callable[[int], list[int]], Callable[..., Any]]:
    """Image i is one to three tiles of ``tokens`` tokens."""

    def images(n: int, seed: int) -> dict[str, Any]:
        return {"pixel_values": _noise(seed, 1, 1 + seed % 3, 3, side, side)[0]}

    return lambda seed: [tokens] * (1 + seed % 3), images


def _plm(n: int, seed: int) -> dict[str, Any]:
    return {"pixel_values": _noise(seed, n, 2, 3, 48, 48)}


def _image(side: int) -> Callable[[int, int], dict[str, Any]]:
    return lambda n, seed: {"pixel_values": _noise(seed, n, 3, side, side)}


video = partial(Family, placeholder=VIDEO, images=_videos)
TILES = (
    Family("llava-next", llava_next, *_sized(ANYRES)),
    Family("llava-next-video", llava_next_video, *_sized(ANYRES)),
    video("llava-next-video (video)", llava_next_video, lambda _: [9] * FRAMES),
    Family("llava-onevision", onevision, *_sized(AT_MOST_TWO_TILES)),
    video("llava-onevision (video)", onevision, lambda _: [*[9] * FRAMES, 1]),
    Family("video-llava", video_llava, 36, _image(48)),
    video("video-llava (video)", video_llava, lambda _: [1, 36] * FRAMES),
    Family("vip-llava", vipllava, 36, _image(48)),
    Family("aya-vision", aya_vision, *_tiles(48, 9)),
    Family("command-a-vision", cohere2_vision, *_tiles(48, 9)),
    Family("ovis2", ovis2, *_tiles(48, 9)),
    Family("perception-lm", perception_lm, lambda _: [9, 9], _plm),
    video("perception-lm (video)", perception_lm, lambda _: [9] * FRAMES),
    Family("fastvlm", fast_vlm, 16, _image(128)),
)
