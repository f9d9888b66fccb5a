"""Near-duplicates: only tokens that say the same are merged, as many as there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops.knobs import within
from foveate.ops.rows import full, one_budget, settled, slots, take
from foveate.reducer import Reducer, Reduction, Tokens


@dataclass(frozen=True)
class NearDuplicates(Reducer, name="near-duplicates"):
    """Lossless first: merge tokens whose cosine is at least ``threshold``, and nothing else.

    For documents and screens, whose blank areas give the same token many times over, while every
    token with print on it is needed. In raster order a token becomes a leader unless an earlier
    leader is that similar to it; the others join the leader most like them, and a group is its
    mean. So whatever is merged is within the threshold of the token in whose place it stands, and
    no chain of small steps joins what is apart. How many stay is up to the image.

    With a budget the threshold is not asked: the leaders are the K tokens least like any earlier
    one.

    A method of ours, not of a paper.

    Attributes:
        threshold: cosine from which on two tokens are the same, in (0, 1].
    """

    adaptive: ClassVar[bool] = True

    threshold: float = 0.95

    def __post_init__(self) -> None:
        within(self.name, "threshold", self.threshold, 0, 1, open_low=True)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Merge what is nearly the same, or down to ``budget[b]`` tokens."""
        wanted = None if budget is None else one_budget(self.name, budget)
        if (done := settled(tokens, wanted)) is not None:
            return done
        work = tokens.x.to(torch.promote_types(tokens.x.dtype, torch.float32))
        with torch.no_grad():
            unit = normalize(work, dim=-1)
            cosine = unit @ unit.mT
            if wanted is None:
                leads = leaders(cosine >= self.threshold)
                count = leads.sum(dim=-1).cpu()
            else:
                leads, count = _novel(cosine, wanted), full(len(cosine), wanted)
            width = int(count.max()) if wanted is None else wanted
            keep = (~leads).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
            near = cosine.masked_fill(~leads[:, None], -torch.inf).argmax(dim=-1)
            near = torch.where(leads, slots(leads), near)  # also where an equal leader is earlier
            group = (leads.cumsum(dim=-1) - 1).gather(1, near)
        of = (group[:, None] == slots(keep)[..., None]).to(work.dtype)  # (B, K, N)
        means = of @ work / of.sum(dim=-1, keepdim=True).clamp(min=1)
        alone = (of.sum(dim=-1, keepdim=True) == 1).expand_as(means)
        x = torch.where(alone, take(work, keep), means)  # not even rounded
        return Reduction(keep, count, x.to(tokens.x.dtype), group)


def leaders(alike: Tensor) -> Tensor:
    """Tokens without an earlier leader that is like them: (B, N, N) bool to (B, N) bool.

    Taken in raster order, but many at once: whoever has no undecided earlier token like it leads,
    and whoever is like an earlier leader does not. Few rounds settle all.
    """
    before = alike.tril(-1)  # row i: the earlier tokens like i
    leads = torch.zeros_like(alike[:, 0])
    follows = leads.clone()
    while not bool((leads | follows).all()):
        open_ = ~(leads | follows)
        leads = leads | (open_ & ~(before & ~follows[:, None]).any(dim=-1))
        follows = follows | (before & leads[:, None]).any(dim=-1)
    return leads


def _novel(cosine: Tensor, wanted: int) -> Tensor:
    """The ``wanted`` tokens least like any earlier one, (B, N) bool."""
    most = cosine.masked_fill(~torch.ones_like(cosine).tril(-1).bool(), -torch.inf).amax(dim=-1)
    order = most.argsort(dim=-1, stable=True)[:, :wanted]
    return torch.zeros_like(most, dtype=torch.bool).scatter(1, order, True)
