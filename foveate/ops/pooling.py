"""Cutting a grid into exactly as many cells as tokens are wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cells(
    size: int, budget: int, grid: tuple[int, int] | None, device: torch.device | None = None
) -> Tensor:
    """The cell of each of ``size`` tokens: (N,) long, all of 0..budget-1 used.

    Shelves: the grid is cut into bands of rows, and each band into cells side by side. The number
    of bands makes cells as square as it can; the ``budget`` cells are spread over the bands evenly,
    so neighbouring bands differ by one cell at most. A quarter of an even grid gives 2×2 pooling.
    Tokens without a grid (None, or one that does not have ``size`` places) are cut into contiguous
    runs.

    Args:
        size: N, tokens.
        budget: cells, 1..N.
        grid: (height, width) of the raster, or None.
        device: where the answer lies.
    """
    height, width = grid if grid is not None and grid[0] * grid[1] == size else (1, size)
    bands = round(math.sqrt(budget * height / width))
    bands = max(math.ceil(budget / width), min(bands, height, budget), 1)
    slot = torch.arange(size, device=device)
    band = slot // width * bands // height
    first = band * budget // bands
    across = (band + 1) * budget // bands - first
    return first + slot % width * across // width


def centres(cell: Tensor, budget: int, grid: tuple[int, int] | None) -> Tensor:
    """The token in the middle of each cell (the earlier one of two): (K,) long, ascending.

    Args:
        cell: ``(N,)`` long from :func:`cells`, with the same ``budget`` and ``grid``.
    """
    size = cell.shape[0]
    width = grid[1] if grid is not None and grid[0] * grid[1] == size else size
    slot = torch.arange(size, device=cell.device)
    places = torch.stack((slot // width, slot % width))  # (2, N): row, column
    index, empty = cell.expand(2, -1), places.new_zeros(2, budget)
    low = empty.scatter_reduce(1, index, places, "amin", include_self=False)
    high = empty.scatter_reduce(1, index, places, "amax", include_self=False)
    row, column = ((low + high) // 2).unbind()
    return row * width + column


def means(x: Tensor, cell: Tensor, budget: int) -> Tensor:
    """The mean vector of each cell: (B, N, D) and (N,) to (B, K, D)."""
    work = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(x.shape[0], budget, x.shape[2], dtype=work).index_add(1, cell, x.to(work))
    ones = torch.ones(cell.shape, dtype=work, device=x.device)
    count = ones.new_zeros(budget).index_add(0, cell, ones)
    return (total / count[:, None]).to(x.dtype)
