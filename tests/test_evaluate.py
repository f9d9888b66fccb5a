"""Evaluation: answers equal a naive loop, intervals equal known ones, bad input is one message."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import Listed, asked, chosen, noise

import foveate
from foveate.answer import answer
from foveate.evaluate import BLANK, baselines, evaluate
from foveate.journal import Journal
from foveate.pinhole.outliers import kept
from foveate.statistics import difference, difference_of_means, interval, mcnemar
from foveate.tasks import Example

STEPS = Example.new_tokens


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


def texts(pair: tuple[Any, Any], some: Sequence[Example], size: int, **more: Any) -> list[str]:
    """Answers in batches of ``size``."""
    parts = [some[i : i + size] for i in range(0, len(some), size)]
    return [text for part in parts for text in answer(*pair, part, **more).texts]


def test_greedy_answers_are_those_of_a_naive_loop(pair: tuple[Any, Any]) -> None:
    some = asked().examples
    expected = [greedy(*pair, e) for e in some]
    assert texts(pair, some, 3) == expected
    assert len(set(expected)) > 3, "the model says the same to everything: nothing was tested"


@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_choices_are_those_of_a_naive_loop(pair: tuple[Any, Any], rule: str) -> None:
    some = chosen().examples
    expected = [likeliest(*pair, e, rule) for e in some]
    assert texts(pair, some, 3, likelihood=rule) == expected
    assert len({e.choices.index(a) for e, a in zip(some, expected, strict=True)}) > 1


@pytest.mark.parametrize("method", ["fastv", "attention", "pagerank"])
def test_choices_do_not_steer_the_method(pair: tuple[Any, Any], method: str) -> None:
    """As in use: the prompt is reduced alone, then each choice is said token by token."""
    some = chosen().examples
    with foveate.reduced(pair[0], foveate.recipe(method, keep=0.25, before=1)):
        expected = [likeliest_in_use(*pair, e) for e in some]
        assert texts(pair, some, 3) == expected


@torch.no_grad()
def likeliest_in_use(model: Any, processor: Any, example: Example) -> str:
    scores = []
    for choice in example.choices:
        out, logp = model(**prompt_of(processor, example), use_cache=True), []
        for token in processor.tokenizer(choice + "<|im_end|>")["input_ids"]:
            logp.append(float(out.logits[0, -1].log_softmax(-1)[token]))
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        scores.append(sum(logp) / len(logp))
    return example.choices[int(np.argmax(scores))]


def test_mean_and_sum_differ(pair: tuple[Any, Any]) -> None:
    some = chosen().examples
    assert texts(pair, some, 7) != texts(pair, some, 7, likelihood="sum")


RECIPES = {"fastv": foveate.recipe("fastv", keep=0.25), "pool": foveate.recipe("pool", keep=0.25)}
TIMES = ("prefill_ms",)


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.mark.parametrize("make", [asked, chosen])
def test_a_batch_answers_as_singles_do(pair: tuple[Any, Any], make: Callable[[], Listed]) -> None:
    results = [plain(evaluate(*pair, [make()], RECIPES, batch_size=size)) for size in (1, 4, 16)]
    assert results[0] == results[1] == results[2]
    dense, fastv, pool = results[0]
    assert [r["n"] for r in results[0]] == [7, 7, 7]
    assert (dense["vision_tokens"], dense["flops_ratio"], dense["agreement"]) == (16, 1, 1)
    assert fastv["vision_tokens"] == (16 + 16 + 4) / 3  # three layers, cut before the third
    assert pool["vision_tokens"] == 4 and pool["flops_ratio"] > fastv["flops_ratio"] > 1


def test_rows_say_what_was_lost(pair: tuple[Any, Any]) -> None:
    """Scores, agreement and paired figures are those of the answers themselves."""
    made = asked()
    dense = texts(pair, made.examples, 7)
    with foveate.reduced(pair[0], RECIPES["pool"]):
        pooled = texts(pair, made.examples, 7)
    right = Listed([replace(e, answer=a) for e, a in zip(made.examples, dense, strict=True)])
    one, other = evaluate(*pair, [right], {"pool": RECIPES["pool"]})
    hits = [float(a == b) for a, b in zip(dense, pooled, strict=True)]
    assert one["score"] == 1.0 and one["difference"] == 0.0 and one["mcnemar_p"] == 1.0
    assert other["score"] == other["agreement"] == sum(hits) / 7 < 1
    assert (other["ci_low"], other["ci_high"]) == interval(hits)
    assert other["difference"] == pytest.approx(sum(hits) / 7 - 1)
    assert other["difference_low"] <= other["difference"] <= other["difference_high"]
    assert other["mcnemar_p"] == pytest.approx(min(1.0, 2 * 0.5 ** hits.count(0.0)))


def test_scores_by_kind(pair: tuple[Any, Any]) -> None:
    some = asked().examples
    said = texts(pair, some, 7)
    kinds = ["near"] * 3 + ["far"] * 4
    wanted = [said[0], "no", said[2], "no", "no", said[5].upper() + ".", "no"]
    parts = zip(some, wanted, kinds, strict=True)
    made = Listed([replace(e, answer=a, meta={"kind": kind}) for e, a, kind in parts])
    (row,) = evaluate(*pair, [made], {})
    assert row["score"] == 3 / 7 and row["by"] == {"far": 1 / 4, "near": 2 / 3}


def test_blanked_images_are_blank(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    with Watched(model) as seen:
        rows = evaluate(model, processor, [asked()], {}, blank=True)
    assert [r["blank"] for r in rows] == [False, True]
    colour = torch.tensor(BLANK) / 255
    images = processor.image_processor
    expected = (colour - torch.tensor(images.image_mean)) / torch.tensor(images.image_std)
    (pixels,) = [p for p in seen.pixels if len(p) == 7 and torch.equal(p[0], p[6])]
    torch.testing.assert_close(pixels, expected[:, None, None].expand_as(pixels), atol=1e-5, rtol=0)


def test_every_example_is_asked_once_and_in_order(pair: tuple[Any, Any]) -> None:
    made, done = asked(), []
    evaluate(*pair, [made], {}, batch_size=3, advance=lambda *said: done.append(said))
    assert sorted(made.drawn) == list(range(7))
    assert done == [("listed", 3), ("listed", 3), ("listed", 1)]


def test_the_processor_and_the_model_are_left_as_they_were(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    before = texts(pair, asked().examples, 7)
    evaluate(model, processor, [asked()], RECIPES)
    assert processor.tokenizer.padding_side == "right"
    assert texts(pair, asked().examples, 7) == before


def test_nothing_to_ask_is_an_error(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="nothing to ask"):
        evaluate(*pair, [Listed([])], {})


def test_outliers_are_counted_image_by_image(pair: tuple[Any, Any]) -> None:
    """As in one batch; adaptive PruMerge keeps an image's outliers and one token besides."""
    images = [noise(i) for i in range(4)]
    found = kept(*pair, images)
    some = [Example(image, "aa bb", "") for image in images]
    with foveate.reduced(pair[0], foveate.recipe("prumerge")) as report:
        answer(*pair, some, max_new_tokens=1)
    assert found == report.alive[0] and min(found) >= 2


