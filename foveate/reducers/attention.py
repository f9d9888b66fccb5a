"""Attention: the ranking of G-Search and P-Sigmoid. arXiv 2412.00556."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.ops.attention import instruction_rows, last_row, observed, received
from foveate.ops.knobs import one_of
from foveate.reducer import Scorer, Tokens

QUERIES = ("instruction", "last")


@dataclass(frozen=True)
class Attention(Scorer, name="attention"):
    """Keep the tokens that the instruction attends to in the layer just crossed.

    The score is the mean over heads and instruction tokens of the softmax row over the whole
    visible sequence. The paper calls itself prompt-aware; which queries and how heads are pooled,
    it does not say where we could read: this is our reading, and ``query`` offers FastV's.

    Attributes:
        query: ``instruction``, the text after the last vision token, or ``last``, the last row.
    """

    site: ClassVar[str] = "layers"
    needs_attention: ClassVar[bool] = True

    query: str = "instruction"

    def __post_init__(self) -> None:
        one_of(self.name, "query", self.query, QUERIES)

    def score(self, tokens: Tokens) -> Tensor:
        """Attention received by each token (B, N)."""
        q, k, at = observed(self.name, tokens)
        rows = instruction_rows if self.query == "instruction" else last_row
        queries, weight = rows(tokens)
        attn = received(
            q, k, queries, weight, scale=tokens.scale, rows=tokens.rows, causal=tokens.causal
        )
        return attn.gather(1, at)
