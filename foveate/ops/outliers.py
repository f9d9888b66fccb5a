"""Outliers of attention, by which PruMerge chooses how many tokens to keep (arXiv 2403.15388)."""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_count(attn: Tensor, fence: float = 1.5) -> Tensor:
    """Values of each row above Q3 + fence·(Q3 - Q1), strictly: (…, N) to (…) long.

    Quartiles are interpolated linearly, in float32. By a sort, because ``torch.quantile`` takes
    neither bfloat16 nor more than 16M values.
    """
    ranked = attn.to(torch.promote_types(attn.dtype, torch.float32)).sort(dim=-1).values
    low, high = _quantile(ranked, 0.25), _quantile(ranked, 0.75)
    return (ranked > high + fence * (high - low)).sum(dim=-1)


def outlier_ratio(attn: Tensor, fence: float = 1.5) -> Tensor:
    """The share of outliers among all values given, whatever the shape: a float64 scalar.

    The released code flattens the whole batch, so that an image's neighbours in the batch decide
    with it; :func:`outlier_count` does not.
    """
    return outlier_count(attn.flatten(), fence).double() / attn.numel()


def _quantile(ranked: Tensor, q: float) -> Tensor:
    """(…, N, 1): rows of ``ranked`` are ascending."""
    place = q * (ranked.shape[-1] - 1)
    below = int(place)
    above = min(below + 1, ranked.shape[-1] - 1)
    return torch.lerp(ranked[..., below : below + 1], ranked[..., above : above + 1], place - below)
