"""Masking, as AIM's released code: pruned rows stay and are hidden. arXiv 2412.03248.

Attention is eager, and every layer makes an N × N importance map of every head at prefill, whether
or not the schedule falls there: about four H·N² arrays live at once. No row is removed, so later
layers and the cache are as long as ever. Merging at the entrance removes rows there as here.

Where that code and foveate define things differently, foveate is followed, so that outputs can be
compared: pruned rows do not vote, every sample of a batch has its own count, and decoding hides
what the prompt hid (the released code overwrites the caller's mask instead).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import foveate
from foveate.adapter import family
from foveate.peers.peer import Peer
from foveate.peers.prefill import Prefill, additive, eager, instead, watched
from foveate.recipe import Recipe
from foveate.reducers.pagerank import PageRank
from foveate.report import Report
from foveate.schedule import Schedule


def serves(recipe: Recipe) -> bool:
    return recipe.layers is not None and recipe.layers.name == PageRank.name


@contextmanager
def reduced(model: nn.Module, recipe: Recipe) -> Iterator[Report]:
    """As ``foveate.reduced``; the report tells the rows that layers work on: none is removed."""
    text = family(model).text(model)
    layers = cast(nn.ModuleList, text.layers)
    schedule = recipe.schedule.resolve(len(layers))
    flat = Schedule((schedule.alive[0],) * len(layers), adaptive=schedule.adaptive)
    entrance = replace(recipe, schedule=flat, layers=None)
    with foveate.reduced(model, entrance) as report, watched(model, report) as prefill:
        run = _Run(prefill, schedule, cast(PageRank, recipe.layers), report)
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                before = partial(run.before, index)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                attention = cast(nn.Module, layer.self_attn)
                stack.enter_context(instead(attention, run.attend))
            yield report


@dataclass
class _Run:
    """One prompt, layer by layer.

    Attributes:
        alive: ``(B, rows)`` bool, rows that are neither padding nor hidden yet.
        left: vision tokens not hidden yet, of each sample.
        hidden: of each layer, what was alive; decoding needs it.
        importance: ``(B, rows)``, of the layer before.
    """

    prefill: Prefill
    schedule: Schedule
    method: PageRank
    report: Report
    alive: Tensor = field(default_factory=lambda: torch.empty(0))
    left: list[int] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    importance: Tensor = field(default_factory=lambda: torch.empty(0))

    def before(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hide what the schedule no longer keeps from this layer's queries."""
        rows, cache = args[0].shape[1], kwargs.get("past_key_values")
        if self.prefill.running:
            if index == 0:
                self.alive = self.prefill.real
                self.left = self.prefill.vision.sum(-1).tolist()
            elif index in self.schedule.cuts():
                with self.report.clock(args[0].device):
                    self._hide(index)
            self.hidden[index] = self.alive
        past = 0 if cache is None else int(cache.layers[index].get_seq_length())
        mask = additive(kwargs.get("attention_mask"), rows, past + rows, args[0])
        seen = nn.functional.pad(
            self.hidden[index], (0, past + rows - self.hidden[index].shape[1]), value=True
        )
        low = torch.finfo(mask.dtype).min
        mask = torch.where(seen[:, None, None], mask, low)
        return args, {**kwargs, "attention_mask": mask}

    def _hide(self, layer: int) -> None:
        """Keep text and the most important vision rows: one sort over all rows."""
        wanted = [
            min(now, self.schedule.count(layer, n))
            for now, n in zip(self.left, self.prefill.original, strict=True)
        ]
        text = self.prefill.real & ~self.prefill.vision
        score = self.importance.masked_fill(text, 1.0).masked_fill(~self.alive, -1.0)
        order = score.argsort(dim=-1, descending=True, stable=True)
        count = text.sum(-1) + torch.tensor(wanted, device=text.device)
        kept = torch.arange(order.shape[1], device=text.device) < count[:, None]
        self.alive = torch.zeros_like(self.alive).scatter(1, order, kept) & self.alive
        self.left = wanted

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        *,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Eager attention; over a prompt, the importance of its rows as well."""
        out, _, logits = eager(query, key, value, mask, scaling)
        if self.prefill.running:
            with self.report.clock(query.device):
                self.importance = importance(
                    logits,
                    temperature=self.method.temperature,
                    iterations=self.method.iterations,
                    damping=self.method.damping,
                    voters=self.alive,
                )
        return out, None


def importance(
    logits: Tensor,
    *,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    voters: Tensor | None = None,
) -> Tensor:
    """PageRank on a map that is written down: ``(B, H, N, N)`` masked logits to (B, N) float32.

    Args:
        logits: of attention, masked.
        temperature: divides them.
        iterations: power steps.
        damping: share of mass spread evenly in each step.
        voters: ``(B, N)`` bool, the rows that have mass at the start and pass it on; None means
            all, as in the released code.
    """
    sharp = (logits.float() / temperature).clamp(min=torch.finfo(torch.float32).min)  # not -inf
    matrix = sharp.softmax(dim=-1)
    vote = torch.ones_like(matrix[:, :1, :1]) if voters is None else voters[:, None, None].float()
    start = (vote / vote.sum(-1, keepdim=True)).expand(*matrix.shape[:2], 1, -1)
    mass = start
    for _ in range(iterations):
        mass = (mass * vote) @ matrix * (1 - damping) + damping * start
    return mass.squeeze(2).square().mean(1).sqrt()


MASKING = Peer(
    name="masking",
    what="recipes that rank by pagerank inside the LLM",
    example="aim",
    serves=serves,
    reduced=reduced,
)
