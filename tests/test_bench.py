"""The benchmark: on a clock that only the test moves, every figure is known beforehand.

``Clock`` stands in for the wall clock. A decoder layer takes one millisecond per row it works on,
the vision encoder and choosing survivors take a fixed time, all else takes none.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.adapter import family, text_shape
from foveate.bench import (
    DENSE,
    IDENTITY,
    Settings,
    Stopwatch,
    bench,
    run,
    sheet,
    stopwatch,
    verdict,
)
from foveate.bench.run import attention_flops
from foveate.bench.verdicts import beside, break_even_output, break_even_prompt
from foveate.reducers.fastv import FastV
from foveate.reducers.random import Random
from foveate.report import elapsed
from foveate.shapes import Prompt, inputs, text_only

TIMES = ("vision_ms", "prefill_ms", "reduce_ms", "ttft_ms", "decode_ms")
CONTRACT = {"recipe", "batch", "prompt_tokens", "vision_tokens", "flops", "kv_bytes", "peak_bytes"}
CONTRACT |= {*TIMES, "speedup", "limit", "attainable_ms", "efficiency", "spread", "answers"}
CONTRACT |= {"paper_flops", "paper_limit", "prefill_peak_bytes", "decode_tokens_per_s"}
RECIPES = {
    "fastv": foveate.recipe("fastv", keep=0.25),
    "random": foveate.recipe("random", keep=0.5),
    "aim": foveate.recipe("aim", keep=0.5),
}
QUICK = Settings(new_tokens=(3,), repeats=2)
ONCE = Settings((2,), 1, 1, False, False)
VISION, CHOOSING = 5.0, 3.0  # ms


@dataclass
class Clock:
    """Time that passes only when told to, in ms; what happens costs what the tests say."""

    now: float = 0.0

    def seconds(self) -> float:
        return self.now / 1e3

    def spend(self, milliseconds: float) -> None:
        self.now += milliseconds

    def layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self.spend((output[0] if isinstance(output, tuple) else output).shape[1])


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Put in the place of the wall clock; the scorers of two methods take ``CHOOSING``."""
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made.seconds)
    for method in (FastV, Random):
        score = method.score

        def slow(self: Any, tokens: Any, score: Any = score) -> Any:
            made.spend(CHOOSING)
            return score(self, tokens)

        monkeypatch.setattr(method, "score", slow)
    return made


@pytest.fixture
def timed(clock: Clock) -> Any:
    """A tiny LLaVA on that clock: 36 vision tokens, 6 layers."""
    model = tiny.llava()
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(clock.layer)
    inside = model.model.multi_modal_projector.linear_1  # the stopwatch's hooks stand around it
    inside.register_forward_pre_hook(lambda *_: clock.spend(VISION))
    return model


def used(mebibytes: int) -> None:
    """Have that much memory for a moment."""
    torch.ones(mebibytes << 18)


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["recipe"]: row for row in result["rows"]}


