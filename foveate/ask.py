"""One question about a picture or clip, answered by the untouched model and by reduced ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from foveate.adapter import family, text_shape, vision_rows
from foveate.bench import DENSE, Stopwatch
from foveate.loading import Clip
from foveate.recipe import Recipe
from foveate.report import Report

if TYPE_CHECKING:
    from PIL import Image


def takes_video(processor: Any) -> bool:
    """Whether a clip goes in as one; else its frames go in as so many images."""
    return getattr(processor, "video_processor", None) is not None


def chat(processor: Any, question: str, shown: Image.Image | Clip | None = None) -> str:
    """The text of one user turn up to where the answer begins: what is shown, then the question.

    Args:
        shown: None means a picture.

    Raises:
        ValueError: for a processor without chat template.
    """
    if processor is None or not getattr(processor, "chat_template", None):
        raise ValueError(
            "This model has no processor with a chat template, so foveate cannot put a question to "
            "it; use --model pinhole or an instruction-tuned model from the Hub."
        )
    kinds = ["image"]
    if isinstance(shown, Clip):
        kinds = ["video"] if takes_video(processor) else kinds * len(shown.frames)
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return cast(str, processor.apply_chat_template(turns, add_generation_prompt=True))


def vision(processor: Any, shown: Sequence[Image.Image | Clip]) -> dict[str, Any]:
    """The processor's arguments for the picture or clip of each prompt."""
    clips = [s for s in shown if isinstance(s, Clip)]
    if not clips or not takes_video(processor):
        return {"images": [list(s.frames) if isinstance(s, Clip) else [s] for s in shown]}
    images = [[] if isinstance(s, Clip) else [s] for s in shown]
    return {
        **({"images": images} if any(images) else {}),
        "videos": [list(c.frames) for c in clips],
        "video_metadata": [
            {"total_num_frames": c.total, "fps": c.fps, "frames_indices": list(c.at)} for c in clips
        ],
        "do_sample_frames": False,
    }


def given_as(processor: Any, shown: Image.Image | Clip) -> str:
    """How the model gets what is shown, for people."""
    if not isinstance(shown, Clip):
        return "a picture"
    count = len(shown.frames)
    if takes_video(processor):
        return f"{count} of {shown.total} frames, given as a video"
    return f"{count} of {shown.total} frames, given as {count} images: it takes no video"


def prepare(model: Any, processor: Any, image: Image.Image | Clip, question: str) -> dict[str, Any]:
    """The arguments of ``generate``: one user turn with the picture or clip, then the question.

    Raises:
        ValueError: for an empty question, a processor without chat template, or one that puts no
            vision tokens into the prompt.
    """
    if not question.strip():
        raise ValueError('The question is empty; ask something, for example "What is this?".')
    text = chat(processor, question, image)
    try:
        made = processor(**vision(processor, [image]), text=[text], return_tensors="pt")
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
        **costs(model, report, given["input_ids"], given["attention_mask"])[0],
        "vision_ms": first.vision_ms,
        "prefill_ms": first.prefill_ms,
        "reduce_ms": report.reduce_ms if report is not None else 0.0,
        "decode_ms": decode_ms,
    }, report


def costs(model: Any, report: Report | None, ids: Tensor, mask: Tensor) -> list[dict[str, Any]]:
    """Vision tokens (mean over layers), FLOPs and KV bytes of each prompt of a batch.

    Args:
        report: of the run that the prompts went through; None means the untouched model.
        ids: (B, L) the prompts.
        mask: (B, L) where they are not padding.
    """
    shape = text_shape(family(model).text(model))
    rows = [mask.sum(-1).tolist()] * shape.layers
    alive = [vision_rows(model, ids).sum(-1).tolist()] * shape.layers
    if report is not None and report.rows:
        rows, alive = report.rows, report.alive
    return [
        {
            "vision_tokens": sum(tokens) / shape.layers,
            "vision_tokens_entrance": tokens[0],
            "vision_tokens_last": tokens[-1],
            "flops": shape.prefill_flops(lengths),
            "kv_bytes": shape.kv_bytes(lengths),
        }
        for lengths, tokens in zip(zip(*rows, strict=True), zip(*alive, strict=True), strict=True)
    ]
