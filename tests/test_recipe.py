"""Schedules, recipes, presets, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foveate
from foveate import Recipe, Schedule
from foveate.recipe import PRESETS, parse
from foveate.reducer import discover

RECIPES = Path(__file__).parent.parent / "recipes"


def test_aim_follows_the_released_literals() -> None:
    """r[l] = max(0, 1 - 0.125·(l - 13)) from layer 14 on, and it acts on the layer after."""
    for layers, first in ((28, 14), (32, 13)):
        rate = [1.0 if i < first else max(0.0, 1 - 0.125 * (i - first + 1)) for i in range(layers)]
        assert Schedule.ramp().resolve(layers).alive == pytest.approx((1.0, *rate[:-1]))


def test_a_step_is_fastv() -> None:
    assert Schedule.step(0.25).resolve(5).alive == (1.0, 1.0, 0.25, 0.25, 0.25)
    assert Schedule.step(0.25).resolve(5).cuts() == (2,)


def test_stages_are_pyramiddrop() -> None:
    alive = Schedule.stages({1: 0.5, 3: 0.25}).resolve(5).alive
    assert alive == (1.0, 0.5, 0.5, 0.25, 0.25)


def test_the_sigmoid_is_the_fitted_curve() -> None:
    """a/(1+exp(k(i-b))) with the paper's fit (papers.md §1.5) is near its digitised dots."""
    alive = Schedule.sigmoid(top=0.756, slope=0.222, middle=12.23).resolve(32).alive
    assert alive[:2] == (1.0, 1.0)
    assert alive[2] == pytest.approx(0.756 / (1 + 2.718281828 ** (0.222 * (3 - 12.23))), abs=1e-6)
    assert alive[2] == pytest.approx(0.649, abs=0.03)


def test_counts_are_floors_and_never_lose_a_token_to_rounding() -> None:
    schedule = Schedule([0.25, 64 / 576, 0.001])
    assert schedule.count(1, 576) == 64
    assert schedule.count(0, 7) == 1
    assert schedule.count(2, 576) == 1
    assert Schedule([0.0]).count(0, 576) == 0


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.75])
def test_a_scaled_curve_has_the_mean_asked_for(keep: float) -> None:
    made = foveate.recipe("gsearch-llava-1.5-7b", keep=keep).resolve(32)
    assert made.schedule.mean == pytest.approx(keep, abs=1e-6)


def test_the_published_curve_has_its_published_mean() -> None:
    made = foveate.recipe("gsearch-llava-1.5-7b").resolve(32)
    assert made.schedule.mean == pytest.approx(0.307, abs=0.001)
    assert "digitised" in made.provenance["source"]


@pytest.mark.parametrize("name", [*PRESETS, *discover()])
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    made = foveate.recipe(name, keep=0.25)
    made.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == made
    deep = made.resolve(28)
    deep.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == deep


@pytest.mark.parametrize("name", [*PRESETS, *discover()])
def test_keep_one_is_all(name: str) -> None:
    schedule = foveate.recipe(name, keep=1.0).resolve(32).schedule
    assert schedule.alive == (1.0,) * 32
    assert not schedule.adaptive


def test_pruning_rate_is_the_other_way_round() -> None:
    a, b = foveate.recipe("fastv", pruning_rate=0.75), foveate.recipe("fastv", keep=0.25)
    assert a.schedule == b.schedule


def test_the_command_lines_form() -> None:
    made = parse("prumerge:keep=0.25,neighbours=16,order=raster")
    assert made.entrance == foveate.reducer("prumerge", neighbours=16, order="raster")
    assert made.schedule == Schedule.flat(0.25)
    assert parse("prumerge").schedule.adaptive


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aimm", "There is no preset or reducer 'aimm'. Did you mean 'aim'"),
        ("fastv:keep=0", r"keep is 0.*\(0, 1\]"),
        ("fastv:keep=1.5", r"keep is 1.5.*\(0, 1\]"),
        ("fastv:keep=half", "keep is 'half'"),
        ("fastv:keep", "'keep' in 'fastv:keep' is not key=value"),
        ("fastv:before=0", "before is 0"),
        (
            "prumerge:neighbour=3",
            "There is no knob of prumerge 'neighbour'. Did you mean 'neighbours'",
        ),
        ("prumerge:neighbours=x", "neighbours of prumerge takes a int, not 'x'"),
        ("aim:stp=9", "There is no knob of aim 'stp'. Did you mean 'stop'"),
        ("aim:at=pixels", "merges at 'features' or at 'tokens'"),
        ("fastv:keep=0.5,pruning_rate=0.5", "said twice"),
        ("fastv:keep=0.5,keep=0.25", "said twice"),
        ("gsearch-llava-1.5-7b:keep=0.01", "below what the 2 full layers"),
        ("missing.json", "There is no recipe file missing.json"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text).resolve(32)


def test_the_budget_said_twice() -> None:
    with pytest.raises(ValueError, match=r"--keep 0\.5 and in 'fastv:keep=0\.5'"):
        parse("fastv:keep=0.5", keep=0.5)


@pytest.mark.parametrize(
    ("alive", "message"),
    [([0.5, 0.6], "never rises"), ([1.2], r"lie in \[0, 1\]"), ([-0.1], "lie in"), ([], "either")],
)
def test_schedules_that_cannot_be(alive: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(alive)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2 and this version reads 1"),
        ({"schedul": {}}, "key of a recipe 'schedul'. Did you mean 'schedule'"),
        ({"layers": {"name": "fastvv"}}, "no reducer 'fastvv'. Did you mean 'fastv'"),
        ({"layers": {"name": "fastv", "x": 1}}, "knob of fastv 'x'"),
        ({"schedule": {"shape": "steep"}}, "schedule shape 'steep'. Did you mean 'step'"),
        ({"schedule": {"alive": [1.0], "alve": 1}}, "key of a schedule 'alve'"),
        ({"layers": {"name": "prumerge"}}, "acts before the LLM"),
        ({"entrance": {"name": "fastv"}}, "cannot act at the entrance"),
        ({"schedule": {"alive": [1.0, 0.5]}, "layers": None}, "no layers reducer"),
        ({"schedule": {"alive": [0.5, 0.5]}}, "needs an entrance reducer"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, change: dict, message: str) -> None:
    said = foveate.recipe("fastv", keep=0.5).to_dict() | change
    (tmp_path / "r.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "r.json")


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Recipe.load(tmp_path / "r.json")


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_recipes_fit_pinhole_and_say_what_they_measured(file: Path) -> None:
    made = Recipe.load(file).resolve(30, "llava")
    told = made.provenance
    assert made.schedule.cuts() and min(told["measured_on"].values()) >= 100
    assert told["difference"] == pytest.approx(told["score"] - told["dense"], abs=1e-3)
    assert told["flops_ratio"] > 1
    with pytest.raises(ValueError, match="30"):
        Recipe.load(file).resolve(32, "llava")
