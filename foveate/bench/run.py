"""The rounds: every row takes its turn in each, and figures are medians over them."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.adapter import family, text_shape, vision_rows
from foveate.bench.machine import Peak, about, wait
from foveate.bench.profiling import hottest
from foveate.bench.rounds import Part, Rounds
from foveate.bench.stopwatch import Stopwatch
from foveate.bench.verdicts import beside, break_even_output, break_even_prompt, verdict
from foveate.peers import How, carried_out
from foveate.recipe import Recipe
from foveate.report import Report, elapsed
from foveate.shapes import Prompt, inputs, text_only

DENSE, IDENTITY = "dense", "identity"
_TIMES = ("vision_ms", "prefill_ms", "reduce_ms", "ttft_ms", "decode_ms")

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        new_tokens: lengths of the answers; the longest is decoded, the others are timed on the way.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        identity: a row with everything attached and nothing reduced.
        attainable: time the untouched model at every length that occurs.
        profile: show where the time goes in recipes and peers whose efficiency is below this; 0
            shows none.
    """

    new_tokens: tuple[int, ...] = (32,)
    repeats: int = 5
    warmup: int = 1
    identity: bool = True
    attainable: bool = True
    profile: float = 0.0

    def __post_init__(self) -> None:
        least = {"new_tokens": 2, "repeats": 1, "warmup": 1}
        given = {"new_tokens": min(self.new_tokens, default=0)}
        given |= {"repeats": self.repeats, "warmup": self.warmup}
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"{name} is {value}; give at least {least[name]}.")
        if self.profile and not self.attainable:
            raise ValueError(
                f"profile={self.profile} is for rows whose efficiency is below it, and efficiency "
                "needs attainable=True (on the command line: leave --no-attainable away)."
            )


@dataclass(frozen=True)
class Case:
    """A row to measure: a recipe, or None for the untouched model, and who carries it out."""

    name: str
    recipe: Recipe | None
    how: How = foveate.reduced


