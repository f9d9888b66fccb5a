"""How a task's questions are put to a model: greedily, or by the likelihood of given choices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ask import chat, vision
from foveate.tasks import Example


@dataclass(frozen=True)
class Answers:
    """What was said to each example, and the prompts that went through the model.

    Attributes:
        texts: one answer per example.
        ids: (B, L) the prompts, padded on the left.
        mask: (B, L) where they are not padding.
    """

    texts: list[str]
    ids: Tensor
    mask: Tensor


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    likelihood: str = "mean",
    max_new_tokens: int | None = None,
) -> Answers:
    """Answer every example, all in one batch; either all have choices or none has.

    Args:
        likelihood: whether choices are compared by the ``mean`` or the ``sum`` of their tokens'
            log-probabilities.
        max_new_tokens: None means what the examples say.
    """
    if any(e.choices for e in examples):
        return _choose(model, processor, examples, likelihood)
    inputs = prompts(model, processor, examples)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longest = max_new_tokens or max(e.new_tokens for e in examples)
    out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    said = processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return Answers([text.strip() for text in said], ids, mask)


def _choose(model: Any, processor: Any, examples: Sequence[Example], likelihood: str) -> Answers:
    """The likeliest choice of each example.

    The prompts go through once. Every choice is then said on a copy of the cache, so a method that
    looks at the prompt's last rows sees the question and not the choice.
    """
    inputs = prompts(model, processor, examples)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    scores: list[list[float]] = [[] for _ in examples]
    for turn in range(max(len(e.choices) for e in examples)):
        said = [e.choices[min(turn, len(e.choices) - 1)] for e in examples]
        ids, real = tails(processor, said, inputs["input_ids"].device)
        cache = copy.deepcopy(out.past_key_values)
        logits = continued(model, out.logits, cache, inputs["attention_mask"], ids)
        logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * real
        total = logp.sum(-1) / (real.sum(-1) if likelihood == "mean" else 1)
        for mine, score in zip(scores, total.tolist(), strict=True):
            mine.append(score)
    best = [mine.index(max(mine)) for mine in scores]
    chosen = [e.choices[min(i, len(e.choices) - 1)] for e, i in zip(examples, best, strict=True)]
    return Answers(chosen, inputs["input_ids"], inputs["attention_mask"])


def tails(processor: Any, said: Sequence[str], device: Any) -> tuple[Tensor, Tensor]:
    """What is said, up to the end of the turn: ids (B, A), and where they are not padding."""
    end = processor.tokenizer.eos_token or ""
    rows = processor.tokenizer([s + end for s in said], add_special_tokens=False)["input_ids"]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)], real[n, : len(row)] = torch.tensor(row), True
    return ids.to(device), real.to(device)


def continued(model: Any, logits: Tensor, cache: Any, mask: Tensor, ids: Tensor) -> Tensor:
    """What is predicted where ``ids`` (B, A) stand after a prompt: (B, A, V), float32.

    Args:
        logits: (B, n, V) of the prompt's last rows.
        cache: the prompt's; it takes in ``ids``.
        mask: (B, L) the prompt's.
    """
    whole = torch.cat([mask, torch.ones_like(ids)], 1)
    more = model(input_ids=ids, attention_mask=whole, past_key_values=cache, use_cache=True)
    return torch.cat([logits[:, -1:], more.logits[:, :-1]], 1).float()


def prompts(model: Any, processor: Any, examples: Sequence[Example]) -> Any:
    """The processor's output for the examples' questions, padded on the left."""
    made = processor(
        **vision(processor, [example.shown for example in examples]),
        text=[chat(processor, example.question, example.shown) for example in examples],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return made.to(model.device, model.dtype)
