"""How a task's questions are put to a model: greedily, or by the likelihood of given choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from foveate.ask import chat
from foveate.tasks import Example


@dataclass(frozen=True)
class Answers:
    """What was said to each example, and the prompts that went through the model.

    Attributes:
        texts: one answer per example.
        ids: (B, L) the prompts, padded on the left; with choices, one prompt per choice.
        mask: (B, L) where they are not padding.
        rows: the row of each example's (first) prompt.
    """

    texts: list[str]
    ids: Tensor
    mask: Tensor
    rows: list[int]


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
    texts = [chat(processor, e.question) for e in examples]
    inputs = _inputs(model, processor, examples, texts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longest = max_new_tokens or max(e.new_tokens for e in examples)
    out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    said = processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return Answers([text.strip() for text in said], ids, mask, list(range(len(examples))))


def _choose(model: Any, processor: Any, examples: Sequence[Example], likelihood: str) -> Answers:
    """The likeliest choice of each example, all of them in one forward."""
    pairs = [(e, c) for e in examples for c in e.choices]
    end = processor.tokenizer.eos_token or ""
    prompts = [chat(processor, e.question) for e, _ in pairs]
    texts = [p + c + end for p, (_, c) in zip(prompts, pairs, strict=True)]
    lengths = [
        len(whole) - len(start)
        for whole, start in zip(*(_ids(processor, some) for some in (texts, prompts)), strict=True)
    ]
    inputs = _inputs(model, processor, [e for e, _ in pairs], texts)
    logits = model(**inputs, logits_to_keep=max(lengths) + 1).logits
    ids = inputs["input_ids"][:, -max(lengths) :]
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    scores = [
        float(row[-n:].mean() if likelihood == "mean" else row[-n:].sum())
        for row, n in zip(logp, lengths, strict=True)
    ]
    chosen, rows, at = [], [], 0
    for e in examples:
        part = scores[at : at + len(e.choices)]
        chosen.append(e.choices[part.index(max(part))])
        rows.append(at)
        at += len(e.choices)
    return Answers(chosen, inputs["input_ids"], inputs["attention_mask"], rows)


def _ids(processor: Any, texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], processor.tokenizer(texts)["input_ids"])


def _inputs(model: Any, processor: Any, examples: Sequence[Example], texts: list[str]) -> Any:
    """The processor's output for ``texts`` about the examples' images, padded on the left."""
    images = [example.image for example in examples]
    inputs = processor(
        images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
    )
    return inputs.to(model.device, model.dtype)
