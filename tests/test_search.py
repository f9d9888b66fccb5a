"""Search: probes from the middle equal whole runs, and searches find what is known to be there."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import foveate
from foveate.recipe import Recipe
from foveate.schedule import Schedule
from foveate.search.gsearch import GSearch, bayes, bisect
from foveate.search.objective import lower
from foveate.search.prefix import Batch, Runner, Shelf

LENGTHS = (3, 1)  # of the answers
CURVE = (1.0, 0.8, 0.8, 0.5, 0.3, 0.1)


def batch_of(family: tiny.Family, images: list[int]) -> Batch:
    """A padded batch with answers of different lengths."""
    inputs = tiny.prompt(family, images)
    width = max(LENGTHS)
    draw = torch.Generator().manual_seed(7)
    answer = torch.randint(3, 80, (len(images), width), generator=draw)
    for row, length in zip(answer, LENGTHS, strict=False):
        row[length:] = -100
    ids = torch.cat([inputs["input_ids"], answer.clamp(min=0)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == tiny.IMAGE).int()
    return Batch(inputs, answer)


class Said:
    """A logits processor that says the answers."""

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer, self.start = answer.clamp(min=0), 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = self.start or ids.shape[1]
        wanted = self.answer[:, ids.shape[1] - self.start, None]
        return torch.full_like(scores, -1e9).scatter(1, wanted, 0.0)


def in_use(model: Any, batch: Batch, recipe: Recipe) -> torch.Tensor:
    """Logits where the answers stand, by ``generate`` on the prompts alone."""
    width = batch.answer.shape[1]
    prompt = {k: v[:, :-width] if k in TWO_D else v for k, v in batch.inputs.items()}
    with foveate.reduced(model, recipe):
        out = model.generate(
            **prompt,
            max_new_tokens=width,
            do_sample=False,
            logits_processor=[Said(batch.answer)],
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits, 1)


TWO_D = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.mark.parametrize("method", ["attention", "fastv", "pagerank", "pool"])
@pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES)
def test_a_walk_gives_what_prefill_and_decoding_give(family: tiny.Family, method: str) -> None:
    model, batch = family.build(), batch_of(family, [1, 1])
    runner = Runner(model)
    state, _ = runner.start(batch)
    recipe = runner.recipe(CURVE, foveate.reducer(method))
    walked = runner.logits(runner.run(state, recipe).hidden, batch)
    used = in_use(model, batch, recipe)
    real = batch.answer >= 0
    torch.testing.assert_close(walked[real], used[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entrance", ["prumerge", "aim-merge", "random"])
def test_with_an_entrance_too(entrance: str) -> None:
    family = tiny.FAMILIES["llava"]
    model, batch = family.build(), batch_of(family, [1, 1])
    runner = Runner(model, foveate.reducer(entrance), keep=0.5)
    state, _ = runner.start(batch)
    recipe = runner.recipe([0.5, 0.5, 0.4, 0.4, 0.2, 0.2], foveate.reducer("attention"))
    walked = runner.logits(runner.run(state, recipe).hidden, batch)
    real = batch.answer >= 0
    torch.testing.assert_close(
        walked[real], in_use(model, batch, recipe)[real], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_going_on_from_the_middle_is_going_on(stop: int, tmp_path: Path) -> None:
    family = tiny.FAMILIES["llava-onevision"]
    model, batch = family.build(), batch_of(family, [1, 2])
    runner, method = Runner(model), foveate.reducer("attention")
    state, _ = runner.start(batch)
    before, tail = CURVE[:stop], min(CURVE[stop], 0.2)
    whole = runner.run(state, runner.recipe([*before, *[tail] * (6 - stop)], method))
    kept = runner.run(state, runner.recipe([*before, *[0.0] * (6 - stop)], method), stop)
    shelf = Shelf(tmp_path, limit=0)  # through a file
    shelf.put(kept)
    (again,) = shelf
    spent = runner.flops
    resumed = runner.run(again, runner.recipe([*before, *[tail] * (6 - stop)], method))
    torch.testing.assert_close(resumed.hidden, whole.hidden, rtol=1e-5, atol=1e-5)
    assert runner.flops - spent < spent * (6 - stop) / 6, "layers below were run again"


def test_nothing_cut_is_the_untouched_model() -> None:
    family = tiny.FAMILIES["llava"]
    model, batch = family.build(), batch_of(family, [1, 1])
    runner = Runner(model)
    state, last = runner.start(batch)
    flat = runner.recipe([1.0] * 6, None)
    assert torch.equal(runner.run(state, flat).hidden, last)
    dense = model(**batch.inputs).logits[:, -4:-1]
    torch.testing.assert_close(runner.logits(last, batch), dense)
    assert Schedule(alive=(1.0,) * 6).cuts() == ()


# --- G-Search ----------------------------------------------------------------------------------


class Nested:
    """The paper's assumption: an example is right while layer i keeps its ``least[i]`` tokens."""

    def __init__(self, least: list[float]) -> None:
        self.least, self.layer, self.asked = least, 0, 0
        self.dense = [1.0] * 20
        self.runner = SimpleNamespace(shape=SimpleNamespace(layers=len(least)), keep=1.0)

    def decide(self, alive: list[float], layer: int) -> None:
        assert layer >= self.layer and alive[layer:] == [alive[layer]] * (len(alive) - layer)
        self.layer = layer

    def values(self, alive: list[float]) -> list[float]:
        self.asked += 1
        enough = all(a >= e for a, e in zip(alive, self.least, strict=True))
        return [1.0] * (20 if enough else 18) + [0.0] * (0 if enough else 2)


