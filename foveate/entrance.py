"""Boundary 0: reducing each image or frame before the LLM sees it.

``get_image_features`` is the one place where an image's tokens, what the encoder attended to and
the image's borders exist together, and ``generate`` calls it before prefill and repeats its result
for beams. So the survivors are written into that result: each into a slot of its image, in the
order in which the LLM is to see them, and every other slot becomes NaN. The number of slots stays,
so the model's own placeholder check holds, and :mod:`foveate.session` drops the NaN rows at the
text model's input. Features carried past the session that made them are therefore loudly broken
instead of silently full.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from foveate.adapter import Adapter, Observed, Seen
from foveate.prompt import take
from foveate.recipe import Recipe
from foveate.reducer import Reducer, Reduction, Tokens
from foveate.report import Report


@dataclass(frozen=True)
class _Survivors:
    """One group after its reduction: ``slots`` (K,) ascending of ``size``, ``x`` (K, D)."""

    size: int
    slots: Tensor
    x: Tensor

    def written(self) -> Tensor:
        """``(size, D)`` with NaN in the slots that nobody takes."""
        if len(self.slots) == self.size:
            return self.x
        full = self.x.new_full((self.size, self.x.shape[-1]), torch.nan)
        return full.index_copy(0, self.slots, self.x)


@dataclass
class _Encoding:
    """State of one ``get_*_features`` call."""

    modality: str
    call: dict[str, Any]
    seen: list[Seen] = field(default_factory=list)
    middle: list[Seen] = field(default_factory=list)
    made: list[list[_Survivors]] = field(default_factory=list)


class Entrance:
    """Wraps the feature calls of one model until :meth:`remove`.

    Args:
        encoded: told (modality, [(slots, survivors) of each item]) after each feature call.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        recipe: Recipe,
        report: Report,
        encoded: Callable[[str, list[tuple[int, int]]], None],
    ) -> None:
        self._model, self._adapter, self._report, self._encoded = model, adapter, report, encoded
        self._schedule, self._method = recipe.schedule, cast(Reducer, recipe.entrance)
        self._state: ContextVar[_Encoding | None] = ContextVar("foveate_encoding", default=None)
        self._kept: MutableMapping[Any, list[tuple[int, int]]] = WeakIdKeyDictionary()
        self._undo: list[Callable[[], None]] = []
        base = adapter.base(model)
        for modality in adapter.encoders(model):
            self._wrap(base, modality)
        if self._method.site == "features" and adapter.aligned:
            self._before = adapter.projector(model).register_forward_pre_hook(
                self._before_projector
            )
            self._undo.append(self._forget_projector)

    def remove(self) -> None:
        """Give the model its own feature calls back."""
        while self._undo:
            self._undo.pop()()

    def __deepcopy__(self, memo: Any) -> Entrance:
        """Itself: peft copies a projector that is trained, hook and all."""
        return self

    def _forget_projector(self) -> None:
        """Take the hook off the projector and off copies of it that took its place."""
        self._before.remove()
        for module in self._adapter.projector(self._model).modules():
            module._forward_pre_hooks.pop(self._before.id, None)

    def watched(self, eyes: Sequence[nn.Module]) -> list[tuple[nn.Module, Callable[[Seen], None]]]:
        """What the method looks at, with the watch's callbacks; ``eyes``: the last attentions."""
        if (depth := self._method.depth) is None:
            return [(last, self._show) for last in eyes]
        found: list[tuple[nn.Module, Callable[[Seen], None]]] = []
        for last in eyes:
            middle = self._adapter.middle_attention(self._model, last, depth)
            if middle is last:  # so few layers that one is both
                found.append((last, self._show_both))
            else:
                found += [(last, self._show), (middle, self._show_middle)]
        return found

    def _show(self, seen: Seen) -> None:
        if (state := self._state.get()) is not None:
            state.seen.append(seen)

    def _show_middle(self, seen: Seen) -> None:
        if (state := self._state.get()) is not None:
            state.middle.append(seen)

    def _show_both(self, seen: Seen) -> None:
        self._show(seen)
        self._show_middle(seen)

    def kept(self, features: Any) -> list[tuple[int, int]] | None:
        """(slots, survivors) of each item of a feature result, or None where only counting tells.

        It does when ``generate`` repeated the features for beams.
        """
        items = features if isinstance(features, list | tuple) else [features]
        known = [self._kept.get(item) for item in items]
        return None if None in known else [pair for pairs in known for pair in pairs or ()]

    def _wrap(self, base: nn.Module, modality: str) -> None:
        name = f"get_{modality}_features"
        original = getattr(base, name)
        signature = inspect.signature(original)

        def reduced(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            more = bound.pop("kwargs", {})
            return self._encode(modality, original, {**bound, **more})

        cast(Any, reduced).__signature__ = signature  # generate reads it to pick the arguments
        setattr(base, name, reduced)
        self._undo.append(lambda: delattr(base, name))

    def _encode(self, modality: str, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        if self._state.get() is not None:  # video features that are made by the call for images
            return original(**call)
        if self._method.video and modality != "video":
            apart = "video" in self._adapter.encoders(self._model)
            where = self._adapter.family + ("" if apart else ", to which videos come as images")
            raise NotImplementedError(
                f"{self._method.name} cannot work on an {modality} of {where}: it compares the "
                "frames of a video. Use a method for images, such as 'pool'."
            )
        self._report.begin()
        state = _Encoding(modality, call)
        token = self._state.set(state)
        try:
            if self._method.site == "pixels":
                outputs, parts = self._smaller(state, original)
            else:
                outputs = original(**call)
                with self._report.clock(outputs.pooler_output[0].device):
                    parts = self._reduced(state, list(outputs.pooler_output))
        finally:
            self._state.reset(token)
        outputs.pooler_output = self._collected(modality, outputs.pooler_output, parts)
        return outputs

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Site ``features``: the projector gets the survivors only."""
        state = self._state.get()
        if state is None:
            return None
        with self._report.clock(args[0].device):
            state.made = self._split(state, list(args[0]))
            left = [torch.cat([made.x for made in part]) for part in state.made]
        return (nn.utils.rnn.pad_sequence(left, batch_first=True), *args[1:])

    def _reduced(self, state: _Encoding, items: list[Tensor]) -> list[list[_Survivors]]:
        """The survivors of every item, group by group."""
        if state.made:  # done before the projector
            return [_projected(part, x) for part, x in zip(state.made, items, strict=True)]
        if self._method.site == "features" and self._adapter.aligned:
            raise ValueError(
                "The projector that the recipe was attached to is no longer the model's; call "
                "foveate.detach(model) and foveate.attach(model, recipe) after changing modules."
            )
        return self._split(state, items)

    def _split(self, state: _Encoding, items: list[Tensor]) -> list[list[_Survivors]]:
        """Items split into groups, reduced."""
        sizes = self._adapter.groups(state.modality, state.call, [len(item) for item in items])
        if self._method.video:
            self._refuse_single_frames(state, sizes)
            return [self._film(item, part) for item, part in zip(items, sizes, strict=True)]
        split = [x for item, part in zip(items, sizes, strict=True) for x in item.split(part)]
        made = iter(self._groups(state, split))
        return [[next(made) for _ in part] for part in sizes]

    def _refuse_single_frames(self, state: _Encoding, sizes: list[list[int]]) -> None:
        """Where an item is a frame and not a video, nothing says which belong together."""
        pixels = state.call.get("pixel_values_videos")
        fewer = pixels is not None and pixels.ndim == 5 and len(pixels) != len(sizes)
        if fewer or any(part[0] < max(part) for part in sizes):
            raise NotImplementedError(
                f"{self._method.name} cannot work on a video of {self._adapter.family}, whose "
                "frames come one by one: it compares the frames of a video. Use a method for "
                "images, such as 'pool', which works frame by frame."
            )

    def _film(self, item: Tensor, sizes: list[int]) -> list[_Survivors]:
        """The frames of a video as one group; what follows them (a newline) stays as it is."""
        frames = sizes.count(sizes[0])
        film, rest = item.split([frames * sizes[0], len(item) - frames * sizes[0]])
        valid = torch.ones(1, len(film), dtype=torch.bool, device=film.device)
        made = self._reduce(Tokens(x=film[None], valid=valid, frames=frames), len(film))
        return [*made, _Survivors(len(rest), torch.arange(len(rest), device=rest.device), rest)]

    def _groups(self, state: _Encoding, xs: list[Tensor]) -> list[_Survivors]:
        """Reduce groups ``(N, D)``: one call of the method for each distinct shape."""
        sizes = [len(x) for x in xs]
        grids = self._adapter.grids(state.modality, state.call, sizes)
        nothing: Sequence[Observed | None] = [None] * len(xs)
        observed = middle = nothing
        if self._method.needs_attention:
            observed = self._observed(state, state.seen)
        if self._method.depth is not None:
            middle = self._observed(state, state.middle)
        shapes: dict[Any, list[int]] = {}
        for g, (size, grid, view) in enumerate(zip(sizes, grids, observed, strict=True)):
            shapes.setdefault((size, grid, view and (view.q.shape, view.cls)), []).append(g)
        made: dict[int, _Survivors] = {}
        for (size, grid, _), members in shapes.items():
            tokens = _stacked([xs[g] for g in members], [observed[g] for g in members], grid)
            if self._method.depth is not None:
                tokens = replace(tokens, middle=_queries_and_keys([middle[g] for g in members]))
            made.update(zip(members, self._reduce(tokens, size), strict=True))
        return [made[g] for g in range(len(xs))]

    def _observed(self, state: _Encoding, seen: Sequence[Seen]) -> list[Observed]:
        return self._adapter.observe(self._model, state.modality, state.call, seen)

    def _reduce(self, tokens: Tokens, size: int) -> list[_Survivors]:
        """Groups of one size, B of them."""
        groups = tokens.x.shape[0]
        budget = self._schedule.count(0, size)
        if size == 1 or (budget == size and not self._schedule.adaptive):
            whole = torch.arange(size, device=tokens.x.device)
            return [_Survivors(size, whole, x) for x in tokens.x]
        made = self._method.reduce(tokens, None if self._schedule.adaptive else [budget] * groups)
        x = take(tokens.x, made.keep) if made.x is None else made.x
        counts = made.count.tolist() if self._schedule.adaptive else [budget] * groups
        if self._adapter.positions == "keep":  # the place is in the position ids: raster order
            rank = torch.arange(made.keep.shape[1], device=x.device)
            over = rank >= torch.tensor(counts).to(x.device, non_blocking=True)[:, None]
            x = take(x, made.keep.masked_fill(over, size).argsort(dim=-1, stable=True))
        self._report.groups.extend(_groups_of(made, size))
        return [
            _Survivors(size, keep[:n].sort().values, row[:n])
            for keep, row, n in zip(made.keep, x, counts, strict=True)
        ]

    def _smaller(
        self, state: _Encoding, original: Callable[..., Any]
    ) -> tuple[Any, list[list[_Survivors]]]:
        """Site ``pixels``: encode smaller images; their tokens take the slots they lie over."""
        method = cast(Any, self._method)  # site pixels: it has shape()
        call, grids = self._adapter.shrink(
            self._model,
            state.modality,
            state.call,
            method.shape,
            lambda n: self._schedule.count(0, n),
        )
        outputs = original(**call)
        changes = iter(grids)
        parts = []
        for item in outputs.pooler_output:
            part, rest = [], item
            while len(rest):
                old, new = next(changes)
                x, rest = rest.split([new[0] * new[1], len(rest) - new[0] * new[1]])
                part.append(_Survivors(old[0] * old[1], nearest(old, new).to(item.device), x))
            parts.append(part)
        if (deepstack := getattr(outputs, "deepstack_features", None)) is not None:
            outputs.deepstack_features = [_spread(items, parts) for items in deepstack]
        return outputs, parts

    def _collected(self, modality: str, features: Any, parts: list[list[_Survivors]]) -> Any:
        """The feature result in the form in which it came."""
        items = [
            torch.cat([group.written() for group in part]) if part else feature
            for part, feature in zip(
                parts, features, strict=True
            )  # a sample without images: no part
        ]
        sizes = [(sum(g.size for g in part), sum(len(g.slots) for g in part)) for part in parts]
        self._encoded(modality, sizes)
        if isinstance(features, list | tuple):
            for item, size in zip(items, sizes, strict=True):
                self._kept[item] = [size]
            return type(features)(items)
        stacked = torch.stack(items)
        self._kept[stacked] = sizes
        return stacked


def _spread(items: Sequence[Tensor], parts: list[list[_Survivors]]) -> list[Tensor]:
    """Further features of the survivors, in their slots; zero in the others."""
    spread = []
    for item, part in zip(items, parts, strict=True):
        xs = item.split([len(group.slots) for group in part])
        written = [replace(g, x=x).written() for g, x in zip(part, xs, strict=True)]
        spread.append(torch.cat(written).nan_to_num(0.0))
    return spread


def _projected(part: list[_Survivors], x: Tensor) -> list[_Survivors]:
    """The groups of one item with their vectors from behind the projector, (K and padding, D)."""
    counts = [len(made.slots) for made in part]
    rows = x[: sum(counts)].split(counts)
    return [replace(made, x=own) for made, own in zip(part, rows, strict=True)]


def _stacked(
    xs: Sequence[Tensor], observed: Sequence[Observed | None], grid: tuple[int, int] | None
) -> Tokens:
    x = torch.stack(list(xs))
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    views = [view for view in observed if view is not None]
    if not views:
        return Tokens(x=x, valid=valid, grid=grid)
    q, k = _queries_and_keys(views)
    return Tokens(
        x=x,
        valid=valid,
        q=q,
        k=k,
        at=torch.stack([view.at for view in views]),
        rows=torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=x.device),
        scale=views[0].scale,
        cls=views[0].cls,
        grid=grid,
    )


def _queries_and_keys(observed: Sequence[Observed | None]) -> tuple[Tensor, Tensor]:
    views = [view for view in observed if view is not None]
    return torch.stack([view.q for view in views]), torch.stack([view.k for view in views])


def _groups_of(made: Reduction, size: int) -> list[Tensor]:
    """Per group (N,): the survivor each token went into, -1 where it was dropped."""
    if made.group is not None:
        return list(made.group)
    owner = made.keep.new_full((made.keep.shape[0], size), -1)
    places = torch.arange(made.keep.shape[1], device=owner.device).expand_as(made.keep)
    return list(owner.scatter(1, made.keep, places))


def nearest(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Slots of an old raster under the cell centres of a smaller one: distinct and ascending."""
    rows, columns = (
        ((torch.arange(n) + 0.5) * (o / n)).long() for o, n in zip(old, new, strict=True)
    )
    return (rows[:, None] * old[1] + columns).flatten()
