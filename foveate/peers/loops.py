"""Loops, as PruMerge's released code: a Python loop over images and kept tokens. arXiv 2403.15388.

For every kept token the others are collected, compared with it, and its nearest added to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

import foveate
from foveate.ops.prumerge import Image
from foveate.peers.peer import Peer
from foveate.recipe import Recipe
from foveate.reducer import Reduction
from foveate.reducers.prumerge import PruMerge
from foveate.reducers.prumerge_plus import PruMergePlus
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
    method = cast(PruMerge, recipe.entrance)
    looped = {"prumerge": _PruMerge, "prumerge+": _PruMergePlus}[method.name]
    with foveate.reduced(model, replace(recipe, entrance=looped(**method.knobs()))) as report:
        yield report


class _PruMerge(PruMerge):
    """PruMerge whose merge is a loop."""

    def merged(self, image: Image, kept: Tensor, count: Tensor, extra: bool) -> Reduction:
        return merge(image, kept, count, self.neighbours, extra)


class _PruMergePlus(_PruMerge, PruMergePlus):
    """PruMerge+ with the same loop."""


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
