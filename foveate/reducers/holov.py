"""HoloV: a quota for each crop, by attention and by diversity inside it. arXiv 2510.02912."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops.encoder import attended
from foveate.ops.knobs import within
from foveate.ops.rows import take
from foveate.reducer import Scorer, Tokens


@dataclass(frozen=True)
class HoloV(Scorer, name="holov"):
    """Cut the raster into crops, share the budget among them, keep each crop's best tokens.

    Crops are contiguous runs of slots, as released. A token's score is ``attention`` times what
    [CLS] attends to it in the encoder's last layer (mean over heads; all rows attend where there is
    no [CLS]) plus ``diversity`` times its variance: that of its cosines with the other tokens of
    its crop, divided by the mean variance of the image. A crop's share is the softmax of its mean
    score. Seats go to crops by largest quotient share / (2 · seats + 1), so that the counts follow
    the shares, add up to the budget exactly, and what a full crop cannot take goes to the others.

    The released code (obananas/HoloV) loses what is over a crop's size and feeds zero vectors in
    its place, and keeps tokens in order of attention; here they stay in raster order. From the
    description that we wrote from we have the two weights and the runs; how variances are scaled
    and how shares follow from scores is our reading. The refetching of context inside the LLM is
    left out.

    Attributes:
        crops: how many; one for each token where there are fewer.
        attention: weight of the attention.
        diversity: weight of the variance.
        temperature: of the softmax over crops; the larger, the more even the shares.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True

    crops: int = 16
    attention: float = 1000.0
    diversity: float = 0.09
    temperature: float = 1.0

    def __post_init__(self) -> None:
        within(self.name, "crops", self.crops, 1)
        within(self.name, "attention", self.attention, 0)
        within(self.name, "diversity", self.diversity, 0)
        within(self.name, "temperature", self.temperature, 0, open_low=True)

    def score(self, tokens: Tokens) -> Tensor:
        """The quotient for which each token gets its crop's seat (B, N)."""
        attn = attended(self.name, tokens)
        index, real, place = _runs(attn.shape[1], self.crops, attn.device)
        spread = _variance(tokens.x.to(attn.dtype), index, real)[:, place]
        spread = spread / spread.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(attn.dtype).tiny)
        value = (self.attention * attn + self.diversity * spread)[:, index]  # (B, P, m)
        mean = value.masked_fill(~real, 0).sum(dim=-1) / real.sum(dim=-1)
        share = (mean / self.temperature).log_softmax(dim=-1)
        order = value.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        seat = torch.zeros_like(order).scatter(
            -1, order, torch.arange(index.shape[1], device=order.device).expand_as(order)
        )
        # In logarithms, where a share of nearly nothing still has an order.
        quotient = share[..., None] - (2 * seat + 1).to(share.dtype).log()
        return quotient.flatten(1)[:, place]


def _runs(size: int, crops: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The slots of each of P even runs, m at most, and where to find a slot among them.

    Returns:
        ``(P, m)`` long; ``(P, m)`` bool, which of these are real; ``(N,)`` long, the place of each
        slot in the flat table.
    """
    number = min(crops, size)
    first = torch.arange(number + 1, device=device) * size // number
    widest = -(-size // number)
    index = first[:-1, None] + torch.arange(widest, device=device)
    slot = torch.arange(size, device=device)
    run = ((slot + 1) * number - 1) // size
    place = run * widest + slot - run * size // number
    return index.clamp(max=size - 1), index < first[1:, None], place


def _variance(x: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Variance of each token's cosines with the others of its run: (B, N, D) to (B, P·m)."""
    batch, number = x.shape[0], index.shape[0]
    unit = take(normalize(x, dim=-1), index.flatten().expand(batch, -1))
    unit = unit.view(batch, *index.shape, -1)
    cosine = unit @ unit.mT  # (B, P, m, m)
    other = real[:, None, :] & real[:, :, None]
    other = other & ~torch.eye(index.shape[1], dtype=torch.bool, device=x.device)
    count = other.sum(dim=-1).clamp(min=1).expand(number, -1)
    mean = cosine.masked_fill(~other, 0).sum(dim=-1) / count
    away = (cosine - mean[..., None]).square().masked_fill(~other, 0).sum(dim=-1) / count
    return away.flatten(1)
