"""A few rows of an attention map, computed beside the fast kernel that never writes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.ops.rows import take
from foveate.reducer import Tokens

# Rows of the map made at a time by `received`.
_BYTES = 64 << 20


def observed(name: str, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """The q (B, H, L, d), k (B, Hkv, L, d) and at (B, N) of the attention just crossed.

    Raises:
        ValueError: when nothing was observed.
    """
    if tokens.q is None or tokens.k is None or tokens.at is None:
        raise ValueError(
            f"{name} reads the attention just crossed and was given none: pass Tokens with q, k "
            "and at, or use a method that reads only the vectors, such as 'pool' or 'random'."
        )
    return tokens.q, tokens.k, tokens.at


def key_rows(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmaxed attention of some rows over the whole visible sequence.

    Args:
        q: queries, ``(B, H, L, d)``.
        k: keys, ``(B, Hkv, L, d)``; query head h reads key head h·Hkv//H.
        queries: ``(B, R)`` long, the rows wanted.
        scale: the attention's scaling of q·k.
        rows: ``(B, L)`` bool, the real keys; None means all.
        causal: whether row i sees only keys up to i.

    Returns:
        ``(B, H, R, L)``, float32 (float64 for float64 inputs).
    """
    (batch, heads, _, width), shared = q.shape, k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    index = queries[:, None, :, None].expand(-1, heads, -1, width)
    picked = q.gather(2, index).to(work) * scale
    # Query heads that share a key head become rows of one product: keys are not repeated.
    logits = picked.reshape(batch, shared, -1, width) @ k.to(work).mT
    logits = logits.view(batch, heads, -1, k.shape[2])
    low = torch.finfo(work).min
    if rows is not None:
        logits = logits.masked_fill(~rows[:, None, None], low)
    if causal:
        ahead = torch.arange(k.shape[2], device=k.device) > queries.unsqueeze(-1)  # (B, R, L)
        logits = logits.masked_fill(ahead.unsqueeze(1), low)
    return logits.softmax(dim=-1)


def received(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    weight: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention that each row of L receives: mean over heads, weighted sum over ``queries``.

    Args as in :func:`key_rows`, with ``weight`` (B, R). Returns ``(B, L)``.
    """
    step = max(1, _BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for first in range(0, queries.shape[1], step):
        some = slice(first, first + step)
        mean = key_rows(q, k, queries[:, some], scale=scale, rows=rows, causal=causal).mean(dim=1)
        parts.append((weight[:, None, some].to(mean.dtype) @ mean).squeeze(1))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def instruction_rows(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The instruction's rows and their weights, which sum to 1: ``(B, R)`` long and ``(B, R)``.

    Rows are packed flush right, so the last ``tokens.instruction[b]`` rows of L are the instruction
    of sample b. Without one, the last row speaks.
    """
    q, _, _ = observed("The instruction's attention", tokens)
    size, length = q.shape[0], q.shape[2]
    counts = [max(1, n) for n in tokens.instruction or (1,) * size]
    longest = max(counts)
    queries = torch.arange(length - longest, length, device=q.device).expand(size, -1)
    count = torch.tensor(counts).to(q.device, non_blocking=True)[:, None]
    return queries, (queries >= length - count).float() / count


def last_row(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The last row, with all the weight: ``(B, 1)`` long and ``(B, 1)``."""
    q, _, _ = observed("The last row's attention", tokens)
    queries = torch.full((q.shape[0], 1), q.shape[2] - 1, device=q.device)
    return queries, torch.ones(queries.shape, device=q.device)


def one_head(states: Tensor, at: Tensor) -> Tensor:
    """Heads side by side, on the tokens' rows: (B, H, L, d) and (B, N) to (B, N, H·d)."""
    return take(states.transpose(1, 2).flatten(2), at)


def cls_attention(
    q: Tensor, k: Tensor, at: Tensor, cls: int | None, *, rows: Tensor | None = None
) -> Tensor:
    """How much [CLS] attends to each token, in one head of the encoder's full width C = H·d.

    PruMerge's released code does not split heads: ``softmax(q_cls · k / sqrt(C))`` over all L rows,
    the [CLS] row's own column included, and then the tokens' columns, not renormalised. Where there
    is no [CLS], AIM's SigLIP baseline takes the mean of the tokens' queries and only the tokens'
    keys.

    Args:
        q: queries, ``(B, H, L, d)``.
        k: keys, ``(B, H, L, d)``.
        at: ``(B, N)`` long, the rows of the tokens.
        cls: the row of [CLS], or None.
        rows: ``(B, L)`` bool, the real rows; None means all.

    Returns:
        ``(B, N)``, float32 (float64 for float64 inputs).
    """
    work = torch.promote_types(q.dtype, torch.float32)
    if cls is None:
        query, keys = one_head(q, at).to(work).mean(dim=1), one_head(k, at).to(work)
        logits = (keys @ query.unsqueeze(-1)).squeeze(-1) / math.sqrt(query.shape[-1])
        return logits.softmax(dim=-1)
    query, keys = q[:, :, cls].flatten(1).to(work), k.transpose(1, 2).flatten(2).to(work)
    logits = (keys @ query.unsqueeze(-1)).squeeze(-1) / math.sqrt(query.shape[-1])
    if rows is not None:
        logits = logits.masked_fill(~rows, -torch.inf)
    return logits.softmax(dim=-1).gather(1, at)
