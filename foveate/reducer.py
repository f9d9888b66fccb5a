"""Reducers: the methods. A reducer chooses or blends vision tokens and knows nothing else.

Shapes used everywhere: B groups (images or frames at the entrance, samples inside the LLM), N
vision tokens, K survivors, L rows of the attention just crossed, H heads, d head width, D model
width.

A reducer is a frozen dataclass whose fields are the method's knobs. Defining the class registers
it::

    @dataclass(frozen=True)
    class Norm(Scorer, name="norm"):
        '''Keep the longest vectors.'''

        def score(self, tokens: Tokens) -> Tensor:
            return tokens.x.norm(dim=-1)

Files in ``foveate/reducers`` are found by themselves; other packages name theirs in the entry-point
group ``foveate.reducers``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor

_REGISTRY: dict[str, type[Reducer]] = {}

SITES = ("pixels", "features", "tokens", "layers")


@dataclass(frozen=True)
class Tokens:
    """What a reducer sees at a boundary. All tensors are on one device.

    Attributes:
        x: the vectors, ``(B, N, D)``.
        valid: ``(B, N)`` bool; False marks padding of ragged groups, always at the end of a row.
        q: queries of the attention just crossed, ``(B, H, L, d)``, after RoPE, not scaled; or None.
        k: its keys, ``(B, Hkv, L, d)`` with Hkv dividing H; or None.
        at: ``(B, N)`` long, the row of L on which each token sits; padding points at row 0.
        rows: ``(B, L)`` bool, which rows are real (not padding); or None when all are.
        scale: the attention's scaling of q·k.
        causal: whether row i saw only rows up to i.
        cls: the row of L that holds the vision encoder's [CLS], or None where there is none.
        instruction: per sample, how many text rows follow the last vision token; they are the last
            rows of L. None at the entrance, where there is no text.
        grid: (height, width) when the tokens are a full raster of that size, else None; of one
            frame where there are several.
        frames: how many frames of a video the tokens are, one after the other, N / frames of each;
            None where a group is not a video.
        middle: q and k, laid out as ``q`` and ``k``, of an attention in the middle of the vision
            encoder; None for methods without a ``depth``.
        embeds: ``(B, R, D)``, the rows with which the prompt entered the LLM, flush right, its text
            too; None at the entrance.
        entered: ``(B, R)`` bool, which of these were vision tokens.
        hidden: the vectors of all rows, ``(B, L, D)``, of which x are those at ``at``; None at the
            entrance, where q and k are the encoder's.
    """

    x: Tensor
    valid: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    at: Tensor | None = None
    rows: Tensor | None = None
    scale: float = 1.0
    causal: bool = False
    cls: int | None = None
    instruction: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    hidden: Tensor | None = None
    frames: int | None = None
    middle: tuple[Tensor, Tensor] | None = None
    embeds: Tensor | None = None
    entered: Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """What a reducer decides.

    Attributes:
        keep: ``(B, K)`` long, the slot (0..N-1) from which each survivor takes its position, in the
            order in which the LLM sees them. Entries from ``count[b]`` on are padding. No
            duplicates.
        count: ``(B,)`` long on the CPU, the survivors of each group.
        x: ``(B, K, D)``, new vectors of the survivors, or None when tokens are only dropped.
        group: ``(B, N)`` long, the survivor (0..K-1) that each token went into, -1 where it was
            dropped; or None, meaning that every survivor holds only itself.
    """

    keep: Tensor
    count: Tensor
    x: Tensor | None = None
    group: Tensor | None = None


class Reducer(ABC):
    """One method. Subclasses are frozen dataclasses; their fields are numbers, strings or booleans.

    Class flags:
        site: where it acts. ``pixels`` (a smaller input image), ``features`` (before the
            projector), ``tokens`` (after it, and inside the LLM too), ``layers`` (only inside the
            LLM).
        needs_attention: whether it reads ``q`` and ``k``.
        encoder: which attention of the vision encoder it reads at the entrance: ``last``, or
            ``features``, that of the layer whose output the model takes as features (LLaVA's last
            but one).
        adaptive: whether it can choose its own count, when the budget is None.
        ragged: whether one call takes groups of different sizes and budgets; where it is False the
            caller makes one call for each distinct (N, budget).
        video: whether a group is a whole video, because the method compares frames. It refuses
            images.
        depth: the share of the vision encoder's layers after which it looks at a second attention,
            ``Tokens.middle``.
    """

    name: ClassVar[str] = "a method without a name"
    site: ClassVar[str] = "tokens"
    needs_attention: ClassVar[bool] = False
    encoder: ClassVar[str] = "last"
    adaptive: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    video: ClassVar[bool] = False
    depth: ClassVar[float | None] = None

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not name:  # an abstract step between Reducer and a method
            return
        if cls.site not in SITES:
            raise TypeError(f"{cls.__name__}.site is {cls.site!r}; it must be one of {SITES}.")
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"Two reducers are named {name!r}: {known!r} and {cls!r}.")
        cls.name = name
        _REGISTRY[name] = cls

    @abstractmethod
    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Reduce each group to its budget.

        Args:
            tokens: the vectors and what is known of them.
            budget: survivors wanted in each of the B groups, 0 <= budget[b] <= valid[b].sum();
                None lets an adaptive reducer choose.

        Returns:
            Exactly ``budget[b]`` survivors in group b.
        """

    def knobs(self) -> dict[str, Any]:
        """The knobs and their values, as JSON takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


class Scorer(Reducer):
    """A reducer that ranks tokens and keeps the best; survivors stay in raster order."""

    ragged: ClassVar[bool] = True

    @abstractmethod
    def score(self, tokens: Tokens) -> Tensor:
        """A score for every token, ``(B, N)``; higher is kept. Ties go to the earlier token."""

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Keep the ``budget[b]`` tokens with the highest scores, in raster order."""
        wanted = needed(self.name, budget)
        with torch.no_grad():  # ranks have no gradient, so training need not remember the scores
            return top(self.score(tokens), tokens.valid, wanted)


