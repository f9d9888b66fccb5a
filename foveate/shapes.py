"""``shape:<name>`` models: published configurations with random weights, and prompts for them.

Speed and memory depend on sizes and not on what was learned, so these stand in for checkpoints
nobody wants to download in order to time them. Their answers mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.adapter import family
from foveate.reducer import unknown

PREFIX = "shape:"
_BLOCK = 1_048_583  # prime, so that the rows of no matrix repeat


@dataclass(frozen=True)
class Prompt:
    """A synthetic prompt.

    Attributes:
        batch: samples.
        images: images of each sample; on InternVL, tiles.
        frames: frames of one video per sample, instead of images.
        text_tokens: text tokens of each sample, before and after the images together.
        image_size: (height, width) in pixels; None means what the family's encoder was made for.
        ragged: every further sample has one text token less, and the batch is padded on the left.
        seed: of pixels and text.
    """

    batch: int = 1
    images: int = 1
    frames: int = 0
    text_tokens: int = 40
    image_size: tuple[int, int] | None = None
    ragged: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("images", 1), ("frames", 0), ("text_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}.")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}; give at least (1, 1).")


@dataclass(frozen=True)
class _Pixels:
    """What the encoder gets, and the vision tokens it makes of each item (image or video)."""

    modality: str
    tokens: list[int]
    inputs: dict[str, Any]


def names() -> tuple[str, ...]:
    """The shapes that :func:`build` knows."""
    return tuple(_SHAPES)


def build(
    name: str, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Any:
    """A model of a published configuration with random weights, in eval mode.

    Args:
        name: with or without ``shape:``; ``llava-1.5-7b:layers=8`` has fewer layers in its text
            model, for machines with less memory, and is the same in all else; ``vision=2`` is how
            many its vision encoder has, where only the text model is to be timed. Both:
            ``layers=8,vision=2``.
        dtype: of all weights; they are made in it, so a 7B model takes 15 GB in bfloat16.
        device: where they are made.

    Raises:
        ValueError: for a name that does not exist, with the nearest that does.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = _config(name.removeprefix(PREFIX))
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    fill(model)
    model.generation_config.eos_token_id = None  # random weights must not stop early
    model.generation_config.pad_token_id = 0
    return model.eval()


def _config(text: str) -> Any:
    """The configuration that ``name`` or ``name:layers=n,vision=n`` stands for."""
    name, colon, options = text.partition(":")
    if name not in _SHAPES:
        raise ValueError(unknown("shape", name, _SHAPES))
    config = _SHAPES[name]()
    for option in options.split(",") if colon else ():
        part, _, value = option.partition("=")
        if part not in _DEPTHS or not value.isdigit() or int(value) < 1:
            raise ValueError(
                f"{option!r} in {text!r} is not understood; give layers=8, say, or vision=2."
            )
        _DEPTHS[part](config, int(value))
    return config


def _text_depth(config: Any, layers: int) -> None:
    config.text_config.num_hidden_layers = layers
    kinds = getattr(config.text_config, "layer_types", None)  # Llama has none
    if kinds:
        config.text_config.layer_types = kinds[:layers]


def _vision_depth(config: Any, layers: int) -> None:
    vision = config.vision_config
    if "depth" in vision.to_dict():  # Qwen2.5-VL: windows, but for some layers and the last
        vision.depth = layers
        full = {n for n in vision.fullatt_block_indexes if n < layers}
        vision.fullatt_block_indexes = sorted(full | {layers - 1})
    else:
        vision.num_hidden_layers = layers