LEAST = [1.0, 1.0, 0.75, 0.5, 0.5, 0.46875, 0.125, 0.0625]


@pytest.mark.parametrize("optimiser", ["bisect", "bayes"])
def test_gsearch_finds_the_least_of_every_layer(optimiser: str) -> None:
    if optimiser == "bayes":
        pytest.importorskip("optuna")
    choose = bisect(1 / 32) if optimiser == "bisect" else bayes(1 / 32, trials=14)
    probe = Nested(LEAST)
    search = GSearch(probe, max_drop=0.01, choose=choose, step=1 / 32)  # type: ignore[arg-type]
    curves = list(search.run())
    assert len(curves) == len(LEAST) - 2
    if optimiser == "bisect":
        assert curves[-1] == LEAST
        assert probe.asked <= 6 * 5
    else:
        assert all(c >= e for c, e in zip(curves[-1], LEAST, strict=True))
        assert sum(curves[-1]) <= sum(LEAST) + 0.2
    again = Nested(LEAST)
    more = GSearch(again, 0.01, choose=choose, step=1 / 32, known=search.known)  # type: ignore[arg-type]
    assert list(more.run()) == curves and again.asked == 0, "what was tried was tried again"


def test_a_tolerance_lets_more_go() -> None:
    strict, loose = Nested(LEAST), Nested(LEAST)
    (*_, first) = GSearch(strict, 0.05, choose=bisect(1 / 32)).run()  # type: ignore[arg-type]
    (*_, second) = GSearch(loose, 0.15, 0.5, choose=bisect(1 / 32)).run()  # type: ignore[arg-type]
    assert first == LEAST and second[2:] == [1 / 32] * 6


def test_the_bound_is_the_normal_one() -> None:
    apart = [0.0, 0.0, -1.0, 0.0, 1.0, 0.0, 0.0, -1.0]
    assert lower(apart, 0.5) == pytest.approx(-1 / 8)
    spread = statistics.stdev(apart) / len(apart) ** 0.5
    assert lower(apart, 0.9) == pytest.approx(-1 / 8 - 1.2816 * spread, abs=1e-4)
