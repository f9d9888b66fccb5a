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
        masks: per segment, ``(B, rows in the cache)`` bool, or None when nobody is padded.
        hidden: rows that the entrance dropped, padding included: what ``get_seq_length`` of the
            shortened cache lacks.
        shift: ``(B, 1)``, what position ids of the caller are ahead of compact ones; None if kept.
        served: a session has the forward under way in hand.
    """

    cuts: tuple[int, ...]
    masks: list[Tensor | None]
    hidden: int = 0
    shift: Tensor | None = None
    served: bool = False

    def live_on(self, cache: Cache) -> None:
        """Put this on the cache that later forwards will bring."""
        vars(cache)["foveate_request"] = self
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
        served = cast(Request, vars(self._cache)["foveate_request"]).served
        if layer_idx == 0 and not served and request_of(self._cache) is not None:
            raise ValueError(
                "This cache was filled by a reduced prompt and the model has no recipe attached. "
                "Go on inside foveate.reduced(model, recipe), with keep=1.0 to reduce nothing "
                "more, or start the conversation anew."
            )
        return type(self._cache).update(self._cache, keys, values, layer_idx, *args, **more)


def request_of(cache: Any) -> Request | None:
    """The request that lives on a cache, unless the cache was emptied since."""
    request = cast("Request | None", getattr(cache, "foveate_request", None))
    if request is None or not int(cache.layers[0].get_seq_length()):
        return None
    return request


@dataclass(frozen=True)
class Flags:
    """What the host knows of a prompt's rows, each ``(B, L)`` bool on the CPU.

    One copy from the device when the prompt arrives; everything later is counted from it.
    """

    valid: Tensor
    vision: Tensor

    @property
    def instruction(self) -> list[int]:
        """Text rows after each sample's last vision token."""
        after = self.vision.flip(-1).long().cumsum(-1).flip(-1) == 0
        return [int(n) for n in (after & self.valid).sum(-1)]


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
        text: ``(B, rows)`` bool, text rows.
        vision: ``(B, rows)`` bool, vision rows.
        place: ``(B, rows)``, each row's position in the prompt as it came.
        lengths, alive, original: per sample, real rows, vision rows, and vision rows at first.
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
    text: Tensor
    vision: Tensor
    place: Tensor
    lengths: list[int]
    alive: list[int]
    original: list[int]
    instruction: list[int]
    past: list[Any]
    old: Request | None
    old_masks: list[Tensor | None]
    flush: bool
    embeds: Tensor
    entered: Tensor
    hidden: int = 0
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
        past: list[Any],
        old: Request | None,
        old_masks: list[Tensor | None],
        kwargs: Mapping[str, Any],
        blocks: Tensor | None = None,
    ) -> Pass:
        """The rows as they come, before any reduction; ``kwargs`` are the text model's."""
        embeds: Tensor = kwargs["inputs_embeds"]
        device, (batch, length) = embeds.device, embeds.shape[:2]
        vision = flags.vision.to(device, non_blocking=True)
        valid = None if bool(flags.valid.all()) else flags.valid.to(device, non_blocking=True)
        counts, lengths = flags.vision.sum(-1).tolist(), flags.valid.sum(-1).tolist()
        report.vision.extend(counts)
        report.dense_rows.extend(lengths)
        return cls(
            recipe=recipe,
            report=report,
            config=config,
            cache=cache,
            device=device,
            rows=length,
            valid=valid,
            text=~vision if valid is None else valid & ~vision,
            vision=vision,
            place=torch.arange(length, device=device).expand(batch, -1),
            lengths=lengths,
            alive=counts,
            original=list(counts),
            instruction=flags.instruction,
            past=past,
            old=old,
            old_masks=old_masks,
            blocks=None if blocks is None else blocks[:, -length:].to(device),
            flush=bool((flags.valid.int().diff(dim=-1) >= 0).all()),
            embeds=embeds,
            entered=vision,
        )

    def enter(
        self, kwargs: dict[str, Any], stay: Tensor, alive: list[int], compact: bool
    ) -> dict[str, Any]:
        """Boundary 0: the text model's arguments with only the rows of ``stay`` (B, rows)."""
        before, real, positions = (
            list(self.alive),
            self.text | self.vision,
            kwargs.get("position_ids"),
        )
        embeds: Tensor = kwargs["inputs_embeds"]
        later = self.old is not None or bool(int(self.past[0]))
        if alive == before and self.flush:
            if not later:
                self.keys(0)
                return kwargs
            positions = shifted(positions, self.old, kwargs)
        else:
            self.hidden = self.rows
            order = self.drop(stay, alive)
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

    def _numbers(self) -> Tensor:
        """0, 1, 2, … over the real rows of each sample, (B, rows)."""
        if self.valid is None:
            return torch.arange(self.rows, device=self.device).expand(len(self.lengths), -1)
        return (self.valid.long().cumsum(-1) - 1).clamp(min=0)

    def _numbered_from(self, positions: Tensor | None, real: Tensor) -> Tensor | None:
        """Compact position ids that start where the caller's do; ``real`` are the rows it had."""
        if positions is None:
            return None
        far = torch.iinfo(positions.dtype).max
        return self._numbers() + positions.masked_fill(~real, far).amin(-1, keepdim=True)

    def _gathered(self, positions: Tensor, order: Tensor) -> Tensor:
        """Position ids ``(…, B, rows)`` of the rows left, as they were."""
        parts = positions[None] if positions.ndim == 2 else positions
        kept = torch.stack([take(p[..., None], order)[..., 0] for p in parts])
        if len(parts) == 4:  # the first only finds packed sequences, and gaps would look like some
            kept[0] = self._numbers()
        return kept[0] if positions.ndim == 2 else kept

    def drop(self, keep: Tensor, alive: Sequence[int]) -> Tensor:
        """Leave only the rows of ``keep`` (B, rows) bool; ``alive`` are the vision rows then left.

        Returns:
            ``(B, new rows)``, the old row of every new one.
        """
        lengths = [n - a + b for n, a, b in zip(self.lengths, self.alive, alive, strict=True)]
        width = max(lengths)
        order = keep.to(torch.uint8).argsort(dim=-1, stable=True)[:, self.rows - width :]
        self.text, self.vision = self.text.gather(1, order), self.vision.gather(1, order)
        self.place = self.place.gather(1, order)
        self.blocks = None if self.blocks is None else self.blocks.gather(1, order)
        self.valid = None
        if min(lengths) < width:
            padding = torch.tensor([width - n for n in lengths]).to(self.device, non_blocking=True)
            self.valid = torch.arange(width, device=self.device) >= padding[:, None]
            self.text, self.vision = self.text & self.valid, self.vision & self.valid
        self.rows, self.lengths, self.alive = width, lengths, list(alive)
        return order

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
        past, batch = self.past[part], len(self.lengths)
        self.masks.append(
            joined(self.old_masks[part], self.valid, past, self.rows, batch, self.device)
        )
        return self.masks[-1]

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
        at = (~self.vision).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
        valid = self.vision.gather(1, at)
        seen = self.seen.pop(layer - 1, None)
        x = take(hidden, at)
        if seen is None:
            return Tokens(x=x, valid=valid)
        if self.blocks is not None and _BOTH_WAYS not in self.report.notes:
            self.report.notes.append(_BOTH_WAYS)
        every = torch.ones_like(self.text) if self.valid is None else self.valid
        last = int(self.past[segment(self.cuts, layer - 1)])
        return Tokens(
            x=x,
            valid=valid,
            q=seen.q,
            k=seen.k[:, :, last : last + self.rows],
            at=at.masked_fill(~valid, 0),
            rows=every,
            scale=seen.scale,
            causal=True,
            instruction=tuple(self.instruction),
            hidden=hidden,
            embeds=self.embeds,
            entered=self.entered,
        )

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
        at = (~self.vision).to(torch.uint8).argsort(dim=-1, stable=True)
        kept = at.gather(1, made.keep)
        if min(wanted) < max(wanted):  # ragged: padding of `keep` points past the end
            over = torch.arange(kept.shape[1]) >= torch.tensor(wanted)[:, None]
            kept = kept.masked_fill(over.to(self.device, non_blocking=True), self.rows)
        if made.x is not None:
            spot = kept.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            wide = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
            hidden = wide.scatter(1, spot, made.x.to(hidden.dtype))[:, : self.rows]
        stay = nn_pad(self.text).scatter(1, kept, True)[:, : self.rows]
        order = self.drop(stay, wanted)
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
            gone = torch.tensor(self.gone, device=self.device)[:, None]
            shift = gone if old_shift is None else gone + old_shift
        return Request(self.cuts, self.masks, old_hidden + self.hidden, shift)


