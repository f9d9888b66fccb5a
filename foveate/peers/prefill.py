"""What peers need to know of a prompt: its vision rows, and masks that eager attention can add."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.adapter import family, vision_rows
from foveate.report import Report


@dataclass
class Prefill:
    """The rows of a prompt in the text model.

    Attributes:
        running: whether the forward under way is that of a prompt with vision tokens.
        real: ``(B, rows)`` bool, rows that are not padding.
        vision: ``(B, rows)`` bool.
        original: vision tokens of each sample before any reduction.
    """

    running: bool = False
    real: Tensor = field(default_factory=lambda: torch.empty(0))
    vision: Tensor = field(default_factory=lambda: torch.empty(0))
    original: list[int] = field(default_factory=list)


@contextmanager
def watched(model: nn.Module, report: Report) -> Iterator[Prefill]:
    """Keep track of prompts that go through a model; padding must be on the left.

    Args:
        model: the multimodal model, reduced by foveate at the entrance at most.
        report: of that reduction, filled when the text model's first layer begins.
    """
    adapter, now = family(model), Prefill()
    given: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given["ids"] = args[0] if args else kwargs["input_ids"]
        now.running = bool(vision_rows(model, given["ids"]).any())

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not now.running:
            return
        flags = vision_rows(model, given["ids"])
        rows, slots = args[0].shape[1], report.slots[0]
        now.original = flags.sum(-1).tolist()
        now.real, now.vision = (torch.zeros(len(slots), rows, dtype=torch.bool) for _ in range(2))
        for b, kept in enumerate(slots):
            now.real[b, rows - len(kept) :] = True
            now.vision[b, rows - len(kept) :] = flags[b, kept.to(flags.device)].cpu()
        now.real, now.vision = now.real.to(flags.device), now.vision.to(flags.device)

    first = cast(nn.ModuleList, adapter.text(model).layers)[0]
    with ExitStack() as stack:
        stack.callback(
            adapter.base(model).register_forward_pre_hook(enter, with_kwargs=True).remove
        )
        stack.callback(first.register_forward_pre_hook(begin, with_kwargs=True).remove)
        yield now


def additive(mask: Any, rows: int, keys: int, like: Tensor) -> Tensor:
    """The mask of any kernel in the form that eager attention adds, ``(B or 1, 1, rows, keys)``.

    Args:
        mask: None (causal), ``(B, keys)`` or ``(B, 1, rows, keys)``.
        rows: queries, the last of the keys.
        keys: keys.
        like: for dtype and device.
    """
    low = torch.finfo(like.dtype).min
    allowed = torch.ones(rows, keys, dtype=torch.bool, device=like.device).tril(keys - rows)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype != torch.bool:
        return mask[..., :keys]
    if isinstance(mask, Tensor):
        seen = mask[..., :keys].bool()
        allowed = seen if mask.ndim == 4 else allowed & seen[:, None, None]
    else:
        allowed = allowed[None, None]
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~allowed, low
    )


def eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that writes its map: the output (B, L, H, d), the map and its logits (B, H, L, L).

    As eager attention of transformers: keys repeated for every query head, the softmax in float32.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query @ key.mT * scale + mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights, logits


Kernel = Callable[..., tuple[Tensor, Tensor | None]]
_NAME = "foveate_peer"


@contextmanager
def instead(attention: nn.Module, kernel: Kernel) -> Iterator[None]:
    """Let an attention module use ``kernel`` for its own; masks are made as before."""
    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(_NAME, _called)
    plain = cast(Any, attention).config
    changed = copy.copy(plain)
    changed._attn_implementation_internal = _NAME
    changed.foveate_peer = _Shared(kernel)
    cast(Any, attention).config = changed
    try:
        yield
    finally:
        cast(Any, attention).config = plain


@dataclass(frozen=True)
class _Shared:
    """Copies of a config share what is in here."""

    kernel: Kernel


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return cast(_Shared, cast(Any, module).config.foveate_peer).kernel(module, *args, **kwargs)
