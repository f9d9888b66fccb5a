"""Search: probes from the middle equal whole runs, and searches find what is known to be there."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from asking import Listed, asked, chosen

import foveate
from foveate.adapter import vision_rows
from foveate.answer import answer, prompts
from foveate.cost import TextShape
from foveate.evaluate import evaluate
from foveate.recipe import Recipe, recipe
from foveate.schedule import Schedule
from foveate.search import budget
from foveate.search.analyse import analyse
from foveate.search.auto import STARTS, Auto, complete, front
from foveate.search.gsearch import GSearch, bayes, bisect
from foveate.search.objective import Calibration, lower
from foveate.search.prefix import Batch, Runner, Shelf
from foveate.search.probe import Probe
from foveate.search.psigmoid import PSigmoid, fit

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
    inputs |= family.marks(ids)
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


TWO_D = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@pytest.mark.parametrize("method", ["attention", "fastv", "pagerank", "pool", "sparsevlm"])
@pytest.mark.parametrize("family", tiny.FAMILIES.values(), ids=tiny.FAMILIES)
def test_a_walk_gives_what_prefill_and_decoding_give(family: tiny.Family, method: str) -> None:
    model, batch = family.build(), batch_of(family, [1, 1])
    runner = Runner(model)
    state = runner.start(batch)
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
    state = runner.start(batch)
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
    state = runner.start(batch)
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
    last = runner.flat(runner.start(batch))
    dense = model(**batch.inputs).logits[:, -4:-1]
    torch.testing.assert_close(runner.logits(last, batch), dense)
    lengths = batch.inputs["attention_mask"].sum(-1).tolist()
    assert runner.flops == 6 * sum(runner.shape.layer_flops(n) for n in lengths)


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


@pytest.mark.parametrize("optimiser", ["bisect", pytest.param("bayes", marks=pytest.mark.wide)])
def test_gsearch_finds_the_least_of_every_layer(optimiser: str) -> None:
    if optimiser == "bayes":
        pytest.importorskip("optuna")
    choose = bisect(1 / 32) if optimiser == "bisect" else bayes(1 / 32, trials=14)
    probe = Nested(LEAST)
    search = GSearch(probe, max_drop=0.01, choose=choose)  # type: ignore[arg-type]
    curves = list(search.run())
    assert len(curves) == len(LEAST) - 2
    if optimiser == "bisect":
        assert curves[-1] == LEAST
        assert probe.asked <= 6 * 5
    else:
        assert all(c >= e for c, e in zip(curves[-1], LEAST, strict=True))
        assert sum(curves[-1]) <= sum(LEAST) + 0.2
    again = Nested(LEAST)
    more = GSearch(again, 0.01, choose=choose, known=search.tried)  # type: ignore[arg-type]
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


# --- budgets and P-Sigmoid ---------------------------------------------------------------------

SHAPE = TextShape(layers=30, width=64, heads=4, kv_heads=2, head_width=16, mlp=96, vocabulary=100)
PROMPTS = [(20, 256), (35, 256), (28, 200)]


def budgets() -> dict[str, budget.Budget]:
    line = [(n, 0.5 + 0.01 * n) for n in (20, 100, 300)]
    dense = budget.share(1.0, SHAPE, PROMPTS).limit
    return {
        "share": budget.share(0.2, SHAPE, PROMPTS),
        "flops": budget.flops(dense / 3, SHAPE, PROMPTS),
        "tokens": budget.tokens(48, PROMPTS),
        "ms": budget.milliseconds(40, line, PROMPTS),
    }


@pytest.mark.parametrize("kind", ["share", "flops", "tokens", "ms"])
@pytest.mark.parametrize("slope", [0.05, 0.22, 1.5])
def test_a_budget_is_met_to_the_token(kind: str, slope: float) -> None:
    limit = budgets()[kind]
    probe = SimpleNamespace(runner=SimpleNamespace(shape=SHAPE, keep=1.0))
    alive = PSigmoid(probe, limit).curve(slope, 1.0)  # type: ignore[arg-type]
    assert alive[:2] == (1.0, 1.0) and limit.holds(alive)
    one_more = [min(1.0, a + 1 / 200) if i >= 2 else a for i, a in enumerate(alive)]
    assert not limit.holds(one_more), "a token more in every layer would have been allowed"


def test_costs_are_those_of_the_formulas() -> None:
    alive = [1.0] * 10 + [0.5] * 20
    rows = [[t + (n if b < 10 else n // 2) for b in range(30)] for t, n in PROMPTS]
    each = [sum(SHAPE.layer_flops(n) for n in mine) for mine in rows]
    assert budget.flops(1, SHAPE, PROMPTS).cost(alive) == pytest.approx(sum(each) / 3)
    kept = [n * 10 + n // 2 * 20 for _, n in PROMPTS]
    assert budget.tokens(1, PROMPTS).cost(alive) == pytest.approx(sum(kept) / 90)
    line = [(n, 0.5 + 0.01 * n) for n in (20, 100, 300)]
    exact = sum(0.5 + 0.01 * n for mine in rows for n in mine) / 3
    assert budget.milliseconds(1, line, PROMPTS).cost(alive) == pytest.approx(exact)
    whole, none = budget.share(1.0, SHAPE, PROMPTS), budget.share(1e-9, SHAPE, PROMPTS)
    assert whole.limit == pytest.approx(whole.cost([1.0] * 30))
    assert none.limit == pytest.approx(none.cost([0.0] * 30))


def test_a_budget_below_the_full_layers_is_refused() -> None:
    probe = SimpleNamespace(runner=SimpleNamespace(shape=SHAPE, keep=1.0))
    search = PSigmoid(probe, budget.tokens(12, PROMPTS))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be met"):
        search.curve(0.2, 1.0)


def test_a_sigmoid_is_fitted_back() -> None:
    pytest.importorskip("scipy")
    drawn = Schedule.sigmoid(slope=0.31, middle=11.0, top=0.8).resolve(30).alive
    assert fit(drawn) == pytest.approx((0.31, 0.8), rel=1e-3)


def test_psigmoid_finds_the_best_slope() -> None:
    """The objective is known: how near the curve is to one of slope 0.4 and the same budget."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runner = SimpleNamespace(shape=SHAPE, keep=1.0)
    limit = budget.tokens(64, PROMPTS)
    best = PSigmoid(SimpleNamespace(runner=runner), limit).curve(0.4, 1.0)  # type: ignore[arg-type]

    def values(alive: Sequence[float]) -> list[float]:
        return [-abs(a - b) for a, b in zip(alive, best, strict=True)]

    probe = SimpleNamespace(runner=runner, values=values)
    search = PSigmoid(probe, limit)  # type: ignore[arg-type]
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.GPSampler(seed=0, n_startup_trials=3)
    )
    search.begin(study)
    study.optimize(search.objective, n_trials=12)
    assert study.trials[0].params["slope"] == pytest.approx(0.222)
    assert study.best_params["slope"] == pytest.approx(0.4, rel=0.1)
    assert all(limit.holds(t.user_attrs["alive"]) for t in study.trials)


