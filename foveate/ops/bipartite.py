"""Bipartite matching of tokens and merging of the pairs, in rounds.

The match of AIM (arXiv 2412.03248), which is that of ToMe (arXiv 2210.09461) without its token
sizes: even tokens are sources, odd ones destinations; each source finds its most similar
destination; the r most similar sources are merged into theirs. Decided from one tensor, done to any
number of others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops.rows import add, slots, take

ORDERS = ("released", "raster")


@dataclass(frozen=True)
class Match:
    """Who goes into whom in one round that turns T tokens into T - r.

    Attributes:
        keep: ``(B, T - r)`` long, the place (0..T-1) of each survivor, in their new order.
        source: ``(B, r)`` long, the places that are merged away.
        into: ``(B, r)`` long, the survivor (0..T-r-1) each of them goes into.
        group: ``(B, T)`` long, the survivor that each place goes into.
    """

    keep: Tensor
    source: Tensor
    into: Tensor
    group: Tensor


def match(metric: Tensor, r: int, order: str = "released") -> Match:
    """Decide one round.

    Args:
        metric: ``(B, T, C)``, compared by cosine in float32 (a zero vector is similar to none).
        r: pairs to merge, clamped to T // 2; 0 or less leaves everything as it is.
        order: ``released``: sources left over by descending similarity, then the destinations, as
            the released code has it; ``raster``: ascending places.
    """
    size = metric.shape[1]
    r = min(r, size // 2)
    if r <= 0:
        place = slots(metric)
        return Match(keep=place, source=place[:, :0], into=place[:, :0], group=place)
    unit = normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    best, nearest = (unit[:, 0::2] @ unit[:, 1::2].mT).max(dim=-1)
    rank = best.argsort(dim=-1, descending=True, stable=True)
    source, left = 2 * rank[:, :r], 2 * rank[:, r:]
    keep = torch.cat((left, slots(metric)[:, 1::2]), dim=1)
    if order == "raster":
        keep = keep.sort(dim=-1).values
    group = torch.zeros_like(slots(metric)).scatter(1, keep, slots(keep))
    into = group.gather(1, 2 * nearest.gather(1, rank[:, :r]) + 1)
    return Match(keep=keep, source=source, into=into, group=group.scatter(1, source, into))


def merge(matched: Match, x: Tensor) -> Tensor:
    """Do one round: each survivor is the plain mean of itself and all that went into it.

    Not weighted by the number of tokens that those already stand for, as in the released code.

    Args:
        matched: the decision for T tokens.
        x: ``(B, T, D)``; the mean is taken in its dtype.

    Returns:
        ``(B, T - r, D)``.
    """
    total = add(take(x, matched.keep), matched.into, take(x, matched.source))
    ones = torch.ones(matched.keep.shape, dtype=x.dtype, device=x.device)
    count = ones.scatter_add(1, matched.into, torch.ones_like(matched.into, dtype=x.dtype))
    return total / count.unsqueeze(-1)


def merge_to(
    x: Tensor, metric: Tensor | None, budget: int, order: str = "released"
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of matching and merging down to ``budget`` tokens; each halves at most.

    Args:
        x: ``(B, N, D)``.
        metric: ``(B, N, C)``, merged along with x from round to round; None compares x itself.
        budget: 1..N.
        order: as in :func:`match`.

    Returns:
        The merged vectors ``(B, K, D)``; ``keep`` (B, K), the slot of each, which is its last
        destination's; ``group`` (B, N), the survivor that each token went into.
    """
    keep = group = slots(x)
    while x.shape[1] > budget:
        matched = match(x if metric is None else metric, x.shape[1] - budget, order)
        x = merge(matched, x)
        metric = None if metric is None else merge(matched, metric)
        keep = keep.gather(1, matched.keep)
        group = matched.group.gather(1, group)
    return x, keep, group
