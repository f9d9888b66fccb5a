"""Batches of different pictures: sizes, several images, video, text only, in one call."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from test_contract import KEEP, METHODS, REFUSED, TOLERANCE, recipe_of

import foveate
from foveate.reducer import discover

MIXED = [name for name, family in tiny.FAMILIES.items() if family.mixed]


def left(method: str, pictures: list[tiny.Picture]) -> int:
    """Vision tokens that a sample keeps: floor per group at the entrance, per sample inside."""
    groups = [size for picture in pictures for size in picture.groups]
    groups = [sum(groups)] if discover()[method].site == "layers" else groups
    return sum(max(int(size * KEEP + 1e-6), 1) for size in groups if size)


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_equals_masking_and_singles(models, method: str, family: str) -> None:
    if (method, family) in REFUSED:
        pytest.skip(REFUSED[method, family])
    model, made, recipe = models(family), tiny.FAMILIES[family], recipe_of(method)
    for shown in made.mixed:
        inputs = tiny.prompt(made, shown)
        run = oracle.reduced_run(model, recipe, inputs, 3)
        assert (run.logits - oracle.masked_logits(model, inputs, run)).abs().max() < TOLERANCE
        for b, names in enumerate(shown):
            alone = oracle.reduced_run(model, recipe, tiny.prompt(made, [names], seed=10 * b), 3)
            assert torch.equal(alone.tokens[0], run.tokens[b])
            assert (alone.logits[0] - run.logits[b]).abs().max() < TOLERANCE
            pictures = made.pictures(names)
            size = sum(sum(picture.groups) for picture in pictures)
            text = int(inputs["attention_mask"][b].sum()) - size
            kept, wanted = len(run.slots[-1][b]) - text, left(method, pictures)
            if discover()[method].site == "pixels":  # the largest grid within the budget
                assert min(1, size) <= kept <= wanted
            else:
                assert kept == wanted


@pytest.mark.parametrize("family", MIXED)
@torch.no_grad()
def test_keep_all_is_the_untouched_model(models, family: str) -> None:
    model, made = models(family), tiny.FAMILIES[family]
    for shown in made.mixed:
        inputs = tiny.prompt(made, shown)
        dense = model(**inputs).logits
        with foveate.reduced(model, recipe_of("fastv", keep=1.0)):
            assert torch.equal(model(**inputs).logits, dense)
