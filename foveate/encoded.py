"""Encoding images once, however many recipes they are then reduced by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapter import family
from foveate.watch import watched


@contextmanager
def once(model: nn.Module) -> Iterator[None]:
    """Inside, a layer of a vision encoder that is given what it was given last is not run again.

    Layers that a recipe looks into run, so a method sees what it would, and results are the same to
    the bit. Nothing is reused where gradients are wanted.
    """
    parts = family(model).beside_text(model)
    stacks = [m for part in parts for m in part.modules() if isinstance(m, nn.ModuleList)]
    layers = {layer: vars(layer).get("forward") for stack in stacks for layer in stack}
    for layer in layers:
        vars(layer)["forward"] = _Remembered(layer)
    try:
        yield
    finally:
        for layer, forward in layers.items():
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


class _Remembered:
    """A layer's forward that keeps its last arguments and what came of them."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._forward = layer, layer.forward
        self._given: Any = None
        self._made: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or watched(self._layer):
            return self._forward(*args, **kwargs)
        given = (args, kwargs)
        if not _same(self._given, given):
            self._made = self._forward(*args, **kwargs)
            self._given = given
        return self._made


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments, or collections of them, hold the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
