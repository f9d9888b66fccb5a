"""SparseVLM: text tokens that fit the image rate its tokens; some come back. arXiv 2410.04417."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.ops.attention import instruction_rows, observed, received
from foveate.ops.knobs import within
from foveate.ops.peaks import density_peaks
from foveate.ops.rows import full, one_budget, settled, slots, take
from foveate.reducer import Reducer, Reduction, Tokens, top


@dataclass(frozen=True)
class SparseVLM(Reducer, name="sparsevlm"):
    """Keep what the text raters attend to, and put clusters of the best of the rest beside it.

    Raters are the instruction's tokens whose share of the image is above the mean: softmax over the
    instruction of the dot products of its input embeddings with those of all vision tokens, mean
    over vision tokens. A vision token's score is the attention it gets from the raters' rows, mean
    over heads and raters. Of the M tokens dropped, the ``int(recycle · M) + 1`` best, m of them,
    are put into ``m // 10 + 1`` clusters by density peaks, and each cluster's mean takes the
    slot of its centre. Kept tokens and clusters together are the budget.

    The released code (Gumpest/SparseVLMs, first version) is followed, where it has budgets of its
    own for kept tokens and adds the clusters to them; in ``foveate.recipe("sparsevlm")`` are those
    budgets. Left are: its random noise on densities (here equal densities go by slot); clusters
    behind the kept tokens (here rows of the LLM stay in raster order); raters of any kind if none
    is above the mean, as for an instruction of one token (here the whole instruction rates; the
    last row where there is none). The paper's layer-wise ratio from the rank of the attention map
    is not in that code: the schedule counts. Neighbours for the densities are not in the
    description that we wrote from.

    Attributes:
        recycle: share of the dropped tokens that goes into clusters; 0 recycles none.
        neighbours: nearest tokens that make up a density.
    """

    site: ClassVar[str] = "layers"
    needs_attention: ClassVar[bool] = True

    recycle: float = 0.3
    neighbours: int = 5

    def __post_init__(self) -> None:
        within(self.name, "recycle", self.recycle, 0, 1)
        within(self.name, "neighbours", self.neighbours, 1)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep and cluster each group down to ``budget[b]`` tokens."""
        wanted, size = one_budget(self.name, budget), tokens.x.shape[1]
        if (done := settled(tokens, wanted)) is not None:
            return done
        with torch.no_grad():
            score = self.score(tokens)
            order = score.argsort(dim=-1, descending=True, stable=True)
        kept, pool, clusters = self.split(size, wanted)
        if clusters == 0:
            return top(score, tokens.valid, [wanted] * len(order))
        best = order[:, kept : kept + pool].sort(dim=-1).values
        centre, member = density_peaks(take(tokens.x, best), clusters, self.neighbours)
        return _recycled(tokens.x, order[:, :kept], best, centre, member)

    def split(self, size: int, wanted: int) -> tuple[int, int, int]:
        """Tokens kept, tokens for clusters and clusters, out of ``size`` tokens for ``wanted``.

        As many are kept as leave room for the clusters of what is dropped; one at least.
        """
        if self.recycle == 0 or wanted == 1:
            return wanted, 0, 0

        def pool(kept: int) -> int:
            return min(int(self.recycle * (size - kept)) + 1, size - kept)

        fitting = (t for t in range(wanted - 1, 0, -1) if t + pool(t) // 10 + 1 <= wanted)
        kept = next(fitting, 1)
        return kept, pool(kept), wanted - kept

    def score(self, tokens: Tokens) -> Tensor:
        """Attention of the raters to each token (B, N)."""
        q, k, at = observed(self.name, tokens)
        queries, weight = instruction_rows(tokens)
        weight = self.rating(tokens, weight)
        attn = received(
            q, k, queries, weight, scale=tokens.scale, rows=tokens.rows, causal=tokens.causal
        )
        return attn.gather(1, at)

    def rating(self, tokens: Tokens, weight: Tensor) -> Tensor:
        """``weight`` (B, R) of the instruction's rows, narrowed to the raters."""
        if tokens.embeds is None or tokens.entered is None:
            raise ValueError(
                f"{self.name} reads the text's input embeddings and was given none: pass Tokens "
                "with embeds and entered, or use 'attention', which takes the whole instruction."
            )
        share = relevance(tokens.embeds, tokens.entered, weight > 0)
        count = (weight > 0).sum(dim=-1, keepdim=True)
        rates = (weight > 0) & (share > share.sum(dim=-1, keepdim=True) / count)
        rates = torch.where(rates.any(dim=-1, keepdim=True), rates, weight > 0)
        return rates.to(share.dtype) / rates.sum(dim=-1, keepdim=True)


def relevance(embeds: Tensor, vision: Tensor, text: Tensor) -> Tensor:
    """How much of the image each of the last rows stands for, (B, R); 0 outside ``text``.

    Args:
        embeds: ``(B, L, D)``, rows as they entered the LLM.
        vision: ``(B, L)`` bool, the vision rows.
        text: ``(B, R)`` bool, which of the last R rows are text that counts.
    """
    work = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    logits = work @ work[:, work.shape[1] - text.shape[1] :].mT  # (B, L, R)
    logits = logits.masked_fill(~text[:, None], torch.finfo(logits.dtype).min)
    share = logits.softmax(dim=-1).masked_fill(~(vision[..., None] & text[:, None]), 0)
    return share.sum(dim=1) / vision.sum(dim=-1, keepdim=True).clamp(min=1)


def _recycled(x: Tensor, kept: Tensor, best: Tensor, centre: Tensor, member: Tensor) -> Reduction:
    """The kept slots (B, T) as they are and the means of the clusters of ``best`` (B, m)."""
    groups, width = x.shape[0], kept.shape[1] + centre.shape[1]
    keep = torch.cat((kept, best.gather(1, centre)), dim=1)
    work = take(x, best).to(torch.promote_types(x.dtype, torch.float32))
    of = (member[:, None] == slots(centre)[..., None]).to(work.dtype)  # (B, C, m)
    means = (of @ work / of.sum(dim=-1, keepdim=True)).to(x.dtype)
    order = keep.argsort(dim=-1)
    place = torch.zeros_like(order).scatter(1, order, slots(order))
    group = torch.full(x.shape[:2], -1, dtype=torch.long, device=x.device)
    group = group.scatter(1, best, place.gather(1, member + kept.shape[1]))
    group = group.scatter(1, keep, place)
    vectors = take(torch.cat((take(x, kept), means), dim=1), order)
    return Reduction(keep.gather(1, order), full(groups, width), vectors, group)
