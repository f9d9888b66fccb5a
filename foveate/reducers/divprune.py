"""DivPrune: keep the tokens that differ most from each other. arXiv 2503.02175."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.ops.diversity import cosines, max_min
from foveate.reducer import Reducer, Reduction, Tokens, leading, needed


@dataclass(frozen=True)
class DivPrune(Reducer, name="divprune"):
    """The greedy set of largest smallest distance (1 - cosine), of projected tokens.

    It reads neither attention nor question. First comes the token farthest from its nearest other,
    then each time the one farthest from all that were picked; survivors stay in raster order.

    As released (vbdi/divprune), which can pick a token several times when vectors are equal or
    zero: here a pick is never repeated, and tokens equal to a picked one or zero come last. The
    release rounds ``ratio · N`` half to even; here the schedule counts.
    """

    ragged: ClassVar[bool] = True

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each group."""
        wanted = needed(self.name, budget)
        with torch.no_grad():
            order = max_min(cosines(tokens.x), tokens.valid, max(wanted))
        return leading(order, tokens.x.shape[1], wanted)
