"""Tiny models of the families whose images are tiles, and of the LLaVA families with video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny import (
    IMAGE,
    VIDEO,
    Family,
    Picture,
    _clip,
    _noise,
    _ready,
    concatenated,
    internvl,
    text_config,
)
from torch import Tensor, nn

PINPOINTS = [[48, 96], [96, 48], [96, 96]]
FRAMES = 3
START, BETWEEN, END, COLUMN = 92, 93, 94, 95


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


def vip_llava() -> Any:
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
        text_config=text_config("cohere2", sliding_window=256),
        image_token_index=IMAGE,
    )


def command_a_vision() -> Any:
    return _model(
        "Cohere2Vision",
        vision_config=_clip("siglip_vision_model"),
        text_config=text_config("cohere2", sliding_window=256),
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
        visual_indicator_token_ids=[START, BETWEEN, END, 95, 96],
        hidden_size=32,
        vocab_size=100,
    )


def perception_lm() -> Any:
    """SigLIP stands in for the Perception Encoder, which needs timm."""
    return _model(
        "PerceptionLM",
        vision_config=_clip("siglip_vision_model") | {"model_args": {"embed_dim": 24}},
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


def molmo2() -> Any:
    """Two rotary tables; features of two layers."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    text = text_config("molmo2_text", head_dim=8, rope_parameters=rope, rope_scaling_layers=[1, 3])
    vision = _clip("molmo2_vision") | {"image_size": [48, 48], "num_key_value_heads": 4}
    vision |= {"head_dim": 6}
    pooling = {
        "vision_feature_layer": [2, 0],
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 32,
        "text_hidden_size": 32,
    }
    return _model(
        "Molmo2",
        vision_config=vision,
        adapter_config=pooling,
        text_config=text,
        image_patch_id=IMAGE,
    )


def _pixels(*shape: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"pixel_values": _noise(seed, 1, *shape)}


def _tiled(n: int, side: int) -> Callable[[int], dict[str, Any]]:
    """Tiles without an image that they belong to: (tiles, 3, H, W)."""
    return lambda seed: {"pixel_values": _noise(seed, 1, n, 3, side, side)[0]}


def _anyres(high: int, wide: int, tiles: int) -> Callable[[int], dict[str, Any]]:
    def make(seed: int) -> dict[str, Any]:
        size = torch.tensor([[high, wide]])
        return {"pixel_values": _noise(seed, 1, tiles, 3, 48, 48), "image_sizes": size}

    return make


def _frames(seed: int) -> dict[str, Any]:
    return {"pixel_values_videos": _noise(seed, 1, FRAMES, 3, 48, 48)}


def _picture(make: Callable[[int], dict[str, Any]], *groups: int, kind: int = IMAGE) -> Picture:
    return Picture([kind] * sum(groups), groups, make)


def _family(name: str, build: Callable[[], Any], ordinary: Picture, **more: Any) -> Family:
    groups, ids, tokens = ordinary.groups, ordinary.ids, sum(ordinary.groups)
    return Family(
        name, build, tokens, lambda n, seed: ordinary.make(seed), ids=ids, groups=groups, **more
    )


def _images(samples: list[list[dict[str, Any]]]) -> list[list[Tensor]]:
    return [[p["pixel_values"] for p in sample if "pixel_values" in p] for sample in samples]


