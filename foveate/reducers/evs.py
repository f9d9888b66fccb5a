"""EVS: of a video, the first frame and then only what changes. arXiv 2510.14624."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.ops.film import frames_of, likeness, spread
from foveate.reducer import Reducer, Reduction, Tokens, top


@dataclass(frozen=True)
class EVS(Reducer, name="evs"):
    """Keep the first frame and the tokens least like those in their place one frame earlier.

    Efficient Video Sampling. The budget is the whole video's: the K - P tokens of lowest cosine
    among all later frames, P tokens being one frame, survivors in raster order, frame after frame.
    The paper compares patches by the L1 distance of their pixels; engines that serve it (vLLM,
    TensorRT-LLM) compare embeddings by cosine, and so is it done here, where pixels are not seen.
    They keep a whole frame when less is asked for; here a budget below one frame takes that many
    tokens of the first frame, evenly spread. Positions stay where the family keeps them (M-RoPE).

    It refuses images, which have no earlier frame.
    """

    video: ClassVar[bool] = True

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep ``budget[b]`` tokens of each video."""
        frames, place, wanted = frames_of(self.name, tokens, budget)
        if wanted <= place:
            return spread(tokens, place, wanted)
        with torch.no_grad():
            x = tokens.x.unflatten(1, (frames, place))
            later = torch.arange(1, frames, device=x.device)
            new = -likeness(x, later, later - 1)  # (B, frames - 1, P)
            first = torch.full_like(x[:, :1, :, 0], torch.inf, dtype=new.dtype)
            score = torch.cat((first, new), dim=1).flatten(1)
            return top(score, tokens.valid, [wanted] * len(score))
