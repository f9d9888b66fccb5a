"""Pool: average pooling, the plainest way to fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.ops.pooling import cells, centres, means
from foveate.ops.rows import full, one_budget, settled
from foveate.reducer import Reducer, Reduction, Tokens


@dataclass(frozen=True)
class Pool(Reducer, name="pool"):
    """Cut the grid into exactly K cells, as square and even as K allows, and average each.

    A quarter of an even grid is 2×2 pooling. Tokens without a grid are averaged in contiguous runs.
    A cell takes the slot of the token in its middle.
    """

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Average each group to ``budget[b]`` tokens."""
        wanted, (groups, size) = one_budget(self.name, budget), tokens.x.shape[:2]
        if (done := settled(tokens, wanted)) is not None:
            return done
        cell = cells(size, wanted, tokens.grid, tokens.x.device)
        return Reduction(
            keep=centres(cell, wanted, tokens.grid).expand(groups, -1),
            count=full(groups, wanted),
            x=means(tokens.x, cell, wanted),
            group=cell.expand(groups, -1),
        )