@pytest.mark.parametrize("prompt", [Prompt(), Prompt(3, ragged=True)], ids=["one", "ragged"])
def test_every_figure_on_a_known_clock(timed: Any, prompt: Prompt) -> None:
    """Truth by construction: T(n) = 6 n, so attainable = Σ n_l and efficiency is what it wastes."""
    result = bench(timed, {"fastv": RECIPES["fastv"], "random": RECIPES["random"]}, prompt, QUICK)
    rows, longest = by_name(result), 36 + prompt.text_tokens
    lengths = {
        DENSE: [longest] * 6,
        IDENTITY: [longest] * 6,
        "fastv": [longest] * 2 + [longest - 27] * 4,
        "random": [longest - 18] * 6,
    }
    assert list(rows) == list(lengths)
    for name, row in rows.items():
        chosen = 0.0 if name in (DENSE, IDENTITY) else CHOOSING
        work = sum(lengths[name])
        assert row["reduce_ms"] == pytest.approx(chosen)
        assert row["vision_ms"] == pytest.approx(VISION)
        assert row["prefill_ms"] == pytest.approx(work + chosen)
        assert row["ttft_ms"] == pytest.approx(VISION + work + chosen)
        assert row["decode_ms"] == pytest.approx(6)
        assert row["attainable_ms"] == pytest.approx(work)
        assert row["efficiency"] == pytest.approx(work / (work + chosen))
        (answer,) = row["answers"]
        assert answer["new_tokens"] == 3
        assert answer["total_ms"] == pytest.approx(VISION + work + chosen + 12)
        assert answer["tokens_per_s"] == pytest.approx(3e3 * prompt.batch / answer["total_ms"])
        assert row["decode_tokens_per_s"] == pytest.approx(1e3 * prompt.batch / 6)
        assert row["speedup"] == pytest.approx(6 * longest / (work + chosen))
    expected = {n: 6.0 * n for n in (longest - 27, longest - 18, longest)}
    assert result["text_only_ms"] == {prompt.batch: pytest.approx(expected)}


def test_vision_is_timed_apart_from_reducing(timed: Any, clock: Clock) -> None:
    """At the entrance, reducing happens inside ``get_image_features``, amid the vision part."""
    watch, given = Stopwatch(timed), inputs(timed, Prompt())
    with watch.around(RECIPES["random"]) as report, torch.no_grad():
        for _ in range(2):
            timed(**given)
            clock.spend(1000)  # what happens between forwards belongs to none
    assert report is not None
    assert report.reduce_ms == pytest.approx(CHOOSING)
    for forward in watch.forwards():
        assert forward.vision_ms == pytest.approx(VISION)
        assert forward.prefill_ms == pytest.approx(CHOOSING + 6 * (18 + 40))
        assert forward.total_ms == pytest.approx(forward.vision_ms + forward.prefill_ms)
    assert len(watch.forwards()) == 2


@torch.no_grad()
def test_generate_is_timed_like_forward(timed: Any, clock: Clock) -> None:
    """It encodes the picture before it calls ``forward``."""
    watch, given = Stopwatch(timed), inputs(timed, Prompt())
    with watch.around(RECIPES["random"]):
        timed.generate(**given, max_new_tokens=3, do_sample=False)
    first, *rest = watch.forwards()
    assert first.vision_ms == pytest.approx(VISION)
    assert first.prefill_ms == pytest.approx(CHOOSING + 6 * (18 + 40))
    assert [(step.vision_ms, step.prefill_ms) for step in rest] == [(0.0, pytest.approx(6))] * 2
    assert watch.decode_ms() == pytest.approx(6)


def test_decoding_is_from_end_to_end(timed: Any, clock: Clock) -> None:
    watch = Stopwatch(timed)
    with watch.around(None) as report, torch.no_grad():
        timed(**inputs(timed, Prompt()))
        assert watch.decode_ms() is None
        for pause in (10, 30):
            clock.spend(pause)
            timed(input_ids=torch.tensor([[5]]))
    assert report is None
    assert watch.decode_ms() == pytest.approx((10 + 6 + 30 + 6) / 2)
    assert elapsed(0.5, 0.75) == pytest.approx(250)


