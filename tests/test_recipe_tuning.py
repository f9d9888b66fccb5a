"""pinhole's tuning with a recipe attached, on a stand-in with 256 vision tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import miniature
import pytest
import torch
from PIL import Image

import foveate
from foveate import pinhole
from foveate.pinhole import assembly, mix, recipe_tuning, train
from foveate.pinhole.recipe_tuning import Lesson, Lessons, Tuning, batch
from foveate.tasks.photos import photos

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6")

SAID = [["A dog runs on grass ."] * 5, ["A man rides a bike ."] * 5] * 6
SEGMENTS = [mix.Segment("what colour", "red"), mix.Segment("is there a dog here", "no it is not")]
RECIPE = foveate.recipe("prumerge", keep=0.125)


class Easy:
    """Two questions about each of three pictures, in place of easy-VQA."""

    def __init__(self) -> None:
        self.numbers = [0, 1, 2]
        self.by_image = {n: list(SEGMENTS) for n in self.numbers}
        self.task = SimpleNamespace(image=lambda n: Image.new("RGB", (64, 64), (80 * n, 20, 90)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``assembly.path`` would be, and photos beside it."""
    from transformers import PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("pinhole")
    asked = [f"{mix.question(t)} {t.phrase}" for t in mix.things()]
    texts = [*asked, "Can you see Does the image show in this picture? user assistant yes"]
    texts += [f"{s.question} {s.answer}" for s in SEGMENTS]
    file = miniature.tokenizer_file(made / "tokenizer.json", texts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<unk>", eos_token="<|im_end|>"
    )
    assembly._processor(tokenizer).save_pretrained(made)
    for split in ("train", "validation"):
        miniature.photo_folder(made / "data", SAID, split)
    return made


@pytest.fixture
def load(folder: Path) -> Callable[..., tuple[Any, Any]]:
    def load(*_: Any) -> tuple[Any, Any]:
        processor = assembly.read_processor(folder)
        words = processor.tokenizer
        image = words.convert_tokens_to_ids("<image>")
        return miniature.llava(vocabulary=len(words), image_token=image, image_size=224), processor

    return load


@pytest.fixture
def start(folder: Path, load: Callable[..., tuple[Any, Any]], tmp_path: Path) -> Any:
    """A run in the folder of that name."""

    def begin(name: str, **more: Any) -> Tuning:
        (tmp_path / name).mkdir(exist_ok=True)
        model, processor = load()
        lessons = Lessons(photos(folder / "data", "train"), Easy())  # type: ignore[arg-type]
        writer = mix.Writer(folder / "tokenizer.json")
        settings = {"lr": 1e-2, "rows": 4} | more
        return Tuning(
            model, pixels(processor), writer, lessons, RECIPE, tmp_path / name, **settings
        )

    return begin


def pixels(processor: Any) -> Callable[[list[Image.Image]], torch.Tensor]:
    return lambda images: processor.image_processor(images, return_tensors="pt")["pixel_values"]


