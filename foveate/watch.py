"""The attention watch: the ordinary kernel runs, and on armed modules q and k are seen as well.

A watched module gets a copy of its config that names our attention function; the model's own
config, from which masks are made, stays as it is. Nothing else is replaced, no attention map is
asked for.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.adapter import Seen

_PREFIX = "foveate_"


class Watch:
    """Shows what some attention modules compute to a callback, until :meth:`remove`.

    Args:
        modules: the attention modules to arm, each with the callback that gets its :class:`Seen`.
    """

    def __init__(self, modules: list[tuple[nn.Module, Callable[[Seen], None]]]) -> None:
        self._plain: list[tuple[nn.Module, Any]] = []
        for module, show in modules:
            config = cast(Any, module.config)
            watched = copy.copy(config)
            watched._attn_implementation_internal = _register(config._attn_implementation)
            watched.foveate_watch = _Shown(config, show)
            self._plain.append((module, config))
            module.config = watched

    def remove(self) -> None:
        """Give every module its own config back."""
        while self._plain:
            module, config = self._plain.pop()
            module.config = config


def watched(module: nn.Module) -> bool:
    """Whether the module or a part of it is armed."""
    return any(hasattr(getattr(m, "config", None), "foveate_watch") for m in module.modules())


class _Shown:
    """The callback of one module and its plain config. Copies of a config share it."""

    def __init__(self, config: Any, show: Callable[[Seen], None]) -> None:
        self.config, self.show = config, show


class _Plain:
    """A module as it was before arming: kernels read ``config`` to learn which one they are."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def check_attention(implementation: str) -> None:
    """Refuse attention implementations whose masks nobody knows how to make.

    Raises:
        ValueError: for a name that is not in transformers' mask registry; padding would be lost.
    """
    known = [name for name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys() if _PREFIX not in name]
    if implementation not in known:
        raise ValueError(
            f"attn_implementation={implementation!r} has no mask function, so padding would be "
            f"lost without a word. Accepted: {', '.join(sorted(known))}. Call "
            'model.set_attn_implementation("sdpa"), or register a mask function for it with '
            "transformers.AttentionMaskInterface.register."
        )


def _register(implementation: str) -> str:
    """The name of the watching twin of an attention implementation; registered once.

    The same name goes into the mask registry, or a model whose masks are made from the armed config
    would silently get none (padding lost).
    """
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _watched)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _watched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: show q and k, then run the module's own kernel."""
    shown = cast(_Shown, cast(Any, module.config).foveate_watch)
    scale = kwargs.get("scaling")
    shown.show(Seen(query, key, query.shape[-1] ** -0.5 if scale is None else scale))
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(
        shown.config._attn_implementation, cast(Callable[..., Any], eager)
    )
    out = kernel(_Plain(module, shown.config), query, key, value, attention_mask, **kwargs)
    return cast(tuple[Tensor, Tensor | None], out)