def test_figures_are_medians_with_quartiles(timed: Any, clock: Clock) -> None:
    """The encoder takes longer each round; dense goes first in the first round, then moves on."""
    spent: list[float] = []

    def slower(*_: Any) -> None:
        spent.append(len(spent))
        clock.spend(len(spent) - 1)

    timed.model.multi_modal_projector.linear_2.register_forward_pre_hook(slower)
    settings = Settings((2,), repeats=4, identity=False, attainable=False)
    row = bench(timed, {}, Prompt(), settings)["rows"][0]
    timed_runs = [VISION + s for s in spent[-4:]]
    assert len(spent) == 6  # FLOPs counted, one warm-up, four rounds
    assert row["vision_ms"] == pytest.approx(statistics.median(timed_runs))
    first, _, third = statistics.quantiles(timed_runs, n=4, method="inclusive")
    assert row["spread"]["vision_ms"] == pytest.approx([first, third])


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("llava", Prompt(3, ragged=True)), ("internvl", Prompt(2, images=2))],
    ids=["ragged", "images"],
)
def test_rows_say_what_a_run_of_its_own_finds(models, name: str, prompt: Prompt) -> None:
    """Lengths, cache bytes and FLOPs from a report and a cache that the benchmark never saw."""
    model = models(name)
    result = bench(model, RECIPES, prompt, QUICK)
    shape, rows = text_shape(family(model).text(model)), by_name(result)
    assert result["prompt"]["ragged"] == prompt.ragged
    typical, seen = result["text_only_ms"][prompt.batch], set()
    for label, recipe in RECIPES.items():
        row = rows[label]
        with foveate.reduced(model, recipe) as report, torch.no_grad():
            cache = model(**inputs(model, prompt)).past_key_values
        held = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
        assert row["kv_bytes"] == held
        lengths = [max(alive) for alive in report.rows]
        assert held == prompt.batch * shape.kv_bytes(lengths)
        assert row["attainable_ms"] == pytest.approx(sum(typical[n] for n in lengths) / 6)
        assert row["flops"] == report.flops
        alive = [sum(layer) / prompt.batch for layer in report.alive]
        assert row["vision_tokens"] == pytest.approx(sum(alive) / 6)
        assert (row["vision_tokens_entrance"], row["vision_tokens_last"]) == (alive[0], alive[-1])
        assert row["flops"] < rows[DENSE]["flops"] == report.dense_flops
        seen |= {*lengths, report.dense_rows[0]}
    assert set(typical) == seen


def test_ratios_are_the_stated_ones(models) -> None:
    result = bench(models("qwen2.5-vl"), RECIPES, Prompt(image_size=(48, 48)), QUICK)
    rows = by_name(result)
    dense = rows[DENSE]
    for row in rows.values():
        assert row.keys() >= CONTRACT
        assert row["speedup"] == pytest.approx(dense["prefill_ms"] / row["prefill_ms"])
        assert row["limit"] == pytest.approx(dense["flops"] / row["flops"])
        assert row["paper_limit"] == pytest.approx(dense["paper_flops"] / row["paper_flops"])
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["prefill_peak_bytes"]
        assert row["efficiency"] == pytest.approx(row["attainable_ms"] / row["prefill_ms"])
        for key in TIMES:
            low, high = row["spread"][key]
            assert math.isfinite(row[key]) and low <= row[key] <= high
            assert row[key] > 0 or key == "reduce_ms"
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    assert dense["limit"] == dense["speedup"] == 1.0
    assert dense["reduce_ms"] == 0.0
    assert all(rows[name]["reduce_ms"] > 0 for name in RECIPES)
    said = json.loads(json.dumps(result))
    assert said["rows"] == result["rows"]
    assert said["prompt"] == result["prompt"] | {"image_size": [48, 48]}
    assert said["text_only_ms"]["1"] == {str(n): t for n, t in result["text_only_ms"][1].items()}


def test_identity_is_as_long_as_dense(models) -> None:
    rows = by_name(bench(models("llava"), {}, Prompt(2, ragged=True), QUICK))
    same = ("prompt_tokens", "vision_tokens", "vision_tokens_last", "flops", "kv_bytes", "limit")
    assert list(rows) == [DENSE, IDENTITY]
    for key in same:
        assert rows[IDENTITY][key] == rows[DENSE][key], key
    assert rows[DENSE]["prompt_tokens"] == 36 + 40


def test_what_is_measured_can_be_left_out(models) -> None:
    result = bench(models("llava"), {"pool": foveate.recipe("pool", keep=0.25)}, Prompt(), ONCE)
    assert [row["recipe"] for row in result["rows"]] == [DENSE, "pool"]
    assert all(row["attainable_ms"] is row["efficiency"] is None for row in result["rows"])
    assert result["text_only_ms"] == {1: {}}
    assert all(row["break_even_prompt"] is None for row in result["rows"])


