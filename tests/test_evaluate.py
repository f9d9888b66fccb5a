"""Evaluation: answers equal a naive loop, intervals equal known ones, bad input is one message."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate import evaluate, loading
from foveate.evaluate import interval, measure
from foveate.tasks import Example, task
from foveate.tasks.example import matches

WORDS = [chr(97 + i) + chr(97 + j) for i in range(8) for j in range(10)]
STEPS = evaluate.MAX_NEW_TOKENS
TEMPLATE = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"  # noqa: E501


@dataclass
class Listed:
    """A task that is a list."""

    examples: list[Example]
    name: str = "listed"
    drawn: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        self.drawn.append(index)
        return self.examples[index]

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)


@dataclass
class Watched:
    """A model whose vision tower's input can be seen."""

    model: Any
    pixels: list[torch.Tensor] = field(default_factory=list)

    def __enter__(self) -> Watched:
        tower = self.model.model.vision_tower
        self._hook = tower.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _see(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.pixels.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small LLaVA (16 vision tokens) and a processor that fits it."""
    from transformers import BitImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    file = miniature.tokenizer_file(folder / "tokenizer.json", [" ".join(WORDS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<unk>", eos_token="<|im_end|>"
    )
    size = {"height": 56, "width": 56}
    images = BitImageProcessorPil(size=size, do_center_crop=False, crop_size=size)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = miniature.llava(vocabulary=96, image_token=image)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, processor


def noise(seed: int, width: int = 60) -> Image.Image:
    """Coarse noise, so that pictures really differ."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((width, 44))


def asked(count: int = 7) -> Listed:
    """Questions of different lengths about different pictures."""
    some = [Example(noise(i), " ".join(WORDS[i : 2 * i + 2]), WORDS[i]) for i in range(count)]
    return Listed(some)


def chosen(count: int = 7) -> Listed:
    """Choices, every other time of different lengths."""
    made = []
    for i in range(count):
        spans = [(3 * i + k, 3 * i + k + 2 + (i % 2) * k) for k in range(3)]
        choices = tuple(" ".join(WORDS[start:stop]) for start, stop in spans)
        made.append(Example(noise(i), " ".join(WORDS[i : i + 2 + i % 3]), choices[1], choices))
    return Listed(made)


def prompt_of(processor: Any, example: Example, more: str = "") -> dict[str, torch.Tensor]:
    """One prompt, by hand: 16 placeholders, then the words."""
    ids = processor.tokenizer(example.question + more)["input_ids"]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    pixels = processor.image_processor(images=example.image, return_tensors="pt")["pixel_values"]
    return {"input_ids": torch.tensor([[image] * 16 + ids]), "pixel_values": pixels}


@torch.no_grad()
def greedy(model: Any, processor: Any, example: Example) -> str:
    """Twelve times the likeliest next token, without a cache."""
    inputs = prompt_of(processor, example)
    start = inputs["input_ids"].shape[1]
    for _ in range(STEPS):
        best = model(**inputs).logits[0, -1].argmax()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], best.view(1, 1)], 1)
    return processor.tokenizer.decode(
        inputs["input_ids"][0, start:], skip_special_tokens=True
    ).strip()


@torch.no_grad()
def likeliest(model: Any, processor: Any, example: Example, rule: str) -> str:
    scores = []
    for choice in example.choices:
        inputs = prompt_of(processor, example, f" {choice}<|im_end|>")
        ids = inputs["input_ids"][0]
        logp = model(**inputs).logits[0].log_softmax(-1)
        count = len(choice.split()) + 1
        said = [float(logp[k - 1, ids[k]]) for k in range(len(ids) - count, len(ids))]
        scores.append(sum(said) / (count if rule == "mean" else 1))
    return example.choices[int(np.argmax(scores))]


def test_greedy_answers_are_those_of_a_naive_loop(pair: tuple[Any, Any]) -> None:
    made = asked()
    result = evaluate.evaluate(*pair, made, batch_size=3)
    expected = [greedy(*pair, e) for e in made.examples]
    assert list(result.answers) == expected
    assert len(set(expected)) > 3, "the model says the same to everything: nothing was tested"


