"""``foveate eval`` as a command: its rows, going on, what it prints and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from command import LAYERS, VISION, absent, never, refuses, works, wrote
from PIL import Image
from rich.console import Console

import foveate
from foveate import loading, scoreboard
from foveate.answer import answer
from foveate.cli import tables
from foveate.evaluate import BASELINES
from foveate.tasks import Example

pytestmark = pytest.mark.usefixtures("elsewhere")
RIGHT = 5  # of the questions of mine.jsonl, the untouched model is right on so many of 8


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def lines(answers: Sequence[str]) -> str:
    """A JSONL file about ``photos/0.png`` and so on."""
    Path("photos").mkdir(exist_ok=True)
    said = []
    for i, expected in enumerate(answers):
        noise(i).save(f"photos/{i}.png")
        row = {"image": f"photos/{i}.png", "question": "what is this", "answer": expected}
        said.append(json.dumps(row))
    return "\n".join(said) + "\n"


@pytest.fixture
def mine(loaded, elsewhere) -> list[str]:
    """The words that evaluate mine.jsonl: of 8 answers, the untouched model gives ``RIGHT``."""
    asked = [Example(noise(i), "what is this", "") for i in range(8)]
    said = answer(*loaded, asked).texts
    assert len(set(said)) > 3, "the model says the same to everything"
    Path("mine.jsonl").write_text(lines(said[:RIGHT] + ["no"] * (8 - RIGHT)))
    return ["eval", "--task", "mine.jsonl", "--model", "tiny", "--batch", "3"]


def names(file: str = "e.json") -> list[str]:
    return [row["recipe"] for row in wrote(file)["rows"]]


# Which rows it makes


def test_recipes_at_every_budget_and_baselines_at_their_flops(mine: list[str]) -> None:
    words = ["--recipe", "fastv", "--recipe", "prumerge:neighbours=4", "--keep", "0.5, 0.25"]
    printed = works(*mine, *words, "--blank", "--limit", 8, "--json", "e.json")
    said = wrote("e.json")
    more = ["prumerge:neighbours=4,keep=0.5", "prumerge:neighbours=4,keep=0.25"]
    asked = ["dense", "dense", "fastv:keep=0.5", "fastv:keep=0.25", *more]
    assert names()[: len(asked)] == asked
    plain = said["rows"][len(asked) :]
    assert [row["recipe"].partition(":")[0] for row in plain] == [*BASELINES] * 3
    dense, blank, fastv, _, half, *_ = said["rows"]
    assert (dense["blank"], blank["blank"]) == (False, True)
    assert (dense["task"], dense["n"], dense["score"]) == ("mine", 8, RIGHT / 8)
    assert dense["vision_tokens"] == VISION and half["vision_tokens"] == VISION / 2
    assert fastv["vision_tokens"] == (2 * VISION + 4 * VISION / 2) / LAYERS
    equal = plain[0], plain[3], plain[3], plain[6]  # 27, 18, 18 and 9 of 36 in every layer
    for row, other in zip(said["rows"][2:6], equal, strict=True):
        assert other["flops_ratio"] >= row["flops_ratio"] > 1
        assert other["vision_tokens"] + 1 > row["vision_tokens"]
    wanted = {"task", "recipe", "n", "score", "ci_low", "ci_high", "agreement", "flops_ratio"}
    assert all(wanted | {"vision_tokens"} <= row.keys() for row in said["rows"])
    assert all(name in printed for name in names())
    assert said["command"].startswith("foveate eval --task mine.jsonl --model tiny --batch 3")
    assert said["command"].endswith("--keep '0.5, 0.25' --blank --limit 8 --json e.json")


def test_a_baseline_that_was_asked_for_is_not_made_twice(mine: list[str]) -> None:
    """0.26 and 9 of 36 tokens are the same budget."""
    works(*mine, "--recipe", "random", "--keep", 0.26, "--limit", 2, "--json", "e.json")
    assert names() == ["dense", "random:keep=0.26", "pool:keep=0.25", "downsample:keep=0.25"]


def test_methods_that_choose_their_own_count(mine: list[str]) -> None:
    words = ("--recipe", "prumerge", "--recipe", "fastv", "--keep", "0.25,adaptive")
    printed = works(*mine, *words, "--no-baselines", "--limit", 2, "--json", "e.json")
    assert names() == ["dense", "prumerge:keep=0.25", "prumerge", "fastv:keep=0.25"]
    assert [row["adaptive"] for row in wrote("e.json")["rows"]] == [False, False, True, False]
    assert "prumerge, adaptive" in printed


def test_a_finished_recipe_is_run_once_as_it_is(mine: list[str]) -> None:
    foveate.recipe("fastv", keep=0.25).resolve(LAYERS).save("f.json")
    words = ("--recipe", "f.json", "--recipe", "pool", "--keep", "0.5,0.25", "--no-baselines")
    works(*mine, *words, "--limit", 2, "--json", "e.json")
    assert names() == ["dense", "f.json", "pool:keep=0.5", "pool:keep=0.25"]


def test_the_seed_orders_and_the_limit_cuts(mine: list[str]) -> None:
    scores = []
    for seed in range(3):
        works(*mine, "--limit", 3, "--seed", seed, "--json", f"{seed}.json")
        (row,) = wrote(f"{seed}.json")["rows"]
        assert row["n"] == 3
        records = Path(f"{seed}.json.answers").read_text().splitlines()[2:]
        scores.append([json.loads(line)["answer"] for line in records])
    assert len({tuple(said) for said in scores}) == 3


def test_photos_drawings_and_files_in_one_run(mine: list[str]) -> None:
    captions = [["A dog runs .", "The dog ."], ["Snow .", "The snow ."], ["A car .", "One car ."]]
    miniature.photo_folder(Path("album"), captions)
    tasks = ("--task", "flickr8k-choice, flickr8k-caption", "--task", "scenes-count")
    works(*mine, *tasks, "--data", "album", "--limit", 2, "--json", "e.json")
    found = {row["task"]: row for row in wrote("e.json")["rows"]}
    assert list(found) == ["mine", "flickr8k-choice", "flickr8k-caption", "scenes-count"]
    assert all(row["n"] == 2 for row in found.values())


# Going on


def test_lost_detail_is_a_note(mine: list[str], monkeypatch) -> None:
    monkeypatch.setattr(scoreboard, "collapses", lambda rows: [f"Warning: {len(rows)} rows"])
    said = works(*mine, "--recipe", "random", "--no-baselines", "--json", "e.json")
    assert "Warning: 2 rows" in said
    assert wrote("e.json")["notes"] == ["Warning: 2 rows"]


def test_the_same_command_again_runs_nothing(mine: list[str], loaded, monkeypatch) -> None:
    """Not even the model, and yet it makes the same table: in the file and in a README."""
    Path("README.md").write_text(f"before\n{scoreboard.BLOCK.around('stale')}\nafter\n")
    words = [*mine, "--recipe", "aim", "--keep", "0.5", "--limit", "4", "--json", "e.json"]
    printed = works(*words, "--write", "README.md")
    said, text = wrote("e.json"), Path("README.md").read_text()
    Path("e.json").unlink()
    Path("README.md").write_text(f"before\n{scoreboard.BLOCK.around('stale')}\nafter\n")
    monkeypatch.setattr(loaded[0], "forward", never)
    assert works(*words, "--write", "README.md") == printed
    assert wrote("e.json") == said and Path("README.md").read_text() == text
    assert text.startswith("before\n<!-- eval: ") and text.endswith("<!-- /eval -->\nafter\n")
    assert scoreboard.markdown(said) in text and "stale" not in text
    assert f"Made by `{said['command']}`" in " ".join(text.split())


@pytest.mark.parametrize("change", ["seed", "split", "questions", "weights"])
def test_answers_of_another_command_are_not_taken(
    mine: list[str], loaded, monkeypatch, change: str
) -> None:
    words = [*mine, "--limit", "2", "--json", "e.json"]
    works(*words)
    if change == "questions":
        Path("mine.jsonl").write_text(lines(["yes"] * 8))
    if change == "weights":
        one = loaded[0].model.language_model.norm.weight
        monkeypatch.setattr(one, "data", one.data + 0.5)
    more = {"seed": ("--seed", 1), "split": ("--split", "train")}.get(change, ())
    said = refuses(*words, *more)
    assert "e.json.answers holds the answers of another command" in said
    assert "Give another --json, or delete the file to begin anew" in said


def test_a_damaged_journal(mine: list[str]) -> None:
    works(*mine, "--limit", 2, "--json", "e.json")
    file = Path("e.json.answers")
    file.write_text(file.read_text() + '{"task": 1}\n')
    said = refuses(*mine, "--limit", 2, "--json", "e.json")
    assert "e.json.answers, line 5 is no answer" in said


# What it prints


def test_no_cell_is_cut_or_folded_at_80_characters() -> None:
    """The tables are those of a very wide terminal."""
    labels = ["dense", "gsearch-llava-1.5-7b:keep=0.3333", "gsearch-llava-1.5-7b:keep=0.1111"]
    rows = [row("flickr8k-yesno-adversarial", name) for name in labels]
    rows += [row("easyvqa", name) for name in labels]
    narrow, wide = printed(rows, 80), printed(rows, 300)
    assert all(len(line) <= 80 for line in narrow)
    shown = [line for line in wide if line.startswith((*labels, "recipe"))]
    assert len(shown) == 3 * (1 + len(labels))
    assert [line for line in narrow if line.startswith((*labels, "recipe"))] == shown
    cells = shown[-1].split()
    assert cells == [labels[2], "100.0", "100.0…100.0", "-100.0*", "-100.0…-100.0", "100%"]


def row(task: str, recipe: str) -> dict[str, Any]:
    """The widest numbers there are."""
    one = {"task": task, "recipe": recipe, "adaptive": False, "blank": False, "n": 10_000}
    one |= {"score": 1.0, "ci_low": 1.0, "ci_high": 1.0, "mcnemar_p": 1e-9, "agreement": 1.0}
    one |= {"difference": -1.0, "difference_low": -1.0, "difference_high": -1.0}
    one |= {"vision_tokens": 12345.6, "flops": 1, "dense_flops": 100, "prefill_ms": 123456.7}
    return one | {"flops_ratio": 100.0}


def printed(rows: list[dict[str, Any]], width: int) -> list[str]:
    head = {"model": "tiny", "device": "cpu", "dtype": "float32", "split": "train", "notes": []}
    console = Console(width=width)
    with console.capture() as capture:
        console.print(tables.evaluation(head | {"rows": rows}))
    return [line.rstrip() for line in capture.get().splitlines()]


# What it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task easy-vqa", "no task 'easy-vqa'; did you mean 'easyvqa'"),
        ("--task ,", "--task names no task; try --task easyvqa"),
        ("", "Missing option.*--task"),
        ("--task gone.jsonl", "no task file gone.jsonl"),
        ("--task empty.jsonl", "empty finds nothing to ask.*a file with questions"),
        ("--task bad.jsonl", "bad.jsonl, line 2 is not of the form.*: not json"),
        ("--task one.jsonl --task other/one.jsonl", "Two tasks are called one.*rename the file"),
        ("--task one.jsonl --model shape:llava-1.5-7b", "random weights.*eval needs a real model"),
        ("--task flickr8k-choice --data album", "no validation.tar and validation.jsonl in album"),
        ("--task easyvqa --split val", "easyvqa has no split 'val'; it has train, validation, t"),
        ("--task one.jsonl --keep 0.5", "--keep 0.5 says what each --recipe keeps, and none is"),
        ("--task one.jsonl --recipe aim --keep half", "'half'; give fractions.*or adaptive"),
        ("--task one.jsonl --recipe aim --keep 2", r"keep is 2.0.*\(0, 1\]"),
        ("--task one.jsonl --recipe aim --keep adaptive", "none of aim does; prumerge and prume"),
        ("--task one.jsonl --recipe f.json --keep 0.5", "f.json is a finished recipe; --keep goe"),
        ("--task one.jsonl --recipe aim:keep=0.5 --keep 0.5", "said twice, --keep 0.5 and in 'ai"),
        ("--task one.jsonl --limit 0", "--limit.*greater than or equal to 1"),
        ("--task one.jsonl --write gone.md", "gone.md does not exist.*<!-- eval: .*<!-- /eval"),
        ("--task one.jsonl --write f.json", "f.json: The markers are missing.*<!-- /eval"),
        ("--task one.jsonl --json gone/e.json", r"make it \(mkdir -p gone\)"),
    ],
)
def test_bad_words(words: str, message: str, monkeypatch) -> None:
    """Each is refused before a model is loaded."""
    Path("other").mkdir()
    Path("empty.jsonl").write_text("\n")
    Path("one.jsonl").write_text(lines(["yes"]))
    Path("bad.jsonl").write_text(lines(["yes"]) + "not json\n")
    Path("other/one.jsonl").write_text(lines(["yes"]).replace("photos/", "../photos/"))
    foveate.recipe("fastv", keep=0.5).resolve(LAYERS).save("f.json")
    monkeypatch.setattr(loading, "model", never)
    assert re.search(message, refuses("eval", *words.split()))


@pytest.mark.parametrize(
    ("task", "package"), [("one.jsonl", "scipy"), ("flickr8k-caption", "sacrebleu")]
)
def test_missing_packages(task: str, package: str, monkeypatch) -> None:
    """The line to type is said before any model is loaded."""
    Path("one.jsonl").write_text(lines(["yes"]))
    miniature.photo_folder(Path("album"), [["A dog ."]])
    monkeypatch.setattr(loading, "model", never)
    absent(package, monkeypatch)
    assert "pip install 'foveate[eval]'" in refuses("eval", "--task", task, "--data", "album")


def test_a_model_without_chat_template(mine: list[str], loaded, monkeypatch) -> None:
    monkeypatch.setattr(loaded[1], "chat_template", None)
    assert "no processor with a chat template" in refuses(*mine, "--limit", 2)
