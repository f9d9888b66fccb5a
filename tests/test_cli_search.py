"""``foveate search`` as a command: what it writes, going on, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import LAYERS, VISION, never, refuses, works, wrote
from PIL import Image

import foveate
from foveate.search import clock
from foveate.search.probe import Probe

pytest.importorskip("optuna")
pytestmark = pytest.mark.usefixtures("elsewhere")


def questions(file: str, seeds: range) -> None:
    """A JSONL file about pictures of noise."""
    said = []
    for i in seeds:
        pixels = np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{i}.png")
        said.append(json.dumps({"image": f"{i}.png", "question": "what is this", "answer": "no"}))
    Path(file).write_text("\n".join(said) + "\n")


@pytest.fixture
def search(loaded, elsewhere) -> list[str]:
    questions("seen.jsonl", range(5))
    questions("unseen.jsonl", range(5, 9))
    more = ["--task", "seen.jsonl", "--check-task", "unseen.jsonl", "--model", "tiny"]
    more += ["--dtype", "float32"]  # what is loaded here, and workers take on any processor
    return [*more, "--objective", "kl", "--batch", "3", "-o", "r.json"]


def test_gsearch_writes_a_recipe_that_runs(search: list[str]) -> None:
    said = works("search", "gsearch", *search, "--max-drop", "0.05", "--step", "0.125")
    recipe = foveate.Recipe.load("r.json")
    alive = recipe.schedule.alive
    assert len(alive) == LAYERS and alive[:2] == (1.0, 1.0)
    assert all(a * 8 == int(a * 8) and a > 0 for a in alive)
    assert recipe.provenance["tasks"] == ["seen.jsonl"] and recipe.provenance["layers"] == LAYERS
    report = wrote("r.search.json")
    assert report["alive"] == list(alive) and Path("r.png").stat().st_size > 1000
    assert {"score", "dense", "flops_ratio", "evaluations", "forward_equivalents"} <= set(report)
    stamp = recipe.provenance
    assert stamp["difference_low"] <= stamp["difference"] <= stamp["difference_high"]
    assert stamp["difference"] == pytest.approx(stamp["score"] - stamp["dense"])
    assert stamp["measured_on"] == {"unseen": 4}
    assert "r.json:" in said and "probes" in said
    for tried in report["tried"]:
        accepted = tried["spare"] >= 0
        assert accepted or alive[tried["layer"]] > tried["keep"]
    (dense, found) = report["rows"]
    assert dense["task"] == "unseen" and dense["n"] == 4
    works("eval", "--task", "unseen.jsonl", "--model", "tiny", "--recipe", "r.json", "--json", "e")
    assert wrote("e")["rows"][1]["score"] == found["score"]


def test_a_search_goes_on(search: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["search", "gsearch", *search, "--step", "0.25"]
    works(*command)
    first = foveate.Recipe.load("r.json").schedule
    monkeypatch.setattr(Probe, "values", never)
    works(*command)
    assert foveate.Recipe.load("r.json").schedule == first
    said = refuses(*command, "--max-drop", "1%")
    assert "max_drop" in said and "--storage" in said


def test_psigmoid_keeps_to_its_budget(search: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["search", "psigmoid", *search, "--tokens", "18", "--first", "1"]
    works(*command, "--trials", "3")
    schedule = foveate.Recipe.load("r.json").schedule
    kept = [schedule.count(b, VISION) for b in range(LAYERS)]
    assert 17 < sum(kept) / LAYERS <= 18 and kept[0] == VISION
    assert len(wrote("r.search.json")["tried"]) == 3
    works(*command, "--trials", "5")
    assert len(wrote("r.search.json")["tried"]) == 5
    monkeypatch.setattr(Probe, "values", never)
    works(*command, "--trials", "5")


def test_auto_writes_its_front_and_what_to_take(search: list[str]) -> None:
    works("search", "auto", *search, "--budget", "0.5", "--trials", "8")
    report, tried = wrote("r.search.json"), wrote("r.search.json")["tried"]
    assert report["value"] == max(t["value"] for t in tried) and report["share"] <= 0.5
    files = sorted(Path("r.front").glob("*.json"))
    assert len(files) == report["front"] >= 1 and Path("r.front/front.png").is_file()
    assert foveate.Recipe.load(files[-1]).schedule == foveate.Recipe.load("r.json").schedule
    more = [*search[:-1], "loose.json", "--max-drop", "9", "--trials", "8"]
    works("search", "auto", *more)
    loose = wrote("loose.search.json")
    assert loose["share"] == min(t["share"] for t in loose["tried"])


def test_analysis_says_what_it_saw(search: list[str]) -> None:
    said = works("search", "analyse", "--task", "seen.jsonl", "--model", "tiny", "-o", "a.json")
    found = wrote("a.json")
    assert (len(found["tau"]), len(found["mass"]), found["examples"]) == (LAYERS - 1, LAYERS, 5)
    assert Path("a.png").stat().st_size > 1000
    assert f"{found['tau'][0]:.2f}" in said and "aim-merge:keep=0.25" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["psigmoid", "--tokens", "9", "--budget", "0.5"], "said 2 times"),
        (["psigmoid"], "said 0 times"),
        (["psigmoid", "--tokens", "1"], "cannot be met"),
        (["psigmoid", "--flops", "many"], "2.74T"),
        (["psigmoid", "--ttft", "soon"], "120ms"),
        (["psigmoid", "--tokens", "9", "--entrance", "fastv"], "prumerge+:keep=0.5"),
        (["gsearch", "--entrance", "prumerge"], "prumerge+:keep=0.5"),
        (["gsearch", "--max-drop", "some"], "0.5%"),
        (["gsearch", "--optimiser", "grid"], "bisect or bo"),
        (["gsearch", "--confidence", "0.2"], "at least 0.5"),
        (["gsearch", "--objective", "loss"], "score, match, kl"),
        (["gsearch", "--method", "atention"], "attention"),
        (["gsearch", "--check-task", "seen.jsonl"], "same examples"),
        (["auto"], "either --budget"),
        (["auto", "--budget", "0.1", "--max-drop", "1%"], "either --budget"),
        (["auto", "--budget", "2"], "(0, 1]"),
    ],
)
def test_bad_input(search: list[str], more: list[str], said: str) -> None:
    kind, *rest = more
    assert said in refuses("search", kind, *search, *rest)


@pytest.mark.parametrize(
    "storage", [pytest.param("one.study", marks=pytest.mark.wide), "sqlite:///one.db"]
)
def test_two_workers_share_one_search_though_one_is_killed(
    search: list[str], checkpoint: Path, storage: str
) -> None:
    """The first worker dies in a trial; the second, another process's like, ends the search."""
    command = ["search", "psigmoid", *search, "--tokens", "18", "--first", "1"]
    command += ["--storage", storage, "--check-limit", "0"]
    killed = [str(checkpoint) if word == "tiny" else word for word in command]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import test_cli_search as t; t.dies_in_the_third({killed!r})"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    )
    assert process.wait(timeout=120) == -signal.SIGKILL
    works(*[str(checkpoint) if word == "tiny" else word for word in command], "--trials", "5")
    tried = wrote("r.search.json")["tried"]
    assert sum(t["value"] is not None for t in tried) == 5


