"""PageRank: AIM's importance of a token inside the LLM. arXiv 2412.03248."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.ops.attention import observed
from foveate.ops.knobs import within
from foveate.ops.pagerank import pagerank
from foveate.reducer import Scorer, Tokens


@dataclass(frozen=True)
class PageRank(Scorer, name="pagerank"):
    """Keep the tokens that important rows attend to.

    Rows start with equal mass and pass it along the attention, sharpened to a softmax at
    ``temperature``; the root mean square over heads after some steps is the score. Text and vision
    rows alike vote, but only vision tokens are ranked: the released code protects text by a score
    of 1, here it is not up for choice.

    The paper has no temperature, heads or step count in what we could read; these are the released
    code's. There, rows of tokens pruned earlier go on voting, since they are only masked; here they
    are gone. Its finite-precision ties (scores of exactly 0) fall to the earlier token here.

    Attributes:
        temperature: divides the attention logits.
        iterations: steps.
        damping: share of mass spread evenly in each step.
    """

    site: ClassVar[str] = "layers"
    needs_attention: ClassVar[bool] = True

    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        within(self.name, "temperature", self.temperature, 0, open_low=True)
        within(self.name, "iterations", self.iterations, 1)
        within(self.name, "damping", self.damping, 0, 1)

    def score(self, tokens: Tokens) -> Tensor:
        """Importance of each token (B, N)."""
        q, k, at = observed(self.name, tokens)
        importance = pagerank(
            q,
            k,
            scale=tokens.scale,
            temperature=self.temperature,
            iterations=self.iterations,
            damping=self.damping,
            alive=tokens.rows,
            voters=tokens.rows,
            causal=tokens.causal,
        )
        return importance.gather(1, at)
