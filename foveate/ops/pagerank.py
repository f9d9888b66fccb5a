"""PageRank over an attention map, without the map.

Importance of AIM (arXiv 2412.03248, as in its released code): with ``M = softmax(q·k·scale / τ)``
and all rows starting at ``1/n``, five times ``s ← (1 - damping)·s M + damping/n``; then the root
mean square over heads. Mass flows along columns: a key is important when important queries attend
to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The map is made in tiles of at least 64 rows and about this many bytes: a CPU's cache, or
# what keeps a GPU busy. A map that fits in one tile is made whole.
_TILE_BYTES_CPU = 1 << 20
_TILE_BYTES = 64 << 20


def pagerank(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    alive: Tensor | None = None,
    voters: Tensor | None = None,
    causal: bool = True,
    block: int | None = None,
) -> Tensor:
    """Importance of every row of L; higher is kept.

    Args:
        q: queries, ``(B, H, L, d)``.
        k: keys, ``(B, Hkv, L, d)``, Hkv dividing H.
        scale: the attention's scaling of q·k.
        temperature: τ; below 1 it sharpens.
        iterations: power steps.
        damping: share of the mass that is spread evenly in every step.
        alive: ``(B, L)`` bool, the keys that can be seen; None means all.
        voters: ``(B, L)`` bool, the rows that start with mass and pass it on; None means all (the
            released code, in which rows of pruned tokens go on voting).
        causal: whether row i sees only keys up to i.
        block: rows of the map made at a time, at least L for the dense map; None chooses.

    Returns:
        ``(B, L)`` float32 (float64 for float64 inputs).
    """
    rows = min(block or _rows(q), q.shape[2])
    walk = _walk(q, k, scale / temperature, iterations, damping, alive, voters, causal, rows)
    if rows >= q.shape[2]:
        mass = _dense(walk)
    elif causal:
        mass = _sweep(walk, rows)
    else:
        mass = _stream(walk, rows)
    return mass.flatten(1, 2).square().mean(dim=1).sqrt()


@dataclass(frozen=True)
class _Walk:
    """The random walk; G query heads share each of the Hkv key heads.

    Attributes:
        q: ``(B, Hkv, G, L, d)``, with the scaling and temperature in it.
        kt: ``(B, Hkv, d, L)``.
        ahead: ``(rows, rows)``, what hides later keys from the rows of one tile.
        dead: ``(B, 1, 1, 1, L)``, what hides dead keys; or None.
        pass_on: ``(B, 1, 1, L)``, 1 on rows that pass their mass on.
        start: ``(B, 1, 1, L)``, the mass at the start.
        spread: ``(B, 1, 1, L)``, the mass that every step adds.
    """

    q: Tensor
    kt: Tensor
    ahead: Tensor
    dead: Tensor | None
    pass_on: Tensor
    start: Tensor
    spread: Tensor
    damping: float
    iterations: int
    causal: bool

    def tile(self, first: int, last: int) -> Tensor:
        """Rows first..last-1 of M: ``(B, Hkv, G, last - first, width)``.

        The width is ``last`` where causality hides the keys after it, L otherwise.
        """
        width = last if self.causal else self.kt.shape[-1]
        q = self.q[:, :, :, first:last]
        logits = (q.flatten(2, 3) @ self.kt[..., :width]).view(*q.shape[:4], width)
        if self.causal:
            logits[..., first:] += self.ahead[: last - first, : last - first]
        if self.dead is not None:
            logits += self.dead[..., :width]
        return torch.softmax(logits, dim=-1)


def _walk(
    q: Tensor,
    k: Tensor,
    scale: float,
    iterations: int,
    damping: float,
    alive: Tensor | None,
    voters: Tensor | None,
    causal: bool,
    rows: int,
) -> _Walk:
    batch, heads, length, width = q.shape
    work = torch.promote_types(q.dtype, torch.float32)
    # Finite, also when both are added: a row that sees no key gives no NaN, and passes nothing on.
    low = torch.finfo(work).min / 4
    vote = q.new_ones(batch, length, dtype=work) if voters is None else voters.to(work)
    spread = vote / vote.sum(dim=-1, keepdim=True).clamp(min=1)
    pass_on = vote
    if alive is not None:  # a row that sees no key has nowhere to send its mass
        seen = alive.cumsum(-1) if causal else alive.sum(-1, keepdim=True)
        pass_on = vote * (seen > 0)
    return _Walk(
        q=(q.to(work) * scale).view(batch, k.shape[1], heads // k.shape[1], length, width),
        kt=k.to(work).mT,
        ahead=q.new_full((rows, rows), low, dtype=work).triu_(1),
        dead=None if alive is None else (~alive).to(work).mul_(low)[:, None, None, None],
        pass_on=pass_on[:, None, None],
        start=spread[:, None, None],
        spread=damping * spread[:, None, None],
        damping=damping,
        iterations=iterations,
        causal=causal,
    )


def _rows(q: Tensor) -> int:
    """Rows per tile."""
    batch, heads, length, _ = q.shape
    tile = _TILE_BYTES_CPU if q.device.type == "cpu" else _TILE_BYTES
    return min(length, max(64, tile // (4 * batch * heads * length)))


def _dense(walk: _Walk) -> Tensor:
    """Reference: the map M is made once and multiplied ``iterations`` times. ``(B, Hkv, G, L)``."""
    matrix = walk.tile(0, walk.q.shape[3])
    mass = walk.start.expand(*walk.q.shape[:4])
    for _ in range(walk.iterations):
        moved = ((mass * walk.pass_on).unsqueeze(-2) @ matrix).squeeze(-2)
        mass = moved * (1 - walk.damping) + walk.spread
    return mass


def _stream(walk: _Walk, rows: int) -> Tensor:
    """The map in tiles of rows, made anew in every step: O(H·rows·L) memory. ``(B, Hkv, G, L)``."""
    length = walk.q.shape[3]
    mass = walk.start.expand(*walk.q.shape[:4])
    for _ in range(walk.iterations):
        sent, moved = (mass * walk.pass_on).unsqueeze(-2), torch.zeros_like(mass)
        for first in range(0, length, rows):
            last = min(first + rows, length)
            moved += (sent[..., first:last] @ walk.tile(first, last)).squeeze(-2)
        mass = moved * (1 - walk.damping) + walk.spread
    return mass


def _sweep(walk: _Walk, rows: int) -> Tensor:
    """All steps in one pass over the tiles of a causal map, last rows first. ``(B, Hkv, G, L)``.

    A causal row sends mass only to itself and to earlier keys. So once all rows after a block have
    been through all steps, the block's own steps need its diagonal tile alone, and what it sends to
    the keys before it is, for all steps together, one product with the rest of its tile. Every
    entry of M is made once, as in the dense form, in O(H·rows·L) memory, as in the streamed one.
    """
    length, steps = walk.q.shape[3], walk.iterations
    # mass[..., t, :] after t steps; until its block is reached, what later rows have sent so far.
    mass = walk.q.new_zeros(*walk.q.shape[:3], steps + 1, length)
    mass[..., 0, :] = walk.start
    for last in range(length, 0, -rows):
        first = max(0, last - rows)
        tile = walk.tile(first, last)
        own, kept = mass[..., first:last], 1 - walk.damping
        pass_on, spread = walk.pass_on[..., first:last], walk.spread[..., first:last]
        for t in range(steps):
            sent = (own[..., t, :] * pass_on).unsqueeze(-2)
            inside = (sent @ tile[..., first:]).squeeze(-2)
            own[..., t + 1, :] = (own[..., t + 1, :] + inside) * kept + spread
        if first:
            sent = own[..., :-1, :] * pass_on.unsqueeze(-2)
            mass[..., 1:, :first] += sent @ tile[..., :first]
    return mass[..., -1, :]
