"""pinhole: packing equals separate chats, weights merge, images reach working size, releases."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import miniature
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.pinhole import assembly, release, train, weights
from foveate.pinhole.bank import Bank, normalise, resized
from foveate.pinhole.packed import Rows, Student


def rows(pixels: Tensor, segments: list[list[int]]) -> Rows:
    """One row: header 5 6, 16 image tokens, newline 7, then the segments; every token a target."""
    prefix = torch.tensor([5, 6] + [miniature.IMAGE] * 16 + [7])
    text, segment, position, target = [], [], [], []
    for number, ids in enumerate(segments):
        text += ids
        segment += [number] * len(ids)
        position += range(19, 19 + len(ids))
        target += [*ids[1:], -100]
    padding = 3
    fields = ((text, 0), (segment, -1), (position, 0), (target, -100))
    tensors = [torch.tensor([values + [fill] * padding]) for values, fill in fields]
    image = (prefix == miniature.IMAGE).nonzero()[:, 0]
    return Rows(pixels, prefix, image, *tensors, torch.ones_like(tensors[0], dtype=torch.float))


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_packed_rows_give_the_losses_of_separate_chats(merged: bool) -> None:
    model = miniature.llava()
    trained = miniature.student(model, merged=merged)
    segments = [[11, 12, 13, 14], [21, 22, 23], [31, 32, 33, 34, 35, 36]]
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        packed, _, _ = trained(rows(pixels, segments))
    exported = {k: v.float() for k, v in _exact(trained).items()}
    model.load_state_dict(weights.merge(model.state_dict(), exported))
    single = []
    for ids in segments:
        whole = torch.tensor([[5, 6] + [miniature.IMAGE] * 16 + [7, *ids]])
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
    with patch("torch.bfloat16", torch.float32):
        return trained.export()


def test_a_run_may_begin_with_released_weights() -> None:
    """Only what was trained is in them: here, the language model's deltas and the projector."""
    made, fresh = miniature.student(miniature.llava()), miniature.student(miniature.llava())
    with torch.no_grad():
        for stack in made.vision.values():
            stack.b.zero_()
    fresh.restore(made.export())
    for (name, a), (_, b) in zip(fresh.named_parameters(), made.named_parameters(), strict=True):
        if not name.startswith("vision"):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    other = {k: v[:-1] if k.endswith(weights.A) else v for k, v in made.export().items()}
    with pytest.raises(ValueError, match="give --rank"):
        fresh.restore(other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "prumerge", "begin": Path("weights.safetensors")}, "without --begin"),
        ({"recipe": "prumerge", "dtype": "bfloat16"}, "without --recipe"),
        ({"device": "cuda", "rows": "3,8,0,0"}, "for a CPU run"),
        ({"device": "cpu", "see": 3.0}, "give --begin"),
        ({"device": "cpu", "dtype": "float16"}, "neither float32 nor bfloat16"),
        ({"device": "cpu", "rows": "3,8"}, "give --rows 6,7,3,0"),
        ({"device": "cpu", "rows": "0,8,1"}, "at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        train.main(**given)


def test_only_deltas_and_projector_are_trained() -> None:
    trained = miniature.student(miniature.llava())
    names = {k.split(".")[0] for k, v in trained.named_parameters() if v.requires_grad}
    assert names == {"language", "vision", "projector"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="does not have"):
        weights.merge({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


# --- pictures ----------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture in which every place is different."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x / 9) * np.cos(y / 7)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def reference(image: Image.Image) -> Tensor:
    """What pinhole is to see: Pillow's bicubic at working size, normalised."""
    side = assembly.IMAGE_SIZE
    array = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float64) / 255
    array = (array - assembly.IMAGE_MEAN) / assembly.IMAGE_STD
    return torch.from_numpy(array).permute(2, 0, 1).float()


@pytest.mark.parametrize("size", [(336, 336), (64, 64), (224, 224), (400, 300)])
def test_training_pictures_of_any_size_look_as_the_processor_makes_them(
    size: tuple[int, int],
) -> None:
    image = picture(*size)
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    seen = normalise(resized(array))[0]
    assert seen.shape == (3, assembly.IMAGE_SIZE, assembly.IMAGE_SIZE)
    levels = (seen - reference(image)).abs() * 255 * torch.tensor(assembly.IMAGE_STD)[:, None, None]
    assert levels.max() < 1.6  # of 255: rounding between the two passes of Pillow


def test_a_batch_of_the_bank_is_at_working_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos are stored at 224, easy-VQA at 64 and scenes drawn at 336; rows come in that order."""
    monkeypatch.setattr(torch, "rand", torch.zeros)  # photos: no crop
    easy, drawn = picture(64, 64), picture(336, 336)
    planes = [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None] for i in (easy, drawn)]
    flat = torch.full((2, 3, 224, 224), 90, dtype=torch.uint8)
    flat[1] += 60
    bank = Bank(flat, planes[0], torch.zeros(5, dtype=torch.long), torch.arange(1))
    batch = {"photo": np.array([1]), "flip": np.array([False]), "easy": np.array([0])}
    batch |= {"drawn": planes[1].numpy()}
    batch |= {k: np.zeros((3, 4), np.int64) for k in ("text", "segment", "position", "target")}
    batch["weight"] = np.zeros((3, 4), np.float32)
    pixels = bank.rows(batch).pixels
    assert pixels.shape == (3, 3, 224, 224)
    for seen, shown in zip(
        pixels, (Image.new("RGB", (9, 9), (150, 150, 150)), easy, drawn), strict=True
    ):
        torch.testing.assert_close(seen, reference(shown), atol=0.03, rtol=0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with pinhole's processor and a small tokenizer."""
    from transformers import PreTrainedTokenizerFast

    file = miniature.tokenizer_file(tmp_path / "tokenizer.json", ["is there a dog"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<unk>"
    )
    assembly._processor(tokenizer).save_pretrained(tmp_path / "processor")
    return tmp_path / "processor"


def test_pixels_are_pillows_and_loading_is_quiet(saved: Path, warned: list[str]) -> None:
    processor = assembly.read_processor(saved)
    image = picture(400, 300)
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, reference(image), atol=1e-5, rtol=0)
    assert warned == []


def test_the_image_processor_is_pillows_whatever_else_is_installed(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlavaProcessor

    class Torchvision:
        """Where torchvision is installed, transformers chooses another class."""

    loaded = LlavaProcessor.from_pretrained(saved)
    loaded.image_processor = Torchvision()
    monkeypatch.setattr(LlavaProcessor, "from_pretrained", lambda folder: loaded)
    assert type(assembly.read_processor(saved).image_processor).__name__ == "BitImageProcessorPil"


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers says at level WARNING and above."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
    return said


# --- releases ----------------------------------------------------------------------------------


def measured(**more: Any) -> dict[str, Any]:
    row = {
        "task": "easyvqa",
        "recipe": "dense",
        "blank": False,
        "n": 8,
        "score": 0.625,
        "ci_low": 0.31,
    }
    row |= {"ci_high": 0.86, "seconds": 3.0}
    hidden = row | {"blank": True, "score": 0.25}
    return {"device": "cpu (one)", "dtype": "float32", "rows": [row, hidden]} | more


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    save_file({"x": torch.ones(2)}, tmp_path / "trained.safetensors", {"licences": "free"})
    return tmp_path / "trained.safetensors"


def test_a_release_carries_its_scores(tmp_path: Path, trained: Path) -> None:
    card, scores, target = (tmp_path / n for n in ("card.md", "scores.json", "weights.safetensors"))
    card.write_text("# pinhole\n<!-- scores -->\nnot yet measured\n<!-- /scores -->\nend\n")
    scores.write_text(json.dumps(measured()))
    more = tmp_path / "more.json"
    other = {**measured()["rows"][0], "task": "scenes-where", "score": 0.3}
    more.write_text(json.dumps(measured(rows=[other, other | {"recipe": "aim"}])))
    for _ in range(2):  # again over its own result
        release.release(trained, [scores, more], target, card)
    with safe_open(target, framework="pt") as opened:
        about = opened.metadata()
        assert torch.equal(opened.get_tensor("x"), torch.ones(2))
    assert about["licences"] == "free"
    assert [r["score"] for r in json.loads(about["scores"])] == [0.625, 0.25, 0.3]
    lines = card.read_text().splitlines()
    assert lines[:2] == ["# pinhole", "<!-- scores -->"]
    assert lines[-2:] == ["<!-- /scores -->", "end"]
    assert "| easyvqa | 8 | 62.5% | 31.0% – 86.0% | 25.0% |" in lines
    assert "| scenes-where | 8 | 30.0% | 31.0% – 86.0% | – |" in lines
    assert "not yet measured" not in lines and lines.count("<!-- scores -->") == 1


def test_the_model_card_has_a_place_for_scores() -> None:
    card = Path(__file__).parents[1] / "docs" / "pinhole.md"
    assert "62.5%" in release.written(card, measured())


@pytest.mark.parametrize(
    ("card", "scores", "message"),
    [
        ("no markers", measured(), "<!-- scores -->"),
        ("<!-- scores --><!-- /scores -->", {"rows": []}, "lacks 'device'"),
    ],
)
def test_a_release_says_what_is_wrong(
    tmp_path: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    card: str,
    scores: dict[str, Any],
    message: str,
) -> None:
    import typer

    (tmp_path / "card.md").write_text(card)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    monkeypatch.setattr(weights, "file", lambda: tmp_path / "target.safetensors")
    with pytest.raises(typer.Exit) as stopped:
        release.main(trained, [tmp_path / "scores.json"], tmp_path / "card.md")
    assert stopped.value.exit_code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target.safetensors").exists()


def test_weights_too_large_to_ship_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "LARGEST", 10)
    with pytest.raises(ValueError, match="--rank"):
        release.release(trained, [], tmp_path / "target", tmp_path / "card.md")


def test_a_release_may_be_an_average(tmp_path: Path, trained: Path) -> None:
    one = load_file(trained)
    save_file({k: v + 1 for k, v in one.items()}, tmp_path / "other.safetensors")
    target, card = tmp_path / "weights.safetensors", tmp_path / "card.md"
    release.release(trained, [], target, card, tmp_path / "other.safetensors", 0.75)
    for name, value in load_file(target).items():
        torch.testing.assert_close(value, (one[name] + 0.25).to(value.dtype), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="cannot be averaged"):
        release.average(one, dict(list(one.items())[1:]), 0.5)
