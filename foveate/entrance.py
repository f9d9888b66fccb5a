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
import itertools
import math
from collections.abc import Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from foveate.adapter import Adapter, Grid, Observed, Seen
from foveate.ops.rows import flat, slots, take
from foveate.recipe import Recipe
from foveate.reducer import Reducer, Reduction, Tokens
from foveate.report import Report


@dataclass(frozen=True)
class _Survivors:
    """Groups of one size after their reduction, all with as many survivors.

    Attributes:
        groups: which of the call's groups these are.
        size: slots of each, N.
        slots: ``(G, K)``, ascending.
        x: ``(G, K, D)``.
    """

    groups: list[int]
    size: int
    slots: Tensor
    x: Tensor

    def written(self) -> Tensor:
        """``(G, N, D)`` with NaN in the slots that nobody takes."""
        count, width = self.slots.shape[1], self.x.shape[-1]
        if count == self.size:
            return self.x
        full = self.x.new_full((len(self.groups) * self.size, width), torch.nan)
        full = full.index_copy(0, flat(self.slots, self.size), self.x.flatten(0, 1))
        return full.view(len(self.groups), self.size, width)


@dataclass(frozen=True)
class _Made:
    """What is left of the items of one call.

    Attributes:
        sizes: per item, the slots of each of its groups; groups are numbered through all items.
        parts: the survivors of all groups.
    """

    sizes: list[list[int]]
    parts: list[_Survivors]

    @property
    def left(self) -> list[list[int]]:
        """Per item, the survivors of each of its groups."""
        counts = {g: part.slots.shape[1] for part in self.parts for g in part.groups}
        return [[counts[g] for g in own] for own in self._numbers()]

    def vectors(self) -> list[Tensor | None]:
        """``(survivors, D)`` of each item; None for one without groups."""
        return self._items([part.x for part in self.parts])

    def written(self) -> list[Tensor | None]:
        """``(slots, D)`` of each item, NaN in the slots that nobody takes."""
        return self._items([part.written() for part in self.parts])

    def carrying(self, items: Sequence[Tensor]) -> _Made:
        """The same survivors with other vectors: items of ``(survivors and padding, D)``."""
        xs = [
            x for item, counts in zip(items, self.left, strict=True) for x in parted(item, counts)
        ]
        parts = [replace(p, x=torch.stack([xs[g] for g in p.groups])) for p in self.parts]
        return _Made(self.sizes, parts)

    def _items(self, stacks: Sequence[Tensor]) -> list[Tensor | None]:
        """Stacks ``(G, n, D)``, one of each part, item by item."""
        rows: dict[int, Tensor] = {}
        for part, stack in zip(self.parts, stacks, strict=True):
            rows.update(zip(part.groups, stack.unbind(), strict=True))
        items = [[rows[g] for g in own] for own in self._numbers()]
        return [torch.cat(own) if len(own) > 1 else next(iter(own), None) for own in items]

    def _numbers(self) -> list[list[int]]:
        """The numbers of each item's groups."""
        number = itertools.count()
        return [[next(number) for _ in own] for own in self.sizes]


