"""Running the language model from any layer on: what lies below is kept, not computed again.

A search asks the same prompts again and again, under schedules that begin alike. Their hidden
states before the layer in question are kept; a probe runs only the layers from there on.

Answers are given with the prompts ("teacher forcing"), so one pass scores a whole answer. They
stand to the right of the prompt in every sample and are hidden from the method, which therefore
sees what it sees in use: the prompt alone.

Shapes: B samples, L rows of a prompt, A rows of the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import foveate
from foveate.adapter import Seen, family, text_shape, vision_rows
from foveate.prompt import Flags, Pass, deepstacked
from foveate.recipe import Recipe
from foveate.reducer import Reducer, Tokens
from foveate.report import Report
from foveate.schedule import Schedule
from foveate.session import session_of
from foveate.watch import Watch


@dataclass(frozen=True)
class Batch:
    """Prompts with the answers that are to be scored.

    Attributes:
        inputs: arguments of the model's forward. ``input_ids`` (B, L + A) holds the prompts, padded
            on the left, then the answers, padded on the right.
        answer: (B, A) token ids of the answers, -100 where there is none.
    """

    inputs: dict[str, Any]
    answer: Tensor


@dataclass
class _Rows(Pass):
    """A pass whose last ``answers`` columns are hidden from the method."""

    answers: int = 0

    def tokens(self, hidden: Tensor, layer: int) -> Tokens:
        seen = super().tokens(hidden, layer)
        end = self.rows - self.answers
        if seen.q is None or seen.k is None:
            return seen
        entered = self.embeds.shape[1] - self.answers
        return replace(
            seen,
            q=seen.q[:, :, :end],
            k=seen.k[:, :, :end],
            rows=None if seen.rows is None else seen.rows[:, :end],
            embeds=self.embeds[:, :entered],
            entered=self.entered[:, :entered],
        )


@dataclass(frozen=True)
class State:
    """A batch just before ``layer``, not yet cut there.

    Attributes:
        hidden: (B, rows, D).
        rows: which rows these are.
        seen: what layer - 1 attended to, where a method asks for it.
        given: the arguments of each layer with nothing cut.
    """

    layer: int
    hidden: Tensor
    rows: _Rows
    given: tuple[dict[str, Any], ...]
    seen: Seen | None = None

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Text and vision rows of each prompt, its answer left out."""
        rows = zip(self.rows.lengths, self.rows.alive, strict=True)
        return [(n - self.rows.answers - vision, vision) for n, vision in rows]

    @property
    def bytes(self) -> int:
        """Memory of what grows with the batch."""
        kept = [self.hidden, self.rows.embeds, *((self.seen.q, self.seen.k) if self.seen else ())]
        return sum(t.numel() * t.element_size() for t in kept)


@dataclass
class Shelf:
    """States of all batches: in memory up to ``limit`` bytes, beyond it in files of ``folder``."""

    folder: Path
    limit: int
    _states: list[State | Path] = field(default_factory=list)

    def put(self, state: State) -> None:
        held = sum(s.bytes for s in self._states if isinstance(s, State))
        if held + state.bytes <= self.limit:
            self._states.append(state)
            return
        file = self.folder / f"{len(self._states)}.pt"
        torch.save(state, file)
        self._states.append(file)

    def __iter__(self) -> Iterator[State]:
        for state in self._states:
            if isinstance(state, State):
                yield state
            else:
                yield torch.load(state, weights_only=False)  # our own file of a moment ago