def bench(
    model: Any,
    recipes: Mapping[str, Recipe],
    prompt: Prompt,
    settings: Settings | None = None,
    *,
    batches: Sequence[int] = (),
    compare: Sequence[str] = (),
    name: str = "",
    file: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the untouched model and every recipe on one synthetic prompt.

    Rows take turns in rounds, each round in an order of its own (seeded): a machine that slows down
    slows all of them, and none always follows the same other. Figures are medians, ``spread`` their
    quartiles; peaks are those of the last untimed round.

    Args:
        recipes: by the name their row gets.
        batches: samples at once, in turn; empty means what ``prompt`` says.
        compare: peers (``foveate.peers``) that carry out the same recipes, each in its own row.
        file: where finished rounds are kept until all are, so that a run that was stopped goes on.
        progress: told (runs done, runs in all, what comes next).

    Returns:
        The JSON of ``foveate bench``.

    Raises:
        ValueError: for a peer that serves none of the recipes, a recipe for another model, or a
            file with the rounds of another run.
    """
    settings, sizes = settings or Settings(), list(batches) or [prompt.batch]
    where = about(model, name)
    made = {label: recipe.to_dict() for label, recipe in recipes.items()}
    asked = where | {"prompt": asdict(prompt) | {"batch": sizes}, "settings": asdict(settings)}
    rounds = Rounds(file, asked | {"recipes": made, "compare": list(compare)})
    cases = [Case(DENSE, None)]
    if settings.identity:
        cases.append(Case(IDENTITY, Recipe(foveate.Schedule.flat(1.0))))
    cases += [Case(label, recipe) for label, recipe in recipes.items()]
    peers = carried_out(recipes, compare)
    cases += [Case(label, peer.recipe, peer.how) for label, peer in peers.items()]
    counter = _Counter(
        progress, len(sizes) * (1 + len(cases) * (settings.warmup + settings.repeats))
    )
    result = asked | {"date": str(date.today()), "rows": [], "vision_flops": {}, "text_only_ms": {}}
    result |= {"verdicts": [], "profiles": []}
    for place, batch in enumerate(sizes):
        if place == len(rounds.parts):
            rounds.parts.append(Part())
        run = _Run(model, replace(prompt, batch=batch), settings, cases, rounds, place, counter)
        run.measure()
        rows = run.rows()
        result["rows"] += rows
        result["vision_flops"][batch] = run.part.vision_flops
        result["text_only_ms"][batch] = run.typical
        named = {row["recipe"]: row for row in rows}
        ours = [named[label] for label in recipes]
        result["verdicts"] += [verdict(row, rows[0]) for row in ours]
        result["verdicts"] += [beside(named[n], named[peer.label]) for n, peer in peers.items()]
        for row in (*ours, *(named[label] for label in peers)):
            if settings.profile and row["efficiency"] < settings.profile:
                slow = {"recipe": row["recipe"], "batch": batch}
                result["profiles"].append(slow | {"ops": run.hottest(row["recipe"])})
    rounds.done()
    return result


@dataclass
class _Counter:
    """Runs done and to do."""

    progress: Progress | None
    total: int
    done: int = 0

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, what)
        self.done += 1


@dataclass
class _Run:
    """One prompt."""

    model: Any
    prompt: Prompt
    settings: Settings
    cases: list[Case]
    kept: Rounds
    place: int
    counter: _Counter
    inputs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = inputs(self.model, self.prompt)
        self.watch = Stopwatch(self.model)
        self.shape = text_shape(family(self.model).text(self.model))

    @property
    def part(self) -> Part:
        return self.kept.parts[self.place]

    def measure(self) -> None:
        """Warm up, then time the rounds that the file does not have yet."""
        done = len(self.part.rounds)
        if done >= self.settings.repeats:
            return
        self._warm()
        draw = random.Random(done)
        for _ in range(done, self.settings.repeats):
            jobs: list[Case | int] = [*self.cases, *self._lengths()]
            draw.shuffle(jobs)
            took: dict[str, dict[str, float]] = {}
            text: dict[int, float] = {}
            for job in jobs:
                if isinstance(job, int):
                    self.counter.say(f"text only, {job} rows")
                    text[job] = self._text(job)
                else:
                    self.counter.say(job.name)
                    took[job.name] = self._measure(job)
            self.part.rounds.append(took)
            self.part.text.append(text)
            self.kept.save()

    def _lengths(self) -> list[int]:
        """Every length that occurs, where what is attainable was asked for."""
        lengths = {n for rows in self.part.lengths.values() for n in rows}
        return sorted(lengths) if self.settings.attainable else []

    def _warm(self) -> None:
        """Untimed rounds, which also tell the lengths and how much memory it takes at most."""
        self.counter.say(DENSE)
        self.part.vision_flops = self._vision_flops()
        for _ in range(self.settings.warmup):
            for case in self.cases:
                self.counter.say(case.name)
                self._measure(case, Peak(self.watch.device))
        lengths = self._lengths()
        self.counter.total += len(lengths) * (1 + self.settings.repeats)
        for rows in lengths:
            self.counter.say(f"text only, {rows} rows")
            self._text(rows)

    @torch.no_grad()
    def _measure(self, case: Case, peak: Peak | None = None) -> dict[str, float]:
        """One prompt and its answer; with ``peak`` the prompt's memory, which takes time."""
        watch, highest = self.watch, []

        def forget() -> None:  # after every part of the encoder; what comes then is the prompt's
            if peak is not None:
                highest.extend(peak.read())
                peak.forget()

        gc.collect()
        wait(watch.device)
        if peak is not None:
            peak.forget()
        with watch.around(case.recipe, case.how, forget if peak is not None else None) as report:
            begin = watch.tick()
            out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            first = watch.tick()
            last = peak.read() if peak is not None else []
            kv_bytes = _held(out.past_key_values)
            start = watch.tick()
            stops = self._decode(out)
            forward = watch.forwards()[0]
        self._note(case, report, kv_bytes)
        if peak is not None:
            found = {"peak_bytes": max([*highest, *last], default=None)}
            self.part.facts[case.name] |= found | {"prefill_peak_bytes": next(iter(last), None)}
        ttft, longest = elapsed(begin, first), max(stops)
        return {
            "vision_ms": forward.vision_ms,
            "prefill_ms": forward.prefill_ms,
            "reduce_ms": report.reduce_ms if report is not None else 0.0,
            "ttft_ms": ttft,
            "decode_ms": elapsed(start, stops[longest]) / (longest - 1),
            **{_total(n): ttft + elapsed(start, stop) for n, stop in stops.items()},
        }

    def _decode(self, out: Any) -> dict[int, Any]:
        """Greedy tokens on the cache that the prompt left: when each length was reached."""
        mask, stops = self.inputs.get("attention_mask"), {}
        for made in range(2, max(self.settings.new_tokens) + 1):
            token = out.logits[:, -1:].argmax(-1)
            more: dict[str, Tensor] = {}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(token)], dim=-1)
                more["attention_mask"] = mask
            out = self.model(
                input_ids=token, past_key_values=out.past_key_values, use_cache=True, **more
            )
            if made in self.settings.new_tokens:
                stops[made] = self.watch.tick()
        return stops

    @torch.no_grad()
    def _text(self, rows: int) -> float:
        """T(n): the untouched model on ``rows`` text rows, by the same clock as ``prefill_ms``."""
        given = text_only(self.model, self.prompt.batch, rows, ragged=self.prompt.ragged)
        gc.collect()
        wait(self.watch.device)
        with self.watch.around(None):
            self.model(**given, use_cache=True, logits_to_keep=1)
            return self.watch.forwards()[0].prefill_ms

    @torch.no_grad()
    def _vision_flops(self) -> int:
        """FLOPs of encoder and projector for the whole batch, counted by torch."""
        from torch.utils.flop_counter import FlopCounterMode

        inside = {id(module): path for path, module in self.model.named_modules()}
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch leaves it out
        counter = FlopCounterMode(display=False, custom_mapping={on_cpu: attention_flops})
        with counter:
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        counts = counter.get_flop_counts()
        root = type(self.model).__name__
        beside = family(self.model).beside_text(self.model)
        parts = [f"{root}.{inside[id(part)]}" for part in beside]
        return sum(sum(counts.get(part, {}).values()) for part in parts)

    def _note(self, case: Case, report: Report | None, kv_bytes: int) -> None:
        """What does not vary from round to round."""
        batch, layers = self.prompt.batch, self.shape.layers
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask", torch.ones_like(ids))
        dense_rows = [int(n) for n in mask.sum(-1)]
        rows = [dense_rows] * layers if report is None else report.rows
        dense = vision_rows(self.model, ids).sum(-1).tolist()
        vision = [dense] * layers if report is None else report.alive
        per_sample = list(zip(*rows, strict=True))
        self.part.lengths[case.name] = [max(alive) for alive in rows]
        facts = self.part.facts.setdefault(case.name, {})
        facts |= {
            "prompt_tokens": max(dense_rows),
            "vision_tokens": sum(map(sum, vision)) / layers / batch,
            "vision_tokens_entrance": sum(vision[0]) / batch,
            "vision_tokens_last": sum(vision[-1]) / batch,
            "flops": sum(self.shape.prefill_flops(sample) for sample in per_sample),
            "paper_flops": sum(self.shape.paper_flops(sample) for sample in per_sample),
            "kv_bytes": kv_bytes,
        }
        if report is not None and report.notes:
            facts["notes"] = list(report.notes)

    @property
    def typical(self) -> dict[int, float]:
        """The untouched model's median at every length, milliseconds."""
        return {n: statistics.median(self.part.text_ms(n)) for n in self._lengths()}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the JSON."""
        typical, made = self.typical, [self._row(case.name) for case in self.cases]
        dense = made[0]
        text = dense["prompt_tokens"] - round(dense["vision_tokens"])
        for row in made:
            lengths = self.part.lengths[row["recipe"]]
            attainable = sum(typical[n] for n in lengths) / len(lengths) if typical else None
            row["attainable_ms"] = attainable
            row["efficiency"] = attainable and attainable / row["prefill_ms"]
            row["speedup"] = dense["prefill_ms"] / row["prefill_ms"]
            row["limit"] = dense["flops"] / row["flops"]
            row["paper_limit"] = dense["paper_flops"] / row["paper_flops"]
            for answer, untouched in zip(row["answers"], dense["answers"], strict=True):
                answer["total_speedup"] = untouched["total_ms"] / answer["total_ms"]
            row["break_even_output"] = None if row is dense else break_even_output(row, dense)
            row["break_even_prompt"] = attainable and break_even_prompt(
                row["prefill_ms"] - attainable, lengths, dense["prompt_tokens"], text, typical
            )
        return made

    def _row(self, name: str) -> dict[str, Any]:
        part, batch = self.part, self.prompt.batch
        times = {key: statistics.median(part.samples(name, key)) for key in _TIMES}
        answers = []
        for n in self.settings.new_tokens:
            total = statistics.median(part.samples(name, _total(n)))
            rate = 1e3 * batch * n / total
            answers.append({"new_tokens": n, "total_ms": total, "tokens_per_s": rate})
        return {
            "recipe": name,
            "batch": batch,
            **part.facts[name],
            **times,
            "decode_tokens_per_s": 1e3 * batch / times["decode_ms"],
            "answers": answers,
            "spread": {key: _quartiles(part.samples(name, key)) for key in _TIMES},
        }

    @torch.no_grad()
    def hottest(self, name: str) -> list[dict[str, Any]]:
        """Where one prompt's time goes."""
        case = next(case for case in self.cases if case.name == name)

        def prompt() -> None:
            with self.watch.around(case.recipe, case.how):
                self.model(**self.inputs, use_cache=True, logits_to_keep=1)

        return hottest(prompt, self.watch.device)


def attention_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and values of one attention call, from the shapes (B, H, L, d) of q and k."""
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def _total(new_tokens: int) -> str:
    return f"total_ms of {new_tokens}"


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def _held(cache: Any) -> int:
    """Bytes of the keys and values in a cache, from its tensors."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
