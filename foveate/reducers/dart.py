"""DART: keep tokens that duplicate neither a few pivots nor each other. arXiv 2502.11494."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.attention import observed
from foveate.ops.diversity import least_alike, unit
from foveate.ops.knobs import within
from foveate.ops.rows import slots, take
from foveate.reducer import Reducer, Reduction, Tokens, needed, top


@dataclass(frozen=True)
class Dart(Reducer, name="dart"):
    """Pivots are the tokens of largest keys; each takes an equal share of what is least like it.

    Key size is the L1 norm over all heads of the layer just crossed, after RoPE. Pivots are the
    largest vision tokens, which are kept, and the largest of the instruction, which as text stay
    anyway. Each pivot in turn takes, from the vision tokens not taken yet, those with the lowest
    cosine of hidden states; survivors stay in raster order and keep their positions.

    As released, in the port that we could read (ModelTC/LightCompress). Where we leave it: the
    budget is met exactly, pivots taking equal shares and the first ones one more (released: ``4 +
    8 · int(budget / 8)``); vision pivots come before text pivots, each by descending key size
    (released: the order in which Python iterates a set of ints); hidden states are compared as
    they are (released: after the model's final norm, which a method does not see).

    Attributes:
        image_pivots: vision tokens that are pivots, as far as the budget goes.
        text_pivots: instruction rows that are pivots, as far as there are any.
    """

    site: ClassVar[str] = "layers"
    needs_attention: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        within(self.name, "image_pivots", self.image_pivots, 1)
        within(self.name, "text_pivots", self.text_pivots, 0)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each sample."""
        wanted = needed(self.name, budget)
        with torch.no_grad():
            return top(self.kept(tokens, wanted).float(), tokens.valid, wanted)

    def kept(self, tokens: Tokens, wanted: Sequence[int]) -> Tensor:
        """Which tokens survive, (B, N) bool."""
        if tokens.hidden is None:
            raise ValueError(
                f"{self.name} compares vision tokens with text and was given no hidden states of "
                "the prompt: pass Tokens with hidden."
            )
        _, k, at = observed(self.name, tokens)
        size = k.to(torch.promote_types(k.dtype, torch.float32)).abs().sum(dim=(1, 3))  # (B, L)
        count = torch.tensor(list(wanted)).to(at.device, non_blocking=True)[:, None]
        own = size.gather(1, at).masked_fill(~tokens.valid, -torch.inf)
        image = own.argsort(dim=-1, descending=True, stable=True)[:, : self.image_pivots]
        real = slots(image) < count
        text, spoken = self.spoken(tokens, size)
        pivots = torch.cat((take(tokens.x, image), take(tokens.hidden, text)), dim=1)
        cosine = unit(pivots) @ unit(tokens.x).mT
        chosen = torch.zeros_like(tokens.valid).scatter(1, image, real)
        quota = shares(count - real.sum(dim=-1, keepdim=True), torch.cat((real, spoken), dim=1))
        return chosen | least_alike(cosine, tokens.valid & ~chosen, quota)

    def spoken(self, tokens: Tokens, size: Tensor) -> tuple[Tensor, Tensor]:
        """The largest instruction rows (B, P) by key ``size`` (B, L), and which of them there are.

        The last ``instruction[b]`` rows of L are the instruction.
        """
        counts = torch.tensor(tokens.instruction or (0,) * len(size))
        counts = counts.to(size.device, non_blocking=True)[:, None]
        inside = slots(size) >= size.shape[1] - counts
        rows = size.masked_fill(~inside, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rows = rows[:, : self.text_pivots]
        return rows, slots(rows) < counts


def shares(total: Tensor, real: Tensor) -> Tensor:
    """``total`` (B, 1) in equal shares for the ``real`` (B, P), the first ones one more: (B, P)."""
    among = real.sum(dim=-1, keepdim=True).clamp(min=1)
    place = real.cumsum(dim=-1) - 1
    return (total // among + (place < total % among)) * real