_DEPTHS: Mapping[str, Callable[[Any, int], None]] = {"layers": _text_depth, "vision": _vision_depth}


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Weights of fan-in scale, norms of one, biases of zero: activations stay finite in bfloat16.

    Values are drawn once and repeated, which is fast and takes no memory of its own.
    """
    draw = torch.Generator().manual_seed(seed)
    block = torch.rand(_BLOCK, generator=draw).mul_(2).sub_(1)
    scaled: dict[Any, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith(("weight", "bias")):
            parameter.fill_(float(name.endswith("weight")))
            continue
        fan_in = parameter.numel() // parameter.shape[0] if parameter.ndim > 1 else 300
        key = (fan_in, parameter.device, parameter.dtype)
        if key not in scaled:
            scaled[key] = (block * math.sqrt(3 / fan_in)).to(parameter.device, parameter.dtype)
        for part in parameter.view(-1).split(_BLOCK):
            part.copy_(scaled[key][: len(part)])


def inputs(model: nn.Module, prompt: Prompt) -> dict[str, Any]:
    """The arguments of ``forward`` for a synthetic prompt, on the model's device and in its dtype.

    Raises:
        ValueError: for a family without a prompt here, and for a video or an image size that the
            family does not take.
    """
    adapter = family(model)
    config = cast(Any, model.config)
    if config.model_type not in _PIXELS:
        raise ValueError(
            f"foveate cannot make a synthetic prompt for {config.model_type!r}; it can for "
            f"{', '.join(_PIXELS)}."
        )
    pixels = _PIXELS[config.model_type](model, prompt)
    placeholder = adapter.placeholders(model)[pixels.modality]
    rows = _rows(model, prompt, pixels.tokens, placeholder)
    width = max(map(len, rows))
    made: dict[str, Any] = dict(pixels.inputs)
    made["input_ids"] = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    if min(map(len, rows)) < width:
        full = [nn.functional.pad(torch.ones_like(r), (width - len(r), 0)) for r in rows]
        made["attention_mask"] = torch.stack(full)
    if config.model_type == "qwen2_5_vl":
        kind = {"image": 1, "video": 2}[pixels.modality]
        made["mm_token_type_ids"] = (made["input_ids"] == placeholder).int() * kind
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in made.items()
    }


def text_only(
    model: nn.Module, batch: int, rows: int, seed: int = 0, *, ragged: bool = False
) -> dict[str, Any]:
    """A prompt of ``rows`` text tokens per sample and no image; ``ragged`` as in a prompt."""
    ids = _words(model, batch * rows, seed).view(batch, rows)
    made = {"input_ids": ids}
    if ragged and batch > 1:
        padding = torch.arange(batch).clamp(max=rows - 1)[:, None]
        made["attention_mask"] = (torch.arange(rows) >= padding).long()
    return {name: value.to(next(model.parameters()).device) for name, value in made.items()}


def _rows(model: nn.Module, prompt: Prompt, tokens: list[int], placeholder: int) -> list[Tensor]:
    """The input ids of each sample, ``tokens`` being the vision tokens of every item in turn."""
    per_sample = len(tokens) // prompt.batch
    items: Iterator[int] = iter(tokens)
    rows = []
    for b in range(prompt.batch):
        count = max(2, prompt.text_tokens - b * prompt.ragged)
        words = _words(model, count, prompt.seed + b)
        parts = [words[:1]]
        for i in range(per_sample):
            parts.append(torch.full((next(items),), placeholder))
            parts.append(words[1 + i : 2 + i] if i + 1 < per_sample else words[1 + i :])
        rows.append(torch.cat(parts))
    return rows


def _words(model: nn.Module, count: int, seed: int) -> Tensor:
    """Random text ids, none of them a placeholder or among the first few special ones."""
    known = cast(Any, model.config).get_text_config().vocab_size
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(3, min(known, 30_000), (count,), generator=draw)
    for placeholder in family(model).placeholders(model).values():
        words[words == placeholder] = 3
    return words


def _noise(prompt: Prompt, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(prompt.seed))


def _no_video(model: nn.Module, prompt: Prompt) -> None:
    if prompt.frames:
        kind = family(model).family
        raise ValueError(f"{kind} takes no video, frames={prompt.frames}; give images instead.")


def _one_size(prompt: Prompt, side: int, why: str) -> None:
    """Refuse pictures of another size where the encoder takes one size only."""
    if prompt.image_size not in (None, (side, side)):
        raise ValueError(
            f"image_size (height, width) is {prompt.image_size} and only {side}x{side} is taken: "
            f"{why}. Leave the size away."
        )


def _llava_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    _no_video(model, prompt)
    config = cast(Any, model.config)
    vision = config.vision_config
    side = vision.image_size
    if vision.model_type == "dinov2":  # its position grid is not the size it is used at
        side = math.isqrt(config.image_seq_length) * vision.patch_size
    else:
        _one_size(prompt, side, "the encoder's positions are for that size")
    height, width = prompt.image_size or (side, side)
    if min(height, width) < vision.patch_size:
        least = f"{vision.patch_size}x{vision.patch_size}, one patch"
        raise ValueError(f"image_size is {prompt.image_size}; give at least {least}.")
    count = prompt.batch * prompt.images
    each = (height // vision.patch_size) * (width // vision.patch_size)
    return _Pixels(
        "image", [each] * count, {"pixel_values": _noise(prompt, count, 3, height, width)}
    )


def _video_llava_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    """Frames bring their [CLS] along."""
    if not prompt.frames:
        return _llava_pixels(model, prompt)
    vision = cast(Any, model.config).vision_config
    side = vision.image_size
    _one_size(prompt, side, "the encoder's positions are for that size")
    each = (side // vision.patch_size) ** 2 + 1
    pixels = _noise(prompt, prompt.batch, prompt.frames, 3, side, side)
    tokens = [each * prompt.frames] * prompt.batch
    return _Pixels("video", tokens, {"pixel_values_videos": pixels})


def _anyres_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    """The whole image and its tiles; on OneVision each of several images is one tile."""
    _no_video(model, prompt)
    adapter, config = cast(Any, family(model)), cast(Any, model.config)
    side, count = config.vision_config.image_size, prompt.batch * prompt.images
    size = list(prompt.image_size or (side, side))
    given = {"image_sizes": torch.tensor([size] * count)}
    if config.model_type == "llava_onevision":
        given["batch_num_images"] = torch.tensor([prompt.images] * prompt.batch)
    tiles = adapter.tiles(model, given)
    given["pixel_values"] = _noise(prompt, count, tiles[0], 3, side, side)
    patches = (side // config.vision_config.patch_size) ** 2
    packed = adapter.pack(model, given, [torch.zeros(n, patches, 1) for n in tiles])
    return _Pixels("image", [len(image) for image in packed], given)


def _anyres_or_video_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    """Images, or frames brought to one size and pooled; OneVision adds a newline token."""
    if not prompt.frames:
        return _anyres_pixels(model, prompt)
    config = cast(Any, model.config)
    side, newline = config.vision_config.image_size, config.model_type == "llava_onevision"
    _one_size(prompt, side, "every frame of a video is brought to it")
    wide = side // config.vision_config.patch_size
    wide = math.ceil(wide / 2) if newline else wide // config.spatial_pool_stride
    pixels = _noise(prompt, prompt.batch, prompt.frames, 3, side, side)
    tokens = [wide * wide * prompt.frames + newline] * prompt.batch
    return _Pixels("video", tokens, {"pixel_values_videos": pixels})


def _tile_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    """One tile per image, squares of patches becoming tokens."""
    _no_video(model, prompt)
    vision = cast(Any, model.config).vision_config
    side = vision.image_size
    _one_size(prompt, side, "larger pictures come as several tiles, given as images")
    count, stride = prompt.batch * prompt.images, cast(Any, family(model)).stride(model)
    each = (side // vision.patch_size // stride) ** 2
    return _Pixels("image", [each] * count, {"pixel_values": _noise(prompt, count, 3, side, side)})


def _qwen_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    vision = cast(Any, model.config).vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    step = patch * merge
    size = prompt.image_size or (24 * step, 24 * step)
    height, width = (max(1, round(s / step)) * merge for s in size)
    times = math.ceil(prompt.frames / vision.temporal_patch_size) if prompt.frames else 1
    items = prompt.batch * (1 if prompt.frames else prompt.images)
    values = vision.in_channels * vision.temporal_patch_size * patch * patch
    pixels = _noise(prompt, items * times * height * width, values)
    grid = torch.tensor([[times, height, width]] * items)
    tokens = [times * height * width // merge**2] * items
    if prompt.frames:
        return _Pixels("video", tokens, {"pixel_values_videos": pixels, "video_grid_thw": grid})
    return _Pixels("image", tokens, {"pixel_values": pixels, "image_grid_thw": grid})


def _internvl_pixels(model: nn.Module, prompt: Prompt) -> _Pixels:
    """One tile per image; a frame of a video is a tile as well."""
    config = cast(Any, model.config)
    side, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    _one_size(prompt, side, "larger pictures come as several tiles, given as images")
    count = prompt.batch * (prompt.frames or prompt.images)
    each = int(side // patch * config.downsample_ratio) ** 2
    return _Pixels("image", [each] * count, {"pixel_values": _noise(prompt, count, 3, side, side)})


_PIXELS: Mapping[str, Callable[[nn.Module, Prompt], _Pixels]] = {
    "llava": _llava_pixels,
    "vipllava": _llava_pixels,
    "video_llava": _video_llava_pixels,
    "llava_next": _anyres_pixels,
    "llava_next_video": _anyres_or_video_pixels,
    "llava_onevision": _anyres_or_video_pixels,
    "aya_vision": _tile_pixels,
    "cohere2_vision": _tile_pixels,
    "ovis2": _tile_pixels,
    "qwen2_5_vl": _qwen_pixels,
    "internvl": _internvl_pixels,
}


def _qwen2(
    width: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": False,
    } | more


def _llava_7b(kind: str, **more: Any) -> Any:
    """llava-hf/llava-1.5-7b-hf and its successors: CLIP ViT-L/14 at 336 px, Vicuna 7B."""
    import transformers

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    config = getattr(transformers, f"{kind}Config")
    return config(vision_config=vision, text_config=text, **{"image_token_index": 32000} | more)


def _onevision(text: dict[str, Any]) -> Any:
    """llava-hf/llava-onevision-qwen2-*-ov-hf: SigLIP so400m/14 at 384 px (26 layers), Qwen2."""
    from transformers import LlavaOnevisionConfig

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    tied = text["tie_word_embeddings"]
    return LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied)


def _qwen25vl(text: dict[str, Any]) -> Any:
    """Qwen/Qwen2.5-VL-*-Instruct: windowed ViT of 32 layers, M-RoPE."""
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text | {"model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _internvl3(text: dict[str, Any]) -> Any:
    """OpenGVLab/InternVL3-*-hf: InternViT-300M at 448 px, Qwen2.5."""
    from transformers import InternVLConfig

    return InternVLConfig(vision_config={}, text_config=text, tie_word_embeddings=False)


_SHAPES: Mapping[str, Callable[[], Any]] = {
    "llava-1.5-7b": lambda: _llava_7b("Llava"),
    "llava-1.6-7b": lambda: _llava_7b("LlavaNext"),
    "llava-next-video-7b": lambda: _llava_7b(
        "LlavaNextVideo", image_token_index=32001, video_token_index=32000
    ),
    "llava-onevision-0.5b": lambda: _onevision(
        _qwen2(896, 4864, 24, 14, 2, 152000, tie_word_embeddings=True)
    ),
    "llava-onevision-7b": lambda: _onevision(_qwen2(3584, 18944, 28, 28, 4, 152128)),
    "qwen2.5-vl-3b": lambda: _qwen25vl(
        _qwen2(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True)
    ),
    "qwen2.5-vl-7b": lambda: _qwen25vl(_qwen2(3584, 18944, 28, 28, 4, 152064)),
    "internvl3-1b": lambda: _internvl3(_qwen2(896, 4864, 24, 14, 2, 151674)),
    "internvl3-2b": lambda: _internvl3(_qwen2(1536, 8960, 28, 12, 2, 151674)),
}
