"""Speed and memory by stage: the untouched model and reduced ones, side by side in one process.

What is timed, for every row alike: ``prefill_ms`` is one forward of the multimodal base model over
the prompt *less* the time inside its vision encoder and projector. That leaves embedding, reducing,
cutting, masks and the text model, but not lm_head; nothing that a recipe adds can hide.
``vision_ms`` is the encoder and projector, ``ttft_ms`` the whole forward with lm_head on the last
row, ``decode_ms`` one further token. ``reduce_ms`` is the part of ``prefill_ms`` that the report
calls reducing.

``attainable_ms`` is what the same lengths cost without any method: the untouched model is timed on
text-only prompts of every length n that occurs, in the same rounds, and Σ_l T(n_l)/L is the bound.
``efficiency`` is attainable_ms ÷ prefill_ms.
"""

from __future__ import annotations

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import foveate
from foveate.adapter import family, text_shape, vision_rows
from foveate.recipe import Recipe
from foveate.report import Report
from foveate.shapes import Prompt, inputs, text_only

DENSE, IDENTITY = "dense", "identity"
_TIMES = ("vision_ms", "prefill_ms", "reduce_ms", "ttft_ms", "decode_ms")
_WORTH = 0.05  # a gain under this share of the whole answer is called none


@dataclass(frozen=True)
class Forward:
    """One forward of the base model: when it began and ended, and its vision part, milliseconds."""

    total_ms: float
    vision_ms: float

    @property
    def prefill_ms(self) -> float:
        return self.total_ms - self.vision_ms


@dataclass
class Stopwatch:
    """Times forwards of a model by hooks that stand outside those of a recipe."""

    model: nn.Module
    _ticks: list[tuple[str, Any]] = field(default_factory=list)

    @contextmanager
    def around(self, recipe: Recipe | None) -> Iterator[Report | None]:
        """Reduce with ``recipe`` (None: leave the model as it is) and time what runs inside."""
        adapter = family(self.model)
        base, text = adapter.base(self.model), adapter.text(self.model)
        encoder = [child for child in base.children() if child is not text]
        self._ticks.clear()
        with ExitStack() as stack:
            self._mark(stack, base.register_forward_pre_hook, "start")
            report = None
            if recipe is not None:
                report = stack.enter_context(foveate.reduced(self.model, recipe))
            for module in encoder:  # inside the recipe's hooks: reducing is not vision
                self._mark(stack, module.register_forward_pre_hook, "vision")
                self._mark(stack, module.register_forward_hook, "seen")
            self._mark(stack, base.register_forward_hook, "stop")
            yield report

    def tick(self) -> Any:
        """Now, on the model's device: a CUDA event or seconds."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forwards(self) -> list[Forward]:
        """The forwards so far, in order.

        ``generate`` encodes before the forward begins, which then counts from there.
        """
        done, start, seen, vision = [], None, None, 0.0
        for label, tick in self._ticks:
            start = tick if start is None else start
            if label == "vision":
                seen = tick
            elif label == "seen":
                vision += elapsed(seen, tick)
            elif label == "stop":
                done.append(Forward(elapsed(start, tick), vision))
                start, vision = None, 0.0
        return done

    def decode_ms(self) -> float | None:
        """Milliseconds from one forward's end to the next after the first, on average."""
        ends = [tick for label, tick in self._ticks if label == "stop"]
        return elapsed(ends[0], ends[-1]) / (len(ends) - 1) if len(ends) > 1 else None

    def _mark(self, stack: ExitStack, register: Callable[..., Any], label: str) -> None:
        handle = register(lambda *_: self._ticks.append((label, self.tick())))
        stack.callback(handle.remove)


@dataclass
class _Case:
    """One row in the making."""

    name: str
    recipe: Recipe | None
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How to measure: tokens decoded, timed rounds after how many untimed ones, extra rows."""

    new_tokens: int = 32
    repeats: int = 5
    warmup: int = 1
    identity: bool = True
    attainable: bool = True

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("repeats", 1), ("warmup", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}.")


Progress = Callable[[int, int, str], object]


def bench(
    model: Any,
    recipes: Mapping[str, Recipe],
    prompt: Prompt,
    settings: Settings | None = None,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the untouched model and every recipe on one synthetic prompt.

    Rows take turns in rounds, each round in an order of its own (seeded): a machine that slows down
    slows all of them, and none always follows the same other. Figures are medians, ``spread`` their
    quartiles.

    Args:
        recipes: by the name their row gets.
        progress: told (runs done, runs in all, what comes next).

    Returns:
        The JSON of ``foveate bench``.
    """
    return _Bench(model, prompt, settings or Settings(), progress).run(recipes, name)