def test_where_and_with_what(models) -> None:
    result = bench(models("llava"), {}, Prompt(), ONCE, name="mine")
    assert result["model"] == "mine"
    assert (result["dtype"], result["attention"]) == ("float32", "sdpa")
    assert result["device"].startswith("cpu")
    assert result["threads"] == torch.get_num_threads()
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["settings"]["new_tokens"] == (2,)
    assert result["date"] == str(date.today())


def test_vision_flops_are_those_of_encoder_and_projector(models) -> None:
    """Against 2·m·n·k by hand: patches, 3 encoder layers with their attention, the projector."""
    found = bench(models("llava"), {}, Prompt(), ONCE, batches=(1, 2))["vision_flops"]
    rows, patch, d, mlp = 37, 3 * 8 * 8, 24, 32
    layer = 2 * rows * d * (4 * d + 2 * mlp) + 4 * rows * rows * d
    projector = 2 * 36 * (d * 32 + 32 * 32)
    expected = 2 * 36 * patch * d + 3 * layer + projector
    assert found == {1: expected, 2: 2 * expected}


def test_progress_ends_where_it_said(models) -> None:
    told: list[tuple[int, int, str]] = []
    bench(models("llava"), {}, Prompt(), QUICK, progress=lambda *said: told.append(said))
    done = [n for n, _, _ in told]
    assert done == list(range(len(told)))
    assert told[-1][1] == len(told)
    assert {what for _, _, what in told} == {DENSE, IDENTITY, "text only, 76 rows"}


def hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@torch.no_grad()
def test_nothing_is_left_on_the_model(monkeypatch) -> None:
    model = tiny.llava()
    given = inputs(model, Prompt())
    logits = model(**given).logits  # first of all: transformers adds hooks of its own here
    before, own = hooks(model), set(vars(model))
    bench(model, RECIPES, Prompt(), QUICK)
    assert (hooks(model), set(vars(model))) == (before, own)
    assert torch.equal(model(**given).logits, logits)

    def fails(*_: Any) -> None:
        raise RuntimeError("stop here")

    monkeypatch.setattr(FastV, "score", fails)
    with pytest.raises(RuntimeError, match="stop here"):
        bench(model, RECIPES, Prompt(), QUICK)
    assert (hooks(model), set(vars(model))) == (before, own)
    assert torch.equal(model(**given).logits, logits)


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [("new_tokens", (3, 1), 2), ("repeats", 0, 1), ("warmup", 0, 1), ("repeats", -3, 1)],
)
def test_settings_that_are_refused(field: str, value: Any, least: int) -> None:
    shown = value[1] if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=rf"{field} is {shown}; give at least {least}\."):
        Settings(**{field: value})


def test_a_profile_needs_a_goal_to_miss() -> None:
    with pytest.raises(ValueError, match="leave --no-attainable away"):
        Settings(profile=0.95, attainable=False)


def test_recipes_for_another_model_are_refused(models) -> None:
    deep = foveate.recipe("fastv", keep=0.5).resolve(32)
    with pytest.raises(ValueError, match=r"model of 32 layers and this one has\s+6"):
        bench(models("llava"), {"deep": deep}, Prompt(), QUICK)


