"""Random: the baseline that every ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.ops.rows import slots
from foveate.reducer import Scorer, Tokens

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Random(Scorer, name="random"):
    """Keep tokens at random, by a hash of slot and seed.

    No generator: nothing to carry along, and a group gets the same tokens alone and in any batch.
    Groups of one batch therefore get the same slots as each other.

    Attributes:
        seed: another number, another choice.
    """

    seed: int = 0

    def score(self, tokens: Tokens) -> Tensor:
        """Pseudo-random numbers in [0, 1), (B, N)."""
        mixed = _mix(slots(tokens.x) + _offset(self.seed))
        return (mixed >> 8).float() / (1 << 24)  # 24 bits are exact in float32


def _offset(seed: int) -> int:
    """Seeds far apart, so that neighbouring ones do not give shifted copies of one sequence."""
    return (seed * 0x9E3779B9 + 0x7F4A7C15) & _MASK


def _mix(state: Tensor) -> Tensor:
    """A 32-bit integer finaliser, in int64 without overflow: the multiplier has 27 bits."""
    for _ in range(2):
        state = ((state ^ (state >> 16)) & _MASK) * 0x45D9F3B & _MASK
    return state ^ (state >> 16)
