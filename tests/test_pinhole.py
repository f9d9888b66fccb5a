"""pinhole: packing equals separate chats, weights merge, parts and folders are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.pinhole import weights
from foveate.pinhole.packed import Rows, Sizes, Student

SIZES = Sizes(
    layers=3, heads=3, kv_heads=1, theta=10_000.0, norm_eps=1e-5, vision_layers=2, vision_heads=2
)
IMAGE = 90


def tiny() -> Any:
    """A LLaVA of pinhole's layout, random weights: 3 layers of 192, DINOv2 of 3 of 128."""
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        layerscale_value=0.5,
    )
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def student(model: Any) -> Student:
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    table = state["model.vision_tower.embeddings.position_embeddings"]
    made = Student(state, SIZES, table, rank=4, vision_rank=2, dtype=torch.float32)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.05)
    return made


def rows(pixels: Tensor, segments: list[list[int]]) -> Rows:
    """One row: header 5 6, 16 image tokens, newline 7, then the segments; every token a target."""
    prefix = torch.tensor([5, 6] + [IMAGE] * 16 + [7])
    text, segment, position, target = [], [], [], []
    for number, ids in enumerate(segments):
        text += ids
        segment += [number] * len(ids)
        position += range(19, 19 + len(ids))
        target += [*ids[1:], -100]
    padding = 3
    fields = ((text, 0), (segment, -1), (position, 0), (target, -100))
    tensors = [torch.tensor([values + [fill] * padding]) for values, fill in fields]
    return Rows(pixels, prefix, 2, *tensors, torch.ones_like(tensors[0], dtype=torch.float))


def test_packed_rows_give_the_losses_of_separate_chats() -> None:
    model = tiny()
    trained = student(model)
    segments = [[11, 12, 13, 14], [21, 22, 23], [31, 32, 33, 34, 35, 36]]
    pixels = torch.randn(1, 3, 56, 56)
    packed, _, _ = trained(rows(pixels, segments))
    exported = {k: v.float() for k, v in _exact(trained).items()}
    model.load_state_dict(weights.merge(model.state_dict(), exported))
    single = []
    for ids in segments:
        whole = torch.tensor([[5, 6] + [IMAGE] * 16 + [7, *ids]])
        with torch.no_grad():
            logits = model(input_ids=whole, pixel_values=pixels).logits
        logp = logits[0, 19:-1].log_softmax(-1)
        single.append(logp.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(single), atol=2e-5, rtol=1e-5)


def _exact(trained: Student) -> dict[str, Tensor]:
    """The export without rounding to bf16: restore what it says first."""
    exported = trained.export()
    before = {k: v.clone() for k, v in trained.named_parameters()}
    trained.restore(exported)
    drift = [(v - before[k]).abs().max() for k, v in trained.named_parameters()]
    assert max(drift) < 0.02
    with torch.no_grad():
        for name, value in trained.named_parameters():
            value.copy_(before[name])
    from unittest.mock import patch

    with patch("torch.bfloat16", torch.float32):
        return trained.export()


def test_only_deltas_and_projector_are_trained() -> None:
    trained = student(tiny())
    names = {k.split(".")[0] for k, v in trained.named_parameters() if v.requires_grad}
    assert names == {"language", "vision", "projector"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="does not have"):
        weights.merge({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


def test_a_part_with_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.pinhole import parts

    (tmp_path / parts.VISION.filename).write_bytes(b"not it")
    monkeypatch.setenv("FOVEATE_PARTS", str(tmp_path))
    monkeypatch.setattr(parts, "_installed", lambda part: None)
    with pytest.raises(parts.PartError, match="sha256"):
        parts.locate(parts.VISION, tmp_path)