def said(ttft: float, decode: float = 10.0, reduce: float = 0.0, half: float = 1.0) -> Any:
    """A row whose answer has 32 tokens."""
    spread = {"ttft_ms": [ttft - half, ttft + half]}
    answer = {"new_tokens": 32, "total_ms": ttft + 31 * decode}
    return {"recipe": "r", "batch": 1, "ttft_ms": ttft, "decode_ms": decode, "reduce_ms": reduce,
            "vision_ms": 100.0, "spread": spread, "answers": [answer],
            "break_even_prompt": None}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (said(500), ["500 ms instead of 1000 ms", "saves 38%", "beyond about 900 tokens"]),
        (said(500, decode=8), ["saves 43%"]),
        (said(500) | {"break_even_prompt": 1234}, ["prompts under about 1,234 tokens gain noth"]),
        (said(500) | {"batch": 8}, ["r at batch 8 brings"]),
        (said(1100, reduce=200), ["does not pay", "1100 ms against 1000", "200 ms of it reducing"]),
        (said(990, half=20), ["does not pay"]),  # within the spread
    ],
)
def test_verdicts(row: Any, words: list[str]) -> None:
    """Of 32 tokens: dense takes 1000 + 31 · 10; at 900 tokens 500 ms are a twentieth."""
    dense = said(1000)
    text = verdict(row | {"break_even_output": break_even_output(row, dense)}, dense)
    assert all(word in text for word in words), text
    assert ("beyond" in text) == (row["ttft_ms"] == 500 and row["decode_ms"] == 10)


def test_what_is_said_of_peers() -> None:
    ours = {"recipe": "r", "batch": 1, "prefill_ms": 20.0, "prefill_peak_bytes": 300 << 20}
    row = ours | {"recipe": "r by p", "prefill_ms": 250.0, "prefill_peak_bytes": 500 << 20}
    text = "r by p takes 12.5 times as long for the prompt as r here"
    assert beside(row, ours) == f"{text} and 200 MiB more at its peak."
    less = row | {"prefill_peak_bytes": 299 << 20}
    assert beside(less, ours) == f"{text} and 1 MiB less at its peak."
    assert beside(row | {"prefill_peak_bytes": None}, ours) == f"{text}."


def test_the_answer_at_which_a_gain_is_a_twentieth() -> None:
    """By trying one length after the other."""
    dense, row = said(1000), said(700, decode=9.9)

    def gain(n: int) -> float:
        return 1 - (700 + n * 9.9) / (1000 + n * 10)

    first = next(n for n in range(10_000) if gain(n) < 0.05)
    assert break_even_output(row, dense) == pytest.approx(first, abs=1)
    assert break_even_output(said(700, decode=9), dense) is None  # a tenth off, for ever
    assert break_even_output(said(1200), dense) == 1


@pytest.mark.parametrize("own", [3.0, 30.0, 299.0])
def test_the_prompt_at_which_savings_equal_costs(own: float) -> None:
    """T(n) = n ms from 40 rows on; half of 600 vision rows leave in half of the layers."""
    typical = {40: 40.0, 340: 340.0, 640: 640.0}
    lengths = [640, 640, 340, 340]
    # shrunk to n rows the recipe saves (n - 40) / 4 and costs `own`
    found = break_even_prompt(own, lengths, 640, 40, typical)
    assert found == (None if own > 150 else pytest.approx(40 + 4 * own, abs=1))


def test_no_prompt_is_too_small_for_what_costs_nothing() -> None:
    typical = {40: 40.0, 640: 640.0}
    assert break_even_prompt(0.0, [640, 340], 640, 40, typical) is None
    assert break_even_prompt(-2.0, [640, 340], 640, 40, typical) is None
    # reading the weights takes 200 ms however few rows there are
    slow = {300: 200.0, 640: 640.0}
    found = break_even_prompt(1.0, [640, 40], 640, 40, slow)
    assert found is not None and 300 < found < 304


def test_break_even_of_a_run(timed: Any) -> None:
    """T(n) = 6 n, and choosing takes 3 ms: 18 of 36 leave, so 6 · v / 2 = 3 at one vision token."""
    settings = Settings((2,), repeats=2)
    rows = by_name(bench(timed, {"random": RECIPES["random"]}, Prompt(), settings))
    # below the shortest length timed, 58, time is taken to stand still
    assert rows["random"]["break_even_prompt"] == 59
    assert rows[DENSE]["break_even_prompt"] is rows[IDENTITY]["break_even_prompt"] is None
    assert rows[DENSE]["break_even_output"] is None


