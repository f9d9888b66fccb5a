"""AIM's merging before the LLM: similar tokens become their mean, in rounds. arXiv 2412.03248."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.ops.attention import observed, one_head
from foveate.ops.bipartite import ORDERS, merge_to
from foveate.ops.knobs import one_of
from foveate.ops.rows import full, one_budget, settled
from foveate.reducer import Reducer, Reduction, Tokens

METRICS = ("keys", "tokens")


@dataclass(frozen=True)
class AimMerge(Reducer, name="aim-merge"):
    """AIM's merging before the projector, compared by the encoder's last keys (LLaVA-1.5).

    Rounds of ``r = min(T // 2, T - K)``: 252 of 576 are the released 288 and 36, 72 are 288, 144
    and 72. Keys keep all heads side by side and are merged along with the vectors, as released; the
    paper's text speaks of embeddings. A merged token is the plain mean of what the round put
    together.

    Attributes:
        metric: what is compared: ``keys`` or ``tokens``, the vectors themselves.
        order: ``released``: in a round that merges some sources only, those left over come first,
            by descending similarity, then the destinations; ``raster``: ascending slots in every
            round.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True

    metric: str = "keys"
    order: str = "raster"

    def __post_init__(self) -> None:
        one_of(self.name, "metric", self.metric, METRICS)
        one_of(self.name, "order", self.order, ORDERS)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Merge each group down to ``budget[b]`` tokens."""
        keys = None
        if self.metric == "keys":
            _, k, at = observed(self.name, tokens)
            keys = one_head(k, at)
        return _merged(tokens, keys, one_budget(self.name, budget), self.order)


@dataclass(frozen=True)
class AimMergeTokens(Reducer, name="aim-merge-tokens"):
    """AIM's merging at the entrance, frame by frame, compared by the tokens (video).

    A name of its own because a method's site is fixed; otherwise as ``aim-merge`` with
    ``metric="tokens"``.

    Attributes:
        order: as in ``aim-merge``.
    """

    order: str = "raster"

    def __post_init__(self) -> None:
        one_of(self.name, "order", self.order, ORDERS)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Merge each group down to ``budget[b]`` tokens."""
        return _merged(tokens, None, one_budget(self.name, budget), self.order)


def _merged(tokens: Tokens, keys: Tensor | None, wanted: int, order: str) -> Reduction:
    if (done := settled(tokens, wanted)) is not None:
        return done
    x, keep, group = merge_to(tokens.x, keys, wanted, order)
    return Reduction(keep=keep, count=full(*keep.shape), x=x, group=group)
