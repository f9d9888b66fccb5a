"""FasterVLM: keep the tokens that [CLS] attends to. arXiv 2412.01818."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.ops.encoder import attended
from foveate.reducer import Scorer, Tokens


@dataclass(frozen=True)
class FasterVLM(Scorer, name="fastervlm"):
    """Rank by the attention of [CLS] in the layer that gives the features, on the mean of heads.

    From the first version of the paper, which became VisPruner's. As released
    (Theia-4869/FasterVLM): the last layer but one of CLIP, survivors in raster order. Where an
    encoder has no [CLS], which the release does not serve, the attention received from all tokens
    stands in.
    """

    site: ClassVar[str] = "features"
    needs_attention: ClassVar[bool] = True
    encoder: ClassVar[str] = "features"

    def score(self, tokens: Tokens) -> Tensor:
        """Attention of [CLS] (B, N)."""
        return attended(self.name, tokens)
