"""What single families need besides the contract: windows, guesses, deepstack, blocks, places."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import oracle
import pytest
import tiny
import tiny_masks
import tiny_rope
import torch
from test_contract import batch, recipe_of
from transformers import LlavaConfig, LlavaForConditionalGeneration

import foveate
from foveate import Recipe, Schedule, Tokens
from foveate.adapter import family
from foveate.reducer import Reducer, Reduction

HALF = Recipe(Schedule.step(0.5), layers=foveate.reducer("fastv"))


# Windows


def gemma_with(window: int) -> Any:
    model = tiny_masks.gemma3()
    model.config.text_config.sliding_window = window
    return model


@pytest.mark.parametrize("recipe", [HALF, foveate.recipe("pool", keep=0.5)], ids=["in", "before"])
def test_a_window_shorter_than_the_prompt_is_refused(recipe: Recipe) -> None:
    inputs = batch("gemma-3", [1])
    rows = inputs["input_ids"].shape[1]
    model = gemma_with(rows - 1)
    with (
        foveate.reduced(model, recipe),
        pytest.raises(ValueError, match=rf"layers of {rows - 1} rows.*have {rows};"),
    ):
        model(**inputs)


@torch.no_grad()
def test_an_answer_that_outgrows_the_window_is_refused() -> None:
    inputs = batch("gemma-3", [1])
    model = gemma_with(inputs["input_ids"].shape[1] + 7)
    with foveate.reduced(model, HALF):
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
        with pytest.raises(ValueError, match="shorter prompt or answer"):
            model.generate(**inputs, max_new_tokens=40, do_sample=False)


# Types without an adapter


class Renamed(LlavaConfig):
    model_type = "llava_of_ours"


def renamed() -> Any:
    model = tiny.llava()
    config = Renamed(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    other = LlavaForConditionalGeneration(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
@pytest.mark.parametrize("method", ["aim-merge-tokens", "fastv", "pagerank", "pool"])
def test_a_renamed_llava_is_served_as_llava_is(
    models, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, recipe = batch("llava", [2, 0, 1]), recipe_of(method)
    with foveate.reduced(models("llava"), recipe):
        expected = models("llava")(**inputs).logits
    other = renamed()
    with caplog.at_level(logging.WARNING), foveate.reduced(other, recipe) as report:
        assert torch.equal(other(**inputs).logits, expected)
    said = [r.message for r in caplog.records if "the model type 'llava_of_ours'" in r.message]
    assert len(said) == 1
    assert any("llava_of_ours" in note for note in report.notes)


def test_a_guess_refuses_what_it_cannot_know() -> None:
    """Masks of the model's own: Gemma 3 under another name."""
    model = tiny_masks.gemma3()
    model.config.__class__ = type("Config", (type(model.config),), {"model_type": "gemma_of_ours"})
    with (
        foveate.reduced(model, HALF),
        pytest.raises(ValueError, match="attention_mask of the model's own"),
    ):
        model(**batch("gemma-3", [1]))


@torch.no_grad()
def test_a_guess_refuses_arguments_of_the_text_model_it_does_not_know() -> None:
    model = tiny.FAMILIES["qwen3-vl"].build()
    model.config.__class__ = type("Config", (type(model.config),), {"model_type": "qwen_of_ours"})
    assert family(model).positions == "keep"
    with (
        foveate.reduced(model, HALF),
        pytest.raises(ValueError, match="deepstack_visual_embeds, visual_pos_masks"),
    ):
        model(**batch("qwen3-vl", [1]))


def test_nothing_recognised_is_the_old_error() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(LlamaConfig(**tiny.text_config("llama")))
    with pytest.raises(ValueError, match="does not know the model type 'llama'"):
        foveate.attach(text, HALF)


# Mixtures of experts, which share their family's adapter