class _Bench:
    def __init__(
        self, model: Any, prompt: Prompt, settings: Settings, progress: Progress | None
    ) -> None:
        self.model, self.prompt, self.settings = model, prompt, settings
        self.inputs = inputs(model, prompt)
        self.watch = Stopwatch(model)
        self.shape = text_shape(family(model).text(model))
        self.text_ms: dict[int, list[float]] = {}
        self._progress, self._done, self._total = progress, 0, 0

    def run(self, recipes: Mapping[str, Recipe], name: str) -> dict[str, Any]:
        cases = [_Case(DENSE, None)]
        if self.settings.identity:
            cases.append(_Case(IDENTITY, Recipe(foveate.Schedule.flat(1.0))))
        cases += [_Case(label, made) for label, made in recipes.items()]
        self._total = 1 + len(cases) * (self.settings.warmup + self.settings.repeats)
        vision_flops = self._warm(cases)
        draw = random.Random(0)
        for _ in range(self.settings.repeats):
            jobs: list[_Case | int] = [*cases, *self.text_ms]
            draw.shuffle(jobs)
            for job in jobs:
                if isinstance(job, int):
                    self._say(f"text only, {job} rows")
                    self.text_ms[job].append(self._text(job))
                else:
                    self._say(job.name)
                    self._measure(job)
        rows_out = self._rows(cases)
        return {
            **about(self.model, name),
            "prompt": asdict(self.prompt),
            "settings": asdict(self.settings),
            "vision_flops": vision_flops,
            "rows": rows_out,
            "text_only_ms": {n: statistics.median(ms) for n, ms in sorted(self.text_ms.items())},
            "verdicts": verdicts(rows_out, self.settings.new_tokens),
        }

    def _say(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, what)
        self._done += 1

    def _warm(self, cases: list[_Case]) -> int:
        """Untimed rounds, which also tell the lengths; returns the vision encoder's FLOPs."""
        self._say(DENSE)
        vision_flops = self._vision_flops()
        for _ in range(self.settings.warmup):
            for case in cases:
                self._say(case.name)
                self._measure(case)
        for case in cases:
            case.samples.clear()
        if self.settings.attainable:
            lengths = sorted({n for case in cases for n in case.lengths})
            self._total += len(lengths) * (self.settings.warmup + self.settings.repeats)
            for rows in lengths:
                self._say(f"text only, {rows} rows")
                self._text(rows)
                self.text_ms[rows] = []
        return vision_flops

    @torch.no_grad()
    def _measure(self, case: _Case) -> None:
        """One prompt and its answer."""
        watch, steps = self.watch, self.settings.new_tokens - 1
        gc.collect()
        with watch.around(case.recipe) as report, _peak(watch.device) as peak:
            begin = watch.tick()
            out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            first = watch.tick()
            kv_bytes = _held(out.past_key_values)
            start = watch.tick()
            self._decode(out, steps)
            stop = watch.tick()
            forward = watch.forwards()[0]
        self._note(case, report, kv_bytes, peak)
        times = {
            "vision_ms": forward.vision_ms,
            "prefill_ms": forward.prefill_ms,
            "reduce_ms": report.reduce_ms if report is not None else 0.0,
            "ttft_ms": elapsed(begin, first),
            "decode_ms": elapsed(start, stop) / steps,
        }
        for key, value in times.items():
            case.samples.setdefault(key, []).append(value)

    def _decode(self, out: Any, steps: int) -> None:
        """Greedy tokens on the cache that the prompt left."""
        mask = self.inputs.get("attention_mask")
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            more: dict[str, Tensor] = {}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(token)], dim=-1)
                more["attention_mask"] = mask
            out = self.model(
                input_ids=token, past_key_values=out.past_key_values, use_cache=True, **more
            )

    @torch.no_grad()
    def _text(self, rows: int) -> float:
        """T(n): the untouched model on ``rows`` text rows, by the same clock as ``prefill_ms``."""
        given = text_only(self.model, self.prompt.batch, rows)
        gc.collect()
        _wait(self.watch.device)
        with self.watch.around(None):
            self.model(**given, use_cache=True, logits_to_keep=1)
            return self.watch.forwards()[0].prefill_ms

    @torch.no_grad()
    def _vision_flops(self) -> int:
        """FLOPs of encoder and projector for the whole batch, counted by torch."""
        from torch.utils.flop_counter import FlopCounterMode

        adapter = family(self.model)
        base, text = adapter.base(self.model), adapter.text(self.model)
        inside = {id(module): path for path, module in self.model.named_modules()}
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch leaves it out
        counter = FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_flops})
        with counter:
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        counts = counter.get_flop_counts()
        root = type(self.model).__name__
        parts = [f"{root}.{inside[id(c)]}" for c in base.children() if c is not text]
        return sum(sum(counts.get(part, {}).values()) for part in parts)

    def _note(self, case: _Case, report: Report | None, kv_bytes: int, peak: list[int]) -> None:
        """What does not vary from run to run."""
        batch, layers = self.prompt.batch, self.shape.layers
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask", torch.ones_like(ids))
        dense_rows = [int(n) for n in mask.sum(-1)]
        rows = [dense_rows] * layers if report is None else report.rows
        dense = vision_rows(self.model, ids).sum(-1).tolist()
        vision = [dense] * layers if report is None else report.alive
        case.lengths = tuple(max(alive) for alive in rows)
        per_sample = list(zip(*rows, strict=True))
        known = case.facts.get("peak_bytes")
        case.facts |= {
            "prompt_tokens": max(dense_rows),
            "vision_tokens": sum(map(sum, vision)) / layers / batch,
            "vision_tokens_entrance": sum(vision[0]) / batch,
            "vision_tokens_last": sum(vision[-1]) / batch,
            "flops": sum(self.shape.prefill_flops(sample) for sample in per_sample),
            "paper_flops": sum(self.shape.paper_flops(sample) for sample in per_sample),
            "kv_bytes": kv_bytes,
            "peak_bytes": max([*peak, *([known] if known else [])], default=None),
        }
        if report is not None and report.notes:
            case.facts["notes"] = list(report.notes)

    def _rows(self, cases: list[_Case]) -> list[dict[str, Any]]:
        made = []
        for case in cases:
            times = {key: statistics.median(case.samples[key]) for key in _TIMES}
            attainable = None
            if self.text_ms:
                typical = {n: statistics.median(ms) for n, ms in self.text_ms.items()}
                attainable = sum(typical[n] for n in case.lengths) / self.shape.layers
            made.append(
                {
                    "recipe": case.name,
                    "batch": self.prompt.batch,
                    **case.facts,
                    **times,
                    "attainable_ms": attainable,
                    "efficiency": attainable and attainable / times["prefill_ms"],
                    "spread": {key: _quartiles(case.samples[key]) for key in _TIMES},
                }
            )
        dense = made[0]
        for row in made:
            row["speedup"] = dense["prefill_ms"] / row["prefill_ms"]
            row["limit"] = dense["flops"] / row["flops"]
        return made


