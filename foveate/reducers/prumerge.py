"""PruMerge: keep the tokens that [CLS] attends to, merge the others into them. arXiv 2403.15388."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.ops.knobs import one_of, within
from foveate.ops.outliers import outlier_count
from foveate.ops.prumerge import ORDERS, WEIGHTS, Image, Rule, look, merge
from foveate.ops.rows import full, one_budget, settled, unchanged
from foveate.reducer import Reducer, Reduction, Tokens


@dataclass(frozen=True)
class PruMerge(Reducer, name="prumerge"):
    """The most attended tokens, each with its nearest neighbours added, and one extra token.

    Attention is that of the vision encoder's last layer in one head of full width
    (``cls_attention``). Without a budget an image keeps as many tokens as have outlying attention:
    above Q3 + fence·IQR.

    A budget counts the extra token: K survivors are the K - 1 most attended and the extra one; K =
    1 is the most attended token alone; K = N changes nothing.

    Where the released code (42Shawn/LLaVA-PruMerge) differs from the paper, it is followed: cosine
    of keys, neighbours among all other tokens, sums not normalised, an extra token, output by
    descending attention. Where we leave it: outliers are counted image by image (released: over the
    flattened batch), exactly (released: ``int(N · ratio)``, which can lose one), and an image
    without any keeps its most attended token and the extra one (released: the extra one alone).

    Attributes:
        neighbours: tokens added to each kept one, N - 1 at most.
        fence: interquartile ranges above the third quartile from which on attention is outlying.
        order: ``attention``, survivors by descending attention and then the extra token, or
            ``raster``.
        weights: ``released`` (``x_i + Σ a_j x_j``) or ``paper`` (the average of x_i and its nearest
            pruned tokens, weighted by a).
        extra: append ``Σ a_j x_j`` over all pruned tokens. It takes the largest slot not kept.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    neighbours: int = 32
    fence: float = 1.5
    order: str = "attention"
    weights: str = "released"
    extra: bool = True

    def __post_init__(self) -> None:
        one_of(self.name, "order", self.order, ORDERS)
        one_of(self.name, "weights", self.weights, WEIGHTS)
        within(self.name, "neighbours", self.neighbours, 0)
        within(self.name, "fence", self.fence, 0)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens, or as many as the attention asks for."""
        wanted = None if budget is None else one_budget(self.name, budget)
        if (done := settled(tokens, wanted)) is not None:
            return done
        if tokens.x.shape[1] == 1:
            return unchanged(tokens)
        image = look(self.name, tokens)
        extra = self.extra and wanted != 1
        if wanted is None:
            kept, count = self.adapted(image.attn)
        else:
            kept = self.chosen(image.attn, wanted - int(extra))
            count = full(*kept.shape)
        return self.merged(image, kept, count, extra)

    def merged(self, image: Image, kept: Tensor, count: Tensor, extra: bool) -> Reduction:
        """The tokens ``kept`` (B, M), the first ``count[b]`` of each, with the others in them."""
        return merge(image, kept, count, Rule(self.neighbours, self.weights, extra, self.order))

    def adapted(self, attn: Tensor) -> tuple[Tensor, Tensor]:
        """The outlying tokens, (B, M) by descending attention (B, N), and their counts (B,)."""
        count = outlier_count(attn, self.fence).clamp(min=1).cpu()
        return self.chosen(attn, int(count.max())), count

    def chosen(self, attn: Tensor, wanted: int) -> Tensor:
        """The ``wanted`` most attended tokens, (B, wanted)."""
        return attn.argsort(dim=-1, descending=True, stable=True)[:, :wanted]