@pytest.mark.wide
def test_torchrun_shares_the_examples_though_one_process_is_killed(
    search: list[str], checkpoint: Path
) -> None:
    """Two processes find what one finds; one is killed on the way and the command given again."""
    command = [str(checkpoint) if word == "tiny" else word for word in search]
    command += ["--step", "0.25", "--max-drop", "0.05", "--check-limit", "2"]
    works("search", "gsearch", *command)
    alone, report = foveate.Recipe.load("r.json"), wrote("r.search.json")
    command[command.index("r.json")] = "shared.json"
    Path("worker.py").write_text(
        f"import test_cli_search as t; t.second_dies_once({['search', 'gsearch', *command]!r})"
    )
    where = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "worker.py"]
    env = {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"}
    first, second = (subprocess.run(torchrun, env=env, timeout=500, check=False) for _ in range(2))
    assert first.returncode != 0 and second.returncode == 0
    assert Path("died").is_file()
    shared = foveate.Recipe.load("shared.json")
    assert shared.schedule == alone.schedule
    assert shared.provenance["data"] == alone.provenance["data"]
    again = wrote("shared.search.json")
    assert again["evaluations"] < report["evaluations"]  # some had been noted before the death
    for before, after in zip(report["tried"], again["tried"], strict=True):
        assert after == pytest.approx(before, abs=1e-5)


def second_dies_once(command: list[str]) -> None:
    """A process of ``torchrun``; the one of rank 1 is killed in its second probe, once."""
    plain, calls = Probe.values, []

    def values(self: Probe, alive: Sequence[float]) -> list[float]:
        calls.append(alive)
        if len(calls) == 2 and os.environ["RANK"] == "1" and not Path("died").is_file():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, alive)

    Probe.values = values  # type: ignore[method-assign]
    works(*command)


