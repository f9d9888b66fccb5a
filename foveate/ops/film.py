"""Frames of a video: what video methods have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops.rows import full, one_budget
from foveate.reducer import Reduction, Tokens


def frames_of(name: str, tokens: Tokens, budget: Sequence[int] | None) -> tuple[int, int, int]:
    """How many frames there are, the tokens of each, and the budget of the whole video.

    Raises:
        ValueError: without a budget, with several, or where tokens are not a video.
    """
    wanted = one_budget(name, budget)
    if tokens.frames is None:
        raise ValueError(
            f"{name} compares the frames of a video and was given tokens without frames; use it at "
            "the entrance of a video, or a method for images, such as 'pool'."
        )
    return tokens.frames, tokens.x.shape[1] // tokens.frames, wanted


def likeness(x: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the tokens in the same place of two frames, (B, F, P) in float32.

    Args:
        x: ``(B, T, P, D)``, a video.
        one: ``(F,)`` long, frames.
        other: ``(F,)`` long, the frame that each is compared with.
    """
    unit = normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    return (unit[:, one] * unit[:, other]).sum(dim=-1)


def spread(tokens: Tokens, size: int, wanted: int) -> Reduction:
    """``wanted`` of the first ``size`` slots, evenly spread: less than one frame is asked for."""
    place = (2 * torch.arange(wanted, device=tokens.x.device) + 1) * size // (2 * max(1, wanted))
    groups = tokens.x.shape[0]
    return Reduction(keep=place.expand(groups, -1), count=full(groups, wanted))