# --- the journal -------------------------------------------------------------------------------


class Stop(Exception):
    """A run that is killed."""


def test_a_stopped_run_goes_on(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """What was answered is not asked again, half a line is dropped, and the rows are the same."""
    whole = plain(evaluate(*pair, [asked()], RECIPES, batch_size=2))
    file, steps = tmp_path / "rows.answers", iter(range(5))

    def stop(*_: object) -> None:
        if next(steps) == 4:
            raise Stop

    with pytest.raises(Stop):
        evaluate(
            *pair, [asked()], RECIPES, batch_size=2, journal=Journal(file, {"m": 1}), advance=stop
        )
    kept = file.read_text()
    assert kept.count("\n") == 1 + 5 * 2
    file.write_text(kept + '{"task": "lis')
    journal = Journal(file, {"m": 1})
    assert len(journal.records) == 10
    assert plain(evaluate(*pair, [asked()], RECIPES, batch_size=2, journal=journal)) == whole
    assert file.read_text().startswith(kept) and file.read_text().count("\n") == 1 + 21


def test_what_is_answered_is_not_made_again(pair: tuple[Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.answers"
    for recipes, drawn in (({}, [*range(4)]), ({}, []), (RECIPES, [*range(7)])):
        made = asked(4 if recipes == {} else 7)
        rows = evaluate(*pair, [made], recipes, batch_size=3, journal=Journal(file))
        assert sorted(made.drawn) == drawn and len(rows) == 1 + len(recipes)


def test_a_fact_is_found_out_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.answers"
    assert Journal(file).once("a", lambda: [1]) == [1]
    journal = Journal(file)
    assert journal.once("a", lambda: [2]) == [1] and journal.once("b", lambda: {}) == {}
    assert Journal(file).facts == {"a": [1], "b": {}} and Journal().once("a", lambda: 3) == 3


def test_questions_with_and_without_choices_in_one_task(pair: tuple[Any, Any]) -> None:
    """They are answered as in tasks of their own."""
    some = [e for two in zip(asked(3).examples, chosen(3).examples, strict=True) for e in two]
    journal = Journal()
    evaluate(*pair, [Listed(some)], {}, batch_size=4, journal=journal)
    said = {r.index: r.answer for r in journal.records}
    assert [said[i] for i in range(6)][::2] == texts(pair, some[::2], 3)
    assert [said[i] for i in range(6)][1::2] == texts(pair, some[1::2], 3)


def test_a_changed_recipe_of_the_same_name_is_asked_anew(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    file = tmp_path / "rows.answers"
    evaluate(*pair, [asked()], {"mine": RECIPES["pool"]}, journal=Journal(file))
    rows = evaluate(*pair, [asked()], {"mine": RECIPES["fastv"]}, journal=Journal(file))
    assert rows[1]["vision_tokens"] == 12 and len(Journal(file).records) == 21


def test_a_journal_of_another_command_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "a", {"seed": 0})
    with pytest.raises(ValueError, match="answers of another command"):
        Journal(tmp_path / "a", {"seed": 1})


# --- baselines ---------------------------------------------------------------------------------


def test_baselines_cost_what_the_recipe_costs(pair: tuple[Any, Any]) -> None:
    made, notes = baselines(*pair, [asked()], {"fastv": RECIPES["fastv"]})
    assert [name.partition(":")[0] for name in made] == ["random", "pool", "downsample"]
    assert not notes
    rows = evaluate(*pair, [asked()], {"fastv": RECIPES["fastv"], **made})
    fastv, random = rows[1]["flops_ratio"], rows[2]["flops_ratio"]
    assert random >= fastv and rows[2]["vision_tokens"] + 1 > rows[1]["vision_tokens"]


# --- intervals ---------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_of_the_disagreements() -> None:
    assert mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == pytest.approx(2 / 32)
    assert mcnemar([1, 0], [0, 1]) == 1.0 and mcnemar([0.5], [0.1]) is None


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    draw = np.random.default_rng(0)
    dense = (draw.random(300) < 0.7).astype(float)
    worse = dense.copy()
    worse[:9] = 0.0
    low, high = difference(list(worse), list(dense))
    assert low < worse.mean() - dense.mean() < high <= 0.0
    one, two = interval(list(worse)), interval(list(dense))
    assert high - low < (one[1] - one[0]) / 2 and two[0] < one[1]


def test_the_mean_of_tasks_counts_a_small_task_as_much_as_a_large_one() -> None:
    draw = np.random.default_rng(1)
    tasks = [(draw.random(n) + gain, draw.random(n)) for n, gain in ((400, 0.0), (100, 0.2))]
    apart = [mine - dense for mine, dense in tasks]
    mean = float(np.mean([values.mean() for values in apart]))
    spread = sum(values.var() / len(values) for values in apart) ** 0.5 / 2
    low, high = difference_of_means([(list(mine), list(dense)) for mine, dense in tasks])
    assert (low, high) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.004)


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
