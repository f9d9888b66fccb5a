"""ToMe: similar tokens become their mean, weighted by what they stand for. arXiv 2210.09461."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.attention import observed
from foveate.ops.bipartite import Match, match
from foveate.ops.knobs import one_of
from foveate.ops.rows import add, full, one_budget, settled, slots, take
from foveate.reducer import Reducer, Reduction, Tokens

METRICS = ("keys", "tokens")


@dataclass(frozen=True)
class ToMe(Reducer, name="tome"):
    """Bipartite soft matching with token sizes, before the projector.

    Tokens of even place are compared with those of odd place by cosine of the encoder's last keys,
    mean over heads; the r most similar pairs are merged, in rounds of ``r = min(T // 2, T - K)``. A
    merged token is the mean of all original tokens in it, however many rounds that took, and so are
    its keys: sizes are the weights. That is what ``aim-merge`` leaves out, which takes plain means
    and compares keys with all heads side by side.

    ToMe (facebookresearch/ToMe) merges r tokens in every layer of the encoder and adds the
    logarithm of the sizes to its attention; here the encoder runs untouched and the merging is done
    once, after it, and the LLM's attention knows no sizes. Survivors stay in raster order, each in
    the slot of its last destination.

    Attributes:
        metric: what is compared: ``keys`` or ``tokens``, the vectors themselves.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True

    metric: str = "keys"

    def __post_init__(self) -> None:
        one_of(self.name, "metric", self.metric, METRICS)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Merge each group down to ``budget[b]`` tokens."""
        wanted = one_budget(self.name, budget)
        if (done := settled(tokens, wanted)) is not None:
            return done
        x = tokens.x.to(torch.promote_types(tokens.x.dtype, torch.float32))
        metric = self.compared(tokens, x)
        size = torch.ones_like(x[..., :1])
        keep = group = slots(x)
        while x.shape[1] > wanted:
            matched = match(metric, x.shape[1] - wanted, "raster")
            weight = _sum(matched, size)
            x = _sum(matched, x * size) / weight
            metric = _sum(matched, metric * size) / weight
            size, keep = weight, keep.gather(1, matched.keep)
            group = matched.group.gather(1, group)
        return Reduction(keep, full(*keep.shape), x.to(tokens.x.dtype), group)

    def compared(self, tokens: Tokens, x: Tensor) -> Tensor:
        """What is compared, (B, N, C) in the dtype of ``x``."""
        if self.metric == "tokens":
            return x
        _, k, at = observed(self.name, tokens)
        return take(k.to(x.dtype).mean(dim=1), at)


def _sum(matched: Match, x: Tensor) -> Tensor:
    """Each survivor of a round with all that went into it added: (B, T, C) to (B, T - r, C)."""
    return add(take(x, matched.keep), matched.into, take(x, matched.source))
