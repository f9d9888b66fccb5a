"""What every method must hold to, for methods of other packages: no tests folder is needed.

The repository's own tests ask the same and more, on every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.recipe import Recipe
from foveate.reducer import Reducer, Reduction, Tokens, reducer
from foveate.schedule import Schedule

_SIZE, _FRAMES, _TEXT = 28, 4, 3
_IMAGE, _PATCHES, _LAYERS, _KEEP = 90, 36, 4, 0.4


def faults(name: str) -> list[str]:
    """In what the method ``name`` breaks the contract; empty when it holds it.

    Asked are tensors of its site (budgets met without duplicates, zero vectors or NaN, keeping all
    as identity, a batch as its groups one by one), and a tiny LLaVA built in process (tokens alive,
    a padded batch as its samples one by one, text alone and the model after it untouched).
    """
    method = reducer(name)
    asked: list[Callable[[Reducer], Iterator[str]]] = [_budgets, _identity, _batches]
    if method.site == "pixels":
        asked = []
    found = [said for ask in asked for said in _caught(ask, method)]
    return found + ([] if method.video else _caught(_in_a_model, method))


def _caught(ask: Callable[[Reducer], Iterator[str]], method: Reducer) -> list[str]:
    """The faults; an exception is one."""
    said: list[str] = []
    try:
        said.extend(ask(method))
    except Exception as error:
        said.append(f"{ask.__name__.strip('_').replace('_', ' ')}: {type(error).__name__}: {error}")
    return said


# Tensors


def _tokens(method: Reducer, groups: int, dtype: torch.dtype = torch.float32) -> Tokens:
    """Groups of 28 tokens in rows of 7, as the method's site has them."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(groups, *shape, generator=draw).to(dtype)

    inside = method.site == "layers"
    rows = _SIZE + (2 + _TEXT if inside else 1)
    first = 2 if inside else 1
    entered = torch.zeros(groups, rows, dtype=torch.bool)
    entered[:, first : first + _SIZE] = True
    seen = Tokens(
        x=random(_SIZE, 6),
        valid=torch.ones(groups, _SIZE, dtype=torch.bool),
        q=random(4, rows, 8),
        k=random(2 if inside else 4, rows, 8),
        at=torch.arange(first, first + _SIZE).expand(groups, -1),
        rows=torch.ones(groups, rows, dtype=torch.bool),
        scale=8**-0.5,
        causal=inside,
        hidden=random(rows, 6) if inside else None,
        embeds=random(rows, 6) if inside else None,
        entered=entered if inside else None,
        instruction=(_TEXT,) * groups if inside else None,
        middle=None if inside else (random(4, rows, 8), random(4, rows, 8)),
    )
    if inside:
        return seen
    return replace(seen, cls=0, grid=(4, 7), frames=_FRAMES if method.video else None)


def _budgets(method: Reducer) -> Iterator[str]:
    for dtype in (torch.float32, torch.bfloat16):
        for wanted in (1, 2, 13, _SIZE - 1):
            tokens = _tokens(method, 2, dtype)
            done = method.reduce(tokens, [wanted] * 2)
            for fault in _wrong(done, tokens, wanted):
                yield f"asked for {wanted} of {_SIZE} tokens in {dtype}, {fault}"


def _wrong(done: Reduction, tokens: Tokens, wanted: int) -> Iterator[str]:
    if done.count.tolist() != [wanted] * 2 or done.keep.shape != (2, wanted):
        yield f"it gives {done.count.tolist()}, keep is {tuple(done.keep.shape)}"
        return
    for keep in done.keep.tolist():
        if len(set(keep)) < wanted or not all(0 <= slot < _SIZE for slot in keep):
            yield f"it keeps the slots {keep}, which must differ and lie in 0..{_SIZE - 1}"
    if done.x is None:
        return
    if done.x.shape != (2, wanted, tokens.x.shape[2]) or done.x.dtype != tokens.x.dtype:
        yield f"its vectors are {tuple(done.x.shape)} in {done.x.dtype}"
    elif not bool(done.x.isfinite().all()) or bool((done.x == 0).all(dim=-1).any()):
        yield "some of its vectors are not finite or zero"


def _identity(method: Reducer) -> Iterator[str]:
    done = method.reduce(_tokens(method, 2), [_SIZE] * 2)
    if done.x is not None or not torch.equal(done.keep, torch.arange(_SIZE).expand(2, -1)):
        yield "keeping all tokens changes them or their order"


def _batches(method: Reducer) -> Iterator[str]:
    tokens = _tokens(method, 3)
    done = method.reduce(tokens, [11] * 3)
    for b in range(3):
        alone = method.reduce(_one(tokens, b), [11])
        same = torch.equal(alone.keep[0], done.keep[b])
        if same and done.x is not None and alone.x is not None:
            same = torch.allclose(alone.x[0], done.x[b], atol=1e-5)
        if not same:
            yield f"group {b} of a batch is reduced in another way when it is alone"


def _one(tokens: Tokens, b: int) -> Tokens:
    given = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    cut: dict[str, Any] = {n: v[b : b + 1] for n, v in given.items() if isinstance(v, Tensor)}
    if tokens.middle is not None:
        cut["middle"] = tuple(part[b : b + 1] for part in tokens.middle)
    return replace(tokens, **cut, instruction=tokens.instruction and (_TEXT,))


# A model


def _in_a_model(method: Reducer) -> Iterator[str]:
    model = _llava()
    if method.site == "layers":
        recipe = Recipe(Schedule.step(_KEEP, before=2), layers=method)
    else:
        recipe = Recipe(Schedule.flat(_KEEP), entrance=method)
    images = [2, 0, 1]
    inputs = _prompt(images)
    with torch.no_grad():
        before, text = model(**inputs).logits, model(**_prompt([0])).logits
        with foveate.reduced(model, recipe) as report:
            together = model(**inputs).logits[:, -1]
            alive = list(report.alive[-1])
            if not torch.equal(model(**_prompt([0])).logits, text):
                yield "a prompt without an image does not pass untouched"
            singles = [model(**_prompt([n])).logits[0, -1] for n in images]
        after = model(**inputs).logits
    share = int(_PATCHES * _KEEP)
    wanted = [n * share if method.site != "layers" else int(n * _PATCHES * _KEEP) for n in images]
    exact = method.site != "pixels"  # else the largest grid within the budget
    if any(a > w or (exact and a < w) for a, w in zip(alive, wanted, strict=True)):
        yield f"in a model {alive} vision tokens are alive where {wanted} were asked for"
    for n, one, mine in zip(images, singles, together, strict=True):
        if not torch.allclose(one, mine, atol=1e-4):
            yield f"a sample with {n} images answers otherwise in a batch than alone"
    if not torch.equal(before, after):
        yield "the model is another one after the session"


def _llava() -> Any:
    """A LLaVA of 36 vision tokens and random weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}
    text = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": _LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=_IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15, generator=draw)
    return model


def _prompt(images: list[int]) -> dict[str, Tensor]:
    """A left-padded batch; what sample b holds follows from its number of images."""
    rows = [[4, *[_IMAGE] * (n * _PATCHES), 5 + n, 6, 7] for n in images]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if any(images):
        pixels = [
            torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(n)) for n in images
        ]
        inputs["pixel_values"] = torch.cat(pixels)
    return inputs