def test_rows_are_the_chat_that_pinhole_answers(folder: Path) -> None:
    """The same ids as the chat template gives; the answer at the end is what is learnt."""
    processor, picture = assembly.read_processor(folder), Image.new("RGB", (30, 20))
    made = batch([Lesson(picture, tuple(SEGMENTS))], mix.Writer(folder / "tokenizer.json"))
    for b, segment in enumerate(SEGMENTS):
        content = [{"type": "image"}, {"type": "text", "text": segment.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        said = f"{segment.answer}<|im_end|>"
        expected = processor(images=picture, text=text + said, return_tensors="pt")
        row = made["input_ids"][b][made["attention_mask"][b].bool()]
        assert row.tolist() == expected["input_ids"][0].tolist()
        learnt = made["labels"][b][made["labels"][b] != -100]
        assert learnt.tolist() == processor.tokenizer(said).input_ids
        assert torch.equal(made["input_ids"][b, -len(learnt) :], learnt)
    assert made["logits_to_keep"] == made["labels"].shape[1] == 6


def test_a_step_learns_what_its_rows_say_one_by_one(start: Any) -> None:
    """Encoding an image once for its rows changes nothing."""
    tuning = start("one")
    picture = Image.effect_noise((224, 224), 80).convert("RGB")
    lessons = [Lesson(picture, tuple(SEGMENTS)), Lesson(Image.new("RGB", (9, 9)), (SEGMENTS[0],))]
    with foveate.reduced(tuning.tuned, RECIPE) as report, torch.no_grad():
        together = tuning._loss(lessons)
        assert report.vision == [256] * 3 and report.alive[0] == [32] * 3
        losses, weights = [], []
        for lesson, segment in ((one, s) for one in lessons for s in one.asked):
            given = batch([Lesson(lesson.image, (segment,))], tuning._writer)
            shown = tuning._pixels([lesson.image])
            losses.append(tuning.tuned(**given, pixel_values=shown).loss)
            weights.append(int((given["labels"] != -100).sum()))
    mean = sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)
    assert torch.allclose(together, mean, rtol=1e-5)


def test_lessons_have_as_many_questions_as_wanted(start: Any) -> None:
    lessons = start("lessons")._lessons
    for seed, rows in itertools.product(range(5), (1, 4, 12)):
        drawn = lessons.draw(random.Random(seed), rows)
        assert sum(len(lesson.asked) for lesson in drawn) == rows
        assert all(0 < len(lesson.asked) <= 3 for lesson in drawn)


def test_yes_and_no_are_asked_equally_often(tmp_path: Path) -> None:
    """Though photos' questions are balanced by their weights, which the model's loss leaves out."""
    nouns = ("dog", "horse", "train", "tent")
    said = [[f"a {nouns[i % 4]} .", f"the {nouns[i % 4]} ."] for i in range(12)]
    shown = photos(miniature.photo_folder(tmp_path, said, "train"), "train")
    drawn = Lessons(shown, Easy()).draw(random.Random(0), 3000)  # type: ignore[arg-type]
    asked = [s.answer for lesson in drawn for s in lesson.asked if s not in SEGMENTS]
    assert len(asked) > 1500
    assert asked.count("yes") / len(asked) == pytest.approx(0.5, abs=0.05)


def test_tuning_lowers_the_loss_and_leaves_the_encoder(start: Any) -> None:
    tuning = start("learns")
    tower = tuning._model.model.vision_tower
    before = [p.clone() for p in tower.parameters()]
    losses = [float(line.split()[-1]) for line in tuning.run(60, 12)]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4]) - 0.4
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), before, strict=True))
    logged = (tuning._out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 13))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0, 50)
    monkeypatch.setattr(recipe_tuning, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    whole = start("whole")
    list(whole.run(5))
    assert (whole.step, whole.seconds) == (6, 300)
    stopped = start("stopped").run(5)
    for _ in range(5):  # the checkpoint is three steps old
        next(stopped)
    stopped.close()
    again = start("stopped")
    assert (again.step, again.seconds) == (3, 150)
    list(again.run(5))
    assert again.step == 6
    for name, value in whole._learnt.items():
        torch.testing.assert_close(again._learnt[name], value, rtol=0, atol=1e-6)


def test_the_command(
    folder: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Answers before, tunes, answers after; what it leaves can be loaded and is what answered."""
    from peft import PeftModel

    monkeypatch.setattr(pinhole, "load", load)
    monkeypatch.setattr(assembly, "path", lambda: folder)
    monkeypatch.setattr(train, "EasyRows", Easy)
    text, out = "prumerge:keep=0.125", tmp_path / "out"
    given = {"data": folder / "data", "out": out, "recipe": text, "device": "cpu"}
    train.main(**given, check=4, max_steps=2, lr=1e-2, batch=3, limit=8)
    said = json.loads((out / "tuning.json").read_text())
    assert said["about"]["steps"] == 2
    assert {row["recipe"] for row in said["rows"]} == {"dense", text}
    assert "| flickr8k-yesno | `prumerge:keep=0.125` | 4 |" in capsys.readouterr().out
    before = (out / "before.answers").read_text()
    train.main(**given, check=4, max_steps=2, lr=1e-2, batch=3, limit=8)
    assert (out / "before.answers").read_text() == before
    assert json.loads((out / "tuning.json").read_text())["about"]["steps"] == 2
    train.main(**given, check=4, max_steps=3, lr=1e-2, batch=3, limit=8)  # what is tuned on is new
    assert sorted(p.name for p in out.glob("after-*")) == ["after-2.answers", "after-3.answers"]
    again = PeftModel.from_pretrained(load()[0], out / "adapter")
    assert any(p.abs().max() > 0 for n, p in again.named_parameters() if "lora_B" in n)
    assert foveate.Recipe.load(out / "adapter" / "recipe.json").entrance == RECIPE.entrance
    with pytest.raises(ValueError, match="answers of another command"):
        train.main(**given | {"recipe": "pool:keep=0.5"}, check=4, max_steps=2)


def test_without_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipe_tuning.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'foveate\[tune\]'"):
        train.main(out=tmp_path / "none", recipe="prumerge", device="cpu")
    assert not (tmp_path / "none").exists()


def test_the_comparison_is_paired() -> None:
    old = {("t", "r"): [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]}
    new = {("t", "r"): [1.0] * 8}
    row = recipe_tuning.comparison(old, new)[0]
    assert (row["before"], row["after"], row["n"]) == (0.375, 1.0, 8)
    assert row["mcnemar_p"] == 2 * 0.5**5
    assert "| t | `r` | 8 | 37.5% (" in recipe_tuning.table([row])
