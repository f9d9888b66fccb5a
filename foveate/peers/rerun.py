"""Rerun, as FastV's ports: the layer that ranks runs a second time, eagerly, for its attention map.

Fast kernels give no attention map, so these ports call the layer before the cut once more with
``output_attentions``. arXiv 2403.06764. The rows are then dropped as foveate drops them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import foveate
from foveate.adapter import family
from foveate.peers.peer import Peer
from foveate.peers.prefill import additive, eager, instead
from foveate.recipe import Recipe
from foveate.reducer import Scorer, Tokens
from foveate.reducers.fastv import FastV
from foveate.report import Report


def serves(recipe: Recipe) -> bool:
    return recipe.layers is not None and recipe.layers.name == FastV.name


@dataclass
class _Map:
    """What the second run saw: attention of the last row, mean over heads, ``(B, L)``."""

    last: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class _ByMap(Scorer):
    """FastV on a map that somebody else made."""

    name: ClassVar[str] = "fastv"
    site: ClassVar[str] = "layers"
    needs_attention: ClassVar[bool] = True  # only for `at`, the rows of the vision tokens

    seen: _Map

    def score(self, tokens: Tokens) -> Tensor:
        return self.seen.last.gather(1, cast(Tensor, tokens.at))


@contextmanager
def reduced(model: nn.Module, recipe: Recipe) -> Iterator[Report]:
    """As ``foveate.reduced``.

    Raises:
        ValueError: for a schedule with no cut inside the LLM, or several.
    """
    layers = cast(nn.ModuleList, family(model).text(model).layers)
    cuts = recipe.schedule.resolve(len(layers)).cuts()
    if len(cuts) != 1:
        raise ValueError(
            f"The peer rerun cuts once inside the LLM and the schedule falls before the layers "
            f"{cuts}; give one keep below 1, such as --recipe fastv:keep=0.5."
        )
    seen, again = _Map(), layers[cuts[0] - 1]
    with foveate.reduced(model, replace(recipe, layers=_ByMap(seen))) as report:

        def rerun(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            rows, cache = args[0].shape[1], kwargs.get("past_key_values")
            held = rows if cache is None else int(cache.layers[cuts[0] - 1].get_seq_length())
            if held != rows:  # decoding
                return
            mask = additive(kwargs.get("attention_mask"), rows, rows, args[0])
            given = {**kwargs, "attention_mask": mask, "past_key_values": None, "use_cache": False}
            with report.clock(args[0].device), instead(cast(nn.Module, again.self_attn), attend):
                module.forward(*args, **given)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **more: Any
        ) -> tuple[Tensor, Tensor]:
            out, weights, _ = eager(query, key, value, mask, more["scaling"])
            seen.last = weights.mean(1)[:, -1]
            return out, weights

        handle = again.register_forward_hook(rerun, with_kwargs=True)
        try:
            yield report
        finally:
            handle.remove()


RERUN = Peer(
    name="rerun",
    what="fastv, which ranks once",
    example="fastv",
    serves=serves,
    reduced=reduced,
)
