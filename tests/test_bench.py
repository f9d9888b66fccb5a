"""The benchmark: on a clock that only the test moves, every figure is known beforehand.

``Clock`` stands in for the wall clock. A decoder layer takes one millisecond per row it works on,
the vision encoder and choosing survivors take a fixed time, all else takes none.
"""

from __future__ import annotations

import csv
import gc
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import foveate
from foveate.adapter import family, text_shape
from foveate.bench import DENSE, IDENTITY, Settings, Stopwatch, bench, elapsed, verdicts
from foveate.cli.app import _append
from foveate.reducers.fastv import FastV
from foveate.reducers.random import Random
from foveate.shapes import Prompt, inputs

TIMES = ("vision_ms", "prefill_ms", "reduce_ms", "ttft_ms", "decode_ms")
CONTRACT = {"recipe", "batch", "prompt_tokens", "vision_tokens", "flops", "kv_bytes", "peak_bytes"}
CONTRACT |= {*TIMES, "speedup", "limit", "attainable_ms", "efficiency", "spread"}
RECIPES = {
    "fastv": foveate.recipe("fastv", keep=0.25),
    "random": foveate.recipe("random", keep=0.5),
    "aim": foveate.recipe("aim", keep=0.5),
}
QUICK = Settings(new_tokens=3, repeats=2)
VISION, CHOOSING = 5.0, 3.0  # ms


@pytest.fixture(autouse=True, scope="module")
def known_objects() -> Iterator[None]:
    """The benchmark collects garbage before each run, and need not search what is there already."""
    gc.freeze()
    yield
    gc.unfreeze()


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
        assert row["speedup"] == pytest.approx(6 * longest / (work + chosen))
    expected = {n: 6.0 * n for n in (longest - 27, longest - 18, longest)}
    assert result["text_only_ms"] == pytest.approx(expected)


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
    settings = Settings(new_tokens=2, repeats=4, identity=False, attainable=False)
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
    typical, seen = result["text_only_ms"], set()
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
        assert row["efficiency"] == pytest.approx(row["attainable_ms"] / row["prefill_ms"])
        for key in TIMES:
            low, high = row["spread"][key]
            assert math.isfinite(row[key]) and low <= row[key] <= high
            assert row[key] > 0 or key == "reduce_ms"
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    assert dense["limit"] == dense["speedup"] == 1.0
    assert dense["reduce_ms"] == 0.0
    assert all(rows[name]["reduce_ms"] > 0 for name in RECIPES)
    assert json.loads(json.dumps(result)) == result | {
        "text_only_ms": {str(n): ms for n, ms in result["text_only_ms"].items()},
        "prompt": result["prompt"] | {"image_size": [48, 48]},
    }


def test_identity_is_as_long_as_dense(models) -> None:
    rows = by_name(bench(models("llava"), {}, Prompt(2, ragged=True), QUICK))
    same = ("prompt_tokens", "vision_tokens", "vision_tokens_last", "flops", "kv_bytes", "limit")
    assert list(rows) == [DENSE, IDENTITY]
    for key in same:
        assert rows[IDENTITY][key] == rows[DENSE][key], key
    assert rows[DENSE]["prompt_tokens"] == 36 + 40


def test_what_is_measured_can_be_left_out(models) -> None:
    settings = Settings(new_tokens=2, repeats=1, identity=False, attainable=False)
    result = bench(models("llava"), {"pool": foveate.recipe("pool", keep=0.25)}, Prompt(), settings)
    assert [row["recipe"] for row in result["rows"]] == [DENSE, "pool"]
    assert all(row["attainable_ms"] is row["efficiency"] is None for row in result["rows"])
    assert result["text_only_ms"] == {}


def test_where_and_with_what(models) -> None:
    result = bench(models("llava"), {}, Prompt(), Settings(2, 1, 1, False, False), name="mine")
    assert result["model"] == "mine"
    assert (result["dtype"], result["attention"]) == ("float32", "sdpa")
    assert result["device"].startswith("cpu")
    assert result["threads"] == torch.get_num_threads()
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["settings"]["new_tokens"] == 2


def test_vision_flops_are_those_of_encoder_and_projector(models) -> None:
    """Against 2·m·n·k by hand: patches, 3 encoder layers with their attention, the projector."""
    settings = Settings(2, 1, 1, False, False)
    found = [bench(models("llava"), {}, Prompt(b), settings)["vision_flops"] for b in (1, 2)]
    rows, patch, d, mlp = 37, 3 * 8 * 8, 24, 32
    layer = 2 * rows * d * (4 * d + 2 * mlp) + 4 * rows * rows * d
    projector = 2 * 36 * (d * 32 + 32 * 32)
    expected = 2 * 36 * patch * d + 3 * layer + projector
    assert found[0] == expected
    assert found[1] == 2 * found[0]


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
    [("new_tokens", 1, 2), ("repeats", 0, 1), ("warmup", 0, 1), ("repeats", -3, 1)],
)
def test_settings_that_are_refused(field: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}; give at least {least}\."):
        Settings(**{field: value})


def test_recipes_for_another_model_are_refused(models) -> None:
    deep = foveate.recipe("fastv", keep=0.5).resolve(32)
    with pytest.raises(ValueError, match=r"model of 32 layers and this one has\s+6"):
        bench(models("llava"), {"deep": deep}, Prompt(), QUICK)


def said(ttft: float, decode: float = 10.0, reduce: float = 0.0, half: float = 1.0) -> Any:
    spread = {"ttft_ms": [ttft - half, ttft + half]}
    return {"recipe": "r", "ttft_ms": ttft, "decode_ms": decode, "reduce_ms": reduce,
            "vision_ms": 100.0, "spread": spread}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (said(500), ["500 ms instead of 1000 ms", "saves 38%", "beyond about 900 tokens"]),
        (said(500, decode=8), ["saves 43%"]),
        (said(1100, reduce=200), ["does not pay", "1100 ms against 1000", "200 ms of it reducing"]),
        (said(990, half=20), ["does not pay"]),  # within the spread
    ],
)
def test_verdicts(row: Any, words: list[str]) -> None:
    """Of 32 tokens: dense takes 1000 + 31 · 10; at 900 tokens 500 ms are a twentieth."""
    (text,) = verdicts([said(1000), said(1000) | {"recipe": IDENTITY}, row], 32)
    assert all(word in text for word in words), text
    assert ("beyond" in text) == ("beyond about 900 tokens" in words)


def test_csv_grows_by_a_line_a_row(models, tmp_path: Path) -> None:
    result = bench(models("llava"), {"aim": RECIPES["aim"]}, Prompt(), QUICK, name="tiny")
    file = tmp_path / "times.csv"
    for _ in range(2):
        _append(file, result)
    with file.open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    assert [line["recipe"] for line in lines] == [DENSE, IDENTITY, "aim"] * 2
    assert {line["model"] for line in lines} == {"tiny"}
    for line, row in zip(lines, result["rows"] * 2, strict=True):
        assert float(line["prefill_ms"]) == row["prefill_ms"]
    assert not any(None in line or None in line.values() for line in lines)