# Several batches, several answers


def test_batches_and_answers(timed: Any) -> None:
    """Each batch has its rows; shorter answers are timed on the way to the longest."""
    settings = Settings((5, 3), repeats=2, identity=False)
    recipes = {"random": RECIPES["random"]}
    result = bench(timed, recipes, Prompt(ragged=True), settings, batches=(1, 3))
    assert [(row["batch"], row["recipe"]) for row in result["rows"]] == [
        (1, DENSE), (1, "random"), (3, DENSE), (3, "random"),
    ]  # fmt: skip
    assert result["prompt"]["batch"] == [1, 3]
    assert set(result["text_only_ms"]) == {1, 3}
    for row in result["rows"]:
        five, three = row["answers"]
        assert (five["new_tokens"], three["new_tokens"]) == (5, 3)
        assert five["total_ms"] - three["total_ms"] == pytest.approx(2 * 6)
        assert three["total_ms"] == pytest.approx(row["ttft_ms"] + 2 * 6)
        assert row["decode_ms"] == pytest.approx(6)
    dense, random = result["rows"][:2]
    expected = dense["answers"][1]["total_ms"] / random["answers"][1]["total_ms"]
    assert random["answers"][1]["total_speedup"] == pytest.approx(expected) != 1
    assert [text.split(" brings")[0] for text in result["verdicts"]] == [
        "random", "random at batch 3",
    ]  # fmt: skip


def test_ragged_lengths_are_attained_with_ragged_text(models, monkeypatch) -> None:
    """What padding costs is no fault of the recipe."""
    given: list[Any] = []
    monkeypatch.setattr(run, "text_only", lambda *a, **k: given.append(k) or text_only(*a, **k))
    for ragged in (False, True):
        bench(models("llava"), {}, Prompt(2, ragged=ragged), Settings((2,), 1, identity=False))
    assert [k["ragged"] for k in given] == [False, False, True, True]


def test_no_clock_is_read_before_the_last_one_is_set(models, monkeypatch) -> None:
    """Reading an event waits for the device; between the first tick and the last nobody may."""
    done: list[str] = []

    def noting(word: str, plain: Any) -> Any:
        return lambda *args: done.append(word) or plain(*args)

    monkeypatch.setattr(run, "wait", noting("begin", run.wait))
    monkeypatch.setattr(stopwatch, "tick", noting("tick", stopwatch.tick))
    for module in (run, stopwatch):
        monkeypatch.setattr(module, "elapsed", noting("read", stopwatch.elapsed))
    bench(models("llava"), {"aim": RECIPES["aim"]}, Prompt(), Settings((2, 3), repeats=1))
    runs = " ".join(done).split("begin")[1:]
    assert len(runs) > 6
    for one in runs:
        ticks, _, reads = one.strip().partition(" read")
        assert ticks and set(ticks.split()) == {"tick"} and "tick" not in reads


@pytest.mark.parametrize("where", ["vision_tower", "language_model"])
def test_peaks_of_encoder_and_prompt(where: str) -> None:
    """128 MiB in one of them, in passing."""
    model = tiny.llava()
    getattr(model.model, where).register_forward_pre_hook(lambda *_: used(128))
    (row,) = bench(model, {}, Prompt(), ONCE)["rows"]
    if row["peak_bytes"] is None:
        pytest.skip("this system does not tell peaks")
    more = row["peak_bytes"] - row["prefill_peak_bytes"]
    assert (more > 100 << 20) if where == "vision_tower" else more == 0