class Runner:
    """The language model of ``model``, layer by layer, and a count of what that cost.

    Attributes:
        flops: of all layers run so far.
    """

    def __init__(
        self, model: nn.Module, entrance: Reducer | None = None, keep: float = 1.0
    ) -> None:
        """``entrance`` reduces to ``keep`` before the language model, in every run."""
        self.model, self.entrance, self.keep = model, entrance, keep
        self.text = family(model).text(model)
        self.layers = list(cast(nn.ModuleList, self.text.layers))
        self.shape = text_shape(self.text)
        self.flops = 0

    def recipe(self, alive: Sequence[float], method: Reducer | None) -> Recipe:
        """The recipe of a curve over all layers."""
        return Recipe(Schedule(alive=tuple(alive)), entrance=self.entrance, layers=method)

    @torch.no_grad()
    def start(self, batch: Batch) -> State:
        """The state before layer 0: the model runs, its layers let everything pass."""
        flat = self.recipe([self.keep] * self.shape.layers, None)
        answers = batch.answer.shape[1]
        inputs = family(self.model).answered(batch.inputs, answers)
        found: list[tuple[Tensor, dict[str, Any], Pass | None]] = []
        with ExitStack() as stack:
            given: dict[str, Any] = {}
            spy = self.text.register_forward_pre_hook(
                lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
            )
            stack.callback(spy.remove)
            if self.entrance is not None:
                stack.enter_context(foveate.reduced(self.model, flat))
            for layer in self.layers:
                vars(layer)["forward"] = partial(self._pass, found)
                stack.callback(vars(layer).pop, "forward")
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        hidden, _, rows = found[0]
        rows = self._rows(inputs, given, flat) if rows is None else rows
        plain = {f.name: getattr(rows, f.name) for f in fields(Pass)}
        plain["instruction"] = [n - answers for n in rows.instruction]
        begun = _Rows(**plain, answers=answers)
        return State(0, hidden, begun, tuple(kwargs for _, kwargs, _ in found))

    def _pass(
        self,
        found: list[tuple[Tensor, dict[str, Any], Pass | None]],
        hidden: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """In place of a layer: notes what it is given."""
        session = session_of(self.model)
        frame = session._frame.get() if session else None
        found.append((hidden, kwargs, frame.rows if frame else None))
        return hidden

    def flat(self, state: State) -> Tensor:
        """The last hidden states (B, rows, D) with nothing cut inside."""
        return self.run(state, self.recipe([self.keep] * self.shape.layers, None)).hidden

    def _rows(self, inputs: Mapping[str, Any], given: dict[str, Any], recipe: Recipe) -> Pass:
        """All rows; ``inputs`` are the model's arguments, ``given`` the text model's."""
        adapter, ids = family(self.model), inputs["input_ids"]
        mask = inputs["attention_mask"].bool()
        flags, _ = Flags.read(mask, vision_rows(self.model, ids))
        config, blocks = self.text.config, adapter.blocks(inputs)
        report = Report(self.shape)
        rows = Pass.begin(recipe, report, config, None, flags, [0], None, [None], given, blocks)
        if adapter.deepstack:
            _, rows.deepstack = deepstacked(given)
        return rows

    @torch.no_grad()
    def run(self, state: State, recipe: Recipe, stop: int | None = None) -> State:
        """``state`` after the layers from ``state.layer`` to ``stop`` (all), cut as told.

        The first ``state.layer`` values of the schedule are those that ``state`` was made with.
        """
        stop = self.shape.layers if stop is None else stop
        cuts = recipe.schedule.cuts()
        parts = len(cuts) + 1
        rows = replace(
            state.rows,
            recipe=recipe,
            report=Report(self.shape),
            past=[0] * parts,
            old_masks=[None] * parts,
            masks=[],
            seen={state.layer - 1: state.seen} if state.seen else {},
            segment=dict(state.rows.segment),
            tables={},
        )
        hidden = state.hidden
        with self._watching(recipe, range(state.layer, stop), rows.seen):
            for index in range(state.layer, stop):
                given = state.given[index]
                if index in cuts:
                    hidden = rows.cut(hidden, index)
                hidden = _first(self.layers[index](hidden, **rows.given(given)))
                hidden = rows.stacked(hidden, index)
                self.flops += sum(self.shape.layer_flops(n) for n in rows.lengths)
        seen = rows.seen.pop(stop - 1, None)
        rows.report = Report(self.shape)  # what a report remembers of rows cannot go into a file
        return State(stop, hidden, rows, state.given, seen)

    @contextmanager
    def _watching(self, recipe: Recipe, layers: range, seen: dict[int, Seen]) -> Iterator[None]:
        """Keep q and k of the layers after which the recipe cuts, and of the last one."""
        needed = recipe.layers is not None and recipe.layers.needs_attention
        before = [b - 1 for b in (*recipe.schedule.cuts(), layers.stop) if b - 1 in layers]
        armed: list[tuple[nn.Module, Callable[[Seen], None]]] = [
            (cast(nn.Module, self.layers[i].self_attn), partial(seen.__setitem__, i))
            for i in sorted(set(before))
            if needed and i + 1 < self.shape.layers
        ]
        watch = Watch(armed)
        try:
            yield
        finally:
            watch.remove()

    @torch.no_grad()
    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """(B, A, V) what is predicted where the answers stand."""
        answers = batch.answer.shape[1]
        rows = cast(nn.Module, self.text.norm)(hidden[:, -answers - 1 : -1])
        return family(self.model).head(self.model, rows).float()


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
