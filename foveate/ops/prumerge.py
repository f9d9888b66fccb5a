"""Merging of PruMerge (arXiv 2403.15388): pruned tokens are added to the kept ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from foveate.ops.attention import cls_attention, observed, one_head
from foveate.ops.rows import slots, sums, take
from foveate.reducer import Reduction, Tokens

WEIGHTS = ("released", "paper")
ORDERS = ("attention", "raster")


@dataclass(frozen=True)
class Image:
    """What the merge reads of each image.

    Attributes:
        x: the vectors, ``(B, N, D)``.
        keys: the encoder's last keys, heads side by side, ``(B, N, C)``.
        attn: attention of [CLS], ``(B, N)``.
    """

    x: Tensor
    keys: Tensor
    attn: Tensor


def look(name: str, tokens: Tokens) -> Image:
    """What method ``name`` reads of its tokens, by the encoder's last attention in one head."""
    q, k, at = observed(name, tokens)
    attn = cls_attention(q, k, at, tokens.cls, rows=tokens.rows)
    return Image(x=tokens.x, keys=one_head(k, at), attn=attn)


@dataclass(frozen=True)
class Rule:
    """How pruned tokens are merged; the knobs of the same names."""

    neighbours: int = 32
    weights: str = "released"
    extra: bool = True
    order: str = "attention"


def merge(image: Image, kept: Tensor, count: Tensor, rule: Rule) -> Reduction:
    """Keep some tokens, add to each its nearest neighbours, and append the sum of the pruned ones.

    The extra token's slot is the largest one not kept. A pruned token's group is the most similar
    survivor that took it as a neighbour, else the extra token, else -1; the token that lends the
    extra one its slot belongs to it.

    Args:
        image: the images.
        kept: ``(B, M)`` long, distinct slots in the order wanted.
        count: ``(B,)`` long on the CPU, how many of ``kept`` count; with ``rule.extra``, below N.
        rule: the knobs.

    Returns:
        ``count + extra`` survivors of each image.
    """
    size, width = image.x.shape[1], kept.shape[1]
    number = count.to(kept.device, non_blocking=True)[:, None]
    real = slots(kept) < number  # (B, M)
    chosen = torch.zeros_like(image.attn, dtype=torch.bool).scatter(1, kept, real)
    x, near = neighbourhood(image, kept, chosen, rule)
    best, group = near.masked_fill(~real[..., None], -torch.inf).max(dim=1)
    group = group.masked_fill(best == -torch.inf, -1)
    if rule.extra:
        x = torch.cat((x, leftover(image, chosen)), dim=1)
        spare = slots(image.x).masked_fill(chosen, -1).amax(dim=1, keepdim=True)
        # Row `count` and the padding after it show the extra token.
        row = slots(x)
        row = row.masked_fill(row >= number, width)
        x, keep = take(x, row), torch.cat((kept, spare), dim=1).gather(1, row)
        group = torch.where(group < 0, number, group)
    else:
        keep = kept
    # Whoever lends a survivor its slot is part of it; padding writes to a place that is cut off.
    home = keep.masked_fill(slots(keep) >= number + int(rule.extra), size)
    group = pad(group, (0, 1)).scatter(1, home, slots(keep))[:, :size]
    done = Reduction(keep=keep, count=count + int(rule.extra), x=x, group=group)
    return _raster(done, size) if rule.order == "raster" else done


def neighbourhood(image: Image, kept: Tensor, chosen: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Each kept token with its nearest neighbours (cosine of keys) added.

    ``released``: ``x_i + Σ_j a_j x_j`` over the nearest among ALL other tokens, not normalised, so
    that x_i weighs 1 and its neighbours about 1/N; every sum reads the original vectors. ``paper``:
    the average of x_i and the nearest pruned tokens, weighted by a.

    Args:
        image: the images.
        kept: ``(B, M)`` long.
        chosen: ``(B, N)`` bool, the tokens that are kept.
        rule: ``neighbours`` and ``weights``.

    Returns:
        ``(B, M, D)`` in x's dtype, and ``(B, M, N)``: the cosine with each neighbour taken, -inf
        elsewhere.
    """
    x, attn = image.x.to(image.attn.dtype), image.attn
    unit = normalize(image.keys.to(attn.dtype), dim=-1)
    similar = (take(unit, kept) @ unit.mT).scatter(-1, kept[..., None], -torch.inf)  # (B, M, N)
    if rule.weights == "paper":
        similar = similar.masked_fill(chosen[:, None], -torch.inf)
    nearest = similar.topk(min(rule.neighbours, x.shape[1] - 1), dim=-1)
    near = torch.full_like(similar, -torch.inf).scatter(-1, nearest.indices, nearest.values)
    weight = take(attn, nearest.indices.flatten(1)).view_as(nearest.indices)
    weight = weight.masked_fill(nearest.values == -torch.inf, 0)
    merged, added = take(x, kept), sums(x, nearest.indices, weight)
    if rule.weights == "paper":
        own = attn.gather(1, kept)[..., None]
        merged = (own * merged + added) / (own + weight.sum(dim=-1, keepdim=True))
    else:
        merged = merged + added
    return merged.to(image.x.dtype), near


def leftover(image: Image, chosen: Tensor) -> Tensor:
    """The extra token: ``Σ a_j x_j`` over the tokens not chosen (B, N), as ``(B, 1, D)``."""
    weight = image.attn.masked_fill(chosen, 0)
    return (weight[:, None] @ image.x.to(weight.dtype)).to(image.x.dtype)


def _raster(done: Reduction, size: int) -> Reduction:
    """The same survivors by ascending slot."""
    assert done.x is not None and done.group is not None
    number = done.count.to(done.keep.device, non_blocking=True)[:, None]
    order = done.keep.masked_fill(slots(done.keep) >= number, size).argsort(dim=-1, stable=True)
    place = torch.zeros_like(order).scatter(1, order, slots(order))
    group = place.gather(1, done.group.clamp(min=0)).masked_fill(done.group < 0, -1)
    return Reduction(done.keep.gather(1, order), done.count, take(done.x, order), group)