# FLOPs


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(models, name: str, keep: float) -> None:
    """Layers and lm_head of a prompt, product by product; random needs none of its own."""
    model, prompt = models(name), Prompt(2, image_size=(48, 48))
    recipe = foveate.Recipe(
        foveate.Schedule.stages({0: 1.0, 2: keep, 4: keep / 2 if keep < 1 else 1.0}),
        layers=foveate.reducer("random"),
    )
    row = by_name(bench(model, {"r": recipe}, prompt, ONCE))["r"]
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu: attention_flops})
    with foveate.reduced(model, recipe), counter:
        model(**inputs(model, prompt), logits_to_keep=1)
    root, counts = type(model).__name__, counter.get_flop_counts()
    parts = [f"{root}.model.language_model.layers.{i}" for i in range(6)] + [f"{root}.lm_head"]
    assert row["flops"] == sum(sum(counts[part].values()) for part in parts)


def test_the_papers_count(models) -> None:
    """4nd² + 2n²d + 2ndm of every layer and sample."""
    rows = by_name(bench(models("llava"), {"fastv": RECIPES["fastv"]}, Prompt(2), ONCE))
    d, m = 32, 48

    def layer(n: int) -> int:
        return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m

    assert rows[DENSE]["paper_flops"] == 2 * 6 * layer(76)
    assert rows["fastv"]["paper_flops"] == 2 * (2 * layer(76) + 4 * layer(49))


# Peers


def test_peers_have_rows_of_their_own(models) -> None:
    """In the same rounds; what they do not remove, they hold and compute."""
    told: list[str] = []
    result = bench(
        models("llava"),
        RECIPES,
        Prompt(2, ragged=True),
        QUICK,
        compare=["masking", "rerun"],
        progress=lambda done, total, what: told.append(what),
    )
    rows = by_name(result)
    assert list(rows) == [DENSE, IDENTITY, *RECIPES, "aim by masking", "fastv by rerun"]
    masked, ours = rows["aim by masking"], rows["aim"]
    assert masked["vision_tokens"] == masked["vision_tokens_entrance"] == 18
    assert masked["vision_tokens"] > ours["vision_tokens"]
    assert masked["kv_bytes"] > ours["kv_bytes"]
    assert masked["flops"] > ours["flops"]
    for key in ("vision_tokens", "kv_bytes", "flops"):
        assert rows["fastv by rerun"][key] == rows["fastv"][key]
    assert all(rows[name]["reduce_ms"] > 0 for name in rows if " by " in name)
    slower = masked["prefill_ms"] / ours["prefill_ms"]
    said = f"aim by masking at batch 2 takes {slower:.1f} times as long for the prompt as aim here"
    assert sum(said in text for text in result["verdicts"]) == 1
    assert len(result["verdicts"]) == len(RECIPES) + 2
    assert told.count("aim by masking") == 3


def test_peers_that_serve_nothing_are_refused(models) -> None:
    with pytest.raises(ValueError, match="masking carries out"):
        bench(models("llava"), {"fastv": RECIPES["fastv"]}, Prompt(), QUICK, compare=["masking"])


# Where time goes


def test_a_profile_of_rows_that_miss_the_goal(timed: Any) -> None:
    """Choosing takes 3 ms: random is less efficient than 0.999, dense and identity are not."""
    settings = Settings((2,), repeats=1, profile=0.999)
    result = bench(timed, {"random": RECIPES["random"]}, Prompt(), settings)
    (found,) = result["profiles"]
    assert (found["recipe"], found["batch"]) == ("random", 1)
    ops = {op["op"]: op for op in found["ops"]}
    assert "aten::addmm" in ops or "aten::mm" in ops
    assert 0 < sum(op["share"] for op in found["ops"]) <= 1.0001
    assert [op["ms"] for op in found["ops"]] == sorted(
        (o["ms"] for o in found["ops"]), reverse=True
    )
    assert bench(timed, {"random": RECIPES["random"]}, Prompt(), QUICK)["profiles"] == []


def test_a_profile_of_a_peer(timed: Any) -> None:
    """Peers that miss the goal are looked into like recipes."""
    settings = Settings((2,), repeats=1, profile=99)
    result = bench(timed, {"aim": RECIPES["aim"]}, Prompt(), settings, compare=["masking"])
    assert [found["recipe"] for found in result["profiles"]] == ["aim", "aim by masking"]


