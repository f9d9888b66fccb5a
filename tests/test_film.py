"""Video methods in a model: a whole video is one group, and images are refused."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import tiny
import torch

import foveate
from foveate.reducer import discover

METHODS = sorted(name for name, cls in discover().items() if cls.video)
FRAMES = 5
# Tokens of a frame, and of what stands after the last one.
FILMS = {"llava-onevision": (9, 1), "qwen2.5-vl": (36, 0)}
KEEP = 0.45


def film(family: str, seed: int) -> dict[str, Any]:
    """Five frames of noise of which the third is the second again."""
    frames = torch.randn(FRAMES, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
    frames[2] = frames[1]
    if family == "llava-onevision":
        return {"pixel_values_videos": frames[None]}
    patches = frames.view(FRAMES, 3, 1, 12, 4, 12, 4).permute(0, 3, 5, 1, 2, 4, 6)
    two = patches.repeat(1, 1, 1, 1, 2, 1, 1)  # a step in time is two frames
    blocks = two.reshape(FRAMES, 6, 2, 6, 2, -1).transpose(2, 3)  # patches of a token side by side
    grid = torch.tensor([[FRAMES, 12, 12]])
    return {"pixel_values_videos": blocks.reshape(FRAMES * 144, -1), "video_grid_thw": grid}


def prompt(family: str, films: list[int]) -> dict[str, Any]:
    """A left-padded batch; sample b has ``films[b]`` videos, and the same ones alone."""
    place, after = FILMS[family]
    rows, shown = [], []
    for b, n in enumerate(films):
        ids = [7, 8 + b]
        for i in range(n):
            ids += [tiny.VIDEO] * (FRAMES * place + after) + [5]
            shown.append(film(family, 10 * n + i))
        rows.append([*ids, 11, 12, 13])
    width = max(map(len, rows))
    ids = torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long()}
    for name in shown[0] if shown else ():
        inputs[name] = torch.cat([one[name] for one in shown])
    if family == "qwen2.5-vl":
        inputs["mm_token_type_ids"] = 2 * (ids == tiny.VIDEO).int()
    return inputs


@pytest.mark.parametrize("family", FILMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("films", [[1], [2, 0, 1]], ids=["single", "padded"])
def test_dropping_equals_masking(models, method: str, family: str, films: list[int]) -> None:
    """The oracle; KV lengths; the budget of the whole video met."""
    model, inputs = models(family), prompt(family, films)
    run = oracle.reduced_run(model, foveate.recipe(method, keep=KEEP), inputs, 4)
    assert (run.logits - oracle.masked_logits(model, inputs, run)).abs().max() < 2e-6
    place, after = FILMS[family]
    kept = int(FRAMES * place * KEEP) + after
    assert [len(slots) for slots in run.slots[-1]] == [5 + n * (kept + 1) for n in films]
    for layer in run.cache.layers:
        assert layer.get_seq_length() == max(5 + n * (kept + 1) for n in films) + 3


@pytest.mark.parametrize("family", FILMS)
@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single(models, method: str, family: str) -> None:
    model, recipe = models(family), foveate.recipe(method, keep=KEEP)
    together = oracle.reduced_run(model, recipe, prompt(family, [2, 0, 1]), 3)
    for b, n in enumerate([2, 0, 1]):
        inputs = prompt(family, [n])
        inputs["input_ids"][inputs["input_ids"] == 8] = 8 + b
        alone = oracle.reduced_run(model, recipe, inputs, 3)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert (alone.logits[0] - together.logits[b]).abs().max() < 2e-6


@pytest.mark.parametrize("family", FILMS)
def test_evs_sees_that_a_frame_repeats(models, family: str) -> None:
    """Four of five frames: the third, which is the second again, is the one to go."""
    place, after = FILMS[family]
    run = oracle.reduced_run(
        models(family), foveate.recipe("evs", keep=0.8), prompt(family, [1]), 1
    )
    frames = [list(range(2 + t * place, 2 + (t + 1) * place)) for t in (0, 1, 3, 4)]
    first = 2 + FRAMES * place
    text = [0, 1, *range(first, first + after + 4)]
    assert run.slots[-1][0].tolist() == sorted(itertools.chain(text, *frames))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_what_follows_the_frames_stays_as_it_is(models, method: str) -> None:
    """LLaVA-OneVision's newline token."""
    model, inputs, first = models("llava-onevision"), prompt("llava-onevision", [1]), {}
    with (
        foveate.reduced(model, foveate.recipe(method, keep=KEEP)) as report,
        oracle.spying(model.model.language_model.layers[0], first),
    ):
        model(**inputs)
    newline = (report.slots[0][0] == 2 + FRAMES * 9).nonzero()[0, 0]
    assert torch.equal(first["args"][0][0, newline], model.model.image_newline)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_keep_all_is_the_untouched_model(models, method: str) -> None:
    for family in FILMS:
        model, inputs = models(family), prompt(family, [2, 0, 1])
        dense = model(**inputs).logits
        with foveate.reduced(model, foveate.recipe(method, keep=1.0)):
            assert torch.equal(model(**inputs).logits, dense)
