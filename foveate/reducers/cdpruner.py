"""CDPruner: tokens that differ from each other and matter to the question. arXiv 2506.10967."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.attention import instruction_rows, observed, received
from foveate.ops.diversity import cosines, dpp
from foveate.ops.encoder import attended
from foveate.ops.knobs import one_of
from foveate.reducer import Reducer, Reduction, Tokens, leading, needed

RELEVANCE = ("attention", "none")


@dataclass(frozen=True)
class CDPruner(Reducer, name="cdpruner"):
    """The greedy most probable set of a DPP with kernel ``relevance_i · cosine_ij · relevance_j``.

    As released (Theia-4869/CDPruner): cosines of projected tokens, relevance stretched to 0…1, as
    many greedy steps as tokens are kept, survivors in raster order.

    Relevance is a substitute. The release takes (minus) the cosine of CLIP's image and text
    embeddings, and no Hugging Face checkpoint carries the text tower. Here it is attention, on the
    mean of heads: inside the LLM that of the instruction in the layer just crossed, which asks for
    the question as the paper does; at the entrance, where no text is, that of [CLS] in the layer
    that gives the features (``fastervlm``), which does not.

    Where we leave the released code: relevance is stretched group by group (released: over the
    batch), and a budget above the kernel's rank (released: NaN and too few tokens) is filled with
    the most relevant of the tokens that are left.

    Attributes:
        relevance: ``attention``, or ``none``: all tokens alike, the plain DPP.
    """

    needs_attention: ClassVar[bool] = True
    encoder: ClassVar[str] = "features"
    ragged: ClassVar[bool] = True

    relevance: str = "attention"

    def __post_init__(self) -> None:
        one_of(self.name, "relevance", self.relevance, RELEVANCE)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each group."""
        wanted = needed(self.name, budget)
        with torch.no_grad():
            order = dpp(cosines(tokens.x), self.weights(tokens), tokens.valid, max(wanted))
        return leading(order, tokens.x.shape[1], wanted)

    def weights(self, tokens: Tokens) -> Tensor:
        """The relevance of each token, 1e-6 to 1 + 1e-6, (B, N)."""
        if self.relevance == "none":
            return torch.ones_like(tokens.valid, dtype=torch.float32)
        if tokens.instruction is None:
            return stretched(attended(self.name, tokens), tokens.valid)
        q, k, at = observed(self.name, tokens)
        queries, weight = instruction_rows(tokens)
        attn = received(
            q, k, queries, weight, scale=tokens.scale, rows=tokens.rows, causal=tokens.causal
        )
        return stretched(attn.gather(1, at), tokens.valid)


def stretched(score: Tensor, valid: Tensor) -> Tensor:
    """``score`` (B, N) from 1e-6 for the lowest valid token of a group to 1 + 1e-6."""
    low = score.masked_fill(~valid, torch.inf).amin(dim=-1, keepdim=True)
    above = (score - low).masked_fill(~valid, 0)
    reach = above.amax(dim=-1, keepdim=True)
    return above / reach.clamp(min=torch.finfo(score.dtype).tiny) + 1e-6
