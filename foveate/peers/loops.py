"""Loops, as PruMerge's released code: a Python loop over images and kept tokens. arXiv 2403.15388.

For every kept token the others are collected, compared with it, and its nearest added to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

import foveate
from foveate.ops.prumerge import Image, look
from foveate.ops.rows import full, nothing, one_budget, unchanged
from foveate.peers.peer import Peer
from foveate.recipe import Recipe
from foveate.reducer import Reducer, Reduction, Tokens
from foveate.reducers.prumerge import PruMerge
from foveate.report import Report


def serves(recipe: Recipe) -> bool:
    method = recipe.entrance
    if method is None or method.name not in ("prumerge", "prumerge+"):
        return False
    knobs = method.knobs()
    return bool(knobs["weights"] == "released" and knobs["order"] == "attention")


@contextmanager
def reduced(model: nn.Module, recipe: Recipe) -> Iterator[Report]:
    """As ``foveate.reduced``."""
    method = _Looped(cast(PruMerge, recipe.entrance))
    with foveate.reduced(model, replace(recipe, entrance=method)) as report:
        yield report


@dataclass(frozen=True)
class _Looped(Reducer):
    """PruMerge whose merge is a loop; it chooses as ``method`` does."""

    name: ClassVar[str] = "prumerge"
    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    method: PruMerge

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        size = tokens.x.shape[1]
        wanted = None if budget is None else one_budget(self.name, budget)
        if wanted == 0:
            return nothing(tokens)
        if wanted == size or size == 1:
            return unchanged(tokens)
        image, extra = look(self.name, tokens), self.method.extra and wanted != 1
        if wanted is None:
            kept, count = self.method.adapted(image.attn)
        else:
            kept = self.method.chosen(image.attn, wanted - int(extra))
            count = full(*kept.shape)
        return merge(image, kept, count, self.method.neighbours, extra)


def merge(
    image: Image, kept: Tensor, count: Tensor, neighbours: int = 32, extra: bool = True
) -> Reduction:
    """Image by image, token by token.

    Args:
        image: the images.
        kept: ``(B, M)`` long, distinct slots.
        count: ``(B,)`` long, how many of them count.
        neighbours: tokens added to each.
        extra: append the sum of the pruned tokens.
    """
    keep, merged = [], []
    for b, number in enumerate(count.tolist()):
        slots, vectors = _one(image, b, kept[b, :number], neighbours, extra)
        keep.append(slots)
        merged.append(vectors)
    x = pad_sequence(merged, batch_first=True).to(image.x.dtype)
    return Reduction(pad_sequence(keep, batch_first=True), count + int(extra), x)


def _one(image: Image, b: int, kept: Tensor, neighbours: int, extra: bool) -> tuple[Tensor, Tensor]:
    """The slots and vectors of one image."""
    attn = image.attn[b]
    x, unit = image.x[b].to(attn.dtype), normalize(image.keys[b].to(attn.dtype), dim=-1)
    pruned = torch.ones_like(attn, dtype=torch.bool)
    pruned[kept] = False
    rest = pruned.nonzero()[:, 0]
    made = []
    for place in range(len(kept)):
        own = kept[place]
        others = torch.cat((kept[:place], kept[place + 1 :], rest))
        similar = unit[others] @ unit[own]
        near = others[similar.topk(min(neighbours, len(others))).indices]
        made.append(x[own] + (attn[near, None] * x[near]).sum(0))
    if extra:
        made.append((attn[rest, None] * x[rest]).sum(0))
        kept = torch.cat((kept, rest[-1:]))
    return kept, torch.stack(made)


LOOPS = Peer(
    name="loops",
    what="prumerge and prumerge+ as released (weights=released, order=attention)",
    example="prumerge",
    serves=serves,
    reduced=reduced,
)
