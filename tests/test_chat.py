"""Conversations: later turns with images of their own, reduced and unreduced turns mixed.

The oracle is one long prompt: what each turn dropped is hidden from everything that follows, what
it blended stands in its place, and the numbering is that of the whole conversation.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import tiny
import torch
from torch import Tensor

import foveate
from foveate import Recipe, Schedule
from foveate.adapter import family

BOTH = Recipe(
    Schedule.ramp(0.5, start=2, stop=5),
    entrance=foveate.reducer("prumerge"),
    layers=foveate.reducer("pagerank"),
)
ENTRANCE = foveate.recipe("prumerge+", keep=0.4)
INSIDE = foveate.recipe("fastv", keep=0.3)
ADAPTIVE = foveate.recipe("prumerge")
WHOLE = foveate.recipe("aim", keep=1.0)
RECIPES = {
    "both": BOTH,
    "entrance": ENTRANCE,
    "inside": INSIDE,
    "adaptive": ADAPTIVE,
    "whole": WHOLE,
}
TOLERANCE = 3e-6


@dataclass
class Talk:
    """A conversation as it goes on: everything said, and what is left of it by layer.

    Attributes:
        said: (B, rows) all ids so far; ``real`` where they are not padding.
        alive: by layer, by sample, the rows of the conversation that are left.
        entered: by sample, the vectors of those rows at layer 0.
        pictures: arguments of ``forward`` for all images so far.
    """

    model: Any
    kind: tiny.Family
    cache: Any = None
    said: Tensor | None = None
    real: Tensor | None = None
    alive: list[list[Tensor]] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def positions(self) -> Tensor:
        """(…, B, rows) the numbering of the untouched model."""
        assert self.said is not None and self.real is not None
        types = self.kind.marks(self.said).get("mm_token_type_ids")
        if types is None:
            return (self.real.cumsum(-1) - 1).clamp(min=0)
        grid = self.pictures.get("image_grid_thw")
        if grid is None:
            return (self.real.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        base = self.model.model
        return base.get_rope_index(self.said, types, grid, attention_mask=self.real)[0]

    def turn(self, inputs: dict[str, Any], recipe: Recipe | None, *, plain: bool = False) -> Tensor:
        """Say ``inputs``; the logits of the rows that are left of them.

        Args:
            plain: without attention mask and position ids, as a bare forward may be called.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        before = 0 if self.said is None else self.said.shape[1]
        self.said = ids if self.said is None else torch.cat([self.said, ids], 1)
        self.real = mask if self.real is None else torch.cat([self.real, mask], 1)
        new = {k: v for k, v in inputs.items() if k.startswith(("pixel", "image"))}
        for name, value in new.items():
            seen = [self.pictures[name]] if name in self.pictures else []
            self.pictures[name] = torch.cat([*seen, value])
        more = {} if plain else {"attention_mask": self.real}
        if not plain:
            more["position_ids"] = self.positions()[..., before:]
        first: dict[str, Any] = {}
        layers = family(self.model).text(self.model).layers
        attached = nullcontext() if recipe is None else foveate.reduced(self.model, recipe)
        with torch.no_grad(), attached as report, oracle.spying(layers[0], first):
            out = self.model(
                input_ids=ids, past_key_values=self.cache, use_cache=True, **new, **more
            )
        self.cache = out.past_key_values
        left = report.slots if report is not None and bool(new) else None
        self._note(left or [[m.nonzero()[:, 0] for m in mask]] * len(layers), before, first)
        return out.logits

    def _note(self, left: list[list[Tensor]], before: int, first: dict[str, Any]) -> None:
        vectors = first["args"][0]
        rows = [vectors[b, vectors.shape[1] - len(s) :] for b, s in enumerate(left[0])]
        now = [[s + before for s in layer] for layer in left]
        self.alive = [
            [torch.cat(pair) for pair in zip(a, b, strict=True)]
            for a, b in zip(
                self.alive or [[s[:0] for s in layer] for layer in now], now, strict=True
            )
        ]
        old = self.entered or [r[:0] for r in rows]
        self.entered = [torch.cat(pair) for pair in zip(old, rows, strict=True)]

    @torch.no_grad()
    def expected(self) -> Tensor:
        """(B, rows, V) of the masked untouched model on the whole conversation."""
        assert self.said is not None
        width = max(map(len, self.entered))
        entered = torch.stack(
            [torch.nn.functional.pad(r, (0, 0, width - len(r), 0)) for r in self.entered]
        )
        run = oracle.Run(entered, self.said[:, :0], self.alive, entered, self.cache)
        dense = {"inputs_embeds": self.model.get_input_embeddings()(self.said)}
        return self.model.lm_head(oracle._masked(self.model, dense, self.positions(), run))


def batch(name: str, images: list[int], seed: int) -> dict[str, Any]:
    return tiny.prompt(tiny.FAMILIES[name], images, seed=seed)