@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_choices_are_those_of_a_naive_loop(pair: tuple[Any, Any], rule: str) -> None:
    made = chosen()
    result = evaluate.evaluate(*pair, made, batch_size=3, likelihood=rule)
    expected = [likeliest(*pair, e, rule) for e in made.examples]
    assert list(result.answers) == expected
    hits = [answer == e.answer for answer, e in zip(expected, made.examples, strict=True)]
    assert result.score == sum(hits) / 7
    places = {e.choices.index(a) for e, a in zip(made.examples, expected, strict=True)}
    assert len(places) > 1


def test_mean_and_sum_differ(pair: tuple[Any, Any]) -> None:
    one, other = (
        evaluate.evaluate(*pair, chosen(), batch_size=7, likelihood=rule).answers
        for rule in ("mean", "sum")
    )
    assert one != other


@pytest.mark.parametrize("make", [asked, chosen])
def test_a_batch_answers_as_singles_do(pair: tuple[Any, Any], make: Callable[[], Listed]) -> None:
    results = [evaluate.evaluate(*pair, make(), batch_size=size) for size in (1, 4, 16)]
    assert results[0] == results[1] == results[2]
    assert results[0].n == 7 and results[0].vision_tokens == 16


def test_every_example_is_asked_once_and_in_order(pair: tuple[Any, Any]) -> None:
    made, done = asked(), []
    evaluate.evaluate(*pair, made, batch_size=3, advance=done.append)
    assert sorted(made.drawn) == list(range(7)) and done == [3, 3, 1]


def test_the_score_is_the_share_of_right_answers_by_kind(pair: tuple[Any, Any]) -> None:
    some = asked().examples
    said = evaluate.evaluate(*pair, Listed(some)).answers
    kinds = ["near"] * 3 + ["far"] * 4
    wanted = [said[0], "no", said[2], "no", "no", said[5].upper() + ".", "no"]
    made = Listed(
        [
            Example(e.image, e.question, answer, meta={"kind": kind})
            for e, answer, kind in zip(some, wanted, kinds, strict=True)
        ]
    )
    result = evaluate.evaluate(*pair, made)
    assert result.score == 3 / 7
    assert result.by == {"far": (4, 1 / 4), "near": (3, 2 / 3)}
    assert (result.ci_low, result.ci_high) == interval([1, 0, 1, 0, 0, 1, 0])


