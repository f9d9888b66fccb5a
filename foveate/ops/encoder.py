"""What the vision encoder says of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.attention import observed, received
from foveate.reducer import Tokens


def attended(name: str, tokens: Tokens) -> Tensor:
    """Attention of [CLS] to each token, softmaxed over all rows, mean over heads: (B, N).

    Where the encoder has no [CLS], the attention that a token receives from all tokens, on the
    mean, as EffiVLM-Bench does for SigLIP.

    Args:
        name: the method that asks, for the message.
        tokens: with q, k and at.

    Raises:
        ValueError: when nothing was observed.
    """
    q, k, at = observed(name, tokens)
    if tokens.cls is None:
        queries, weight = at, tokens.valid / tokens.valid.sum(dim=-1, keepdim=True).clamp(min=1)
    else:
        queries = torch.full_like(at[:, :1], tokens.cls)
        weight = torch.ones_like(queries, dtype=torch.float32)
    mean = received(
        q, k, queries, weight, scale=tokens.scale, rows=tokens.rows, causal=tokens.causal
    )
    return mean.gather(1, at)
