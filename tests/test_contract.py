"""One contract over every method × every family. A new method or family is tested by existing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import MATRIX

import foveate
from foveate import Recipe, Schedule
from foveate.reducer import discover

METHODS = sorted(discover())
FAMILIES = sorted(tiny.FAMILIES)
KEEP = 0.4
# What cannot work, and the reason that the refusal must give.
PACKED = "its packing of tiles is tied to the input size"
ONE_SIZE = "its encoder's positions are made for one image size"
FIXED = {
    "gemma-3": "its token grid is tied to the input size",
    "generic": "its token grid is tied to the input size",
    "llava-next": PACKED,
    "llava-next-video": PACKED,
    "llava-next-video (video)": PACKED,
    "llava-onevision": PACKED,
    "llava-onevision (video)": PACKED,
    "molmo-2": "its table of patches is made for the image as it came",
    "ovis2": ONE_SIZE,
    "perception-lm": ONE_SIZE,
    "perception-lm (video)": ONE_SIZE,
}
BLIND = {
    "fastvlm": "its convolutional encoder shows none",
    "generic": "without an adapter nobody knows how its patches become tokens",
    "perception-lm": "its encoder, run by timm, shows none",
    "perception-lm (video)": "its encoder, run by timm, shows none",
}
REFUSED = {("downsample", family): why for family, why in FIXED.items()} | {
    (method, family): why
    for family, why in BLIND.items()
    for method, kind in discover().items()
    if kind.needs_attention and kind.site != "layers"
}
# Whose pictures are videos; some families give them out as images, or frame by frame.
SINGLE = ("perception-lm (video)", "video-llava (video)")
FILMS = [f for f in FAMILIES if f.endswith("(video)") and f not in SINGLE]
REFUSED |= {
    (method, family): "it compares the frames of a video"
    for method, kind in discover().items()
    for family in FAMILIES
    if kind.video and family not in FILMS
}
# Families where methods can read what the encoder attended to.
OBSERVED = [family for family in FAMILIES if family not in BLIND]
TOLERANCE = 2e-6


def recipe_of(method: str, keep: float = KEEP) -> Recipe:
    """The method alone: at the entrance, or with two cuts inside the LLM."""
    if discover()[method].site != "layers":
        return foveate.recipe(method, keep=keep)
    stages = Schedule.stages({1: keep + (1 - keep) / 2, 4: keep})
    return Recipe(Schedule.flat(1.0) if keep == 1.0 else stages, layers=foveate.reducer(method))


def batch(family: str, images: list[int], seed: int = 0) -> dict[str, Any]:
    return tiny.prompt(tiny.FAMILIES[family], images, seed=seed)


def works(method: str, family: str) -> None:
    if (method, family) in REFUSED:
        pytest.skip(REFUSED[method, family])


def vision(family: str, shown: tiny.Shown) -> int:
    """Vision tokens of one sample."""
    return sum(size for picture in tiny.FAMILIES[family].pictures(shown) for size in picture.groups)


def film(frames: Sequence[int]) -> list[int]:
    """The frames of a video as one group, and what follows them."""
    count = list(frames).count(frames[0])
    return [count * frames[0], *frames[count:]]


def tokens(family: str, method: str, n: int) -> int:
    """Vision tokens that ``n`` images keep: floor per group at the entrance, per sample inside."""
    kind = discover()[method]
    parts = [film(p.groups) if kind.video else p.groups for p in tiny.FAMILIES[family].pictures(n)]
    groups = [size for part in parts for size in part]
    groups = [sum(groups)] if kind.site == "layers" else groups
    return sum(max(int(size * KEEP + 1e-6), 1) for size in groups if size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
def test_dropping_equals_masking(models, method: str, family: str, images: list[int]) -> None:
    """The oracle, prefill and three decode steps; KV lengths; the budget met."""
    works(method, family)
    model, inputs = models(family), batch(family, images)
    run = oracle.reduced_run(model, recipe_of(method), inputs, 4)
    expected = oracle.masked_logits(model, inputs, run)
    assert (run.logits - expected).abs().max() < TOLERANCE
    text = [
        int(m.sum()) - vision(family, n)
        for m, n in zip(inputs["attention_mask"], images, strict=True)
    ]
    left = [len(slots) - t for slots, t in zip(run.slots[-1], text, strict=True)]
    wanted = [tokens(family, method, n) for n in images]
    if discover()[method].site == "pixels":  # the largest grid within the budget
        assert all(n <= kept <= most for n, kept, most in zip(images, left, wanted, strict=True))
    else:
        assert left == wanted
    for layer, slots in zip(run.cache.layers, run.slots, strict=True):
        assert layer.get_seq_length() == max(map(len, slots)) + 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single(models, method: str, family: str) -> None:
    works(method, family)
    model, recipe = models(family), recipe_of(method)
    together = oracle.reduced_run(model, recipe, batch(family, [2, 0, 1]), 3)
    for b, n in enumerate([2, 0, 1]):
        alone = oracle.reduced_run(model, recipe, batch(family, [n], seed=10 * b), 3)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert (alone.logits[0] - together.logits[b]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_keep_all_is_the_untouched_model(models, method: str, family: str) -> None:
    works(method, family)
    model, inputs = models(family), batch(family, [2, 0, 1])
    dense = model(**inputs).logits
    with foveate.reduced(model, recipe_of(method, keep=1.0)):
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_everything_is_undone(models, method: str, family: str) -> None:
    """No hook, no changed attribute or implementation, same logits; also after an error."""
    works(method, family)
    model, inputs = models(family), batch(family, [1])
    dense, before = model(**inputs).logits, state_of(model)
    with foveate.reduced(model, recipe_of(method)):
        assert state_of(model) != before
        model(**inputs)
    assert state_of(model) == before
    with pytest.raises(RuntimeError), foveate.reduced(model, recipe_of(method)):
        model(**inputs)
        raise RuntimeError
    assert state_of(model) == before
    assert torch.equal(model(**inputs).logits, dense)


def state_of(model: Any) -> list[Any]:
    """Everything a session could leave behind: hooks, instance attributes, attention names."""
    return [
        (
            name,
            [list(map(id, hooks.values())) for hooks in (m._forward_pre_hooks, m._forward_hooks)],
            sorted(set(vars(m)) - {"rope_deltas"}),
            id(vars(m).get("config")),
            getattr(vars(m).get("config"), "_attn_implementation", None),
        )
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_text_passes_untouched(models, method: str, family: str) -> None:
    works(method, family)
    model, inputs = models(family), batch(family, [0, 0])
    dense = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with foveate.reduced(model, recipe_of(method)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_next_turn_on_a_reduced_cache(models, method: str, family: str) -> None:
    """A second turn of text equals the same rows given in one longer generation."""
    works(method, family)
    model, inputs = models(family), batch(family, [2, 0, 1])
    turn = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(3))
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], turn], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(turn)], 1),
    }
    for name in tiny.FAMILIES[family].marks(turn):
        longer[name] = torch.cat([inputs[name], turn.to(inputs[name].dtype) * 0], 1)
    with foveate.reduced(model, recipe_of(method)) as report:
        first = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
        cache, slots = first.past_key_values, report.slots
        second = model.generate(
            **longer,
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        entered = oracle.entered_again(model, inputs)
    given = torch.cat([turn, second.sequences[:, longer["input_ids"].shape[1] :]], 1)
    run = oracle.Run(first.sequences[:, :0], given, slots, cache=cache, **entered)
    expected = oracle.masked_logits(model, inputs, run)[:, turn.shape[1] :]
    assert (torch.stack(second.logits, 1) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("method", "family"), sorted(REFUSED))
def test_refusals_say_why(models, method: str, family: str) -> None:
    said = f"^{re.escape(method)} cannot work on .*{REFUSED[method, family]}"
    with pytest.raises(NotImplementedError, match=said):
        oracle.reduced_run(models(family), recipe_of(method), batch(family, [1]), 1)


def test_the_committed_matrix_is_complete() -> None:
    """``make matrix`` writes it from these tests; a new method or family makes it stale."""
    rows = json.loads(MATRIX.read_text())["rows"]
    assert len(rows) == len(FAMILIES)
    assert all(sorted(row["methods"]) == METHODS for row in rows)
