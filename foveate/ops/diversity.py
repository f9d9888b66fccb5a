"""Choosing tokens that differ from each other.

Every step is taken for all groups at once; what is picked is never picked again, and padding is
never picked while a real token is left. Cosines are float32 (float64 for float64 inputs), and a
zero vector is similar to none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops.rows import slots, take


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, (…, D) in at least float32."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def cosines(x: Tensor) -> Tensor:
    """The cosine of every two tokens: (B, N, D) to (B, N, N)."""
    directions = unit(x)
    return directions @ directions.mT


def max_min(cosine: Tensor, valid: Tensor, steps: int) -> Tensor:
    """DivPrune's greedy maximum of the smallest distance (arXiv 2503.02175).

    Distance is 1 - cosine. First comes the token farthest from its nearest other, then each time
    the one farthest from all that were picked. A zero vector, which has no direction, comes last.

    Args:
        cosine: ``(B, N, N)``.
        valid: ``(B, N)`` bool, the tokens there are.
        steps: how many to pick, at most N.

    Returns:
        ``(B, steps)`` long, distinct slots in the order picked; past the number of valid tokens of
        a group they mean nothing.
    """
    distance = 1 - cosine
    itself = torch.eye(cosine.shape[-1], dtype=torch.bool, device=cosine.device)
    other = valid & (cosine.diagonal(dim1=-2, dim2=-1) > 0.5)  # all but padding and zero vectors
    alone = distance.masked_fill(itself | ~other[:, None], torch.inf).amin(dim=-1)
    # Distance to what is picked: none is yet. -inf is what cannot be picked.
    nearest = torch.full_like(alone, torch.inf).masked_fill(~other, 0)
    nearest = nearest.masked_fill(~valid, -torch.inf)
    picks = slots(cosine)[:, :steps].clone()
    pick = torch.minimum(alone, nearest).argmax(dim=-1, keepdim=True)
    for step in range(steps):
        picks[:, step : step + 1] = pick
        nearest = torch.minimum(nearest, take(distance, pick).squeeze(1))
        nearest = nearest.scatter(1, pick, -torch.inf)
        pick = nearest.argmax(dim=-1, keepdim=True)
    return picks


def dpp(cosine: Tensor, relevance: Tensor, valid: Tensor, steps: int) -> Tensor:
    """The greedy most probable subset of a determinantal point process (arXiv 1709.05135).

    The kernel is ``L_ij = r_i · cosine_ij · r_j``; each step picks the token that multiplies the
    determinant of the picked tokens' kernel most, by one new row of its Cholesky factor. Once the
    picked tokens span all others (a budget above the kernel's rank), no token adds volume, and
    the most relevant ones left follow.

    Args:
        cosine: ``(B, N, N)``.
        relevance: ``(B, N)``, not negative.
        valid: ``(B, N)`` bool, the tokens there are.
        steps: how many to pick, at most N.

    Returns:
        ``(B, steps)`` long, distinct slots in the order picked; past the number of valid tokens of
        a group they mean nothing.
    """
    groups, size = relevance.shape
    # The cosine with itself is 1 or, of a zero vector, 0: rounding must not decide between equals.
    volume = cosine.diagonal(dim1=-2, dim2=-1).round() * relevance.square()
    noise = volume * size * torch.finfo(volume.dtype).eps  # less than this is rounding
    spanned = -1 / (1 + relevance)  # below every volume, rising with relevance
    factor = volume.new_zeros(groups, steps, size)
    picks, free = slots(cosine)[:, :steps].clone(), valid
    for step in range(steps):
        adds = volume > noise
        rank = torch.where(adds, volume, spanned).masked_fill(~free, -torch.inf)
        pick = rank.argmax(dim=-1, keepdim=True)
        row = take(cosine, pick) * (relevance * relevance.gather(1, pick)).unsqueeze(1)
        above = factor[:, :step]
        row = row - above.gather(2, pick.unsqueeze(1).expand(-1, step, 1)).mT @ above
        length = volume.gather(1, pick).clamp(min=torch.finfo(volume.dtype).tiny).rsqrt()
        row = row.squeeze(1) * length * adds.gather(1, pick)
        factor[:, step], volume = row, volume - row.square()
        picks[:, step : step + 1], free = pick, free.scatter(1, pick, False)
    return picks


def least_alike(cosine: Tensor, free: Tensor, quota: Tensor) -> Tensor:
    """Each pivot in turn takes the free tokens that are least like it.

    Args:
        cosine: ``(B, P, N)``, of P pivots with every token.
        free: ``(B, N)`` bool, the tokens that may be taken.
        quota: ``(B, P)`` long, how many each pivot takes, as far as there are any.

    Returns:
        ``(B, N)`` bool, what was taken.
    """
    left = free
    for likeness, wanted in zip(cosine.unbind(1), quota.unbind(1), strict=True):
        order = likeness.masked_fill(~left, torch.inf).argsort(dim=-1, stable=True)
        near = torch.zeros_like(left).scatter(1, order, slots(left) < wanted[:, None])
        left = left & ~near
    return free & ~left


def thinned(cosine: Tensor, slot: Tensor, wanted: int, step: int) -> Tensor:
    """Tokens with near-duplicates removed, ``step`` at a time.

    In every round even places look for their most similar odd one, and the ``step`` even ones with
    the highest cosine go.

    Args:
        cosine: ``(B, N, N)``.
        slot: ``(B, T)`` long, the tokens to choose from, ascending.
        wanted: how many to leave, 0..T.
        step: how many go in a round, at least 1.

    Returns:
        ``(B, wanted)`` long, ascending.
    """
    if wanted == 0:
        return slot[:, :0]
    while (size := slot.shape[1]) > wanted:
        gone = min(step, size // 2, size - wanted)
        even, odd = slot[:, 0::2], slot[:, 1::2]
        pairs = odd.unsqueeze(1).expand(-1, even.shape[1], -1)
        likeness = take(cosine, even).gather(2, pairs).amax(dim=-1)
        left = likeness.argsort(dim=-1, descending=True, stable=True)[:, gone:]
        slot = torch.cat((even.gather(1, left), odd), dim=1).sort(dim=-1).values
    return slot
