"""What a session must do besides the contract: caches, beams, threads, observation, refusals."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import tiny
import torch
from test_contract import FAMILIES, OBSERVED

import foveate
from foveate import Recipe, Schedule, Scorer, Tokens

BOTH = Recipe(
    Schedule.ramp(0.5, start=2, stop=5),
    entrance=foveate.reducer("prumerge"),
    layers=foveate.reducer("pagerank"),
)


def batch(family: str, images: list[int], seed: int = 0) -> dict[str, Any]:
    return tiny.prompt(tiny.FAMILIES[family], images, seed=seed)


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Any], steps: int = 4, **more: Any) -> Any:
    more = {"do_sample": False, "output_logits": True} | more
    out = model.generate(**inputs, max_new_tokens=steps, return_dict_in_generate=True, **more)
    return torch.stack(out.logits, 1)


def test_the_oracle_can_fail(models) -> None:
    """Masking nothing is far from dropping much, so the tolerance means something."""
    model, inputs = models("llava"), batch("llava", [1])
    run = oracle.reduced_run(model, BOTH, inputs, 2)
    everything = [[torch.arange(inputs["input_ids"].shape[1])] for _ in run.slots]
    entered = oracle.reduced_run(model, foveate.recipe("pool", keep=1.0), inputs, 1).entered
    untouched = oracle.Run(run.logits, run.tokens, everything, entered, run.cache)
    assert (run.logits - oracle.masked_logits(model, inputs, untouched)).abs().max() > 1e-3


def attending(family: str, implementation: str) -> Any:
    """A model of its own, with this kernel."""
    model = tiny.FAMILIES[family].build()
    if implementation == "sdpa" and family == "paligemma-2":
        pytest.skip("transformers has no sdpa for Gemma 2, whose attention is soft-capped")
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", OBSERVED)
def test_entrance_and_layers_together(family: str, implementation: str) -> None:
    model = attending(family, implementation)
    run = oracle.reduced_run(model, BOTH, batch(family, [2, 0, 1]), 4)
    expected = oracle.masked_logits(model, batch(family, [2, 0, 1]), run)
    assert (run.logits - expected).abs().max() < 2e-6


@pytest.mark.parametrize("images", [[1, 1], [2, 0, 1]], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "qwen3-vl", "gemma-3", "paligemma"])
def test_static_cache_equals_dynamic(models, family: str, images: list[int]) -> None:
    model, inputs = models(family), batch(family, images)
    static = {"cache_implementation": "static", "disable_compile": True}
    with foveate.reduced(model, BOTH):
        assert torch.allclose(
            logits_of(model, inputs, **static), logits_of(model, inputs), atol=2e-6
        )


@pytest.mark.parametrize("recipe", [BOTH, foveate.recipe("prumerge")], ids=["fixed", "adaptive"])
@pytest.mark.parametrize(
    "family", ["llava", "internvl", "qwen2.5-vl", "qwen3-vl", "gemma-3", "smolvlm", "mistral-3"]
)
@torch.no_grad()
def test_beam_search_of_a_batch_equals_singles(models, family: str, recipe: Recipe) -> None:
    model, beams = models(family), {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with foveate.reduced(model, recipe):
        together = model.generate(**batch(family, [2, 0, 1]), **beams)[:, -4:]
        for b, n in enumerate([2, 0, 1]):
            alone = model.generate(**batch(family, [n], seed=10 * b), **beams)[:, -4:]
            assert torch.equal(alone[0], together[b])


@torch.no_grad()
def test_several_answers_and_prompt_lookup_run(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    with foveate.reduced(model, BOTH):
        many = model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=3)
        greedy = model.generate(**inputs, do_sample=False, max_new_tokens=6)
        lookup = model.generate(
            **inputs, do_sample=False, max_new_tokens=6, prompt_lookup_num_tokens=2
        )
    assert many.shape[0] == 3
    assert torch.equal(greedy, lookup)


@pytest.mark.parametrize("family", OBSERVED)
@torch.no_grad()
def test_bare_forwards_equal_generate(models, family: str) -> None:
    """A prompt and decode steps by plain calls, without position ids."""
    model, inputs = models(family), batch(family, [1])
    with foveate.reduced(model, BOTH):
        expected = logits_of(model, inputs)
        del inputs["attention_mask"]
        out = model(**inputs, use_cache=True)
        got = [out.logits[:, -1]]
        for _ in range(3):
            token = got[-1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            got.append(out.logits[:, -1])
    assert torch.allclose(torch.stack(got, 1), expected, atol=2e-6)


@torch.no_grad()
def test_right_padding_equals_left_padding(models) -> None:
    model, left = models("llava"), batch("llava", [1, 1])
    left["input_ids"][0, :3], left["attention_mask"][0, :3] = tiny.PAD, 0
    right = {**left}
    for name in ("input_ids", "attention_mask"):
        right[name] = left[name].clone()
        right[name][0] = left[name][0].roll(-3)
    with foveate.reduced(model, BOTH):
        positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        a = model(**left, position_ids=positions).logits[:, -1]
        positions = (right["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        b = model(**right, position_ids=positions).logits[:, -1]
    assert torch.allclose(a, b, atol=2e-6)


@torch.no_grad()
def test_a_second_image_in_a_later_turn(models) -> None:
    """Turn two brings an image of its own; the cache of turn one is kept as it was reduced."""
    model = models("llava")
    first, second = batch("llava", [1]), batch("llava", [1], seed=40)
    with foveate.reduced(model, BOTH) as report:
        cache = model(**first, use_cache=True).past_key_values
        held = [layer.get_seq_length() for layer in cache.layers]
        out = model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            past_key_values=cache,
            use_cache=True,
        )
        rows = [sum(rows) for rows in report.rows]
    now = [layer.get_seq_length() for layer in out.past_key_values.layers]
    assert now == [h + r for h, r in zip(held, rows, strict=True)]
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself(models) -> None:
    """Prefix reuse: a deep copy of a reduced cache answers as the original does."""
    model, inputs = models("llava"), batch("llava", [1])
    step = torch.tensor([[7]])
    with foveate.reduced(model, BOTH):
        cache = model(**inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        model(input_ids=step, past_key_values=cache)
        a = model(input_ids=step, past_key_values=cache).logits
        model(input_ids=step, past_key_values=twin)
        b = model(input_ids=step, past_key_values=twin).logits
    assert torch.equal(a, b)


def test_two_models_in_two_threads_never_meet(models) -> None:
    names = ["llava", "internvl"]
    alone = {}
    for name in names:
        with foveate.reduced(models(name), BOTH):
            alone[name] = logits_of(models(name), batch(name, [2, 1]))
    found: dict[str, Any] = {}

    def work(name: str) -> None:
        with foveate.reduced(models(name), BOTH):
            found[name] = [logits_of(models(name), batch(name, [2, 1])) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert all(torch.allclose(got, alone[name], atol=1e-6) for got in found[name])


def test_one_model_in_two_threads_one_after_the_other(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    found: list[Any] = []
    with foveate.reduced(model, BOTH):
        for _ in range(2):
            thread = threading.Thread(target=lambda: found.append(logits_of(model, inputs)))
            thread.start()
            thread.join()
    assert torch.equal(found[0], found[1])


@torch.no_grad()
def test_the_report_counts_what_happened(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    with foveate.reduced(model, foveate.recipe("fastv", keep=0.5)) as report:
        assert "No prompt" in str(report)
        out = model(**inputs, use_cache=True)
        said = report.to_dict()
    assert said["alive"] == [[36], [36], [18], [18], [18], [18]]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert said["kv_bytes"] == held
    assert said["dense_kv_bytes"] == held * 6 * 45 // (2 * 45 + 4 * 27)
    assert said["flops"] < said["dense_flops"]
    assert said["reduce_ms"] > 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_watch_sees_what_attention_used(family: str) -> None:
    """Scores from the watched q and k equal the eager model's own attention weights."""
    model, inputs = tiny.FAMILIES[family].build(), batch(family, [2, 1])
    seen: dict[str, Tokens] = {}

    @dataclass(frozen=True)
    class Spy(Scorer):
        needs_attention = True
        site = "layers"

        def score(self, tokens: Tokens) -> torch.Tensor:
            seen["tokens"] = tokens
            return tokens.x.norm(dim=-1)

    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[1]
    model = tiny.FAMILIES[family].build()  # the same, with the kernel that it has of itself
    with foveate.reduced(model, Recipe(Schedule.step(0.5), layers=Spy())):
        model(**inputs)
    tokens = seen["tokens"]
    heads = tokens.q.shape[1] // tokens.k.shape[1]
    keys = tokens.k.repeat_interleave(heads, 1)
    scores = tokens.q @ keys.transpose(-1, -2) * tokens.scale
    if (cap := getattr(model.config.get_text_config(), "attn_logit_softcapping", None)) is not None:
        scores = cap * torch.tanh(scores / cap)  # methods rank by what is before the cap
    rows = tokens.rows[:, None, None, :] & torch.ones(scores.shape[-2:]).bool().tril()
    last = scores.masked_fill(~rows, -torch.inf).softmax(-1)[:, :, -1]
    assert torch.allclose(last, weights[:, :, -1], atol=1e-6)
    vision = torch.isin(inputs["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    for b in range(2):
        assert torch.equal(tokens.at[b][tokens.valid[b]], vision[b].nonzero()[:, 0])


@torch.no_grad()
def test_a_bf16_model_works(models) -> None:
    for family in OBSERVED:
        model = tiny.FAMILIES[family].build().to(torch.bfloat16)
        inputs = batch(family, [2, 0, 1])
        with foveate.reduced(model, BOTH):
            assert logits_of(model, inputs).isfinite().all()


@torch.no_grad()
def test_the_encoder_gets_what_it_always_gets(models) -> None:
    """Encoders of other packages take no argument that they do not know."""
    model, inputs, given = models("llava"), batch("llava", [1]), []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(sorted(kwargs)), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=1)
    with foveate.reduced(model, BOTH):
        model.generate(**inputs, max_new_tokens=1)
    hook.remove()
    assert given[0] == given[1]


# What is refused


def test_attach_twice_and_detach_twice(models) -> None:
    model = models("llava")
    foveate.attach(model, BOTH)
    with pytest.raises(ValueError, match=r"already has a recipe.*foveate\.detach"):
        foveate.attach(model, BOTH)
    foveate.detach(model)
    with pytest.raises(ValueError, match="no recipe attached"):
        foveate.detach(model)


def test_an_unknown_model_type() -> None:
    with pytest.raises(ValueError, match=r"model type 'Linear'.*llava"):
        foveate.attach(torch.nn.Linear(1, 1), BOTH)


def test_a_recipe_for_another_depth(models) -> None:
    with pytest.raises(ValueError, match="28 layers and this one has 6"):
        foveate.attach(models("llava"), Recipe(Schedule([1.0] * 28)))


def test_a_recipe_for_another_model(models) -> None:
    other = Recipe(Schedule([1.0] * 6), provenance={"model_type": "qwen2_5_vl"})
    with pytest.raises(ValueError, match="made for 'qwen2_5_vl' and this model is 'llava'"):
        foveate.attach(models("llava"), other)


def test_chunked_prefill(models) -> None:
    model = models("llava")
    with foveate.reduced(model, BOTH), pytest.raises(ValueError, match="prefill_chunk_size=8"):
        model.generate(**batch("llava", [1]), max_new_tokens=1, prefill_chunk_size=8)


def test_embeddings_without_ids(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with foveate.reduced(model, BOTH), pytest.raises(ValueError, match="Pass input_ids"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])


def test_a_window_shorter_than_the_prompt() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = tiny.text_config(
        "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0
    )
    config = LlavaConfig(
        vision_config=tiny._clip("clip_vision_model"),
        text_config=text,
        image_token_index=tiny.IMAGE,
    )
    model = tiny._ready(LlavaForConditionalGeneration(config))
    with (
        foveate.reduced(model, BOTH),
        pytest.raises(ValueError, match="layers of 16 rows"),
    ):
        model(**batch("llava", [1]))
