"""Tiny multimodal models, built in process from configs. No weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYERS = 6
IMAGE, VIDEO, PAD = 90, 91, 0


@dataclass(frozen=True)
class Picture:
    """An image or video: its ids in the prompt, tokens of each group, arguments from a seed."""

    ids: Sequence[int]
    groups: Sequence[int]
    make: Callable[[int], dict[str, Any]]


Shown = int | Sequence[str]  # what a sample shows: n ordinary images, or pictures by name


def concatenated(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The arguments of all pictures of all samples, one after the other."""
    pictures = [picture for sample in samples for picture in sample]
    names = dict.fromkeys(name for picture in pictures for name in picture)
    return {name: torch.cat([p[name] for p in pictures if name in p]) for name in names}


@dataclass(frozen=True)
class Family:
    """A family's tiny model and how to make a prompt for it.

    Attributes:
        build: the model, in eval mode.
        image_tokens: vision tokens of one ordinary image.
        images: arguments of ``forward`` for n ordinary images.
        marks: further arguments (B, L), from the ids.
        ids: the ids of an ordinary image, where they are not placeholders alone.
        groups: the tokens of its groups, where it is not one.
        collate: the arguments of a batch from those of each sample's pictures.
        more: pictures besides the ordinary image.
        turn: the pictures, by name, that n images are in turn.
        encoder: the type of the real encoder, where another stands in for it.
        mixed: batches of different pictures that the family takes in one call.
    """

    name: str
    build: Callable[[], Any]
    image_tokens: int
    images: Callable[[int, int], dict[str, Any]]
    marks: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    ids: Sequence[int] = ()
    groups: Sequence[int] = ()
    collate: Callable[[list[list[dict[str, Any]]]], dict[str, Any]] = concatenated
    more: Mapping[str, Picture] = field(default_factory=dict)
    turn: Sequence[str] = ("image",)
    encoder: str = ""
    mixed: Sequence[Sequence[Sequence[str]]] = ()

    def pictures(self, shown: Shown) -> list[Picture]:
        """The pictures of one sample."""
        ordinary = Picture(
            self.ids or [IMAGE] * self.image_tokens,
            self.groups or [self.image_tokens],
            lambda seed: self.images(1, seed),
        )
        names = shown
        if isinstance(shown, int):
            names = [self.turn[i % len(self.turn)] for i in range(shown)]
        return [{"image": ordinary, **self.more}[name] for name in names]


def text_config(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def _ready(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def _clip(kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
    }


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_clip("clip_vision_model"),
        text_config=text_config("llama"),
        image_token_index=IMAGE,
    )
    return _ready(LlavaForConditionalGeneration(config))


def llava_dino() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 3, "mlp_ratio": 2}
    vision |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 8}
    config = LlavaConfig(
        vision_config=vision, text_config=text_config("llama"), image_token_index=IMAGE
    )
    return _ready(LlavaForConditionalGeneration(config))


def llava_siglip() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_clip("siglip_vision_model"),
        text_config=text_config("qwen2"),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    return _ready(LlavaForConditionalGeneration(config))


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {
        "model_type": "internvl_vision",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [64, 64],
        "patch_size": [8, 8],
    }
    config = InternVLConfig(
        vision_config=vision, text_config=text_config("qwen2"), image_token_id=IMAGE
    )
    return _ready(InternVLForConditionalGeneration(config))


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "tokens_per_second": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text_config("qwen2_5_vl_text", rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return _ready(Qwen2_5_VLForConditionalGeneration(config))


def _pixels(side: int) -> Callable[[int, int], dict[str, Any]]:
    def images(n: int, seed: int) -> dict[str, Any]:
        return {"pixel_values": _noise(seed, n, 3, side, side)}

    return images


def _qwen(n: int, seed: int) -> dict[str, Any]:
    grid = torch.tensor([[1, 12, 12]] * n)
    return {"pixel_values": _noise(seed, n * 144, 3 * 2 * 4 * 4), "image_grid_thw": grid}


def modalities(ids: Tensor) -> dict[str, Tensor]:
    """What M-RoPE is made from: 1 for images, 2 for video."""
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _noise(seed: int, first: int, *shape: int) -> Tensor:
    """Image i of seed s is the noise of seed s + i, so batches can be compared with singles."""
    per = [
        torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed + i))
        for i in range(first)
    ]
    return torch.stack(per)


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", llava, 36, _pixels(48)),
        Family("llava-dinov2", llava_dino, 49, _pixels(56)),
        Family("llava-siglip", llava_siglip, 36, _pixels(48)),
        Family("internvl", internvl, 16, _pixels(64)),
        Family("qwen2.5-vl", qwen2_5_vl, 36, _qwen, modalities),
    )
}


def prompt(
    family: Family, images: Sequence[Shown], *, seed: int = 0, text: int = 6
) -> dict[str, Any]:
    """A left-padded batch; sample b shows ``images[b]``, with some text before and after.

    Image and text contents depend on (seed, sample, image) only, so sample b alone is
    ``prompt(family, [images[b]], seed=seed + 10 * b)``.
    """
    rows, samples = [], []
    for b, shown in enumerate(images):
        own, pictures = seed + 10 * b, family.pictures(shown)
        draw = torch.Generator().manual_seed(own)
        ids = torch.randint(3, 80, (3 + text + own % 4,), generator=draw).tolist()
        ids[2:2] = [i for p in pictures for i in (5, *p.ids)][1:]
        rows.append(ids)
        samples.append([p.make(own + i) for i, p in enumerate(pictures)])
    width = max(map(len, rows))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[PAD] * (width - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in rows]),
    }
    if any(samples):
        inputs |= family.collate(samples)
    return inputs | family.marks(inputs["input_ids"])


# Further families; they use what is above.
import tiny_generic  # noqa: E402
import tiny_masks  # noqa: E402
import tiny_rope  # noqa: E402
import tiny_tiles  # noqa: E402

FAMILIES |= tiny_rope.FAMILIES
FAMILIES |= tiny_masks.FAMILIES
FAMILIES |= tiny_generic.FAMILIES
FAMILIES |= tiny_tiles.FAMILIES
