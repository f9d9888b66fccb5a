"""Encoding once: the same to the bit, and really once."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_contract import REFUSED, batch
from torch import Tensor

import foveate
from foveate.encoded import once

RECIPES = {
    "pool": foveate.recipe("pool", keep=0.4),
    "aim-merge": foveate.recipe("aim-merge", keep=0.4),
    "fastv": foveate.recipe("fastv", keep=0.4),
}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], recipe: foveate.Recipe | None = None) -> Tensor:
    if recipe is None:
        return model(**inputs).logits
    with foveate.reduced(model, recipe):
        return model(**inputs).logits


SOME = ("llava", "llava-onevision", "qwen2.5-vl", "smolvlm")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in SOME else pytest.mark.wide) for f in sorted(tiny.FAMILIES)],
)
def test_nothing_changes(models, family: str) -> None:
    """Untouched, under every kind of recipe, and again with other pictures."""
    model = models(family)
    recipes = [None, *(r for m, r in RECIPES.items() if (m, family) not in REFUSED)]
    given = [batch(family, [1, 2], seed=seed) for seed in (0, 7)]
    plain = [[logits(model, inputs, r) for r in recipes] for inputs in given]
    with once(model):
        for _ in range(2):
            for inputs, wanted in zip(given, plain, strict=True):
                for recipe, right in zip(recipes, wanted, strict=True):
                    assert torch.equal(logits(model, inputs, recipe), right)


def test_layers_run_once_for_the_same_pictures(models, monkeypatch) -> None:
    """Those that a method looks into run for it; with gradients all do; afterwards, too."""
    model = models("llava")
    layers = model.model.vision_tower.encoder.layers
    runs: list[int] = []
    for n, layer in enumerate(layers):
        monkeypatch.setattr(
            layer.mlp, "forward", lambda x, n=n, f=layer.mlp.forward: runs.append(n) or f(x)
        )

    def ran(recipe: foveate.Recipe | None = None, seed: int = 0) -> list[int]:
        runs.clear()
        logits(model, batch("llava", [1], seed=seed), recipe)
        return list(runs)

    every = list(range(len(layers)))
    with once(model):
        assert ran() == every
        assert ran() == ran(RECIPES["pool"]) == ran(RECIPES["fastv"]) == []
        assert ran(RECIPES["aim-merge"]) == every[-1:]
        assert ran(seed=1) == every
        runs.clear()
        model(**batch("llava", [1], seed=1))
        assert runs == every
    assert ran(seed=1) == every


def test_a_forward_that_was_replaced_comes_back(models, monkeypatch) -> None:
    """As accelerate replaces it."""
    model = models("llava")
    first, second = model.model.vision_tower.encoder.layers[:2]
    mine = first.forward
    monkeypatch.setitem(vars(first), "forward", mine)
    with pytest.raises(KeyError), once(model):
        raise KeyError
    assert vars(first)["forward"] is mine and "forward" not in vars(second)
