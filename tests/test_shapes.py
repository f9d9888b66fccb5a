"""Published configurations and synthetic prompts: sizes, placeholders, finite numbers, refusals.

The sizes are those of the checkpoints' config.json, the parameters those of their safetensors.
Large models are built on the meta device, where they weigh nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from foveate import shapes
from foveate.adapter import family, text_shape
from foveate.shapes import Prompt

VISION_OF = {"internvl": 16, "llava": 36, "llava-siglip": 36, "llava-dinov2": 576}
EVERY = [
    *("aya-vision", "command-a-vision", "internvl", "llava", "llava-dinov2", "llava-next"),
    *("llava-next-video", "llava-onevision", "llava-siglip", "ovis2", "qwen2.5-vl"),
    *("video-llava", "vip-llava"),
]
VIDEO_OF = {  # vision tokens of two frames, and how many of them are not of a frame
    "internvl": (32, 0),
    "llava-next-video": (18, 0),
    "llava-onevision": (19, 1),
    "qwen2.5-vl": (36, 0),
    "video-llava": (74, 0),
}
ON_META = pytest.mark.parametrize("name", shapes.names())


@pytest.fixture(scope="module")
def published():
    """Shapes on the meta device by name, built once."""
    return {name: shapes.build(name, device="meta") for name in shapes.names()}


def vision_rows(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """How many placeholders each row of a prompt has."""
    wanted = torch.tensor(list(family(model).placeholders(model).values()))
    return torch.isin(ids, wanted).sum(-1)


@pytest.mark.parametrize(
    ("name", "sizes", "billions"),
    [
        # layers, width, heads, kv heads, head width, mlp, vocabulary
        ("llava-1.5-7b", (32, 4096, 32, 32, 128, 11008, 32064), 7.063427072),
        ("llava-1.6-7b", (32, 4096, 32, 32, 128, 11008, 32064), 7.06),
        ("llava-next-video-7b", (32, 4096, 32, 32, 128, 11008, 32064), 7.06),
        ("llava-onevision-0.5b", (24, 896, 14, 2, 64, 4864, 152000), 0.894),
        ("llava-onevision-7b", (28, 3584, 28, 4, 128, 18944, 152128), 8.03),
        ("qwen2.5-vl-3b", (36, 2048, 16, 2, 128, 11008, 151936), 3.754622976),
        ("qwen2.5-vl-7b", (28, 3584, 28, 4, 128, 18944, 152064), 8.292166656),
        ("internvl3-1b", (24, 896, 14, 2, 64, 4864, 151674), 0.938),
        ("internvl3-2b", (28, 1536, 12, 2, 128, 8960, 151674), 2.09),
    ],
)
def test_sizes_are_the_published_ones(published, name: str, sizes: Any, billions: float) -> None:
    model = published[name]
    shape = text_shape(family(model).text(model))
    got = shape.layers, shape.width, shape.heads, shape.kv_heads, shape.head_width
    assert (*got, shape.mlp, shape.vocabulary) == sizes
    exact = len(str(billions)) > 6
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert total == pytest.approx(billions, rel=1e-9 if exact else 1e-3)
    assert len(family(model).text(model).layers) == sizes[0]


def test_the_table_has_every_shape(published) -> None:
    marks = test_sizes_are_the_published_ones.pytestmark
    assert {row[0] for row in marks[0].args[1]} == set(shapes.names())
    assert {model.config.model_type for model in published.values()} <= set(shapes._PIXELS)


@pytest.mark.parametrize(
    ("name", "prompt", "vision"),
    [
        ("llava-1.5-7b", Prompt(), 24 * 24),
        ("llava-1.5-7b", Prompt(images=3), 3 * 576),
        # the whole image, one tile of it, and a newline token per row of the tile
        ("llava-1.6-7b", Prompt(), 576 + 576 + 24),
        ("llava-1.6-7b", Prompt(images=2, image_size=(672, 672)), 2 * (576 + 48 * 49)),
        ("llava-next-video-7b", Prompt(frames=8), 8 * 144),
        ("llava-onevision-0.5b", Prompt(), 729 + 729 + 27),
        # 3 × 3 tiles of 27 × 27 in one raster with newlines, beside the whole image
        ("llava-onevision-0.5b", Prompt(image_size=(1152, 1152)), 729 + 81 * 81 + 81),
        ("llava-onevision-0.5b", Prompt(images=2), 2 * (729 + 1)),
        ("llava-onevision-7b", Prompt(frames=8), 8 * 14 * 14 + 1),
        ("qwen2.5-vl-3b", Prompt(), 24 * 24),
        ("qwen2.5-vl-3b", Prompt(image_size=(1120, 560)), 40 * 20),
        ("qwen2.5-vl-7b", Prompt(frames=8), 4 * 24 * 24),
        ("internvl3-1b", Prompt(), 16 * 16),
        ("internvl3-2b", Prompt(images=5), 5 * 256),
        ("internvl3-2b", Prompt(frames=8), 8 * 256),
    ],
)
def test_vision_tokens_are_the_published_ones(
    published, name: str, prompt: Prompt, vision: int
) -> None:
    ids = shapes.inputs(published[name], prompt)["input_ids"]
    assert ids.shape == (prompt.batch, vision + prompt.text_tokens)


@ON_META
def test_fewer_layers_and_all_else_alike(published, name: str) -> None:
    cut, whole = shapes.build(f"shape:{name}:layers=2", device="meta"), published[name]
    assert len(family(cut).text(cut).layers) == 2
    sizes = {path: parameter.shape for path, parameter in whole.named_parameters()}
    left = {path: parameter.shape for path, parameter in cut.named_parameters()}
    assert left.items() < sizes.items()
    gone = {path.split("language_model.layers.")[1] for path in sizes.keys() - left.keys()}
    depth = len(family(whole).text(whole).layers)
    assert {int(path.split(".")[0]) for path in gone} == set(range(2, depth))


@ON_META
def test_a_shallow_encoder_and_all_else_alike(published, name: str) -> None:
    cut, whole = shapes.build(f"{name}:layers=3,vision=2", device="meta"), published[name]
    assert len(family(cut).text(cut).layers) == 3
    sizes = {path: parameter.shape for path, parameter in whole.named_parameters()}
    left = {path: parameter.shape for path, parameter in cut.named_parameters()}
    assert left.items() < sizes.items()
    seen = [path for path in sizes.keys() - left.keys() if "language_model" not in path]
    assert seen and all(
        ".layers." in path or ".blocks." in path or ".layer." in path for path in seen
    )
    assert shapes.inputs(cut, Prompt())["input_ids"].shape == (
        shapes.inputs(whole, Prompt())["input_ids"].shape
    )


@pytest.mark.parametrize("text", [Prompt(), Prompt(2, images=2), Prompt(3, ragged=True)], ids=str)
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_every_family_takes_its_prompt(models, name: str, text: Prompt) -> None:
    """The model compares placeholders with features; padding and counts are compared here."""
    model = models(name)
    prompt = shapes.inputs(model, text)
    ids = prompt["input_ids"]
    mask = prompt.get("attention_mask", torch.ones_like(ids))
    expected = [text.text_tokens - b * text.ragged for b in range(text.batch)]
    assert ((mask.sum(-1) - vision_rows(model, ids)).tolist()) == expected
    assert bool((ids[mask == 0] == 0).all())
    assert ("attention_mask" in prompt) == text.ragged
    if name in VISION_OF:
        assert vision_rows(model, ids).tolist() == [VISION_OF[name] * text.images] * text.batch
    out = model(**prompt, logits_to_keep=1)
    assert out.logits.shape == (text.batch, 1, 100)


@pytest.mark.parametrize("name", VIDEO_OF)
@torch.no_grad()
def test_video(models, name: str) -> None:
    """Frames cost vision tokens in proportion: per frame, per frame, per pair of frames."""
    model = models(name)
    size = (48, 48) if name == "qwen2.5-vl" else None
    counts = []
    for frames in (2, 4):
        text = Prompt(batch=2, frames=frames, text_tokens=5, image_size=size)
        prompt = shapes.inputs(model, text)
        assert model(**prompt, logits_to_keep=1).logits.shape == (2, 1, 100)
        counts.append(int(vision_rows(model, prompt["input_ids"])[0]))
    two, newline = VIDEO_OF[name]
    assert counts == [two, 2 * (two - newline) + newline]


def test_images_of_a_size(models) -> None:
    ids = shapes.inputs(models("qwen2.5-vl"), Prompt(image_size=(48, 64)))["input_ids"]
    assert int((ids == tiny.IMAGE).sum()) == 6 * 8
    ids = shapes.inputs(models("llava-dinov2"), Prompt(image_size=(56, 40)))["input_ids"]
    assert int((ids == tiny.IMAGE).sum()) == 7 * 5


def test_prompts_are_drawn_from_their_seed(models) -> None:
    def made(seed: int) -> torch.Tensor:
        return shapes.inputs(models("llava"), Prompt(seed=seed))["input_ids"]

    assert torch.equal(made(3), made(3))
    assert not torch.equal(made(3), made(4))


def test_ragged_text_is_padded_like_a_ragged_prompt(models) -> None:
    mask = shapes.text_only(models("llava"), 3, 5, ragged=True)["attention_mask"]
    assert mask.tolist() == [[1] * 5, [0] + [1] * 4, [0] * 2 + [1] * 3]
    assert shapes.text_only(models("llava"), 3, 1, ragged=True)["attention_mask"].all()
    for batch, ragged in ((1, True), (3, False)):
        assert "attention_mask" not in shapes.text_only(models("llava"), batch, 5, ragged=ragged)


def test_text_only_has_no_placeholder(models) -> None:
    ids = shapes.text_only(models("llava"), 3, 200)["input_ids"]
    assert ids.shape == (3, 200)
    assert int(vision_rows(models("llava"), ids).sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_filled_models_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Random weights keep activations near one, layer after layer, so bfloat16 holds them."""
    model = tiny.FAMILIES[name].build().to(dtype)
    shapes.fill(model)
    out = model(**shapes.inputs(model, Prompt(text_tokens=6)), output_hidden_states=True)
    for hidden in (*out.hidden_states, out.logits):
        assert bool(hidden.isfinite().all())
        assert 0.01 < float(hidden.float().std()) < 100