def _filled(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """All pictures; images with fewer tiles than others are filled up, as processors do."""
    most = max((image.shape[1] for images in _images(samples) for image in images), default=0)

    def full(picture: dict[str, Any]) -> dict[str, Any]:
        if "pixel_values" not in picture:
            return picture
        tiles = picture["pixel_values"]
        more = (0, 0, 0, 0, 0, 0, 0, most - tiles.shape[1])
        return picture | {"pixel_values": nn.functional.pad(tiles, more)}

    return concatenated([[full(picture) for picture in sample] for sample in samples])


def _counted(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """With the number of each sample's images where several of a sample have one tile each."""
    images, made = _images(samples), _filled(samples)
    if any(image.shape[1] == 1 for shown in images for image in shown):
        made["batch_num_images"] = torch.tensor([len(shown) for shown in images])
    return made


# Tokens of an anyres image: 36 of the whole, then the rows of the tiles with a newline token each.
# The tall one is unpadded, from 12 × 6 to 12 × 4.
WIDE = _picture(_anyres(48, 96, 3), 36 + 6 * 13)
TALL = _picture(_anyres(80, 30, 3), 36 + 12 * 5)
LARGE = _picture(_anyres(90, 90, 5), 36 + 12 * 13)
BROUGHT_TO_TWO_TILES = _picture(_anyres(90, 90, 5), 36 + 8 * 9)
ONE_TILE = _picture(_anyres(90, 90, 1), 36 + 1)
POOLED = _picture(_frames, *[9] * FRAMES, kind=VIDEO)
POOLED_WITH_NEWLINE = _picture(_frames, *[9] * FRAMES, 1, kind=VIDEO)
FRAMES_WITH_CLS = _picture(_frames, *[1, 36] * FRAMES, kind=VIDEO)
ONE_IMAGE = _picture(_pixels(3, 48, 48), 36)
TWO_TILES = _picture(_pixels(2, 3, 48, 48), 9, 9)


def _of_tiles(name: str, build: Callable[[], Any], side: int, tokens: int) -> Family:
    """An image is one tile, a large one three; nothing tells the model which belong together."""
    small, large = (_picture(_tiled(n, side), *[tokens] * n) for n in (1, 3))
    more = {"large": large}
    mixed = [[["image"], [], ["image", "large", "large"]]]
    return _family(name, build, small, more=more, turn=["large", "image"], mixed=mixed)


def _of_both(
    name: str, build: Callable[[], Any], image: Picture, video: Picture, **more: Any
) -> list[Family]:
    """A family once with images and once with video, and with both in one batch."""
    more = {"mixed": [[["image"], [], ["image"] * 3, ["video"]]]} | more
    more["more"] = more.get("more", {}) | {"video": video}
    alone = _family(f"{name} (video)", build, video, encoder=more.get("encoder", ""))
    return [_family(name, build, image, **more), alone]


def _ovis2() -> Family:
    """Tiles stand between indicator tokens, which are text that gets features of its own."""
    ids = [START, *[IMAGE] * 9, END]
    large = [START, *[IMAGE] * 9, BETWEEN, *[IMAGE] * 9, END]
    more = {"large": Picture(large, [9, 9], _tiled(2, 48))}
    mixed = [[["image"], [], ["image", "large", "large"]]]
    small = Picture(ids, [9], _tiled(1, 48))
    return _family("ovis2", ovis2, small, more=more, turn=["large", "image"], mixed=mixed)


def _cells(index: Tensor) -> Tensor:
    """Numbers of patches (rows, columns), -1 for none, to those of 2 × 2 cells, (cells, 4)."""
    even = nn.functional.pad(index, (0, index.shape[1] % 2, 0, index.shape[0] % 2), value=-1)
    return even.unfold(0, 2, 2).unfold(1, 2, 2).flatten(2).flatten(0, 1)


def _molmo2() -> Family:
    """Images are a whole of 3 × 3 tokens and crops of 3 × 6 or, cut off at the bottom, 3 × 3."""
    whole = torch.arange(36).view(6, 6)
    two = torch.cat([whole, whole + 36], dim=1)

    def image(crops: int, index: Tensor) -> Picture:
        table = torch.cat([_cells(whole), _cells(index + 36)])
        high, wide = -(-index.shape[0] // 2), -(-index.shape[1] // 2)

        def make(seed: int) -> dict[str, Any]:
            pixels = _noise(seed, 1, crops, 36, 192)[0]
            grids = torch.tensor([[3, 3, high, wide]])
            return {"pixel_values": pixels, "image_token_pooling": table, "image_grids": grids}

        rows = [i for _ in range(high) for i in (*[IMAGE] * wide, COLUMN)]
        return Picture([START, *[IMAGE] * 9, END, START, *rows, END], [9, high * wide], make)

    def frames(seed: int) -> dict[str, Any]:
        return {
            "pixel_values_videos": _noise(seed, 1, 2, 36, 192)[0],
            "video_token_pooling": torch.cat([_cells(whole), _cells(whole + 36)]),
            "video_grids": torch.tensor([[2, 3, 3]]),
        }

    def numbered(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Patches are numbered through the batch."""
        start, shifted = 0, []
        for picture in (picture for sample in samples for picture in sample):
            pixels = picture.get("pixel_values", picture.get("pixel_values_videos"))
            name = "image" if "pixel_values" in picture else "video"
            table = picture[f"{name}_token_pooling"]
            table = torch.where(table >= 0, table + start, -1)
            shifted.append(picture | {f"{name}_token_pooling": table})
            start += pixels.shape[0] * pixels.shape[1]
        return concatenated([shifted])

    def marks(ids: Tensor) -> dict[str, Tensor]:
        return {
            "mm_token_type_ids": torch.isin(ids, torch.tensor([IMAGE, START, COLUMN, END])).int()
        }

    video = Picture([START, *[IMAGE] * 9, END, 7, START, *[IMAGE] * 9, END], [9, 9], frames)
    mixed = [[["image"], [], ["image", "small", "small"]], [["video"], [], ["video", "video"]]]
    return _family(
        "molmo-2",
        molmo2,
        image(3, two),
        more={"small": image(2, whole[:5]), "video": video},
        turn=["small", "image"],
        mixed=mixed,
        collate=numbered,
        marks=marks,
    )


SIZES = {"tall": TALL, "large": LARGE}
ANYRES = {"more": SIZES, "turn": ["image", "tall"], "collate": _filled}
OF_SIZES = [["large"], [], ["image", "tall", "large"]]
FAMILIES = {
    family.name: family
    for family in (
        _family("llava-next", llava_next, WIDE, mixed=[OF_SIZES], **ANYRES),
        *_of_both(
            "llava-next-video",
            llava_next_video,
            WIDE,
            POOLED,
            mixed=[[*OF_SIZES, ["video"]]],
            **ANYRES,
        ),
        *_of_both(
            "llava-onevision",
            onevision,
            WIDE,
            POOLED_WITH_NEWLINE,
            more={"tall": TALL, "large": BROUGHT_TO_TWO_TILES, "one of several": ONE_TILE},
            turn=["image", "tall"],
            mixed=[OF_SIZES, [["large"], [], ["one of several"] * 3, ["video"]]],
            collate=_counted,
        ),
        *_of_both("video-llava", video_llava, ONE_IMAGE, FRAMES_WITH_CLS),
        _family("vip-llava", vip_llava, ONE_IMAGE),
        _of_tiles("aya-vision", aya_vision, 48, 9),
        _of_tiles("command-a-vision", command_a_vision, 48, 9),
        _of_tiles("internvl-tiles", internvl, 64, 16),
        _ovis2(),
        _molmo2(),
        *_of_both("perception-lm", perception_lm, TWO_TILES, POOLED, encoder="timm_wrapper"),
        _family("fastvlm", fast_vlm, _picture(_pixels(3, 128, 128), 16), encoder="timm_wrapper"),
    )
}