def test_blanked_images_are_blank(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with Watched(model) as seen:
        blanked = evaluate.evaluate(model, processor, asked(), blank=True)
    colour = torch.tensor(evaluate.BLANK) / 255
    images = processor.image_processor
    expected = (colour - torch.tensor(images.image_mean)) / torch.tensor(images.image_std)
    (pixels,) = seen.pixels
    assert len(pixels) == 7
    torch.testing.assert_close(pixels, expected[:, None, None].expand_as(pixels), atol=1e-5, rtol=0)
    hidden = [
        Example(Image.new("RGB", e.image.size, evaluate.BLANK), e.question, e.answer)
        for e in asked().examples
    ]
    assert blanked == evaluate.evaluate(model, processor, Listed(hidden))
    assert blanked.answers != evaluate.evaluate(model, processor, asked()).answers


def test_what_is_attached_reduces_during_evaluation(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    made, recipe = asked(), foveate.recipe("fastv", keep=0.25)
    dense = evaluate.evaluate(model, processor, made)
    with foveate.reduced(model, recipe) as report:
        together = evaluate.evaluate(model, processor, made)
        assert report.vision == [16] * 7 and report.alive[-1] == [4] * 7
        single = evaluate.evaluate(model, processor, made, batch_size=1)
    assert together == single
    assert together.answers != dense.answers and together.vision_tokens == 16
    assert evaluate.evaluate(model, processor, made) == dense


def test_the_processor_is_left_as_it_was(pair: tuple[Any, Any]) -> None:
    before = pair[1].tokenizer.padding_side
    evaluate.evaluate(*pair, asked(2))
    assert pair[1].tokenizer.padding_side == before == "right"


def test_nothing_to_ask_is_an_error(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="nothing to ask"):
        evaluate.evaluate(*pair, Listed([]))


# --- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 7), (40, 50), (1, 1000), (500, 1000)])
def test_intervals_of_right_and_wrong_are_wilsons(hits: int, n: int) -> None:
    from scipy.stats import binomtest

    known = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert interval([1.0] * hits + [0.0] * (n - hits)) == pytest.approx(known, abs=1e-6)


def test_other_intervals_are_near_the_normal_one() -> None:
    scores = [float(v) for v in np.random.default_rng(0).random(400)]
    half = 1.96 * float(np.std(scores)) / math.sqrt(400)
    low, high = interval(scores)
    assert low == pytest.approx(np.mean(scores) - half, abs=0.1 * half)
    assert high == pytest.approx(np.mean(scores) + half, abs=0.1 * half)
    assert interval(scores) == (low, high)
    assert interval([0.5] * 9) == (0.5, 0.5) and interval([]) == (0.0, 1.0)


# --- the command -------------------------------------------------------------------------------

ROW = {"task", "recipe", "n", "score", "ci_low", "ci_high", "agreement", "flops_ratio"}
ROW |= {"vision_tokens", "blank"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    said = [["a dog .", "the dog .", f"picture {i} ."] for i in range(4)]
    said += [["snow .", "white snow .", f"picture {i} ."] for i in range(4)]
    return miniature.photo_folder(tmp_path / "photos", said)


@pytest.fixture
def run(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``python -m foveate.evaluate …`` with the small model: exit status, stdout, stderr."""
    known = loading.model
    given = lambda name, **more: pair if name == "pinhole" else known(name, **more)  # noqa: E731
    monkeypatch.setattr(loading, "model", given)

    def main(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foveate.evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return main


def test_the_file_for_other_programs(
    run: Callable[..., tuple[int, str, str]], pair: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    names = "flickr8k-yesno, flickr8k-choice"
    more = ("--data", folder, "--limit", 6, "--batch", 4, "--blank", "--json", file)
    status, out, _ = run("--task", names, *more)
    assert status == 0
    result = json.loads(file.read_text())
    assert result["model"] == "pinhole" and {"device", "dtype"} <= set(result)
    rows = result["rows"]
    assert [(r["task"], r["blank"]) for r in rows] == [
        (name, hidden) for name in names.split(", ") for hidden in (False, True)
    ]
    assert all(set(r) >= ROW for r in rows)
    assert all(r["recipe"] == "dense" and r["agreement"] == r["flops_ratio"] == 1.0 for r in rows)
    assert all(r["vision_tokens"] == 16 and r["n"] == 6 for r in rows)
    alone = evaluate.evaluate(*pair, task("flickr8k-choice", data=folder, limit=6))
    assert rows[2]["score"] == alone.score and rows[2]["ci_high"] == alone.ci_high
    assert f"| flickr8k-choice | 6 | {alone.score:.1%} |" in out


def test_rows_are_written_as_they_come(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    """The second task fails; what the first gave is in the file."""
    lines = (folder / "validation.jsonl").read_text().replace("validation-7.jpg", "gone.jpg")
    (folder / "validation.jsonl").write_text(lines)
    file = tmp_path / "rows.json"
    names = "scenes-words,flickr8k-choice"
    status, _, err = run("--task", names, "--data", folder, "--limit", 8, "--json", file)
    assert status == 2 and "holds no gone.jpg" in err
    assert [r["task"] for r in json.loads(file.read_text())["rows"]] == ["scenes-words"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "easy-vqa"], "did you mean 'easyvqa'"),
        (["--task", ","], "names no task"),
        (["--task", "flickr8k-yesno", "--data", "absent"], "--data DIR --split S"),
        (["--split", "val"], "train, validation, test"),
        (["--model", "pinhol"], "pinhole"),
        (["--model", "shape:llava-1.5-7b"], "random weights"),
        (["--model", "absent/", "--limit", "1"], "local folder"),
        (["--device", "abacus", "--model", "./x"], "abacus"),
        (["--dtype", "float8", "--model", "./x"], "float32"),
        (["--json", "absent/rows.json"], "does not exist"),
        (["--limit", "0"], "--limit"),
        (["--batch", "x"], "--batch"),
        (["--recipes"], "--recipes"),
    ],
)
def test_bad_input_is_one_message(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*words)
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_without_typer(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    status, _, err = run()
    assert status == 2 and "pip install 'foveate[eval]'" in err


def test_measure_gives_one_row_a_task(pair: tuple[Any, Any]) -> None:
    seen: list[tuple[str, int]] = []
    rows = list(measure(*pair, [asked(3)], blank=True, advance=lambda *a: seen.append(a)))
    assert [r["blank"] for r in rows] == [False, True] and seen[0] == ("listed", 3)
    assert "answers" not in rows[0]