def test_filling_is_repeatable_and_leaves_nothing_constant() -> None:
    first, second = tiny.llava(), tiny.llava()
    for model in (first, second):
        shapes.fill(model)
    for (name, one), two in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)
        if one.ndim > 1 and "position" not in name:
            fan_in = one.numel() // one.shape[0]
            assert float(one.std()) == pytest.approx(fan_in**-0.5, rel=0.15), name


@pytest.mark.heavy
@torch.no_grad()
def test_a_published_shape_runs_in_bfloat16() -> None:
    model = shapes.build("qwen2.5-vl-3b:layers=2")
    prompt = shapes.inputs(model, Prompt(image_size=(112, 112)))
    out = model(**prompt, output_hidden_states=True, logits_to_keep=1)
    assert all(bool(hidden.isfinite().all()) for hidden in (*out.hidden_states, out.logits))
    assert 0.01 < float(out.hidden_states[-1].float().std()) < 100


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape:lava-1.5-7b", "no shape 'lava-1.5-7b'. Did you mean 'llava-1.5-7b'"),
        ("gpt", "Accepted: llava-1.5-7b, llava-1.6-7b"),
        ("shape:", "no shape ''"),
        ("llava-1.5-7b:layers=0", "'layers=0' in 'llava-1.5-7b:layers=0' is not understood"),
        ("llava-1.5-7b:layers=many", "give layers=8"),
        ("llava-1.5-7b:depth=4", "'depth=4' in .* is not understood"),
        ("llava-1.5-7b:", "give layers=8"),
        ("llava-1.5-7b:layers=2,vision=0", "'vision=0' in .* is not understood"),
    ],
)
def test_shapes_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.build(name, device="meta")


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", 0), ("images", 0), ("frames", -1), ("text_tokens", 1), ("image_size", (0, 48))],
)
def test_prompts_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .*give at least"):
        Prompt(**{field: value})


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("llava", Prompt(frames=4), "takes no video, frames=4; give images"),
        ("llava", Prompt(image_size=(64, 48)), r"image_size.*only 48x48"),
        ("llava-siglip", Prompt(image_size=(64, 64)), r"image_size.*only 48x48"),
        ("llava-dinov2", Prompt(image_size=(7, 56)), "image_size.*at least 8x8"),
        ("internvl", Prompt(image_size=(128, 64)), r"image_size.*only 64x64.*images"),
        ("llava-onevision", Prompt(frames=2, image_size=(96, 96)), r"image_size.*only 48x48"),
    ],
)
def test_prompts_that_a_family_refuses(models, name: str, prompt: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.inputs(models(name), prompt)


def test_models_without_a_prompt_are_refused(models, monkeypatch) -> None:
    monkeypatch.setattr(shapes, "_PIXELS", {"internvl": shapes._PIXELS["internvl"]})
    with pytest.raises(ValueError, match=r"for 'llava'; it can for internvl\."):
        shapes.inputs(models("llava"), Prompt())
