"""VisPruner: tokens that [CLS] attends to, and others that differ. arXiv 2412.01818."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.diversity import cosines, thinned
from foveate.ops.encoder import attended
from foveate.ops.knobs import within
from foveate.ops.rows import full, one_budget, settled
from foveate.reducer import Reducer, Reduction, Tokens


@dataclass(frozen=True)
class VisPruner(Reducer, name="vispruner"):
    """``int(important · K)`` tokens by [CLS] attention, the others by removing near-duplicates.

    As released (Theia-4869/VisPruner): attention of the layer that gives the features, on the mean
    of heads; from the rest, round by round, the ``step`` even tokens go that are most like an odd
    one (cosine of the vectors), until as many are left as wanted; survivors in raster order.

    Where we leave the released code: the rest is in raster order in every round, and an odd number
    of tokens (released: IndexError) leaves one even token more than odd ones. At least one token is
    kept by attention. Without [CLS], the attention received from all tokens stands in.

    Attributes:
        important: the share of the budget kept by attention.
        step: tokens removed in a round.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True
    encoder: ClassVar[str] = "features"

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        within(self.name, "important", self.important, 0, 1)
        within(self.name, "step", self.step, 1)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each group."""
        wanted = one_budget(self.name, budget)
        if (done := settled(tokens, wanted)) is not None:
            return done
        with torch.no_grad():
            keep = self.chosen(tokens, wanted)
        return Reduction(keep=keep, count=full(*keep.shape))

    def chosen(self, tokens: Tokens, wanted: int) -> Tensor:
        """The slots kept, ascending, (B, wanted)."""
        first = max(1, int(wanted * self.important))
        order = attended(self.name, tokens).argsort(dim=-1, descending=True, stable=True)
        rest = order[:, first:].sort(dim=-1).values
        diverse = thinned(cosines(tokens.x), rest, wanted - first, self.step)
        return torch.cat((order[:, :first], diverse), dim=1).sort(dim=-1).values
