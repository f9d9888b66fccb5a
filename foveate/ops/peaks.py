"""Clustering by density peaks with nearest neighbours, decided alike every time."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.rows import slots


def density_peaks(x: Tensor, clusters: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Centres that are dense and far from anything denser, and the centre nearest to each vector.

    Distances are Euclidean, divided by sqrt(D). The density of i is ``exp(-mean d²)`` over its
    nearest neighbours, itself among them; its height is the distance to the nearest denser vector,
    or to the farthest one where none is denser. Centres have the largest density · height. Of equal
    densities the earlier one counts as denser, and of equal products it is taken first.

    Args:
        x: ``(B, N, D)``.
        clusters: C, 1..N.
        neighbours: how many make up a density, N at most.

    Returns:
        The centres ``(B, C)`` long, and ``(B, N)`` long, the cluster (0..C-1) of each vector; a
        centre belongs to its own.
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    apart = torch.cdist(work, work) / x.shape[2] ** 0.5
    near = apart.topk(min(neighbours, x.shape[1]), dim=-1, largest=False).values
    density = -near.square().mean(dim=-1)  # its exponential keeps the order
    rank = density.argsort(dim=-1, descending=True, stable=True)
    place = torch.zeros_like(rank).scatter(1, rank, slots(rank))
    denser = place[:, None] < place[:, :, None]  # (B, N, N): column j is denser than row i
    height = apart.masked_fill(~denser, torch.inf).amin(dim=-1)
    height = torch.where(place == 0, apart.amax(dim=-1), height)
    centre = (density.exp() * height).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    to_centre = apart.gather(2, centre[:, None].expand(-1, x.shape[1], -1))
    member = to_centre.argmin(dim=-1).scatter(1, centre, slots(centre))
    return centre, member
