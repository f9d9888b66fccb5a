"""How a task's questions are put to a model: greedily, or by the likelihood of given choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from foveate.tasks import Example

MAX_NEW_TOKENS = 12


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
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answers:
    """Answer every example, all in one batch.

    Args:
        likelihood: whether choices are compared by the ``mean`` or the ``sum`` of their tokens'
            log-probabilities.
    """
    if any(e.choices for e in examples):
        return _choose(model, processor, examples, likelihood)
    inputs = _inputs(model, processor, examples, [_prompt(processor, e) for e in examples])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return Answers([text.strip() for text in said], ids, mask, list(range(len(examples))))


def _choose(model: Any, processor: Any, examples: Sequence[Example], likelihood: str) -> Answers:
    """The likeliest choice of each example, all of them in one forward."""
    pairs = [(e, c) for e in examples for c in e.choices]
    end = processor.tokenizer.eos_token or ""
    prompts = [_prompt(processor, e) for e, _ in pairs]
    texts = [p + c + end for p, (_, c) in zip(prompts, pairs, strict=True)]
    inputs = _inputs(model, processor, [e for e, _ in pairs], texts)
    said = continuations(model, inputs, added(processor, prompts, texts))
    scores = [float(logp.mean() if likelihood == "mean" else logp.sum()) for logp, _ in said]
    chosen, rows, at = [], [], 0
    for e in examples:
        part = scores[at : at + len(e.choices)]
        chosen.append(e.choices[part.index(max(part))])
        rows.append(at)
        at += len(e.choices)
    return Answers(chosen, inputs["input_ids"], inputs["attention_mask"], rows)


def added(processor: Any, starts: Sequence[str], texts: Sequence[str]) -> list[int]:
    """How many tokens each text has beyond its start."""
    before, whole = (processor.tokenizer(list(some))["input_ids"] for some in (starts, texts))
    return [len(b) - len(a) for a, b in zip(before, whole, strict=True)]


def continuations(
    model: Any, inputs: Mapping[str, Tensor], lengths: Sequence[int]
) -> list[tuple[Tensor, bool]]:
    """How likely the ends of prompts are, in one forward.

    Args:
        inputs: a batch padded on the left.
        lengths: how many of the last tokens of each row to look at.

    Returns:
        For each row the log-probabilities ``(lengths[b],)``, and whether each token was the
        likeliest.
    """
    longest = max(lengths)
    logits = model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
    ids = inputs["input_ids"][:, -longest:]
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    first = logits.argmax(-1) == ids
    return [
        (row[-n:], bool(best[-n:].all())) for row, best, n in zip(logp, first, lengths, strict=True)
    ]


def _prompt(processor: Any, example: Example) -> str:
    """The text of a single-turn chat, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    chat = [{"role": "user", "content": content}]
    return cast(str, processor.apply_chat_template(chat, add_generation_prompt=True))


def _inputs(model: Any, processor: Any, examples: Sequence[Example], texts: list[str]) -> Any:
    """The processor's output for ``texts`` about the examples' images, padded on the left."""
    images = [example.image for example in examples]
    inputs = processor(
        images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
    )
    return inputs.to(model.device, model.dtype)
