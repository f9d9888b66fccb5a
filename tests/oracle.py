"""The oracle: dropping rows must equal masking them.

The untouched text model runs on the whole prompt, with every row that the report calls gone hidden
by a 4-D mask, layer by layer; and with the survivors' vectors where a method blended some.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.adapter import family


@dataclass(frozen=True)
class Run:
    """One reduced generation: logits (B, steps, V), tokens (B, steps) and what the report said.

    ``entered`` are the rows that the text model got, ``deepstack`` what it was to add to vision
    rows later on. ``blended``: the rows (B, rows, D) that a method made new before a layer,
    NaN elsewhere.
    """

    logits: Tensor
    tokens: Tensor
    slots: list[list[Tensor]]
    entered: Tensor
    cache: Any
    deepstack: Any = None
    blended: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def spying(module: Any, store: dict[str, Any], *, first: bool = False):
    """Keep the arguments of a module's first call; ``first``: as they are before a session."""

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        if not store:
            store.update(kwargs, args=args)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def blending(model: Any):
    """Inside a session: the rows of the first prompt that are new before a layer, by layer."""
    before: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(family(model).text(model).layers):
        hooks += [
            layer.register_forward_pre_hook(partial(_came, before, index), prepend=True),
            layer.register_forward_pre_hook(partial(_left, before, made, index)),
        ]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def _came(before: dict[int, Tensor], index: int, _: Any, args: Any) -> None:
    if index not in before:
        before[index] = args[0]


def _left(
    before: dict[int, Tensor], made: dict[int, Tensor], index: int, _: Any, args: Any
) -> None:
    """Compare with every row that came; later calls (decoding) find nothing to compare with."""
    came, before[index] = before[index], args[0][:, :0]
    same = (args[0][:, :, None] == came[:, None]).all(-1).any(-1)
    if came.shape[1] and not bool(same.all()):
        made[index] = args[0].masked_fill(same[..., None], torch.nan)


@contextmanager
def entering(model: Any, store: dict[str, Any]):
    """Inside a session: keep the rows that the text model gets, and its deepstack features."""
    text, early, late = family(model).text(model), {}, {}
    with spying(text, early, first=True), spying(text, late), blending(model) as blended:
        yield
    store["blended"] = blended
    store["entered"] = late["inputs_embeds"]
    store["deepstack"] = early.get("deepstack_visual_embeds")


@torch.no_grad()
def reduced_run(
    model: Any, recipe: foveate.Recipe, inputs: dict[str, Any], steps: int, **more: Any
) -> Run:
    first: dict[str, Any] = {}
    with foveate.reduced(model, recipe) as report, entering(model, first):
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
        slots = report.slots
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    return Run(torch.stack(out.logits, 1), tokens, slots, cache=out.past_key_values, **first)


@torch.no_grad()
def masked_logits(model: Any, inputs: dict[str, Any], run: Run) -> Tensor:
    """Logits (B, steps, V) of the masked dense model, the run's tokens given."""
    dense: dict[str, Any] = {}
    with spying(family(model).text(model), dense):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    hidden = _masked(model, dense, dense["position_ids"], run)
    return _head(model, hidden[:, dense["inputs_embeds"].shape[1] - 1 :])