@pytest.mark.parametrize("method", ["fastv", "prumerge"])
@pytest.mark.parametrize("name", ["qwen3-vl", "glm-4v"])
def test_mixtures_of_experts(name: str, method: str) -> None:
    model = {"qwen3-vl": tiny_rope.qwen3_vl_moe, "glm-4v": tiny_rope.glm4v_moe}[name]()
    inputs = batch(name, [2, 0, 1])
    run = oracle.reduced_run(model, recipe_of(method), inputs, 3)
    assert (run.logits - oracle.masked_logits(model, inputs, run)).abs().max() < 2e-6


# Places


@dataclass(frozen=True)
class Backwards(Reducer):
    """Keeps every third token, last first, and chooses that by itself."""

    adaptive: ClassVar[bool] = True

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        keep = torch.arange(0, tokens.x.shape[1], 3).flip(0)
        keep = torch.nn.functional.pad(keep, (0, 1)).expand(tokens.x.shape[0], -1)  # and padding
        return Reduction(keep, torch.full((tokens.x.shape[0],), keep.shape[1] - 1))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm-4v"])
@torch.no_grad()
def test_chosen_survivors_lie_where_they_were(models, name: str) -> None:
    """M-RoPE reads a survivor's place from its slot, so each must be in its own."""
    model, inputs = models(name), batch(name, [1])
    dense: dict[str, Any] = {}
    with oracle.spying(family(model).text(model), dense):
        model(**inputs)
    recipe = Recipe(Schedule.flat(1.0, adaptive=True), entrance=Backwards())
    run = oracle.forward_run(model, recipe, inputs)
    assert torch.equal(run.entered[0], dense["inputs_embeds"][0, run.slots[0][0]])


# Deepstack and blocks


@pytest.mark.parametrize("name", ["qwen3-vl"])
@pytest.mark.parametrize("cuts", [{1: 0.5}, {1: 0.7, 2: 0.5, 3: 0.3}, {0: 0.5, 2: 0.2}])
def test_cuts_inside_the_deepstack_layers(models, name: str, cuts: dict[int, float]) -> None:
    model, inputs = models(name), batch(name, [2, 0, 1])
    entrance = foveate.reducer("random") if 0 in cuts else None
    recipe = Recipe(Schedule.stages(cuts), entrance=entrance, layers=foveate.reducer("fastv"))
    run = oracle.reduced_run(model, recipe, inputs, 3)
    expected = oracle.masked_logits(model, inputs, run)
    assert (run.logits - expected).abs().max() < 2e-6


@pytest.mark.parametrize("name", ["gemma-3", "paligemma", "paligemma-2"])
@torch.no_grad()
def test_images_see_themselves_in_both_directions(models, name: str) -> None:
    """Were the masks of a cut causal, the oracle would tell: here the two differ."""
    model, inputs = models(name), batch(name, [1])
    run = oracle.reduced_run(model, recipe_of("fastv"), inputs, 2)
    with foveate.reduced(model, recipe_of("fastv")) as report:
        model(**inputs)
    assert [note for note in report.notes if "both directions" in note] == report.notes
    assert len(report.notes) == 1
    blind = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert (run.logits - oracle.masked_logits(model, inputs, run)).abs().max() < 2e-6
    assert (run.logits - oracle.masked_logits(model, blind, run)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gemma-3", "qwen3-vl", "smolvlm"])
@torch.no_grad()
def test_a_picture_in_a_later_turn(models, name: str) -> None:
    """Its blocks and deepstack stand where the turn begins: a cut that drops nothing is dense."""
    model, made = models(name), tiny.FAMILIES[name]
    first, second = batch(name, [1]), batch(name, [1], seed=40)
    shown = {k: v for k, v in second.items() if not k.endswith(("mask", "token_type_ids"))}
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    marks = made.marks(ids if name == "gemma-3" else second["input_ids"])

    def turns() -> torch.Tensor:
        cache = model(**first, use_cache=True).past_key_values
        return model(**shown, **marks, past_key_values=cache, use_cache=True).logits

    dense = turns()
    with foveate.reduced(model, Recipe(Schedule.step(1 - 1e-9), layers=foveate.reducer("fastv"))):
        assert torch.allclose(turns(), dense, atol=2e-6)
    with foveate.reduced(model, HALF):
        assert turns().isfinite().all()
