"""DyCoke: in every few frames one stays whole, of the others what is new. arXiv 2411.15024."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.film import frames_of, likeness, spread
from foveate.ops.knobs import within
from foveate.ops.rows import full
from foveate.reducer import Reducer, Reduction, Tokens


@dataclass(frozen=True)
class DyCoke(Reducer, name="dycoke"):
    """Temporal merging of DyCoke: the first frame of each window, the least similar of the rest.

    Frames come in windows of four. The second is compared with the first, the fourth with the
    third, and the third with the first, token by token in the same place, by cosine; the least
    similar stay. In larger windows the same goes on: an odd frame is compared with the one before,
    an even one with the one before that. The budget is the whole video's: what the first frames
    leave is shared among the others evenly, earlier ones first (released: 0.3 of each, which is a
    budget of 0.475). Where the first frames alone are more than the budget, windows grow frame by
    frame until they fit; below one frame, that many tokens of the first frame are kept, evenly
    spread. Survivors stay in raster order, frame after frame (released: by dissimilarity).

    The released code (KD-TAO/DyCoke) loses an odd last frame, fails at four frames or fewer and is
    made for 196 tokens a frame; none of it here. Its second part, which drops cached tokens during
    decoding, saves no memory there (a copy beside the full cache) and is left out. It refuses
    images.

    Attributes:
        window: frames of which one stays whole.
    """

    video: ClassVar[bool] = True

    window: int = 4

    def __post_init__(self) -> None:
        within(self.name, "window", self.window, 2)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each video."""
        frames, place, wanted = frames_of(self.name, tokens, budget)
        if wanted <= place:
            return spread(tokens, place, wanted)
        window = self.window
        while -(-frames // window) * place > wanted:
            window += 1
        with torch.no_grad():
            x = tokens.x.unflatten(1, (frames, place))
            kept = x.new_ones(x.shape[:3], dtype=torch.bool)
            later = [t for t in range(frames) if t % window]
            if later:
                left = wanted - (frames - len(later)) * place
                kept[:, later] = _least_alike(x, later, window, left)
            order = (~kept.flatten(1)).to(torch.uint8).argsort(dim=-1, stable=True)
        return Reduction(keep=order[:, :wanted], count=full(len(order), wanted))


def _least_alike(x: Tensor, later: list[int], window: int, wanted: int) -> Tensor:
    """Which tokens of the frames ``later`` (F) stay, ``wanted`` in all: (B, F, P) bool."""
    one = torch.tensor(later).to(x.device, non_blocking=True)
    same = likeness(x, one, one - torch.where(one % window % 2 == 0, 2, 1))
    order = same.argsort(dim=-1, stable=True)
    rank = torch.zeros_like(order).scatter(
        -1, order, torch.arange(x.shape[2], device=x.device).expand_as(order)
    )
    share, more = divmod(wanted, len(later))
    quota = share + (torch.arange(len(later), device=x.device) < more).long()
    return rank < quota[:, None]
