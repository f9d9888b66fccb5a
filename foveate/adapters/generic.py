"""Model types without an adapter of their own whose parts can be recognised.

Recognised are a text model with ``layers`` of self-attention, ``get_image_features`` and the ids of
placeholders. What only a look into the model could tell is refused: how the encoder's patches
become tokens (methods that read its attention), masks and arguments of the text model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from foveate.adapter import Adapter, Observed, Seen

_PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}
_TEXT = ("language_model", "text_model", "model", "decoder")
_KINDS = {"full_attention", "sliding_attention"}


class Generic(Adapter):
    """A model of an unknown type, its rows numbered anew."""

    family: ClassVar[str] = "generic"
    aligned: ClassVar[bool] = False
    guessed: ClassVar[bool] = True
    blind: ClassVar[str] = "without an adapter nobody knows how its patches become tokens"

    def base(self, model: nn.Module) -> nn.Module:
        inner = getattr(model, "model", None)
        return inner if hasattr(inner, "get_image_features") else model  # type: ignore[return-value]

    def text(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, _text(self.base(model)))

    def placeholders(self, model: nn.Module) -> Mapping[str, int]:
        config, base = model.config, self.base(model)
        found = {
            modality: next((getattr(config, n) for n in names if hasattr(config, n)), None)
            for modality, names in _PLACEHOLDERS.items()
            if hasattr(base, f"get_{modality}_features")
        }
        return {modality: number for modality, number in found.items() if number is not None}

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        raise NotImplementedError(self.blind)


class GenericRope(Generic):
    """The same with M-RoPE, where survivors keep their place."""

    positions: ClassVar[str] = "keep"


def recognised(model: nn.Module) -> Adapter | None:
    """An adapter for a model of unknown type, or None when its parts are not recognised."""
    generic = Generic()
    if getattr(model, "config", None) is None:
        return None
    if not hasattr(generic.base(model), "get_image_features"):
        return None
    text = _text(generic.base(model))
    if text is None or "image" not in generic.placeholders(model):
        return None
    rope = getattr(text.config, "rope_parameters", None) or {}
    return GenericRope() if "mrope_section" in rope else generic


def _text(base: nn.Module) -> nn.Module | None:
    """The text model inside ``base``: layers of self-attention that sees every row before it."""
    for name in _TEXT:
        part = getattr(base, name, None)
        if part is not None and (found := part if hasattr(part, "layers") else _text(part)):
            kinds = set(getattr(found.config, "layer_types", None) or ())
            plain = all(hasattr(layer, "self_attn") for layer in cast(Any, found).layers)
            if plain and kinds <= _KINDS:
                return cast(nn.Module, found)
    return None
