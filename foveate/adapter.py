"""Adapters: where a model family keeps its parts. One family, one file, found by ``model_type``."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.cost import TextShape

_FAMILIES: dict[str, type[Adapter]] = {}

Grid = tuple[int, int]  # height, width
Shrink = Callable[[Grid, int], Grid]
Shrunk = tuple[dict[str, Any], list[tuple[Grid, Grid]]]


@dataclass(frozen=True)
class Seen:
    """One call of the watched attention: q ``(B, H, L, d)``, k ``(B, Hkv, L, d)``, after RoPE."""

    q: Tensor
    k: Tensor
    scale: float


@dataclass(frozen=True)
class Observed:
    """The vision encoder's last attention as one group (image or frame) of tokens sees it.

    Attributes:
        q: ``(H, L, d)``; where several patches become one token they are averaged to the token
            grid.
        k: ``(H, L, d)``.
        at: ``(N,)`` the row of each token on L.
        cls: the row of [CLS], or None.
        scale: the attention's scaling.
    """

    q: Tensor
    k: Tensor
    at: Tensor
    cls: int | None
    scale: float


class Adapter(ABC):
    """Where a family keeps its parts.

    Class flags:
        family: the name people use.
        model_types: the ``config.model_type`` values it serves.
        positions: ``compact`` when the LLM numbers the shorter prompt anew (1-D RoPE), ``keep``
            when survivors keep the place they had (M-RoPE).
        aligned: whether the projector's input rows are exactly the LLM's vision tokens, so that
            methods of site ``features`` act there; elsewhere they act on projected tokens.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[str] = "compact"
    aligned: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for model_type in cls.model_types:
            _FAMILIES[model_type] = cls

    def base(self, model: nn.Module) -> nn.Module:
        """The module that mixes text and vision: it has ``forward`` and ``get_image_features``."""
        return cast(nn.Module, model.model)

    def text(self, model: nn.Module) -> nn.Module:
        """The text model: it has ``layers``."""
        return cast(nn.Module, self.base(model).language_model)

    def vision_attention(self, model: nn.Module) -> nn.Module:
        """The attention module of the vision encoder's last layer."""
        return last_attention(cast(nn.Module, self.base(model).vision_tower))

    def projector(self, model: nn.Module) -> nn.Module:
        """The module whose input are the encoder's features; used where ``aligned``."""
        return cast(nn.Module, self.base(model).multi_modal_projector)

    def placeholders(self, model: nn.Module) -> Mapping[str, int]:
        """The placeholder id of each modality."""
        config = cast(Any, model.config)
        return {"image": config.image_token_id}

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        """Split each item (one image or video of ``sizes[i]`` tokens) into images or frames."""
        return [[size] for size in sizes]

    def grids(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[Grid | None]:
        """(height, width) of each group of ``sizes[g]`` tokens that is a full raster, else None."""
        sides = [math.isqrt(size) for size in sizes]
        return [(s, s) if s * s == n else None for s, n in zip(sides, sizes, strict=True)]

    @abstractmethod
    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        """What the last vision attention saw, one entry per group."""

    def shrink(
        self,
        model: nn.Module,
        modality: str,
        call: Mapping[str, Any],
        shape: Shrink,
        count: Callable[[int], int],
    ) -> Shrunk:
        """The call with smaller images, and (old grid, new grid) of each group.

        Args:
            call: the arguments of ``get_image_features``.
            shape: (grid, budget) to the new grid.
            count: tokens of a group to its budget.
        """
        raise NotImplementedError(
            f"downsample cannot work on {self.family}: its packing of tiles is tied to the input "
            "size. Use pool, which averages the tokens instead."
        )


def family(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        ValueError: for a model type that none serves, with those that are.
    """
    known = families()
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in known:
        raise ValueError(
            f"foveate does not know the model type {model_type!r}. Known: {', '.join(known)}. "
            "Run `foveate models` for what works with what."
        )
    return known[model_type]()


def families() -> Mapping[str, type[Adapter]]:
    """All adapters by ``model_type``."""
    package = importlib.import_module("foveate.adapters")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_FAMILIES.items()))


def vision_rows(model: nn.Module, ids: Tensor) -> Tensor:
    """Which rows of a prompt are placeholders of images or video, ``(B, L)`` bool."""
    where = torch.zeros_like(ids, dtype=torch.bool)
    for placeholder in family(model).placeholders(model).values():
        where |= ids == placeholder
    return where


def text_shape(text: nn.Module) -> TextShape:
    """The cost-relevant sizes of a text model, from its config."""
    config = cast(Any, text.config)
    heads = config.num_attention_heads
    return TextShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        bytes_per_value=next(text.parameters()).element_size(),
    )


def last_attention(tower: nn.Module) -> nn.Module:
    """The last attention module of a vision encoder: the one that holds its query projection."""
    owners = [m for m in tower.modules() if "q_proj" in dict(m.named_children())]
    if not owners:
        raise ValueError(
            f"{type(tower).__name__} has no attention with a q_proj, so foveate cannot see its "
            "queries and keys; use a method that does not need attention, such as pool."
        )
    return owners[-1]


def whole_images(seen: Sequence[Seen], *, has_cls: bool) -> list[Observed]:
    """Observations of an encoder that sees one image per batch row, [CLS] first if there is one."""
    first, cls = int(has_cls), 0 if has_cls else None
    found = []
    for s in seen:
        at = torch.arange(first, s.q.shape[2], device=s.q.device)
        pairs = zip(s.q.unbind(0), s.k.unbind(0), strict=True)
        found += [Observed(q, k, at, cls, s.scale) for q, k in pairs]
    return found


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Images ``(…, C, H, W)`` made smaller, antialiased, in their own dtype."""
    small = nn.functional.interpolate(
        pixels.flatten(0, -4).float(), size=(height, width), mode="bilinear", antialias=True
    )
    return small.to(pixels.dtype).reshape(*pixels.shape[:-2], height, width)