# Files


def test_csv_grows_by_a_line_for_each_row_and_answer(models, tmp_path: Path) -> None:
    recipes = {"aim": RECIPES["aim"]}
    settings = Settings((2, 4), repeats=1)
    result = bench(models("llava"), recipes, Prompt(), settings, name="tiny", batches=(1, 2))
    file = tmp_path / "times.csv"
    for _ in range(2):
        sheet.append(file, sheet.lines(result))
    with file.open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert [line["recipe"] for line in lines[::2]] == [DENSE, IDENTITY, "aim"] * 4
    assert [line["new_tokens"] for line in lines] == ["2", "4"] * 12
    assert {line["model"] for line in lines} == {"tiny"}
    assert {line["date"] for line in lines} == {str(date.today())}
    assert {line["torch"] for line in lines} == {result["versions"]["torch"]}
    for line, row in zip(lines[::2], result["rows"] * 2, strict=True):
        assert float(line["prefill_ms"]) == row["prefill_ms"]
        assert float(line["prefill_ms_q1"]) == row["spread"]["prefill_ms"][0]
        assert float(line["total_ms"]) == row["answers"][0]["total_ms"]
        assert line["batch"] == str(row["batch"])
    assert not any(None in line or None in line.values() for line in lines)


def test_a_csv_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    file.write_text("name,price\nx,1\n")
    with pytest.raises(ValueError, match=r"other columns.*name a new file"):
        sheet.append(file, [{"name": "x", "weight": 2}])
    assert file.read_text() == "name,price\nx,1\n"


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(timed: Any, tmp_path: Path) -> None:
    """Rounds that are whole are not timed again; the figures are those of one run."""
    file, recipes = tmp_path / "b.json.rounds", {"random": RECIPES["random"]}
    settings = Settings((2,), repeats=3)

    def whole(**more: Any) -> dict[str, Any]:
        return bench(timed, recipes, Prompt(), settings, batches=(1, 2), **more)

    def until(last: int) -> list[str]:
        told: list[str] = []

        def progress(done: int, total: int, what: str) -> None:
            told.append(what)
            if len(told) == last:
                raise Stopped

        with pytest.raises(Stopped):
            whole(file=file, progress=progress)
        return told

    every: list[str] = []
    expected = whole(progress=lambda done, total, what: every.append(what))
    warm = 1 + 3 + 2  # FLOPs, three rows, two lengths of text
    until(len(every) // 2 + warm + 8)  # amid the second round of the second batch
    parts = json.loads(file.read_text())["parts"]
    assert [len(part["rounds"]) for part in parts] == [3, 1]
    rest: list[str] = []
    result = whole(file=file, progress=lambda done, total, what: rest.append(what))
    assert len(rest) == warm + 2 * 5
    assert not file.exists()
    drifting = ("peak_bytes", "prefill_peak_bytes")
    for row, same in zip(result["rows"], expected["rows"], strict=True):
        for key in row.keys() - {*drifting, "spread", "answers"}:
            assert row[key] == pytest.approx(same[key]), key


def test_rounds_of_another_run_are_refused(models, tmp_path: Path) -> None:
    file = tmp_path / "b.json.rounds"
    model = models("llava")

    def stop(done: int, total: int, what: str) -> None:
        if done == total - 1:
            raise Stopped

    with pytest.raises(Stopped):
        bench(model, {}, Prompt(), QUICK, file=file, progress=stop)
    before = file.read_text()
    for recipes, prompt in (({}, Prompt(2)), ({"aim": RECIPES["aim"]}, Prompt())):
        with pytest.raises(ValueError, match="the rounds of another command"):
            bench(model, recipes, prompt, QUICK, file=file)
    assert file.read_text() == before
    file.write_text("{}")
    with pytest.raises(ValueError, match="no rounds that this version wrote; delete it"):
        bench(model, {}, Prompt(), QUICK, file=file)