def verdicts(rows: list[dict[str, Any]], new_tokens: int) -> list[str]:
    """One plain sentence per recipe: what it saves, and when it does not pay."""
    dense = rows[0]
    return [_verdict(row, dense, new_tokens) for row in rows[1:] if row["recipe"] != IDENTITY]


def _verdict(row: Mapping[str, Any], dense: Mapping[str, Any], new_tokens: int) -> str:
    name, saved = row["recipe"], dense["ttft_ms"] - row["ttft_ms"]
    faster = dense["decode_ms"] - row["decode_ms"]
    low, high = row["spread"]["ttft_ms"][1], dense["spread"]["ttft_ms"][0]
    if saved <= 0 or low >= high:
        return (
            f"{name} does not pay on this prompt: the first token takes {row['ttft_ms']:.0f} ms "
            f"against {dense['ttft_ms']:.0f} ms untouched"
            + (f", {row['reduce_ms']:.0f} ms of it reducing." if row["reduce_ms"] >= 1 else ".")
        )
    whole = dense["ttft_ms"] + (new_tokens - 1) * dense["decode_ms"]
    gain = (saved + (new_tokens - 1) * faster) / whole
    text = (
        f"{name} brings the first token after {row['ttft_ms']:.0f} ms instead of "
        f"{dense['ttft_ms']:.0f} ms (the vision encoder is {row['vision_ms']:.0f} ms of it) and "
        f"saves {gain:.0%} of a {new_tokens}-token answer"
    )
    limit = _break_even(saved, faster, dense)
    if limit is None:
        return text + "."
    return text + f"; beyond about {limit:,} tokens the gain is under {_WORTH:.0%}."


def _break_even(saved: float, faster: float, dense: Mapping[str, Any]) -> int | None:
    """The answer length at which the gain falls under what is worth having, if it ever does."""
    per_token = _WORTH * dense["decode_ms"] - faster
    left = saved - _WORTH * dense["ttft_ms"]
    return max(1, round(left / per_token)) if per_token > 0 else None


def about(model: Any, name: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    first = next(model.parameters())
    return {
        "model": name or cast(str, model.config.model_type),
        "device": device_name(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads() if first.device.type == "cpu" else None,
        "versions": {name: version_of(name) for name in ("foveate", "torch", "transformers")},
    }


def device_name(device: torch.device) -> str:
    """The processor or accelerator as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({models[0] if models else platform.processor() or platform.machine()})"


def elapsed(start: Any, stop: Any) -> float:
    """Milliseconds between two ticks."""
    if isinstance(start, float):
        return (float(stop) - start) * 1e3
    stop.synchronize()
    return float(start.elapsed_time(stop))


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _attention_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and values of one attention call, from the shapes (B, H, L, d) of q and k."""
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def _held(cache: Any) -> int:
    """Bytes of the keys and values in a cache, from its tensors."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Peak bytes inside the block, weights included: torch's on CUDA, the process's on Linux.

    The list stays empty where neither can be read.
    """
    found: list[int] = []
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    known = _forget_peak()
    yield found
    if known:
        lines = Path("/proc/self/status").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]


def _forget_peak() -> bool:
    """Set the process's high-water mark back to what it uses now; False where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
