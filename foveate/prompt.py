"""One prompt on its way through the text model: which rows are left, and moving them.

Rows are re-packed flush right, so that the last row of a sample stays its last text token; samples
may keep different numbers of rows. What has to be known of an earlier prompt lives on its cache
(:class:`Request`), what has to be known during one forward lives here, nothing lives on the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
)

from foveate.adapter import Seen
from foveate.ops.rows import take
from foveate.recipe import Recipe
from foveate.reducer import Reducer, Reduction, Tokens
from foveate.report import Report

_IGNORED = -100  # the label that losses leave out
_BOTH_WAYS = (
    "Rows of an image or a prefix see each other in both directions in this model; methods rank by "
    "what each row sees of the rows before it."
)


@dataclass
class Request:
    """What later forwards on the same cache must know. Lives on the cache object.

    Attributes:
        cuts: the boundaries of the recipes so far, which divide the layers into segments.
        masks: per segment, ``(B, n)`` bool over the first n rows in the cache, those after them
            being real; or None when nobody is padded. As wide as the cache where that is static.
        hidden: rows that the entrance dropped, padding included: what ``get_seq_length`` of the
            shortened cache lacks.
        shift: ``(B, 1)``, what position ids of the caller are ahead of compact ones; None if kept.
        served: a session has the forward under way in hand. What follows is of that forward only:
            decoding has no frame of its own, which torch.compile could not trace.
        given: the attention mask that its caller gave.
        now: per segment, the attention mask of its layers.
        hooks: those it needs because the cache was filled under another recipe.
    """

    cuts: tuple[int, ...]
    masks: list[Tensor | None]
    hidden: int = 0
    shift: Tensor | None = None
    served: bool = False
    given: Any = None
    now: list[Any] | None = None
    hooks: list[Any] = field(default_factory=list)

    def leave(self) -> None:
        """The forward is over."""
        for handle in self.hooks:
            handle.remove()
        self.served, self.given, self.now, self.hooks = False, None, None, []

    def live_on(self, cache: Cache) -> None:
        """Put this on the cache that later forwards will bring."""
        vars(cache)["foveate_request"] = self
        vars(cache)["reset"] = _Reset(cache)
        vars(cache)["update"] = _Served(cache)
        if self.hidden:
            vars(cache)["get_seq_length"] = _SeenLength(cache, self)


class _SeenLength:
    """``cache.get_seq_length`` of a cache whose entrance was reduced: prompt tokens seen so far.

    Callers use it to slice the next input and to number positions, so it must speak of the whole
    prompt. Layers other than 0 tell their own length.
    """

    def __init__(self, cache: Cache, request: Request) -> None:
        self._cache, self._request = cache, request

    def __call__(self, layer_idx: int = 0) -> Any:
        length = type(self._cache).get_seq_length(self._cache, layer_idx)
        return length + self._request.hidden if layer_idx == 0 else length


class _Served:
    """``cache.update`` of a reduced cache: refuses a forward that no session has in hand.

    Without one, masks and positions would be those of a prompt that is not there: errors about
    sizes at best, and silently another answer where a mask of the wrong size happens to fit.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __call__(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> Any:
        if layer_idx == 0 and not cast(Request, request_of(self._cache)).served:
            raise ValueError(
                "This cache was filled by a reduced prompt and the model has no recipe attached. "
                "Go on inside foveate.reduced(model, recipe), with keep=1.0 to reduce nothing "
                "more, or start the conversation anew."
            )
        return type(self._cache).update(self._cache, keys, values, layer_idx, *args, **more)


class _Reset:
    """``cache.reset`` of a cache that holds a reduced prompt: what is known of it goes, too."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __call__(self) -> None:
        for name in ("foveate_request", "get_seq_length", "reset", "update"):
            vars(self._cache).pop(name, None)
        self._cache.reset()


def request_of(cache: Any) -> Request | None:
    """The request that lives on a cache."""
    return cast("Request | None", getattr(cache, "foveate_request", None))


@dataclass(frozen=True)
class Flags:
    """Which rows of a prompt are what, and what the host knows of it.

    Attributes:
        valid: ``(B, L)`` bool, or None when nobody is padded.
        vision: ``(B, L)`` bool.
        lengths, counts: per sample, real rows and vision rows.
        instruction: per sample, the text rows after the last vision token.
        flush: whether no sample has padding after a real row.
    """

    valid: Tensor | None
    vision: Tensor
    lengths: list[int]
    counts: list[int]
    instruction: list[int]
    flush: bool

    @property
    def rows(self) -> int:
        """L, padding included."""
        return self.vision.shape[1]

    @classmethod
    def read(
        cls, valid: Tensor | None, vision: Tensor, more: Sequence[Tensor] = ()
    ) -> tuple[Flags, list[list[int]]]:
        """Count on the device and read all counts at once: the only read of a prompt.

        Args:
            valid: ``(B, L)`` bool, or None for a prompt without padding.
            vision: ``(B, L)`` bool, placeholders.
            more: other ``(B, L)`` bool to be counted.

        Returns:
            The flags, and the counts of ``more`` sample by sample.
        """
        batch, length = vision.shape
        place = torch.arange(length, device=vision.device)
        if valid is not None:
            valid = valid.to(vision.device)
            vision = vision & valid
        after = place > torch.where(vision, place, -1).amax(-1, keepdim=True)
        wanted = [vision, after, *more]
        if valid is not None:
            wanted[1] = after & valid
            wanted += [valid, nn.functional.pad(valid[:, :-1] & ~valid[:, 1:], (1, 0))]
        counts, instruction, *counted = torch.stack(wanted).sum(-1).tolist()
        lengths, late = counted[len(more) :] or ([length] * batch, [0])
        valid = None if min(lengths) == length else valid
        flags = cls(valid, vision, lengths, counts, instruction, not any(late))
        return flags, counted[: len(more)]


@dataclass(frozen=True)
class Left:
    """The rows of a prompt of ``length`` rows that reached the head of the model.

    Attributes:
        place: ``(B, rows)``, each row's position in the prompt as it came.
        valid: ``(B, rows)`` bool, or None when nobody is padded.
        length: rows of the prompt as it came, padding included.
    """

    place: Tensor
    valid: Tensor | None
    length: int

    def labels(self, given: Tensor, rows: int) -> Tensor:
        """Labels of the last ``rows`` rows left, (B, rows): each row keeps its own.

        The loss shifts them afterwards, so a row predicts the next one *left*: the last vision row
        alive predicts the first text row after the image, as the last of all did. Padding, and the
        first row of a sample that follows padding, get -100.

        Args:
            given: ``(B, n)``, the labels of the last n rows of the prompt.
            rows: rows of the logits: fewer than are left under ``logits_to_keep``.

        Raises:
            ValueError: for more labels than the prompt has rows.
        """
        missing = self.length - given.shape[1]
        if missing < 0:
            raise ValueError(
                f"labels have {given.shape[1]} columns and input_ids {self.length}; give one label "
                "for each id."
            )
        full = nn.functional.pad(given.to(self.place.device), (missing, 0), value=_IGNORED)
        cut = full.gather(1, self.place)
        if self.valid is not None:
            predicted = self.valid & self.valid.roll(1, dims=-1)
            cut = cut.masked_fill(~predicted, _IGNORED)
        return cut[:, cut.shape[1] - rows :]


@dataclass
class Pass:
    """The rows of one forward, layer by layer.

    Attributes:
        rows: rows now, padding included.
        valid: ``(B, rows)`` bool on the device, or None when nobody is padded.
        vision: ``(B, rows)`` bool, vision rows; before the first cut.
        place: ``(B, rows)``, each row's position in the prompt as it came.
        lengths, alive, original: per sample, real rows, vision rows, and vision rows at first.
        at: ``(B, most alive)``, the vision rows in order, ``rows`` where there are no more; from
            the first cut on.
        segment: what the layers of this segment get instead of the model's own arguments.
        blocks: ``(B, rows)``, rows of one number see each other, those of -1 only rows before; None
            when the model is causal throughout.
        deepstack: ``(B, prompt rows, D)`` each, what is added to the rows after layer 0, 1, ….
        order: ``(B, rows)``, each row's number among those that entered layer 0; None until a cut.
        embeds: ``(B, rows at layer 0, D)``, the rows as they entered, for methods that read text.
        entered: ``(B, rows at layer 0)`` bool, the vision rows among them.
    """

    recipe: Recipe
    report: Report
    config: Any
    cache: Cache | None
    device: torch.device
    rows: int
    valid: Tensor | None
    vision: Tensor
    place: Tensor
    lengths: list[int]
    alive: list[int]
    original: list[int]
    instruction: list[int]
    past: list[int]
    old: Request | None
    old_masks: list[Tensor | None]
    flush: bool
    embeds: Tensor
    entered: Tensor
    hidden: int = 0
    at: Tensor | None = None
    gone: list[int] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    seen: dict[int, Seen] = field(default_factory=dict)
    segment: dict[str, Any] = field(default_factory=dict)
    blocks: Tensor | None = None
    deepstack: list[Tensor] = field(default_factory=list)
    order: Tensor | None = None
    tables: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where a new segment begins."""
        return boundaries(self.recipe, self.old)

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        report: Report,
        config: Any,
        cache: Cache | None,
        flags: Flags,
        past: list[int],
        old: Request | None,
        old_masks: list[Tensor | None],
        kwargs: Mapping[str, Any],
        blocks: Tensor | None = None,
    ) -> Pass:
        """The rows as they come, before any reduction; ``kwargs`` are the text model's."""
        embeds: Tensor = kwargs["inputs_embeds"]
        device, (batch, length) = embeds.device, embeds.shape[:2]
        vision = flags.vision.to(device, non_blocking=True)
        valid = None if flags.valid is None else flags.valid.to(device, non_blocking=True)
        report.vision.extend(flags.counts)
        report.dense_rows.extend(flags.lengths)
        return cls(
            recipe=recipe,
            report=report,
            config=config,
            cache=cache,
            device=device,
            rows=length,
            valid=valid,
            vision=vision,
            place=torch.arange(length, device=device).expand(batch, -1),
            lengths=flags.lengths,
            alive=flags.counts,
            original=flags.counts,
            instruction=flags.instruction,
            past=past,
            old=old,
            old_masks=old_masks,
            blocks=None if blocks is None else blocks[:, -length:].to(device),
            flush=flags.flush,
            embeds=embeds,
            entered=vision,
        )

    def enter(
        self, kwargs: dict[str, Any], stay: Tensor | None, alive: list[int], compact: bool
    ) -> dict[str, Any]:
        """Boundary 0: the text model's arguments with only the rows of ``stay`` (B, rows)."""
        before, real, positions = self.alive, self.valid, kwargs.get("position_ids")
        embeds: Tensor = kwargs["inputs_embeds"]
        later = self.old is not None or bool(self.past[0])
        if alive == before and self.flush:
            if not later:
                self.keys(0)
                return kwargs
            positions = shifted(positions, self.old, kwargs)
        else:
            self.hidden = self.rows
            order = self._enter(stay, alive)
            self.hidden -= self.rows
            embeds = take(embeds, order)
            if self.valid is not None:  # padding now stands on dropped rows, and those are NaN
                embeds = embeds.masked_fill(~self.valid[..., None], 0.0)
            if compact:
                self.gone = [a - b for a, b in zip(before, alive, strict=True)]
                positions = self._numbered_from(shifted(positions, self.old, kwargs), real)
            elif positions is not None:
                positions = self._gathered(positions, order)
            self.embeds, self.entered = embeds, self.vision
        mask: Any = self.keys(0)
        if later or self.blocks is not None:
            mask = self.mask(mask, 0, embeds)
        return {
            **kwargs,
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": mask,
        }

    def _enter(self, stay: Tensor | None, alive: list[int]) -> Tensor:
        """Leave only the real rows of ``stay``: the old row of every new one."""
        if self.valid is not None:
            stay = self.valid if stay is None else stay & self.valid
        order, _ = self.drop(cast(Tensor, stay), alive)
        vision = self.vision.gather(1, order)
        self.vision = vision if self.valid is None else vision & self.valid
        return order

    def _numbers(self) -> Tensor:
        """0, 1, 2, … over the real rows of each sample, (B, rows)."""
        if self.valid is None:
            return torch.arange(self.rows, device=self.device).expand(len(self.lengths), -1)
        return (self.valid.long().cumsum(-1) - 1).clamp(min=0)

    def _numbered_from(self, positions: Tensor | None, real: Tensor | None) -> Tensor | None:
        """Compact position ids that start where the caller's do; ``real`` are the rows it had."""
        if positions is None:
            return None
        if real is not None:
            positions = positions.masked_fill(~real, torch.iinfo(positions.dtype).max)
        return self._numbers() + positions.amin(-1, keepdim=True)

    def _gathered(self, positions: Tensor, order: Tensor) -> Tensor:
        """Position ids ``(…, B, rows)`` of the rows left, as they were."""
        parts = positions[None] if positions.ndim == 2 else positions
        kept = torch.stack([take(p[..., None], order)[..., 0] for p in parts])
        if len(parts) == 4:  # the first only finds packed sequences, and gaps would look like some
            kept[0] = self._numbers()
        return kept[0] if positions.ndim == 2 else kept

    def drop(self, stay: Tensor, alive: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Leave only the rows of ``stay`` (B, rows) bool; ``alive`` are the vision rows then left.

        Returns:
            ``(B, new rows)``, the old row of every new one; and ``(B, rows)``, the new row of every
            old one that stays.
        """
        lengths = [n - a + b for n, a, b in zip(self.lengths, self.alive, alive, strict=True)]
        width = max(lengths)
        number = stay.cumsum(-1)
        wanted = torch.arange(1, width + 1, device=self.device).expand(len(lengths), -1)
        if min(lengths) < width:
            padding = on(self.device, [width - n for n in lengths])[:, None]
            number = number + padding
            self.valid = wanted > padding
        else:
            self.valid = None
        # The rows that stay are numbered in their order, so finding a number finds the row; numbers
        # of padding are found nowhere and give row 0.
        order = torch.searchsorted(number, wanted.contiguous())
        self.place = self.place.gather(1, order)
        self.blocks = None if self.blocks is None else self.blocks.gather(1, order)
        self.rows, self.lengths, self.alive = width, lengths, list(alive)
        return order, number - 1

    def record(self, layers: int) -> None:
        """Write the rows of the next ``layers`` layers into the report."""
        place, valid = self.place, self.valid

        def slots() -> list[Tensor]:
            if valid is None:
                return list(place.cpu().unbind(0))
            return [p[v] for p, v in zip(place.cpu(), valid.cpu(), strict=True)]

        for _ in range(layers):
            self.report.alive.append(list(self.alive))
            self.report.rows.append(list(self.lengths))
            self.report._slots.append(slots)

    def keys(self, part: int) -> Tensor | None:
        """The key mask of segment ``part``, kept for the request."""
        mask = joined(self.old_masks[part], self.valid, self.past[part])
        if mask is not None and (width := fixed_length(self.cache)):
            mask = reaching(mask, width)
        self.masks.append(mask)
        return mask

    def mask(self, keys: Tensor | None, part: int, like: Tensor) -> Any:
        """The ready mask of segment ``part``, whose key mask is ``keys``."""
        past, batch = self.past[part], len(self.lengths)
        return causal_mask(
            self.config, self.cache, keys, self.rows, past, batch, like, blocks=self.blocks
        )

    def given(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer, with what belongs to the rows left.

        A model may have several rotary tables (one for each kind of layer), so each layer's own are
        taken, each distinct one once.
        """
        if self.order is None:
            return {**kwargs, **self.segment}
        table = kwargs["position_embeddings"]
        if id(table) not in self.tables:  # the table is kept, so its id is not given to another
            self.tables[id(table)] = (table, tuple(take(part, self.order) for part in table))
        return {**kwargs, **self.segment, "position_embeddings": self.tables[id(table)][1]}

    def stacked(self, hidden: Tensor, layer: int) -> Tensor:
        """``hidden`` (B, rows, D) after ``layer``, with what the model adds there."""
        if layer >= len(self.deepstack):
            return hidden
        return hidden + take(self.deepstack[layer], self.place)

    def tokens(self, hidden: Tensor, layer: int) -> Tokens:
        """The vision tokens before ``layer``, with what layer - 1 attended to."""
        width = max(self.alive)
        slots = torch.arange(1, width + 1, device=self.device).expand(len(self.alive), -1)
        if self.at is None:
            self.at = torch.searchsorted(self.vision.cumsum(-1), slots.contiguous())
        at, valid = self.at, slots > 0
        if min(self.alive) < width:
            valid = slots <= on(self.device, self.alive)[:, None]
            at = at.masked_fill(~valid, 0)
        seen = self.seen.pop(layer - 1, None)
        x = take(hidden, at)
        if seen is None:
            return Tokens(x=x, valid=valid)
        if self.blocks is not None and _BOTH_WAYS not in self.report.notes:
            self.report.notes.append(_BOTH_WAYS)
        last = self.past[segment(self.cuts, layer - 1)]
        return Tokens(
            x=x,
            valid=valid,
            q=seen.q,
            k=seen.k[:, :, last : last + self.rows],
            at=at,
            rows=self.valid,
            scale=seen.scale,
            causal=True,
            instruction=tuple(self.instruction),
            hidden=hidden,
            embeds=self.embeds,
            entered=self.entered,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def cut(self, hidden: Tensor, layer: int) -> Tensor:
        """Reduce ``hidden`` (B, rows, D) to what the schedule says for ``layer``."""
        schedule, method = self.recipe.schedule, cast(Reducer, self.recipe.layers)
        wanted = [
            min(now, schedule.count(layer, n))
            for now, n in zip(self.alive, self.original, strict=True)
        ]
        if wanted != self.alive:
            with self.report.clock(self.device):
                reduction = apply(method, self.tokens(hidden, layer), self.alive, wanted)
                hidden = self._leave(hidden, reduction, wanted)
        part = segment(self.cuts, layer)
        self.segment["attention_mask"] = self.mask(self.keys(part), part, hidden)
        last = next((c for c in self.cuts if c > layer), len(schedule.alive))
        self.record(last - layer)
        return hidden

    def _leave(self, hidden: Tensor, made: Reduction, wanted: list[int]) -> Tensor:
        batch, beyond = len(wanted), self.rows
        at, ragged = cast(Tensor, self.at), min(self.alive) < max(self.alive)
        kept = at.gather(1, made.keep)
        if min(wanted) < max(wanted):  # padding of `keep` goes to a row past the end
            ragged = True
            over = (
                torch.arange(kept.shape[1], device=self.device) >= on(self.device, wanted)[:, None]
            )
            kept = kept.masked_fill(over, beyond)
        if made.x is not None:
            hidden = written(hidden, kept, made.x.to(hidden.dtype), ragged)
        stay = torch.ones(batch, beyond + ragged, dtype=torch.bool, device=self.device)
        if self.valid is not None:
            stay[:, :beyond] = self.valid
        stay.scatter_(1, at, False).scatter_(1, kept, True)
        order, now = self.drop(stay[:, :beyond], wanted)
        kept = kept.sort(dim=-1).values
        if ragged:
            now = nn.functional.pad(now, (0, 1), value=self.rows)
        self.at = now.gather(1, kept)
        self.order = order if self.order is None else self.order.gather(1, order)
        self.tables = {}
        # Layers use position ids only to find packed sequences; gaps would look like some.
        self.segment["position_ids"] = torch.arange(self.rows, device=self.device)[None]
        return take(hidden, order)

    def request(self) -> Request:
        """What later forwards on this cache must know."""
        old_hidden = self.old.hidden if self.old else 0
        old_shift = self.old.shift if self.old else None
        shift = old_shift
        if any(self.gone):
            gone = on(self.device, self.gone)[:, None]
            shift = gone if old_shift is None else gone + old_shift
        return Request(self.cuts, self.masks, old_hidden + self.hidden, shift)


def on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Numbers of the host on a device, without waiting for it: (n,) long."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def written(rows: Tensor, at: Tensor, x: Tensor, beyond: bool) -> Tensor:
    """``rows`` (B, L, D) with ``x`` (B, K, D) in the places ``at``; to place L goes nothing."""
    length = rows.shape[1]
    if beyond:
        rows = nn.functional.pad(rows, (0, 0, 0, 1))
    return rows.scatter(1, at.unsqueeze(-1).expand_as(x), x)[:, :length]


def boundaries(recipe: Recipe, old: Request | None) -> tuple[int, ...]:
    """Where the number of rows in a cache may change: by this recipe, or by those before it."""
    return tuple(sorted({*recipe.schedule.cuts(), *(old.cuts if old else ())}))


def segment(cuts: Sequence[int], layer: int) -> int:
    """The number of cuts up to and before ``layer``."""
    return sum(cut <= layer for cut in cuts)


def apply(
    method: Reducer, tokens: Tokens, alive: Sequence[int], wanted: Sequence[int]
) -> Reduction:
    """One call where the method takes ragged groups, else one for each distinct size and budget."""
    if not any(wanted):
        nothing = torch.zeros(len(alive), 0, dtype=torch.long, device=tokens.x.device)
        return Reduction(keep=nothing, count=torch.zeros(len(alive), dtype=torch.long))
    if method.ragged or (len(set(alive)) == 1 and len(set(wanted)) == 1):
        return method.reduce(tokens, wanted)
    parts: dict[tuple[int, int], list[int]] = {}
    for b, shape in enumerate(zip(alive, wanted, strict=True)):
        parts.setdefault(shape, []).append(b)
    keep = torch.zeros(len(alive), max(wanted), dtype=torch.long, device=tokens.x.device)
    x: Tensor | None = None
    for (size, budget), members in parts.items():
        some = on(keep.device, members)
        made = method.reduce(_members(tokens, members, some, size), [budget] * len(members))
        keep[:, :budget] = keep[:, :budget].index_copy(0, some, made.keep)
        if made.x is not None:
            x = tokens.x.new_zeros(*keep.shape, tokens.x.shape[-1]) if x is None else x
            wide = nn.functional.pad(made.x, (0, 0, 0, keep.shape[1] - budget))
            x = x.index_copy(0, some, wide)
    return Reduction(keep=keep, count=torch.tensor(list(wanted)), x=x)


def _members(tokens: Tokens, members: Sequence[int], index: Tensor, size: int) -> Tokens:
    def some(rows: Tensor | None, width: int | None = None) -> Tensor | None:
        return None if rows is None else rows.index_select(0, index)[:, :width]

    return Tokens(
        x=cast(Tensor, some(tokens.x, size)),
        valid=cast(Tensor, some(tokens.valid, size)),
        q=some(tokens.q),
        k=some(tokens.k),
        at=some(tokens.at, size),
        rows=some(tokens.rows),
        scale=tokens.scale,
        causal=tokens.causal,
        instruction=tokens.instruction and tuple(tokens.instruction[m] for m in members),
        hidden=some(tokens.hidden),
        embeds=some(tokens.embeds),
        entered=some(tokens.entered),
    )


def reaching(mask: Tensor, length: int) -> Tensor:
    """A key mask ``(B, n)`` for ``length`` rows, of which those from n on are real."""
    if mask.shape[1] == length:
        return mask
    return nn.functional.pad(mask, (0, length - mask.shape[1]), value=True)


def joined(old: Tensor | None, new: Tensor | None, past: Any) -> Tensor | None:
    """Key mask of ``past`` rows in the cache and new ones; None when nobody is padded."""
    if old is not None and isinstance(past, int) and past < old.shape[1]:
        old = old[:, :past]  # the cache was cropped, or is static
    if new is None:
        return old
    before = new.new_ones(new.shape[0], 0) if old is None else old
    return torch.cat([reaching(before, int(past)), new], dim=-1)


def fixed_length(cache: Any) -> int:
    """Rows that a static cache has room for; 0 for one that grows, or none."""
    static = cache is not None and cache.is_compileable
    return int(cache.get_max_length(0)) if static else 0


def causal_mask(
    config: Any,
    cache: Any,
    keys: Tensor | None,
    rows: int,
    past: Any,
    batch: int,
    like: Tensor,
    blocks: Tensor | None = None,
) -> Any:
    """A causal mask for ``rows`` new rows after ``past`` cached ones, ``keys`` as in a request.

    As ``create_causal_mask`` makes it, but sized by the segment instead of by layer 0. New rows of
    one number in ``blocks`` (B, rows) see each other; -1 is none. It is told what it would
    otherwise read from the device: whether anybody is padded.
    """
    length = fixed_length(cache) or past + rows
    seen = causal_mask_function
    if blocks is not None:
        around = (past, length - past - rows)
        seen = or_masks(seen, blockwise_overlay(nn.functional.pad(blocks, around, value=-1)))
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch,
        q_length=rows,
        kv_length=length,
        q_offset=past,
        kv_offset=0,
        mask_function=seen,
        attention_mask=None if keys is None else reaching(keys, length),
        allow_is_causal_skip=keys is None and blocks is None and isinstance(past, int),
        dtype=like.dtype,
        config=config,
        use_vmap=False,
        device=like.device,
    )


def deepstacked(kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The text model's arguments without what it would add to vision rows after its first layers.

    Returns:
        Them, and what is to be added after layer 0, 1, …: ``(B, rows, D)``, zero in text rows. So
        it can be cut as the rows are, at whatever boundary.
    """
    like: Tensor = kwargs["inputs_embeds"]
    full = [
        torch.zeros_like(like).masked_scatter(kwargs["visual_pos_masks"][..., None], part.to(like))
        for part in kwargs.get("deepstack_visual_embeds") or ()
    ]
    return {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}, full


def shifted(
    positions: Tensor | None, old: Request | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The caller's position ids in the numbers of a shortened conversation."""
    if old is None or old.shift is None:
        return positions
    if positions is None:
        rows, start = kwargs["inputs_embeds"].shape[1], kwargs["past_key_values"].get_seq_length()
        positions = (torch.arange(rows, device=old.shift.device) + start)[None]
    return positions - old.shift


def ready_made(mask: Any) -> bool:
    """Whether a mask says who sees whom, instead of which rows are padding."""
    return isinstance(mask, dict) or getattr(mask, "ndim", 2) == 4


def two_d(mask: Any, rows: int, past: int) -> Tensor | None:
    """Which of the ``rows`` newest rows are real, ``(B, rows)`` bool, from whatever mask came.

    A static cache brings the 4-D mask ready made: what its last query sees is the padding mask.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise ValueError(
            f"foveate takes a 2-D attention_mask (batch, rows), not a {type(mask).__name__}; pass "
            "the one that the processor made."
        )
    if mask.ndim == 2:
        return mask[:, -rows:].bool()
    last = mask[:, 0, -1, past : past + rows]
    return last if last.dtype == torch.bool else last == 0
