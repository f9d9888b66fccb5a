"""PruMerge+: PruMerge with spatial samples beside the attended tokens. arXiv 2403.15388."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.ops.outliers import outlier_count
from foveate.ops.rows import slots
from foveate.reducers.prumerge import PruMerge


@dataclass(frozen=True)
class PruMergePlus(PruMerge, name="prumerge+"):
    """The tokens of PruMerge and a regular sample of the rest; then the same merge over both.

    Without a budget: with ratio = outliers / N, every ``int(int(1 / ratio) / 3)``-th slot below N -
    1 is sampled, about three times the outliers; samples follow the outliers in raster order, less
    those that are outliers. With a budget K: ``max(1, round((K - 1) / 4))`` tokens by attention,
    the others spread evenly over what is left, K - 1 distinct ones in all, and the extra token. K =
    1 is the most attended token alone; K = N changes nothing.

    The released code samples below 575 whatever N is (the same for its 576 tokens); a stride of 1,
    which 97 outliers of 576 give, makes it keep everything: here the stride is at least 2. It fails
    at no outlier (here one token counts as one) and at a batch (here images are counted one by
    one). Its fixed path takes N/8 by attention and every 8th from 4 on, duplicates included, and
    loses as many other tokens: here the budget's tokens are distinct. The rest as in ``prumerge``.

    Attributes: as in ``prumerge``.
    """

    def adapted(self, attn: Tensor) -> tuple[Tensor, Tensor]:
        """The outlying tokens, then every stride-th slot: (B, M) and the counts (B,) on the CPU."""
        outliers = outlier_count(attn, self.fence).clamp(min=1)
        size, slot, rank = attn.shape[1], slots(attn), _rank(attn)
        # In float64 through the ratio, as Python computes it.
        step = (1 / (outliers.double() / size)).long()
        stride = (step // 3).clamp(min=2)[:, None]
        outlying = rank < outliers[:, None]
        sampled = (slot % stride == 0) & (slot < size - 1) & ~outlying
        first = torch.where(outlying, rank, slot + torch.where(sampled, size, 2 * size))
        count = (outlying | sampled).sum(dim=-1).cpu()
        return first.argsort(dim=-1)[:, : int(count.max())], count

    def chosen(self, attn: Tensor, wanted: int) -> Tensor:
        """A quarter of ``wanted`` by attention, the others evenly over the rest: (B, wanted)."""
        size = attn.shape[1]
        most = min(wanted, max(1, round(wanted / 4)))
        order = attn.argsort(dim=-1, descending=True, stable=True)
        rest = order[:, most:].sort(dim=-1).values  # (B, N - most), raster order
        samples = torch.arange(wanted - most, device=attn.device)
        place = (2 * samples + 1) * (size - most) // (2 * max(1, wanted - most))
        return torch.cat((order[:, :most], rest[:, place]), dim=1)


def _rank(attn: Tensor) -> Tensor:
    """The place of each token by descending attention: (B, N) long."""
    order = attn.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order).scatter(1, order, slots(order))