def test_one_task_is_searched_on_train_and_measured_on_validation(search: list[str]) -> None:
    where = ["--model", "tiny", "--limit", "2", "--check-limit", "2", "-o", "r.json"]
    works("search", "psigmoid", "--task", "easyvqa", *where, "--tokens", "18", "--trials", "1")
    assert [row["task"] for row in wrote("r.search.json")["rows"]] == ["easyvqa"] * 2


def test_an_entrance_before_the_search(search: list[str]) -> None:
    works(
        "search",
        "psigmoid",
        *search,
        "--tokens",
        "9",
        "--entrance",
        "pool:keep=0.5",
        "--trials",
        "2",
        "--check-limit",
        "0",
    )
    recipe = foveate.Recipe.load("r.json")
    assert recipe.entrance == foveate.reducer("pool") and recipe.schedule.alive[:2] == (0.5, 0.5)
    kept = [recipe.schedule.count(b, VISION) for b in range(LAYERS)]
    assert 8 < sum(kept) / LAYERS <= 9
    assert "entrance" in refuses("search", "psigmoid", *search, "--tokens", "9")


def test_a_budget_of_milliseconds(search: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes 1 ms and 0.1 for each row, all else 4 ms: 7 text rows and 36 of the image."""
    monkeypatch.setattr(clock, "layer_times", lambda *_: [(1, 1.1), (100, 11.0)])
    text = []

    def taken(model: object, inputs: dict[str, Any], recipe: foveate.Recipe | None = None) -> float:
        text[:] = [inputs["input_ids"].shape[1] - VISION]
        alive = recipe.schedule.alive if recipe else (1.0,) * LAYERS
        kept = foveate.Schedule(alive=alive)
        return 4.0 + sum(1 + 0.1 * (text[0] + kept.count(b, VISION)) for b in range(LAYERS))

    monkeypatch.setattr(clock, "first_token", taken)
    dense = taken(None, {"input_ids": torch.zeros(1, 43)})
    works(
        "search",
        "psigmoid",
        *search,
        "--ttft",
        f"{dense - 6:.6f}ms",
        "--first",
        "1",
        "--trials",
        "2",
        "--check-limit",
        "0",
    )
    assert dense - 6.6 < wrote("r.search.json")["ttft_ms"] + 0.1 * (36 - text[0] - 29) <= dense
    said = refuses("search", "psigmoid", *search[:-1], "s.json", "--ttft", "3ms")
    assert "cannot be met" in said and "4 ms" in said


def dies_in_the_third(command: list[str]) -> None:
    """A worker that is killed while its third trial runs."""
    plain, calls = Probe.values, []

    def values(self: Probe, alive: Sequence[float]) -> list[float]:
        calls.append(alive)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, alive)

    Probe.values = values  # type: ignore[method-assign]
    works(*command, "--trials", "5")