def _head(model: Any, hidden: Tensor) -> Tensor:
    logits = model.lm_head(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def masked_loss(model: Any, inputs: dict[str, Any], labels: Tensor, run: Run) -> Tensor:
    """The summed loss of the masked dense model: each row alive predicts the next one alive."""
    dense: dict[str, Any] = {}
    with torch.no_grad(), spying(family(model).text(model), dense):
        model(**inputs)
    embeds, positions = dense["inputs_embeds"], dense["position_ids"]
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    if positions.ndim == 2:
        positions = positions.expand(len(embeds), -1)
    logits = _head(model, _masked(model, dense, positions, run))
    total = logits.new_zeros(())
    for b, alive in enumerate(run.slots[-1]):
        for row, following in itertools.pairwise(alive.tolist()):
            if labels[b, following] != -100:
                total = total - logits[b, row].log_softmax(-1)[labels[b, following]]
    return total


def forward_run(model: Any, recipe: foveate.Recipe, inputs: dict[str, Any]) -> Run:
    """One plain forward of a prompt, nothing generated."""
    first: dict[str, Any] = {}
    with torch.no_grad(), foveate.reduced(model, recipe) as report, entering(model, first):
        out = model(**inputs)
    return Run(out.logits, inputs["input_ids"][:, :0], report.slots, cache=None, **first)


def _masked(model: Any, dense: dict[str, Any], positions: Tensor, run: Run) -> Tensor:
    """Hidden rows (B, L + steps - 1, D) of the dense model that sees only what the run left.

    ``dense`` are the text model's arguments when nothing is reduced.
    """
    adapter = family(model)
    text, embeds = adapter.text(model), dense["inputs_embeds"].clone()
    new = run.tokens[:, :-1]
    batch, length = embeds.shape[:2]
    for b, slots in enumerate(run.slots[0]):
        embeds[b, slots] = run.entered[b, run.entered.shape[1] - len(slots) :]
    positions = _positions(positions, run, adapter.positions, new.shape[1])
    hidden = torch.cat([embeds, model.get_input_embeddings()(new)], 1)
    seen = _seen(dense.get("attention_mask"), length)
    masks = [_mask(slots, batch, seen, new.shape[1], hidden.dtype) for slots in run.slots]
    more = {}
    if (where := dense.get("visual_pos_masks")) is not None:
        more["visual_pos_masks"] = torch.nn.functional.pad(where, (0, new.shape[1]))
        more["deepstack_visual_embeds"] = run.deepstack

    def use(index: int):
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            rows = _blended(args[0], run.blended.get(index), run.slots[index])
            return (rows, *args[1:]), {**kwargs, "attention_mask": masks[index]}

        return hook

    hooks = [
        layer.register_forward_pre_hook(use(i), with_kwargs=True)
        for i, layer in enumerate(text.layers)
    ]
    try:
        out = text(
            inputs_embeds=hidden,
            position_ids=positions,
            attention_mask=masks[0],
            use_cache=False,
            **more,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return out.last_hidden_state


def _blended(hidden: Tensor, made: Tensor | None, slots: list[Tensor]) -> Tensor:
    """``hidden`` with the rows that a method made new put where it put them."""
    hidden = hidden.clone()
    for b, own in enumerate(slots if made is not None else ()):
        rows = made[b, made.shape[1] - len(own) :]  # type: ignore[index]
        new = ~rows[:, 0].isnan()
        hidden[b, own[new]] = rows[new]
    return hidden


def _positions(positions: Tensor, run: Run, policy: str, new: int) -> Tensor:
    positions = positions.clone()
    if policy == "compact":
        for b, slots in enumerate(run.slots[0]):
            positions[b, slots] = torch.arange(len(slots))
    after = positions[..., -1:] + 1 + torch.arange(new)
    return torch.cat([positions, after], -1)


def _seen(mask: Any, length: int) -> Tensor:
    """Who sees whom in the dense model, (B or 1, 1, L, L) bool, apart from padding."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    if mask is None or mask.ndim == 2:
        return causal
    return causal | (mask if mask.dtype == torch.bool else mask == 0)


def _mask(slots: list[Tensor], batch: int, seen: Tensor, new: int, dtype: torch.dtype) -> Tensor:
    length = seen.shape[-1]
    alive = torch.zeros(batch, length + new, dtype=torch.bool)
    alive[:, length:] = True
    for b, own in enumerate(slots):
        alive[b, own] = True
    total = length + new
    causal = torch.ones(total, total, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    causal[:, :, :length, :length] = seen
    allowed = causal & alive[:, None, None, :] | torch.eye(total, dtype=torch.bool)
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@torch.no_grad()
def entered_again(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What enters the text model under the session that is open, as :class:`Run` has it."""
    first: dict[str, Any] = {}
    with entering(model, first):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return first
