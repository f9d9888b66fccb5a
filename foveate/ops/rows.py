"""Rows: picking vectors by slot, and the reductions that change nothing or leave nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from foveate.reducer import Reduction, Tokens, needed


def take(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]``: (B or 1, N, …) and (B, K) to (B, K, …).

    Whole rows of the flat tensor: on CPU ten times as fast as ``gather`` with a repeated index.
    """
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    numbers = index.flatten() if x.shape[0] == 1 else flat(index, x.shape[1])
    return x.flatten(0, 1).index_select(0, numbers).view(*index.shape, *x.shape[2:])


def add(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """``x`` with ``y[b, i]`` added to row ``index[b, i]``: (B, K, D), (B, r), (B, r, D)."""
    return x.flatten(0, 1).index_add(0, flat(index, x.shape[1]), y.flatten(0, 1)).view(x.shape)


def sums(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``Σ_k weight[b, i, k] · x[b, index[b, i, k]]``: (B, N, D) index (B, K, k) to (B, K, D).

    On CPU five times as fast as the product with a matrix that is zero elsewhere.
    """
    batch, bags, size = index.shape
    made = embedding_bag(
        flat(index.flatten(1), x.shape[1]),
        x.flatten(0, 1),
        torch.arange(batch * bags, device=x.device) * size,
        per_sample_weights=weight.flatten(),
        mode="sum",
    )
    return made.view(batch, bags, x.shape[2])


def flat(index: Tensor, size: int) -> Tensor:
    """Rows ``index`` (B, K) of groups of ``size`` rows, numbered through all groups: (B·K,)."""
    if index.shape[0] == 1:
        return index[0]
    start = torch.arange(index.shape[0], device=index.device) * size
    return (index + start[:, None]).flatten()


def slots(x: Tensor) -> Tensor:
    """The slots 0..N-1 of each group of ``x`` (B, N, …): (B, N) long."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def full(size: int, count: int) -> Tensor:
    """``count`` for each of ``size`` groups, as in ``Reduction.count``: (size,) on the CPU."""
    return torch.full((size,), count, dtype=torch.long)


def unchanged(tokens: Tokens) -> Reduction:
    """All tokens as they are."""
    groups, size = tokens.x.shape[:2]
    return Reduction(keep=slots(tokens.x), count=full(groups, size))


def nothing(tokens: Tokens) -> Reduction:
    """No survivor at all."""
    return Reduction(keep=slots(tokens.x)[:, :0], count=full(tokens.x.shape[0], 0))


def settled(tokens: Tokens, wanted: int | None) -> Reduction | None:
    """The reduction to nothing or to all tokens, which no method has to decide; else None."""
    if wanted == 0:
        return nothing(tokens)
    return unchanged(tokens) if wanted == tokens.x.shape[1] else None


def one_budget(name: str, budget: Sequence[int] | None) -> int:
    """The budget that all groups share, for methods that work on rectangular batches.

    Raises:
        ValueError: when there is none, or groups differ.
    """
    wanted = needed(name, budget)
    if len(set(wanted)) != 1:
        raise ValueError(
            f"{name} was given the budgets {sorted(set(wanted))}; it takes groups of one size and "
            "one budget. Call it once for each distinct budget."
        )
    return wanted[0]
