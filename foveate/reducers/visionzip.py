"""VisionZip: tokens that [CLS] attends to, and the rest merged into a few. arXiv 2412.04467."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.attention import observed
from foveate.ops.diversity import unit
from foveate.ops.encoder import attended
from foveate.ops.knobs import one_of, within
from foveate.ops.rows import add, full, one_budget, settled, slots, take
from foveate.reducer import Reducer, Reduction, Tokens

WEIGHTS = ("released", "mean")
ORDERS = ("released", "raster")


@dataclass(frozen=True)
class VisionZip(Reducer, name="visionzip"):
    """Dominant tokens by [CLS] attention; contextual ones, into which the others are merged.

    Of K survivors ``round(contextual · K)`` are contextual, as in the paper's 54 + 10, 108 + 20 and
    162 + 30. Targets are taken from what is not dominant at a regular step; every other token joins
    the target of most similar keys.

    As released (dvlab-research/VisionZip): attention and keys of the layer that gives the features,
    attention on the mean of heads, keys averaged over heads; a contextual token is the target plus
    the mean of those that joined it, which is up to twice as long as a token; dominant ones come
    first in raster order, then contextual ones in theirs.

    Where we leave the released code: it hands [CLS] itself to the LLM as one of the dominant
    tokens; here [CLS] is no vision token, and a patch takes its place, so that K patches are kept
    of K asked. No contextual token (released: ZeroDivisionError) means that the others are
    dropped. Without [CLS], the attention received from all tokens stands in.

    Attributes:
        contextual: the share of contextual tokens; one token at least is dominant.
        weights: ``released``, the sum above, or ``mean``, the plain mean of a target and all that
            joined it.
        order: ``released``, or ``raster``: ascending slots; a contextual token has its target's.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True
    encoder: ClassVar[str] = "features"

    contextual: float = 10 / 64
    weights: str = "released"
    order: str = "released"

    def __post_init__(self) -> None:
        within(self.name, "contextual", self.contextual, 0, 1)
        one_of(self.name, "weights", self.weights, WEIGHTS)
        one_of(self.name, "order", self.order, ORDERS)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep or merge each group down to ``budget[b]`` tokens."""
        wanted = one_budget(self.name, budget)
        if (done := settled(tokens, wanted)) is not None:
            return done
        merged = min(round(wanted * self.contextual), wanted - 1)
        with torch.no_grad():
            rank = attended(self.name, tokens).argsort(dim=-1, descending=True, stable=True)
        dominant = rank[:, : wanted - merged].sort(dim=-1).values
        if not merged:
            return Reduction(keep=dominant, count=full(*dominant.shape))
        rest = rank[:, wanted - merged :].sort(dim=-1).values
        done = self._merged(tokens, dominant, rest, merged)
        return done if self.order == "released" else _raster(done)

    def _merged(self, tokens: Tokens, dominant: Tensor, rest: Tensor, merged: int) -> Reduction:
        """The ``dominant`` slots (B, M), and ``rest`` (B, N - M) in ``merged`` tokens."""
        place, step = torch.arange(rest.shape[1]), rest.shape[1] // merged
        aimed = (place % step == 0) & (place < step * merged)  # on the CPU: the same in all groups
        order = aimed.to(torch.uint8).argsort(stable=True).to(rest.device, non_blocking=True)
        other, target = rest[:, order[:-merged]], rest[:, order[-merged:]]
        with torch.no_grad():
            _, k, at = observed(self.name, tokens)
            keys = unit(take(k.mean(dim=1), at))
            into = (take(keys, other) @ take(keys, target).mT).argmax(dim=-1)
        x = torch.cat((take(tokens.x, dominant), self._sums(tokens.x, target, other, into)), dim=1)
        keep = torch.cat((dominant, target), dim=1)
        group = torch.zeros_like(tokens.valid, dtype=torch.long).scatter(1, keep, slots(keep))
        group = group.scatter(1, other, into + dominant.shape[1])
        return Reduction(keep=keep, count=full(*keep.shape), x=x, group=group)

    def _sums(self, x: Tensor, target: Tensor, other: Tensor, into: Tensor) -> Tensor:
        """The contextual tokens, (B, M, D): ``into`` (B, T) is the target of each of ``other``."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        own = take(work, target)
        joined = add(torch.zeros_like(own), into, take(work, other))
        count = own.new_zeros(target.shape).scatter_add(1, into, torch.ones_like(into).to(own))
        count = count.unsqueeze(-1)
        if self.weights == "mean":
            return ((own + joined) / (1 + count)).to(x.dtype)
        return (own + joined / count.clamp(min=1)).to(x.dtype)


def _raster(done: Reduction) -> Reduction:
    """The same survivors by ascending slot."""
    assert done.x is not None and done.group is not None
    order = done.keep.argsort(dim=-1)
    group = order.argsort(dim=-1).gather(1, done.group)
    return Reduction(done.keep.gather(1, order), done.count, take(done.x, order), group)