def agree(talk: Talk, logits: Tensor) -> None:
    """The last turn's rows say what the one long prompt says."""
    expected = talk.expected()
    for b, rows in enumerate(talk.alive[-1]):
        own = min(len(rows), logits.shape[1])
        new = rows[len(rows) - own :]
        new = new[new >= talk.said.shape[1] - 6]  # text after the last image, in every sample
        assert len(new) >= 3
        got = logits[b, logits.shape[1] - len(new) :]
        assert (got - expected[b, new]).abs().max() < TOLERANCE


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_a_second_image_on_a_reduced_cache(models, name: str, recipe: str, images: list) -> None:
    """Image, text, image, text: every turn equals the long prompt with the same rows masked."""
    talk, made = Talk(models(name), tiny.FAMILIES[name]), RECIPES[recipe]
    agree(talk, talk.turn(batch(name, images, 0), made))
    agree(talk, talk.turn(batch(name, [0] * len(images), 40), made))
    agree(talk, talk.turn(batch(name, images[::-1], 80), made))
    agree(talk, talk.turn(batch(name, [0] * len(images), 120), made))
    layers = len(talk.alive)
    held = [talk.cache.layers[i].get_seq_length() for i in (0, layers - 1)]
    for b in range(len(images)):
        assert len(talk.alive[0][b]) <= held[0] and len(talk.alive[-1][b]) <= held[1]


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_a_recipe_attached_after_an_unreduced_turn(
    models, name: str, recipe: str, images: list[int]
) -> None:
    """What was said before stays whole; only the new images are reduced."""
    talk, made = Talk(models(name), tiny.FAMILIES[name]), RECIPES[recipe]
    agree(talk, talk.turn(batch(name, images, 0), None))
    agree(talk, talk.turn(batch(name, [0] * len(images), 40), None))
    whole = [len(rows) for rows in talk.alive[-1]]
    agree(talk, talk.turn(batch(name, images, 80), made))
    agree(talk, talk.turn(batch(name, [0] * len(images), 120), made))
    agree(talk, talk.turn(batch(name, images[::-1], 160), made))
    for b, rows in enumerate(talk.alive[-1]):
        assert (rows < talk.said.shape[1]).all() and len(rows) > whole[b]


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
@pytest.mark.parametrize(
    ("recipe", "second"),
    [("both", "whole"), ("both", "inside"), ("entrance", "both"), ("inside", "adaptive")],
)
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_another_recipe_on_a_reduced_cache(
    models, name: str, recipe: str, second: str, images: list[int]
) -> None:
    """One that keeps everything among them; the first again after it, then text under it."""
    talk, made, other = Talk(models(name), tiny.FAMILIES[name]), RECIPES[recipe], RECIPES[second]
    agree(talk, talk.turn(batch(name, images, 0), made))
    before = talk.real.shape[1]
    agree(talk, talk.turn(batch(name, images[::-1], 40), other))
    if second == "whole":
        new = talk.real[:, before:].sum(-1).tolist()
        for layer in talk.alive:
            assert [int((rows >= before).sum()) for rows in layer] == new
    agree(talk, talk.turn(batch(name, [0] * len(images), 80), other))
    agree(talk, talk.turn(batch(name, images, 120), made))
    agree(talk, talk.turn(batch(name, [0] * len(images), 160), RECIPES["whole"]))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("first", [True, False], ids=["reduced", "unreduced"])
def test_bare_forwards_without_mask_and_positions(models, recipe: str, first: bool) -> None:
    talk, made = Talk(models("llava"), tiny.FAMILIES["llava"]), RECIPES[recipe]
    agree(talk, talk.turn(batch("llava", [1], 0), made if first else None, plain=True))
    for seed, images in ((40, 0), (80, 2), (120, 0)):
        agree(talk, talk.turn(batch("llava", [images], seed), made, plain=True))


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
@torch.no_grad()
def test_generate_goes_on_with_a_second_image(models, recipe: str, images: list[int]) -> None:
    """The whole conversation as ids with the new images alone, as chat programs call it."""
    model, made = models("llava"), RECIPES[recipe]
    talk = Talk(model, tiny.FAMILIES["llava"])
    first, second = (batch("llava", images, seed) for seed in (0, 40))
    talk.turn(first, made)
    expected = talk.turn(second, made)[:, -1]
    with foveate.reduced(model, made):
        more = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        cache = model.generate(**first, max_new_tokens=1, **more).past_key_values
        both = {k: torch.cat([first[k], second[k]], 1) for k in ("input_ids", "attention_mask")}
        given = both | {"pixel_values": second["pixel_values"]}
        out = model.generate(**given, past_key_values=cache, max_new_tokens=3, **more)
    assert (out.logits[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"whole"}))
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
@torch.no_grad()
def test_a_reduced_cache_needs_a_session(models, name: str, recipe: str) -> None:
    """Without one the model would take the cache for a whole prompt's, mostly in silence."""
    model, inputs = models(name), batch(name, [1], 0)
    with foveate.reduced(model, RECIPES[recipe]):
        cache = model(**inputs, use_cache=True).past_key_values
    token = torch.tensor([[7]])
    with pytest.raises(ValueError, match=r"no recipe attached. Go on inside foveate\.reduced"):
        model(input_ids=token, past_key_values=cache)
    with foveate.reduced(model, RECIPES["whole"]):
        on = model(input_ids=token, past_key_values=cache).past_key_values
    assert on.layers[-1].get_seq_length() == cache.layers[-1].get_seq_length()
    with pytest.raises(ValueError, match="no recipe attached"):
        model(input_ids=token, past_key_values=on)


def test_the_comparison_can_fail(models) -> None:
    """One row less of the first turn, in one layer, is seen."""
    talk = Talk(models("llava"), tiny.FAMILIES["llava"])
    talk.turn(batch("llava", [1], 0), BOTH)
    logits = talk.turn(batch("llava", [1], 40), BOTH)
    talk.alive[-1][0] = talk.alive[-1][0][1:]
    with pytest.raises(AssertionError):
        agree(talk, logits)
