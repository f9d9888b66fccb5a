"""Adapters: where a model family keeps its parts. One family, one file, found by ``model_type``."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.cost import TextShape

_FAMILIES: dict[str, type[Adapter]] = {}

Grid = tuple[int, int]  # height, width
Shrink = Callable[[Grid], Grid]
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
        model_types: the ``config.model_type`` values it serves; ``a+b`` is type a with a vision
            encoder of type b, and goes before a.
        modalities: what it takes beside text: ``image``, ``video``.
        positions: ``compact`` when the LLM numbers the shorter prompt anew (1-D RoPE), ``keep``
            when survivors keep the place they had (M-RoPE).
        aligned: whether the projector's input rows are exactly the LLM's vision tokens, so that
            methods of site ``features`` act there; elsewhere they act on projected tokens.
        deepstack: whether the text model adds vision features to vision rows after its first
            layers (arguments ``visual_pos_masks`` and ``deepstack_visual_embeds``).
        guessed: whether this stands in for a model type that has no adapter of its own.
        blind: why nobody can see the encoder's queries and keys, or empty where foveate can.
        fixed: why smaller input images cannot be encoded; said where :meth:`shrink` is missing.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    positions: ClassVar[str] = "compact"
    aligned: ClassVar[bool] = True
    deepstack: ClassVar[bool] = False
    guessed: ClassVar[bool] = False
    blind: ClassVar[str] = ""
    fixed: ClassVar[str] = "its token grid is tied to the input size"

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

    def beside_text(self, model: nn.Module) -> list[nn.Module]:
        """Encoders, projectors and whatever else the base runs besides the text model."""
        text = self.text(model)
        return [part for part in self.base(model).children() if part is not text]

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Logits of the text model's last hidden states."""
        return cast(Tensor, cast(Any, model).get_output_embeddings()(hidden))

    def vision_attention(self, model: nn.Module) -> nn.Module:
        """The attention module of the vision encoder's last layer."""
        return last_attention(cast(nn.Module, self.base(model).vision_tower))

    def vision_attentions(self, model: nn.Module) -> Sequence[nn.Module]:
        """The attention modules to watch: one, or one of each encoder where there are several."""
        return [self.vision_attention(model)]

    def feature_attention(self, model: nn.Module, last: nn.Module) -> nn.Module:
        """The attention module of the encoder layer whose output the model takes as features.

        Args:
            last: that of the encoder's last layer, which it is unless ``vision_feature_layer``
                names another.
        """
        layer = getattr(model.config, "vision_feature_layer", -1)
        if not isinstance(layer, int) or layer in (-1, 0):  # several layers, or none
            return last
        if (numbered := _numbered(model, last)) is None:
            return last
        name, index = numbered
        # Feature 0 are the embeddings, so feature n > 0 leaves layer n - 1.
        return model.get_submodule(name.format(layer - 1 if layer > 0 else index + 1 + layer))

    def middle_attention(self, model: nn.Module, last: nn.Module, depth: float) -> nn.Module:
        """The attention of layer ``depth · layers`` of the encoder whose last one is ``last``."""
        name, index = cast(tuple[str, int], _numbered(model, last))
        return model.get_submodule(name.format(round(depth * (index + 1))))

    def projector(self, model: nn.Module) -> nn.Module:
        """The module whose input are the encoder's features; used where ``aligned``."""
        return cast(nn.Module, self.base(model).multi_modal_projector)

    def placeholders(self, model: nn.Module) -> Mapping[str, int]:
        """The placeholder id of each modality."""
        return {name: getattr(model.config, f"{name}_token_id") for name in self.modalities}

    def encoders(self, model: nn.Module) -> Sequence[str]:
        """The modalities that have a ``get_*_features`` call of their own."""
        return list(self.placeholders(model))

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

    def blocks(self, call: Mapping[str, Any]) -> Tensor | None:
        """Rows that see each other whatever their order: ``(B, rows)``, -1 where a row is causal.

        Args:
            call: the arguments of the model's forward.

        Returns:
            The number of each row's block, or None where the language model is causal throughout.
        """
        return None

    def answered(self, call: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
        """The arguments of the model's forward, their last ``rows`` columns marked as an answer."""
        return call

    @abstractmethod
    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        """What the last vision attention saw, one entry per group."""

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        """The call with smaller images, and (old grid, new grid) of each group.

        Args:
            call: the arguments of ``get_image_features``.
            shape: the token grid of a group to its new one.
        """
        raise NotImplementedError(
            f"downsample cannot work on {self.family}: {self.fixed}. Use pool, which averages the "
            "tokens instead."
        )


def family(model: nn.Module) -> Adapter:
    """The adapter of a model; the generic one for an unknown type whose parts are recognised.

    Raises:
        ValueError: for another model type that none serves, with those that are.
    """
    known = families()
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    encoder = getattr(getattr(config, "vision_config", None), "model_type", None)
    if f"{model_type}+{encoder}" in known:
        return known[f"{model_type}+{encoder}"]()
    if model_type in known:
        return known[model_type]()
    generic = importlib.import_module("foveate.adapters.generic").recognised(model)
    if generic is None:
        raise ValueError(
            f"foveate does not know the model type {model_type!r}. Known: {', '.join(known)}. "
            "Run `foveate models` for what works with what."
        )
    return cast(Adapter, generic)


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


def _numbered(model: nn.Module, part: nn.Module) -> tuple[str, int] | None:
    """A layer's part by name with a hole for the number, and its number; None where it has none."""
    name = next(name for name, module in model.named_modules() if module is part)
    found = re.fullmatch(r"(.*\.)(\d+)(\..*)", name)  # encoder.layers.23.self_attn
    return None if found is None else (f"{found[1]}{{}}{found[3]}", int(found[2]))


def last_attention(tower: nn.Module) -> nn.Module:
    """The last attention module of a vision encoder: the one that holds its query projection."""
    owners = [m for m in tower.modules() if "q_proj" in dict(m.named_children())]
    if not owners:
        raise ValueError(
            f"{type(tower).__name__} has no attention with a q_proj, so foveate cannot see its "
            "queries and keys; use a method that does not need attention, such as pool."
        )
    return owners[-1]


def whole_images(seen: Sequence[Seen], *, has_cls: bool, stride: int = 1) -> list[Observed]:
    """Observations of an encoder that sees one image per batch row, [CLS] first if there is one.

    Args:
        stride: side of the square of patches that becomes one token; what sticks out is cut off.
    """
    first = int(has_cls)

    def tokens(rows: Tensor) -> Tensor:  # (B, H, [CLS] + patches, d)
        if stride == 1:
            return rows
        patches, side = rows[:, :, first:], math.isqrt(rows.shape[2] - first)
        return torch.cat([rows[:, :, :first], averaged(patches, (side, side), stride)], dim=2)

    found = []
    for s in seen:
        q, k = tokens(s.q), tokens(s.k)
        at = torch.arange(first, q.shape[2], device=q.device)
        pairs = zip(q.unbind(0), k.unbind(0), strict=True)
        found += [Observed(*pair, at, 0 if has_cls else None, s.scale) for pair in pairs]
    return found


def averaged(rows: Tensor, grid: Grid, stride: int) -> Tensor:
    """Rasters ``(…, patches, d)`` to the means of whole squares, ``(…, tokens, d)``."""
    squares = rows.unflatten(-2, grid).unfold(-3, stride, stride).unfold(-3, stride, stride)
    return cast(Tensor, squares.mean((-2, -1)).flatten(-3, -2))


def select_strategy(model: nn.Module, call: Mapping[str, Any]) -> str:
    """``default`` drops the encoder's first row, [CLS]; ``full`` says that there is none."""
    given = call.get("vision_feature_select_strategy")
    return cast(str, given or cast(Any, model.config).vision_feature_select_strategy)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Images ``(…, C, H, W)`` made smaller, antialiased, in their own dtype."""
    small = nn.functional.interpolate(
        pixels.flatten(0, -4).float(), size=(height, width), mode="bilinear", antialias=True
    )
    return small.to(pixels.dtype).reshape(*pixels.shape[:-2], height, width)