# --- the calibration set -----------------------------------------------------------------------


def probe_of(pair: tuple[Any, Any], task: Listed, kind: str, folder: Path, size: int = 3) -> Probe:
    model, processor = pair
    calibration = Calibration(model, processor, [task], kind, size)
    return Probe(Runner(model), calibration, foveate.reducer("attention"), folder)


ALIVE = (1.0, 0.5, 0.25)


def test_choices_are_judged_as_evaluation_does(pair: tuple[Any, Any], tmp_path: Path) -> None:
    scores_agree(pair, chosen(), tmp_path)


def test_answers_are_judged_as_evaluation_does(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word that most answers come to is made the end of turn, so that answers do end."""
    model, processor = pair
    some = asked().examples
    said = [text.split() for text in answer(*pair, some).texts]
    later = (word for words in said for word in set(words[1:]) - set(words[:1]))
    end = Counter(later).most_common(1)[0][0]
    number = processor.tokenizer.convert_tokens_to_ids(end)
    monkeypatch.setattr(model.generation_config, "eos_token_id", number)
    other = copy.deepcopy(processor)
    other.tokenizer.add_special_tokens({"eos_token": end})
    right = [
        replace(e, answer=" ".join(takewhile(lambda word: word != end, words)))
        for e, words in zip(some, said, strict=True)
        if end in words[1:]
    ]
    assert len(right) > 2
    scores_agree((model, other), Listed(right), tmp_path)


def scores_agree(pair: tuple[Any, Any], task: Listed, folder: Path) -> None:
    """What is likeliest when the answers are given is what is said in use."""
    probe = probe_of(pair, task, "score", folder)
    recipe = Recipe(Schedule(alive=ALIVE), layers=foveate.reducer("attention"))
    dense, reduced = evaluate(*pair, [task], {"r": recipe})
    assert sum(probe.dense) / len(task) == dense["score"]
    assert sum(probe.values(ALIVE)) / len(task) == reduced["score"]
    assert dense["score"] != reduced["score"]


def test_match_is_agreement_with_what_dense_says(pair: tuple[Any, Any], tmp_path: Path) -> None:
    task = asked()
    probe = probe_of(pair, task, "match", tmp_path)
    assert probe.dense == [1.0] * 7
    flat = probe.values([1.0] * 3)
    assert flat == [1.0] * 7 and min(probe.values([1.0, 0.1, 0.1])) == 0.0


def test_kl_is_the_divergence_where_dense_speaks(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = pair
    probe = probe_of(pair, asked(2), "kl", tmp_path)
    assert probe.dense == pytest.approx([0.0, 0.0], abs=1e-2)
    calibration = Calibration(model, processor, [asked(2)], "kl", 1)
    for asked_batch, value in zip(calibration, probe.values(ALIVE), strict=True):
        batch = asked_batch.batch
        recipe = Recipe(Schedule(alive=ALIVE), layers=foveate.reducer("attention"))
        flat = Recipe(Schedule(alive=(1.0,) * 3))
        p, q = (in_use(model, batch, r).log_softmax(-1)[0] for r in (flat, recipe))
        assert value == pytest.approx(-float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-2)
        assert value < -0.01


def test_batches_do_not_matter(pair: tuple[Any, Any], tmp_path: Path) -> None:
    found = []
    for size in (1, 7):
        (folder := tmp_path / str(size)).mkdir()
        probe = probe_of(pair, asked(), "kl", folder, size)
        found.append([*probe.dense, *probe.values(ALIVE)])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_deciding_costs_one_layer_and_changes_nothing(
    pair: tuple[Any, Any], tmp_path: Path
) -> None:
    probe = probe_of(pair, asked(), "kl", tmp_path)
    assert probe.forwards == pytest.approx(1.0)
    whole = probe.values([1.0, 0.5, 0.25])
    before = probe.forwards
    probe.decide([1.0, 0.5, 0.5], 2)
    assert probe.forwards - before < 2 / 3
    before = probe.forwards
    assert probe.values([1.0, 0.5, 0.25]) == pytest.approx(whole, abs=1e-4)
    assert 0 < probe.forwards - before < 1 / 3
    assert probe.runs == 2


# --- analysis ----------------------------------------------------------------------------------


@torch.no_grad()
def test_analysis_is_what_the_attention_maps_say(pair: tuple[Any, Any]) -> None:
    """tau and mass from eager attention maps; redundancy by a loop over tokens."""
    stats = pytest.importorskip("scipy.stats")
    model, processor = pair
    some = asked(3).examples
    found = analyse(model, processor, some, merged=("pool:keep=0.25",))
    taus, masses, near = [], [], []
    for example in some:
        inputs = prompts(model, processor, [example])
        vision = vision_rows(model, inputs["input_ids"])[0]
        last = int(vision.nonzero()[-1])
        model.set_attn_implementation("eager")
        try:
            out = model(**inputs, output_attentions=True, output_hidden_states=True)
        finally:
            model.set_attn_implementation("sdpa")
        scores = [a[0].mean(0)[last + 1 :].mean(0)[vision].double() for a in out.attentions]
        masses.append([float(s.sum()) for s in scores])
        taus.append([stats.kendalltau(a, b).statistic for a, b in pairwise(scores)])
        rows = out.hidden_states[0][0][vision]
        for i, row in enumerate(rows):
            others = [torch.cosine_similarity(row, o, 0) for j, o in enumerate(rows) if j != i]
            near.append(float(max(others)))
    assert found.examples == 3
    assert found.tau == pytest.approx(np.mean(taus, 0).tolist(), abs=1e-3)
    assert found.mass == pytest.approx(np.mean(masses, 0).tolist(), abs=1e-4)
    assert found.redundancy["untouched"] == pytest.approx(np.mean(near), abs=1e-4)
    assert set(found.redundancy) == {"untouched", "pool:keep=0.25"}


def test_analysis_needs_a_ranking_by_attention(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="take attention or fastv"):
        analyse(*pair, asked(1).examples, method="random")


# --- auto --------------------------------------------------------------------------------------


def searched(pair: tuple[Any, Any], share: float, trials: int = 14) -> tuple[Auto, Any]:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, processor = pair
    search = Auto(model, Calibration(model, processor, [asked()], "kl", 4), (share / 4, share))
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=0)
    )
    search.begin(study)
    study.optimize(search.objective, n_trials=trials)
    return search, study


def test_auto_begins_with_the_papers_settings_and_keeps_to_its_budget(
    pair: tuple[Any, Any],
) -> None:
    search, study = searched(pair, 0.5)
    done = complete(study)
    first = [(t.params["entrance"], t.params["layers"]) for t in study.trials[: len(STARTS)]]
    assert first == [(s["entrance"], s["layers"]) for s in STARTS]
    assert len(done) > 6 and all(t.values[1] <= 0.5 + 1e-9 for t in done)
    assert len({t.params["entrance"] for t in done}) > 2
    best = max(t.values[0] for t in done)
    assert best >= max(t.values[0] for t in done[: len(STARTS)])
    assert search.runs == len(done) and search.forwards < 1 + len(done)


def test_auto_measures_what_is_used(pair: tuple[Any, Any]) -> None:
    """Value and cost of every trial are those of its recipe as written."""
    search, study = searched(pair, 0.6, trials=8)
    shape, flat = search.shape, search.lengths
    for trial in complete(study):
        recipe = Recipe.from_dict(trial.user_attrs["recipe"])
        counts = [[recipe.schedule.count(b, n) for b in range(3)] for _, n in flat]
        pairs = zip(flat, counts, strict=True)
        flops = sum(shape.layer_flops(text + n) for (text, _), mine in pairs for n in mine)
        floor = sum(shape.layer_flops(text) for text, _ in flat) * 3
        whole = sum(shape.layer_flops(text + n) for text, n in flat) * 3
        assert trial.values[1] == pytest.approx((flops - floor) / (whole - floor))
        again = search.values(recipe)
        assert trial.values[0] == pytest.approx(sum(again) / 7, abs=1e-6)
        assert search.apart(trial) == pytest.approx(
            [a - b for a, b in zip(again, search.dense, strict=True)], abs=1e-6
        )


def test_the_front_is_what_no_other_beats() -> None:
    points = [(0.9, 0.5), (0.8, 0.2), (0.7, 0.3), (0.9, 0.6), (0.5, 0.1), (0.5, 0.15)]
    trials = [SimpleNamespace(values=p) for p in points]
    kept = [t.values for t in front(trials)]  # type: ignore[arg-type]
    assert kept == [(0.5, 0.1), (0.8, 0.2), (0.9, 0.5)]


class Counted(Nested):
    """The paper's curve for LLaVA-1.5-7B at 30 layers of pinhole's size, and the FLOPs spent."""

    def __init__(self, shape: TextShape, text: int, vision: int) -> None:
        super().__init__(list(recipe("gsearch-llava-1.5-7b").schedule.resolve(30).alive))
        self.rows = lambda kept: text + int(kept * vision)
        self.cost = shape.layer_flops
        self.whole = 30 * self.cost(self.rows(1.0))
        self.spent = self.whole

    def decide(self, alive: list[float], layer: int) -> None:
        self.spent += sum(self.cost(self.rows(a)) for a in alive[self.layer : layer])
        super().decide(alive, layer)

    def values(self, alive: list[float]) -> list[float]:
        self.spent += sum(self.cost(self.rows(a)) for a in alive[self.layer :])
        return super().values(alive)


def test_a_whole_gsearch_costs_forty_forwards_at_most() -> None:
    """Of the calibration set, for more than a hundred probes."""
    shape = TextShape(30, 576, 9, 3, 64, 1536, 49152)
    probe = Counted(shape, text=30, vision=256)
    (*_, curve) = GSearch(probe, 0.01).run()  # type: ignore[arg-type]
    assert probe.asked > 100 and probe.spent / probe.whole < 30
    assert all(a >= b for a, b in zip(curve, probe.least, strict=True))
    assert sum(curve) / 30 < sum(probe.least) / 30 + 1 / 64