@dataclass
class _Encoding:
    """State of one ``get_*_features`` call; grids and sizes of ``call`` are on the host."""

    modality: str
    call: dict[str, Any]
    seen: list[Seen] = field(default_factory=list)
    middle: list[Seen] = field(default_factory=list)
    made: _Made | None = None


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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        state = _Encoding(modality, {n: _read(n, value) for n, value in call.items()})
        token = self._state.set(state)
        try:
            if self._method.site == "pixels":
                outputs, made = self._smaller(state, original)
            else:
                outputs = original(**call)
                with self._report.clock(outputs.pooler_output[0].device):
                    made = self._reduced(state, list(outputs.pooler_output))
        finally:
            self._state.reset(token)
        outputs.pooler_output = self._collected(modality, outputs.pooler_output, made)
        return outputs

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Site ``features``: the projector gets the survivors only."""
        state = self._state.get()
        if state is None:
            return None
        with self._report.clock(args[0].device):
            state.made = made = self._split(state, list(args[0]))
            if len(made.parts) == 1 and len(made.sizes) == len(made.parts[0].groups):
                return (made.parts[0].x, *args[1:])
            left = cast(list[Tensor], made.vectors())
        return (nn.utils.rnn.pad_sequence(left, batch_first=True), *args[1:])

    def _reduced(self, state: _Encoding, items: list[Tensor]) -> _Made:
        """What is left of the encoder's output."""
        if state.made is not None:  # done before the projector
            return state.made.carrying(items)
        if self._method.site == "features" and self._adapter.aligned:
            raise ValueError(
                "The projector that the recipe was attached to is no longer the model's; call "
                "foveate.detach(model) and foveate.attach(model, recipe) after changing modules."
            )
        return self._split(state, items)

    def _split(self, state: _Encoding, items: list[Tensor]) -> _Made:
        """Items split into groups, reduced."""
        sizes = self._adapter.groups(state.modality, state.call, [len(item) for item in items])
        if self._method.video:
            self._refuse_single_frames(state, sizes)
            return self._films(items, sizes)
        parts = [parted(item, part) for item, part in zip(items, sizes, strict=True)]
        return _Made(sizes, self._groups(state, [x for part in parts for x in part]))

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

    def _films(self, items: list[Tensor], sizes: list[list[int]]) -> _Made:
        """The frames of a video as one group; what follows them (a newline) stays as it is."""
        number, films, made = itertools.count(), [], []
        for item, part in zip(items, sizes, strict=True):
            frames = part.count(part[0])
            film, rest = item.split([frames * part[0], len(item) - frames * part[0]])
            valid = torch.ones(1, len(film), dtype=torch.bool, device=film.device)
            tokens = Tokens(x=film[None], valid=valid, frames=frames)
            made += self._reduce(tokens, [next(number)])
            made.append(_Survivors([next(number)], len(rest), slots(rest[None]), rest[None]))
            films.append([len(film), len(rest)])
        return _Made(films, made)

    def _groups(self, state: _Encoding, xs: Sequence[Tensor]) -> list[_Survivors]:
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
        made: list[_Survivors] = []
        for (_, grid, _), groups in shapes.items():
            tokens = _stacked([xs[g] for g in groups], [observed[g] for g in groups], grid)
            if self._method.depth is not None:
                tokens = replace(tokens, middle=_queries_and_keys([middle[g] for g in groups]))
            made += self._reduce(tokens, groups)
        return made

    def _observed(self, state: _Encoding, seen: Sequence[Seen]) -> list[Observed]:
        return self._adapter.observe(self._model, state.modality, state.call, seen)

    def _reduce(self, tokens: Tokens, groups: list[int]) -> list[_Survivors]:
        """Groups of one size, G of them."""
        size = tokens.x.shape[1]
        budget = self._schedule.count(0, size)
        if size == 1 or (budget == size and not self._schedule.adaptive):
            return [_Survivors(groups, size, slots(tokens.x), tokens.x)]
        if self._schedule.adaptive:
            return self._adapted(tokens, groups)
        made = self._method.reduce(tokens, [budget] * len(groups))
        x = take(tokens.x, made.keep) if made.x is None else made.x
        ranked = made.keep.sort(dim=-1)
        if self._adapter.positions == "keep":  # the place is in the position ids: in raster order
            x = take(x, ranked.indices)
        self._report.groups.extend(_groups_of(made, size))
        return [_Survivors(groups, size, ranked.values, x)]

    def _adapted(self, tokens: Tokens, groups: list[int]) -> list[_Survivors]:
        """The same where the method chooses each group's count, and so each is on its own."""
        size = tokens.x.shape[1]
        made = self._method.reduce(tokens, None)
        x = take(tokens.x, made.keep) if made.x is None else made.x
        self._report.groups.extend(_groups_of(made, size))
        survivors = []
        for g, keep, row, n in zip(groups, made.keep, x, made.count.tolist(), strict=True):
            ranked = keep[:n].sort()
            own = row[ranked.indices] if self._adapter.positions == "keep" else row[:n]
            survivors.append(_Survivors([g], size, ranked.values[None], own[None]))
        return survivors

    def _smaller(self, state: _Encoding, original: Callable[..., Any]) -> tuple[Any, _Made]:
        """Site ``pixels``: encode smaller images; their tokens take the slots they lie over."""
        method = cast(Any, self._method)  # site pixels: it has shape()
        call, grids = self._adapter.shrink(
            self._model,
            state.modality,
            state.call,
            lambda grid: method.shape(grid, self._schedule.count(0, math.prod(grid))),
        )
        outputs = original(**call)
        changes, number = iter(grids), itertools.count()
        sizes: list[list[int]] = []
        shapes: dict[tuple[Grid, Grid], list[tuple[int, Tensor]]] = {}
        for item in outputs.pooler_output:
            own: list[tuple[Grid, Grid]] = []
            while sum(math.prod(new) for _, new in own) < len(item):
                own.append(next(changes))
            for shape, x in zip(own, parted(item, [math.prod(n) for _, n in own]), strict=True):
                shapes.setdefault(shape, []).append((next(number), x))
            sizes.append([math.prod(old) for old, _ in own])
        parts = []
        for (old, new), found in shapes.items():
            x = torch.stack([x for _, x in found])
            under = nearest(old, new).to(x.device, non_blocking=True).expand(len(found), -1)
            parts.append(_Survivors([g for g, _ in found], math.prod(old), under, x))
        made = _Made(sizes, parts)
        if (deepstack := getattr(outputs, "deepstack_features", None)) is not None:
            outputs.deepstack_features = [_spread(made, items) for items in deepstack]
        return outputs, made

    def _collected(self, modality: str, features: Any, made: _Made) -> Any:
        """The feature result in the form in which it came."""
        items = [
            feature if item is None else item  # a sample without images has no groups
            for item, feature in zip(made.written(), features, strict=True)
        ]
        kept = [(sum(own), sum(left)) for own, left in zip(made.sizes, made.left, strict=True)]
        self._encoded(modality, kept)
        if isinstance(features, list | tuple):
            for item, pair in zip(items, kept, strict=True):
                self._kept[item] = [pair]
            return type(features)(items)
        stacked = torch.stack(items)
        self._kept[stacked] = kept
        return stacked


def _spread(made: _Made, items: Sequence[Tensor]) -> list[Tensor]:
    """Further features of the survivors, in their slots; zero in the others."""
    written = made.carrying(items).written()
    return [
        item if own is None else own.nan_to_num(0.0)
        for own, item in zip(written, items, strict=True)
    ]


def _read(name: str, value: Any) -> Any:
    """Grids, sizes and numbers on the host, read before the encoder keeps the device busy."""
    small = isinstance(value, Tensor) and any(part in name for part in ("grid", "size", "num"))
    return value.cpu() if small else value


def parted(item: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The groups of an item ``(slots and padding, D)``."""
    if sizes == [len(item)]:
        return [item]
    return item[: sum(sizes)].split(sizes) if sizes else []


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
