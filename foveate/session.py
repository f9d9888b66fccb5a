"""Sessions: getting a recipe into a model and out again. The only code that touches a model.

Pre-hooks move rows, the attention interface watches, nothing is copied or replaced. Everything is
gone after :func:`detach` or the end of the ``with`` block, also after an error.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from foveate.adapter import Adapter, Seen, family, text_shape
from foveate.entrance import Entrance
from foveate.prompt import (
    Flags,
    Left,
    Pass,
    Request,
    boundaries,
    causal_mask,
    deepstacked,
    joined,
    ready_made,
    request_of,
    segment,
    shifted,
    two_d,
)
from foveate.recipe import Recipe
from foveate.reducer import Reducer
from foveate.report import Report
from foveate.watch import Watch, check_attention

_INPUTS = {"image": "pixel_values", "video": "pixel_values_videos"}
_TEXT_INPUTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"),
    *("use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"),
}


@contextmanager
def reduced(model: nn.Module, recipe: Recipe) -> Iterator[Report]:
    """Run a model with a recipe inside a ``with`` block.

    Args:
        model: a Hugging Face multimodal model, as loaded.
        recipe: what to do; see :func:`foveate.recipe`.

    Yields:
        The report of the last prompt, filled as prompts go through.

    Raises:
        ValueError: for a model type that foveate does not know, a recipe for another depth or
            model, or a model that already has one attached.
    """
    report = attach(model, recipe)
    try:
        yield report
    finally:
        detach(model)


def attach(model: nn.Module, recipe: Recipe) -> Report:
    """The persistent form of :func:`reduced`: stays until :func:`detach`.

    A model wrapped by peft may be given as it is; the recipe goes into the model inside.
    """
    if session_of(model) is not None:
        raise ValueError(
            "This model already has a recipe attached; call foveate.detach(model) first."
        )
    session = Session(_inner(model), recipe)
    cast(Any, session.model).foveate_session = session
    return session.report


def detach(model: nn.Module) -> None:
    """Leave the model as it was before :func:`attach`.

    Raises:
        ValueError: when nothing is attached.
    """
    session = session_of(model)
    if session is None:
        raise ValueError(
            "This model has no recipe attached; foveate.attach(model, recipe) does that."
        )
    session.close()
    del cast(Any, session.model).foveate_session


def session_of(model: nn.Module) -> Session | None:
    """The session attached to a model."""
    return cast("Session | None", vars(_inner(model)).get("foveate_session"))


def _inner(model: nn.Module) -> nn.Module:
    """The Hugging Face model that peft wrapped; peft puts its layers into that very object."""
    base = getattr(model, "get_base_model", None)
    return model if base is None else cast(nn.Module, base())


@dataclass(eq=False)
class _Frame:
    """One forward that brings images: what the model's parts tell each other.

    Attributes:
        flags: the rows of the prompt, or None when no vision token is among them.
        slots: per modality, the placeholders of each sample.
        kept: per modality, (slots, survivors) of each item; None where only counting tells.
        mask: the attention mask that the caller gave.
        blocks: rows that see each other whatever their order; see :meth:`Adapter.blocks`.
        old: what is known of the cache that came, where it holds a reduced prompt.
    """

    flags: Flags | None = None
    slots: dict[str, list[int]] = field(default_factory=dict)
    kept: dict[str, list[tuple[int, int]] | None] = field(default_factory=dict)
    rows: Pass | None = None
    mask: Any = None
    blocks: Tensor | None = None
    old: Request | None = None


class Session:
    """A recipe in a model. Holds hooks and nothing of any prompt; that is in a ContextVar."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.adapter: Adapter = family(model)
        self.model, self.text = model, self.adapter.text(model)
        self.shape = text_shape(self.text)
        config = cast(Any, model.config)
        self.recipe = recipe.resolve(self.shape.layers, config.model_type)
        self.recipe._check_reducers()
        self.report = Report(self.shape)
        self._frame: ContextVar[_Frame | None] = ContextVar("foveate_frame", default=None)
        # Empty while no forward brings images. torch.compile cannot trace a ContextVar, and so
        # decoding, which needs no frame, does not ask for one.
        self._frames: set[_Frame] = set()
        self._left: ContextVar[Left | None] = ContextVar("foveate_left", default=None)
        self._undo: list[Callable[[], None]] = []
        self._entrance: Entrance | None = None
        self._cuts = self.recipe.schedule.cuts()
        self._reducing = bool(self._cuts)
        self._guess = ""
        if self.adapter.guessed:
            self._guess = (
                f"foveate has no adapter for the model type {config.model_type!r}; its parts were "
                "recognised, and what cannot be known of it is refused."
            )
            logging.getLogger(__name__).warning(self._guess)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Undo everything, last first."""
        while self._undo:
            self._undo.pop()()

    def _open(self) -> None:
        base, text, schedule = self.adapter.base(self.model), self.text, self.recipe.schedule
        watched: list[tuple[nn.Module, Callable[[Seen], None]]] = []
        if schedule.adaptive or schedule.alive[0] < 1.0:
            self._reducing = True
            self._entrance = Entrance(
                self.model, self.adapter, self.recipe, self.report, self._encoded
            )
            self._undo.append(self._entrance.remove)
            if cast(Any, self.recipe.entrance).needs_attention:
                watched += self._entrance.watched(self._eyes())
        if self._reducing:
            check_attention(cast(Any, text.config)._attn_implementation)
        layers = list(cast(nn.ModuleList, text.layers))
        if self._cuts and cast(Any, self.recipe.layers).needs_attention:
            watched += [
                (cast(nn.Module, layers[cut - 1].self_attn), partial(self._show, cut - 1))
                for cut in self._cuts
            ]
        self._undo.append(Watch(watched).remove)
        self._hook(self.model.register_forward_pre_hook(self._refuse_rows, with_kwargs=True))
        self._hook(base.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._hook(base.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        self._hook(text.register_forward_pre_hook(self._before_text, with_kwargs=True))
        self._hook(text.register_forward_hook(self._after_text))
        self._undo += [handle.remove for handle in self._at_layers(self._cuts[:1])]
        if self.adapter.deepstack:
            for index, layer in enumerate(layers):
                self._hook(layer.register_forward_hook(partial(self._after_layer, index)))
        self._refuse_chunks()
        self._cut_labels()

    def _eyes(self) -> Sequence[nn.Module]:
        """The encoder's attention modules."""
        if self.adapter.blind:
            raise NotImplementedError(
                f"{cast(Any, self.recipe.entrance).name} cannot work on {self.adapter.family}: it "
                f"needs the encoder's attention, and {self.adapter.blind}. Use a method that needs "
                "none, such as pool or aim-merge-tokens, or one inside the LLM, such as fastv."
            )
        last = self.adapter.vision_attentions(self.model)
        if cast(Reducer, self.recipe.entrance).encoder == "last":
            return last
        return [self.adapter.feature_attention(self.model, module) for module in last]

    def _at_layers(self, first: Sequence[int], stop: int | None = None) -> list[Any]:
        """Hooks before the layers from ``first``, if any, up to ``stop``."""
        layers = list(cast(nn.ModuleList, self.text.layers))
        return [
            layers[index].register_forward_pre_hook(
                partial(self._before_layer, index), with_kwargs=True
            )
            for cut in first
            for index in range(cut, len(layers))[: None if stop is None else max(0, stop - cut)]
        ]

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    # What is refused

    def _refuse_rows(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._reducing and isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError(
                "logits_to_keep names rows of the prompt as it came, and a reduced prompt has "
                "others. Give a number: the last rows are the same."
            )
        if self._reducing and kwargs.get("shift_labels") is not None:
            raise ValueError(
                "shift_labels were given, but labels can be shifted only after dropped rows are "
                "cut out of them. Pass labels alone."
            )

    def _refuse_chunks(self) -> None:
        model = cast(Any, self.model)
        original = model._prefill

        def checked(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size} splits the image "
                    "over several forwards, and a reduced prompt must see it whole. Leave it None."
                )
            return original(input_ids, generation_config, *args, **kwargs)

        model._prefill = checked
        self._undo.append(lambda: delattr(model, "_prefill"))

    def _refuse_old_checkpointing(self) -> None:
        layer = cast(nn.ModuleList, self.text.layers)[0]
        inside = "__call__" in vars(GradientCheckpointingLayer)  # hooks would run again in backward
        if inside and self.text.training and cast(Any, layer).gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing with cuts inside the LLM needs transformers 5.23 and this "
                f"is {transformers.__version__}. Update it, call "
                "model.gradient_checkpointing_disable(), or reduce at the entrance only."
            )

    def _refuse_windows(self, past: Any, rows: int) -> None:
        config = cast(Any, self.text.config)
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)  # without them every layer has the window
        if window is None or (types is not None and "sliding_attention" not in types):
            return
        if window < int(past) + rows:
            raise ValueError(
                f"This model has sliding-window layers of {window} rows, and prompt and answer "
                f"have {int(past) + rows}; with rows left out a window would mean other rows. Use "
                "a shorter prompt or answer, or run the model without a recipe."
            )

    def _refuse_unknown(self, frame: _Frame, kwargs: dict[str, Any]) -> None:
        """What a model without an adapter does besides masks and positions cannot be cut alike."""
        parameters = set(inspect.signature(self.text.forward).parameters) - {"args", "kwargs"}
        more = [n for n in parameters - _TEXT_INPUTS if kwargs.get(n) is not None]
        if ready_made(kwargs.get("attention_mask")) and not ready_made(frame.mask):
            more.append("an attention_mask of the model's own making")
        if more:
            raise ValueError(
                f"foveate has no adapter for {cast(Any, self.model.config).model_type!r}, and its "
                f"text model was given {', '.join(sorted(more))}, which foveate cannot cut. Use a "
                "model type that `foveate models` lists."
            )

    # One forward of the multimodal model

    def _now(self) -> _Frame | None:
        """The frame of this thread's forward, if it brings images."""
        return self._frame.get() if self._frames else None

    def _encoded(self, modality: str, sizes: list[tuple[int, int]]) -> None:
        if (frame := self._now()) is not None:  # a second call: only counting tells whose
            frame.kept[modality] = None if modality in frame.kept else sizes

    def _show(self, layer: int, seen: Seen) -> None:
        frame = self._now()
        if frame is not None and frame.rows is not None:
            frame.rows.seen[layer] = seen

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._left.set(None)
        old = request_of(kwargs.get("past_key_values"))
        if old is not None:
            old.served, old.given = True, kwargs.get("attention_mask")
        outputs = kwargs.get("mm_encoder_outputs") or {}
        given = [m for m, name in _INPUTS.items() if kwargs.get(name) is not None or outputs.get(m)]
        if given:
            self._begin(args[0] if args else kwargs.get("input_ids"), given, outputs, old, kwargs)

    # torch.compile leaves what only a prompt needs alone: it would make a graph of every prompt.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self,
        ids: Tensor | None,
        given: list[str],
        outputs: Mapping[str, Any],
        old: Request | None,
        kwargs: dict[str, Any],
    ) -> None:
        """A forward that brings images."""
        if ids is None:
            raise ValueError(
                "inputs_embeds were given without input_ids, and foveate cannot tell which of "
                "their rows are vision tokens. Pass input_ids and pixel_values."
            )
        frame = _Frame(
            mask=kwargs.get("attention_mask"), blocks=self.adapter.blocks(kwargs), old=old
        )
        self._frame.set(frame)
        self._frames.add(frame)
        self._read(frame, ids, given, kwargs)
        for modality in given:
            if self._entrance is not None and outputs.get(modality):
                frame.kept[modality] = self._entrance.kept(outputs[modality].pooler_output)

    def _read(self, frame: _Frame, ids: Tensor, given: list[str], kwargs: dict[str, Any]) -> None:
        """Which rows are vision and which padding, and how many: the one read from the device."""
        numbers = self.adapter.placeholders(self.model)
        where = {modality: ids == numbers[modality] for modality in given}
        past = int(self._past(kwargs.get("past_key_values"), ())[0])
        valid = two_d(kwargs.get("attention_mask"), ids.shape[1], past)
        vision = reduce(torch.logical_or, where.values())
        flags, slots = Flags.read(valid, vision, list(where.values()))
        frame.slots = dict(zip(where, slots, strict=True))
        if any(flags.counts):
            frame.flags = flags

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        frame = self._now()
        old = request_of(kwargs.get("past_key_values")) if frame is None else frame.old
        if old is not None:
            old.leave()
        if frame is None:
            return
        if frame.rows is not None and frame.flags is not None:
            self._left.set(Left(frame.rows.place, frame.rows.valid, frame.flags.rows))
        self._frame.set(None)
        self._frames.discard(frame)

    # Training

    def _cut_labels(self) -> None:
        """The model's own loss, on labels of the rows that are left."""
        model = cast(Any, self.model)
        own, original = vars(model).get("_loss_function"), model.loss_function

        def loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
            if (left := self._left.get()) is not None:
                labels = left.labels(labels, logits.shape[1])
            return original(logits, labels, *args, **kwargs)

        model.loss_function = loss
        self._undo.append(lambda: _restore(model, "_loss_function", own))

    # The text model

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        frame = self._now()
        old = request_of(kwargs.get("past_key_values"))
        if old is not None and old.served and old.cuts != self._cuts:
            self._also_cut(old)
        if frame is not None and frame.flags is not None:
            return args, self._start(frame, frame.flags, kwargs)
        return None if old is None or not old.served else (args, self._continue(old, kwargs))

    def _also_cut(self, old: Request) -> None:
        """A cache that was filled under a recipe with cuts elsewhere."""
        old.hooks += self._at_layers(old.cuts[:1], next(iter(self._cuts), None))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start(self, frame: _Frame, flags: Flags, kwargs: dict[str, Any]) -> dict[str, Any]:
        """New rows with vision tokens among them."""
        cache, old = kwargs.get("past_key_values"), frame.old
        past = [int(n) for n in self._past(cache, boundaries(self.recipe, old))]
        old_masks = self._old_masks(old, past, frame.mask)
        self.report.begin()
        rows = Pass.begin(
            self.recipe,
            self.report,
            self.text.config,
            cache,
            flags,
            past,
            old,
            old_masks,
            kwargs,
            frame.blocks,
        )
        if not self._reducing and old is None:
            rows.record(self.shape.layers)
            return kwargs
        frame.rows = rows
        if self._guess:
            self.report.notes.append(self._guess)
            self._refuse_unknown(frame, kwargs)
        self._refuse_windows(past[0], rows.rows)
        if self.adapter.deepstack:
            kwargs, rows.deepstack = deepstacked(kwargs)
        if self._cuts:
            self._refuse_old_checkpointing()
        stay, alive = None, rows.alive
        with self.report.clock(rows.device):
            if self._entrance is not None:
                stay = ~kwargs["inputs_embeds"][..., 0].isnan()
                alive = self._alive(frame, stay, flags)
            kwargs = rows.enter(kwargs, stay, alive, self.adapter.positions == "compact")
        rows.record(next(iter(rows.cuts), self.shape.layers))
        return kwargs

    def _alive(self, frame: _Frame, stay: Tensor, flags: Flags) -> list[int]:
        """Vision rows left in each sample, from what the feature calls said, else by counting."""
        counted = [0] * len(flags.counts)
        for modality, samples in frame.slots.items():
            items = iter(frame.kept.get(modality) or ())
            for b, slots in enumerate(samples):
                while slots > 0:
                    size, kept = next(items, (slots + 1, 0))
                    slots, counted[b] = slots - size, counted[b] + kept
                if slots:
                    return cast(list[int], (stay & flags.vision.to(stay.device)).sum(-1).tolist())
        return counted

    def _continue(self, old: Request, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Text after a reduced prompt: decoding, or the next turn."""
        embeds, cache = kwargs["inputs_embeds"], kwargs["past_key_values"]
        batch, rows = embeds.shape[:2]
        past = self._past(cache, old.cuts)
        self._refuse_windows(past[0], rows)
        new = None
        if rows > 1 and (valid := two_d(old.given, rows, 0)) is not None:
            new = None if bool(valid.all()) else valid.to(embeds.device)
        old.masks = [joined(mask, new, n) for mask, n in zip(old.masks, past, strict=True)]
        old.now = [
            causal_mask(self.text.config, cache, mask, rows, length, batch, embeds)
            for mask, length in zip(old.masks, past, strict=True)
        ]
        positions = shifted(kwargs.get("position_ids"), old, kwargs)
        return {**kwargs, "attention_mask": old.now[0], "position_ids": positions}

    def _past(self, cache: Any, cuts: Sequence[int]) -> list[Any]:
        """Rows in the cache, per segment."""
        held = len(cache.layers) if cache is not None else 0
        return [cache.layers[s].get_seq_length() if s < held else 0 for s in (0, *cuts)]

    def _old_masks(self, old: Request | None, past: list[Any], mask: Any) -> list[Tensor | None]:
        """Key masks of the rows in the cache, per segment; ``mask`` is the caller's."""
        if old is not None:
            cuts = (0, *boundaries(self.recipe, old))
            return [old.masks[segment(old.cuts, start)] for start in cuts]
        plain = isinstance(mask, Tensor) and mask.ndim == 2 and int(past[0])
        return [mask[:, : int(past[0])].bool() if plain else None for _ in past]

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        frame = self._now()
        if frame is None or frame.rows is None:
            old = request_of(kwargs.get("past_key_values"))
            if old is None or old.now is None:
                return None
            return args, {**kwargs, "attention_mask": old.now[segment(old.cuts, index)]}
        if index in frame.rows.cuts:
            args = (frame.rows.cut(args[0], index), *args[1:])
        return args, frame.rows.given(kwargs)

    def _after_layer(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Any:
        frame = self._now()
        return output if frame is None or frame.rows is None else frame.rows.stacked(output, index)

    def _after_text(self, module: nn.Module, args: Any, output: Any) -> None:
        frame = self._now()
        if frame is None or frame.flags is None:
            return
        self.report.finish()
        if frame.rows is not None and (cache := output.past_key_values) is not None:
            frame.rows.request().live_on(cache)


def _restore(owner: Any, name: str, value: Any) -> None:
    """Put an instance attribute back, or away where there was none."""
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
