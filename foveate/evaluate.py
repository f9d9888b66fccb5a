"""Accuracy of a model on a task, with a 95 % confidence interval.

Any Hugging Face image-text model with its processor will do; what is attached to the model stays.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from foveate.tasks import Example, Task

MAX_NEW_TOKENS = 12
BLANK = (124, 116, 104)


@dataclass(frozen=True)
class Result:
    """The outcome on one task: mean score, its interval, and what was answered to every example."""

    task: str
    n: int
    score: float
    ci_low: float
    ci_high: float
    by: dict[str, tuple[int, float]]
    answers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, without the answers."""
        row = asdict(self)
        del row["answers"]
        return row


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    *,
    batch_size: int = 16,
    blank: bool = False,
    likelihood: str = "mean",
    advance: Callable[[int], object] | None = None,
) -> Result:
    """Answer every example of ``task`` greedily, or by likelihood where it has choices.

    ``blank`` replaces every image by one of mean colour: what the questions alone give away.
    ``likelihood`` compares choices by ``mean`` or ``sum`` of their tokens' log-probabilities.
    """
    answers: list[str] = []
    scores: list[float] = []
    kinds: list[str] = []
    for examples in _batches(task, batch_size, blank):
        given = _answer(model, processor, examples, likelihood)
        answers += given
        scores += [task.score(e, a) for e, a in zip(examples, given, strict=True)]
        kinds += [e.meta.get("kind", "") for e in examples]
        if advance:
            advance(len(examples))
    low, high = interval(scores)
    by = {
        k: _mean([s for s, kind in zip(scores, kinds, strict=True) if kind == k])
        for k in set(kinds)
    }
    by = {k: by[k] for k in sorted(by) if k}
    n, score = _mean(scores)
    return Result(task.name, n, score, low, high, by, tuple(answers))


def interval(scores: list[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for right-or-wrong scores, else a bootstrap."""
    n = len(scores)
    if n == 0:
        return 0.0, 1.0
    mean = sum(scores) / n
    if set(scores) <= {0.0, 1.0}:
        z = 1.959964
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)
    rng = random.Random(0)
    means = sorted(sum(rng.choices(scores, k=n)) / n for _ in range(1000))
    return means[25], means[974]


def _mean(scores: list[float]) -> tuple[int, float]:
    return len(scores), sum(scores) / len(scores) if scores else 0.0


def _batches(task: Task, size: int, blank: bool) -> Iterator[list[Example]]:
    """Examples in batches, the next ones made ready while the model works."""

    def one(index: int) -> Example:
        example = task.example(index)
        if not blank:
            return example
        plain = Image.new("RGB", example.image.size, BLANK)
        return Example(plain, example.question, example.answer, example.choices, example.meta)

    with ThreadPoolExecutor(4) as pool:
        starts = range(0, len(task), size)
        spans = [range(s, min(s + size, len(task))) for s in starts]
        waiting = [pool.submit(one, i) for i in spans[0]] if spans else []
        for k in range(len(spans)):
            coming = [pool.submit(one, i) for i in spans[k + 1]] if k + 1 < len(spans) else []
            yield [f.result() for f in waiting]
            waiting = coming


def _answer(model: Any, processor: Any, examples: list[Example], likelihood: str) -> list[str]:
    if any(e.choices for e in examples):
        return _choose(model, processor, examples, likelihood)
    inputs = _inputs(model, processor, [(e, "") for e in examples])
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def _choose(model: Any, processor: Any, examples: list[Example], likelihood: str) -> list[str]:
    """The likeliest choice of each example, all of them in one forward."""
    pairs = [(e, c) for e in examples for c in e.choices]
    end = processor.tokenizer.eos_token
    lengths = [
        len(processor.tokenizer(c + end, add_special_tokens=False)["input_ids"]) for _, c in pairs
    ]
    inputs = _inputs(model, processor, [(e, c + end) for e, c in pairs])
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=max(lengths) + 1).logits
    ids = inputs["input_ids"][:, -max(lengths) :]
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    scores = [
        float(row[-n:].mean() if likelihood == "mean" else row[-n:].sum())
        for row, n in zip(logp, lengths, strict=True)
    ]
    chosen, at = [], 0
    for e in examples:
        part = scores[at : at + len(e.choices)]
        chosen.append(e.choices[part.index(max(part))])
        at += len(e.choices)
    return chosen


def _inputs(model: Any, processor: Any, asked: list[tuple[Example, str]]) -> Any:
    """Processor output for single-turn chats, each followed by the given start of an answer."""
    texts = []
    for example, answer in asked:
        content = [{"type": "image"}, {"type": "text", "text": example.question}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True) + answer)
    images = [example.image for example, _ in asked]
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype)
