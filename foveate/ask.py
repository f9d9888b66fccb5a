"""One question about one picture, answered by the untouched model and by reduced ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapter import family, text_shape
from foveate.bench import DENSE, Stopwatch
from foveate.recipe import Recipe
from foveate.report import Report

if TYPE_CHECKING:
    from PIL import Image


def prepare(model: Any, processor: Any, image: Image.Image, question: str) -> dict[str, Any]:
    """The arguments of ``generate``: one user turn with the picture, then the question.

    Raises:
        ValueError: for an empty question, a processor without chat template, or one that puts no
            vision tokens into the prompt.
    """
    if not question.strip():
        raise ValueError('The question is empty; ask something, for example "What is this?".')
    if processor is None or not getattr(processor, "chat_template", None):
        raise ValueError(
            "This model has no processor with a chat template, so foveate cannot put a question to "
            "it; use --model pinhole or an instruction-tuned model from the Hub."
        )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    try:
        made = processor(images=[image], text=[text], return_tensors="pt")
    except ValueError as error:
        raise ValueError(
            f"The processor makes no prompt of this picture and question: {error} Check that model "
            "and processor belong together."
        ) from None
    made = made.to(model.device, model.dtype)
    if not bool(vision_rows(model, made["input_ids"]).any()):
        raise ValueError(
            "There are no vision tokens in the prompt: the processor's chat template left the "
            "image out, so there is nothing to reduce. Check that model and processor belong "
            "together."
        )
    return dict(made)


def vision_rows(model: Any, ids: Tensor) -> Tensor:
    """Which rows of a prompt are placeholders of images or video, ``(B, L)`` bool."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    for placeholder in family(model).placeholders(model).values():
        where |= ids == placeholder
    return where


def costs(
    model: Any, report: Report | None, ids: Tensor, mask: Tensor
) -> list[tuple[float, int, int]]:
    """(mean vision tokens over layers, FLOPs, FLOPs untouched) of each prompt of a batch.

    Args:
        report: None, or one without rows, means that nothing was reduced.
        ids: (B, L) the prompts.
        mask: (B, L) where they are not padding.
    """
    shape = text_shape(family(model).text(model))
    lengths, vision = mask.sum(-1).tolist(), vision_rows(model, ids).sum(-1).tolist()
    found = []
    for b, length in enumerate(lengths):
        rows, alive = [length] * shape.layers, [vision[b]] * shape.layers
        dense = shape.prefill_flops(rows)
        if report is not None and report.rows:
            rows = [layer[b] for layer in report.rows]
            alive = [layer[b] for layer in report.alive]
        found.append((sum(alive) / shape.layers, shape.prefill_flops(rows), dense))
    return found


def answers(
    model: Any,
    processor: Any,
    given: Mapping[str, Any],
    recipes: Mapping[str, Recipe],
    *,
    max_new_tokens: int = 32,
    warm: bool = True,
) -> list[tuple[dict[str, Any], Report | None]]:
    """Greedy answers, the untouched model's first; each row with what it cost, and the report.

    Args:
        given: from :func:`prepare`.
        warm: run everything once before, so that no row pays for what happens only the first time.
    """
    cases: dict[str, Recipe | None] = {DENSE: None, **recipes}
    rows = []
    for warming in (True, False) if warm else (False,):
        for name, recipe in cases.items():
            tokens = 2 if warming else max_new_tokens
            row, report = _answer(model, processor, given, recipe, tokens)
            if not warming:
                rows.append(({"recipe": name} | row, report))
    dense = rows[0][0]
    for row, _ in rows:
        row["same_as_dense"] = row["answer"] == dense["answer"]
    return rows


@torch.no_grad()
def _answer(
    model: Any, processor: Any, given: Mapping[str, Any], recipe: Recipe | None, tokens: int
) -> tuple[dict[str, Any], Report | None]:
    watch = Stopwatch(model)
    with watch.around(recipe) as report:
        out = model.generate(**given, max_new_tokens=tokens, do_sample=False)
        first, decode_ms = watch.forwards()[0], watch.decode_ms()
    new = out[0, given["input_ids"].shape[1] :]
    text = processor.decode(new, skip_special_tokens=True).strip()
    return {
        "answer": text,
        "answer_tokens": len(new),
        **cost(model, given, report),
        "vision_ms": first.vision_ms,
        "prefill_ms": first.prefill_ms,
        "reduce_ms": report.reduce_ms if report is not None else 0.0,
        "decode_ms": decode_ms,
    }, report


def cost(model: Any, given: Mapping[str, Any], report: Report | None) -> dict[str, Any]:
    """Vision tokens, FLOPs and KV bytes of a prompt; no report means the untouched model."""
    shape = text_shape(family(model).text(model))
    vision = int(vision_rows(model, given["input_ids"]).sum())
    if report is None:
        rows = [given["input_ids"].shape[1]] * shape.layers
        alive = [vision] * shape.layers
        flops, kv_bytes = shape.prefill_flops(rows), shape.kv_bytes(rows)
    else:
        alive = [sum(layer) for layer in report.alive]
        flops, kv_bytes = report.flops, report.kv_bytes
    return {
        "vision_tokens": sum(alive) / len(alive),
        "vision_tokens_entrance": alive[0],
        "vision_tokens_last": alive[-1],
        "flops": flops,
        "kv_bytes": kv_bytes,
    }
