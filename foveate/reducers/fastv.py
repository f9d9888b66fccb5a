"""FastV: the last row's attention. arXiv 2403.06764."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.ops.attention import last_row, observed, received
from foveate.reducer import Scorer, Tokens


@dataclass(frozen=True)
class FastV(Scorer, name="fastv"):
    """Keep the tokens that the last prompt row attends to, on the mean of heads.

    The paper speaks of the attention received from all rows; the released code, which this follows,
    takes the last row only (issues 14 and 44 there). Of its four variants, which differ in where
    the image starts and in rounding, none is followed: the schedule counts and the session knows
    the image.
    """

    site: ClassVar[str] = "layers"
    needs_attention: ClassVar[bool] = True

    def score(self, tokens: Tokens) -> Tensor:
        """Attention of the last row (B, N)."""
        q, k, at = observed(self.name, tokens)
        queries, weight = last_row(tokens)
        attn = received(
            q, k, queries, weight, scale=tokens.scale, rows=tokens.rows, causal=tokens.causal
        )
        return attn.gather(1, at)
