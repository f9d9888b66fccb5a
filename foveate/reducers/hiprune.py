"""HiPrune: anchors of a middle layer, what is around them, and the last's. arXiv 2508.00553."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.attention import observed, received
from foveate.ops.knobs import within
from foveate.ops.rows import full, one_budget, settled, slots
from foveate.reducer import Reducer, Reduction, Tokens

_AROUND = 5  # an anchor and its four neighbours


@dataclass(frozen=True)
class HiPrune(Reducer, name="hiprune"):
    """Anchor, buffer and register tokens, by the attention that tokens receive in the encoder.

    Middle layers of a vision encoder look at objects, deep ones gather the whole. Of a budget K,
    ``int(share · K / 5)`` anchors are the most attended in the middle layer, at least one where K
    is 5 or more; buffers are their neighbours in the grid, up, down, left and right; registers, the
    most attended in the last layer among the others, fill K. Attention received is the mean over
    heads and over all rows, so no [CLS] is needed. Survivors stay in raster order.

    The middle layer is 3/8 of the depth, as 9 of 24 in the released setting; encoders with windows
    take the nearest layer that sees the whole image. The deep layer is the last one here (released:
    that which gives the features, in LLaVA the last but one). Written from the published
    descriptions: that neighbours at a border are not replaced by others, and that a token which is
    neighbour to two anchors counts once, so that registers make up for both, is our reading. Tokens
    without a grid have neighbours to the left and right only.

    Attributes:
        share: of the budget, what goes to anchors and their neighbours.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True
    depth: ClassVar[float | None] = 3 / 8

    share: float = 0.1

    def __post_init__(self) -> None:
        within(self.name, "share", self.share, 0, 1)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each group."""
        wanted, size = one_budget(self.name, budget), tokens.x.shape[1]
        if (done := settled(tokens, wanted)) is not None:
            return done
        with torch.no_grad():
            q, k, at = observed(self.name, tokens)
            if tokens.middle is None:
                raise ValueError(
                    f"{self.name} reads an attention in the middle of the vision encoder and was "
                    "given none: pass Tokens with middle=(q, k), or use 'vispruner'."
                )
            anchors = max(int(self.share * wanted / _AROUND), int(wanted >= _AROUND))
            objects = _received(*tokens.middle, at, tokens)
            order = objects.argsort(dim=-1, descending=True, stable=True)
            near = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :anchors], True)
            first = _spread(near, tokens.grid)
            deep = _received(q, k, at, tokens)
            rank = deep.argsort(dim=-1, descending=True, stable=True)
            place = torch.zeros_like(rank).scatter(1, rank, slots(rank))
            chosen = torch.where(first, place - size, place).argsort(dim=-1)[:, :wanted]
        return Reduction(keep=chosen.sort(dim=-1).values, count=full(*chosen.shape))


def _received(q: Tensor, k: Tensor, at: Tensor, tokens: Tokens) -> Tensor:
    """Attention that each token receives, mean over heads and all L rows: (B, N)."""
    length = q.shape[2]
    queries = torch.arange(length, device=q.device).expand(q.shape[0], -1)
    weight = torch.full(queries.shape, 1 / length, device=q.device)
    attn = received(q, k, queries, weight, scale=tokens.scale, rows=tokens.rows)
    return attn.gather(1, at)


def _spread(near: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """``near`` (B, N) bool with the four neighbours of every token in it."""
    size = near.shape[1]
    height, width = grid if grid is not None and grid[0] * grid[1] == size else (1, size)
    around = torch.nn.functional.pad(near.view(-1, height, width), (1, 1, 1, 1))
    middle = around[:, 1:-1, 1:-1]
    side = around[:, 1:-1, :-2] | around[:, 1:-1, 2:]
    updown = around[:, :-2, 1:-1] | around[:, 2:, 1:-1]
    return (middle | side | updown).flatten(1)