def nn_pad(flags: Tensor) -> Tensor:
    """``(B, L)`` with one more column of False, where writes to nowhere go."""
    return nn.functional.pad(flags, (0, 1))


def take(rows: Tensor, order: Tensor) -> Tensor:
    """Rows ``order`` (B, K) of ``rows`` (B or 1, L, …): one gather."""
    batch, length = order.shape[0], rows.shape[1]
    if batch == 1:
        return rows.index_select(1, order[0])
    start = torch.arange(batch, device=order.device)[:, None] * length
    flat = order if rows.shape[0] == 1 else order + start
    taken = rows.flatten(0, 1).index_select(0, flat.flatten())
    return taken.view(*order.shape, *rows.shape[2:])


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
        made = method.reduce(_members(tokens, members, size), [budget] * len(members))
        keep[members, :budget] = made.keep
        if made.x is not None:
            x = tokens.x.new_zeros(*keep.shape, tokens.x.shape[-1]) if x is None else x
            x = x.index_put((torch.tensor(members)[:, None], torch.arange(budget)), made.x)
    return Reduction(keep=keep, count=torch.tensor(list(wanted)), x=x)


def _members(tokens: Tokens, members: Sequence[int], size: int) -> Tokens:
    def some(rows: Tensor | None, width: int | None = None) -> Tensor | None:
        return None if rows is None else rows[list(members)][:, :width]

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


def joined(
    old: Tensor | None, new: Tensor | None, past: Any, rows: int, batch: int, device: torch.device
) -> Tensor | None:
    """Key mask ``(B, past + rows)`` of a segment, or None when nobody is padded."""
    if old is None and new is None:
        return None
    past = int(past)
    before = (
        torch.ones(batch, past, dtype=torch.bool, device=device) if old is None else old[:, :past]
    )
    now = torch.ones(batch, rows, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([before, now], dim=-1)


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
    """A causal mask for ``rows`` new rows after ``past`` cached ones, ``keys`` (B, past + rows).

    As ``create_causal_mask`` makes it, but sized by the segment instead of by layer 0. New rows of
    one number in ``blocks`` (B, rows) see each other; -1 is none.
    """
    static = cache is not None and cache.is_compileable
    length = cache.get_max_length(0) if static else past + rows
    seen = causal_mask_function
    if blocks is not None:
        around = (int(past), int(length) - int(past) - rows)
        seen = or_masks(seen, blockwise_overlay(nn.functional.pad(blocks, around, value=-1)))
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch,
        q_length=rows,
        kv_length=length,
        q_offset=past,
        kv_offset=0,
        mask_function=seen,
        attention_mask=keys,
        allow_is_causal_skip=blocks is None and not (static and rows == 1),
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