def needed(name: str, budget: Sequence[int] | None) -> Sequence[int]:
    """The budget, for a method that cannot do without.

    Raises:
        ValueError: when there is none.
    """
    if budget is None:
        raise ValueError(f"{name} needs a budget; it cannot choose its own count.")
    return budget


def top(score: Tensor, valid: Tensor, budget: Sequence[int]) -> Reduction:
    """The ``budget[b]`` highest scores of each row of ``score`` (B, N), as ascending slots.

    A stable sort and not topk, so that ties are decided alike on every device and batch.
    """
    order = score.masked_fill(~valid, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return leading(order, score.shape[1], budget)


def leading(order: Tensor, size: int, budget: Sequence[int]) -> Reduction:
    """The first ``budget[b]`` slots of each row of ``order`` (B, ≥ K), of ``size``, ascending."""
    width = max(budget, default=0)
    count = torch.tensor(list(budget), dtype=torch.long)
    keep = order[:, :width]
    if min(budget, default=0) < width:  # ragged: push what is over the budget behind the rest
        rank = torch.arange(width, device=order.device)
        keep = keep.masked_fill(rank >= count.to(order.device, non_blocking=True)[:, None], size)
    return Reduction(keep=keep.sort(dim=-1).values.clamp(max=size - 1), count=count)


def discover() -> Mapping[str, type[Reducer]]:
    """All reducers by name: those of ``foveate.reducers`` and those of other packages."""
    package = importlib.import_module("foveate.reducers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="foveate.reducers"):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


def reducer(name: str, **knobs: Any) -> Reducer:
    """Build a reducer by name: ``reducer("fastv")``, ``reducer("pagerank", temperature=1.0)``.

    Raises:
        ValueError: for a name or knob that does not exist, naming the nearest one, or a knob of
            another type.
    """
    known = discover()
    if name not in known:
        raise ValueError(unknown("reducer", name, known))
    cls = known[name]
    types = {field.name: type(field.default) for field in fields(cls)}  # type: ignore[arg-type]
    for knob, value in knobs.items():
        if knob not in types:
            raise ValueError(unknown(f"knob of {name}", knob, types))
        if not _fits(value, types[knob]):
            wanted = types[knob].__name__
            raise ValueError(f"Knob {knob} of {name} takes a {wanted}, not {value!r}.")
    return cls(**knobs)


def _fits(value: object, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is wanted


def unknown(kind: str, given: str, accepted: Mapping[str, Any]) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(given, accepted, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no {kind} {given!r}.{hint} Accepted: {', '.join(accepted) or 'none'}."
