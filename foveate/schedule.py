"""Schedules: how many vision tokens are alive, by boundary. They know no method or model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foveate.reducer import unknown

# A count is floor(n * alive); the epsilon forgives 64/576*576 = 63.999…
_EPSILON = 1e-6


@dataclass(frozen=True)
class Schedule:
    """The fraction of the ORIGINAL vision tokens alive after each boundary.

    Boundary 0 is the LLM's entrance, boundary b lies just before layer b, so ``alive[b]`` is what
    layer b works on. It never rises. A schedule is either the curve itself (``alive``, one value
    per layer) or a named ``shape`` with its numbers, which :meth:`resolve` turns into the curve of
    a model's depth.

    Attributes:
        alive: one fraction in [0, 1] per layer, or empty for a shape.
        shape: ``step``, ``ramp``, ``stages``, ``pyramid``, ``sigmoid`` or ``stretched``, or empty
            for a curve.
        numbers: the shape's parameters.
        adaptive: the entrance reducer chooses its own count; later boundaries can only lower it.
    """

    alive: tuple[float, ...] = ()
    shape: str = ""
    numbers: tuple[tuple[str, Any], ...] = ()
    adaptive: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "alive", tuple(float(a) for a in self.alive))
        if bool(self.alive) == bool(self.shape):
            raise ValueError("A schedule is either alive=[…], one fraction per layer, or a shape.")
        if self.shape and self.shape not in _SHAPES:
            raise ValueError(unknown("schedule shape", self.shape, _SHAPES))
        for layer, (before, after) in enumerate(zip((1.0, *self.alive), self.alive, strict=False)):
            if not 0.0 <= after <= 1.0:
                raise ValueError(f"alive[{layer}] is {after}; fractions lie in [0, 1].")
            if after > before:
                raise ValueError(
                    f"alive[{layer}] = {after} is above alive[{layer - 1}] = {before}; "
                    "a dropped token cannot come back, so a schedule never rises."
                )

    @classmethod
    def flat(cls, keep: float, *, adaptive: bool = False) -> Schedule:
        """``keep`` from the entrance on (PruMerge, any pre-LLM method)."""
        return cls._shaped("step", {"keep": _fraction(keep), "before": 0}, adaptive)

    @classmethod
    def step(cls, keep: float, *, before: int = 2, entrance: float = 1.0) -> Schedule:
        """All until layer ``before``, then ``keep`` of the original (FastV: K = ``before`` = 2)."""
        numbers = {"keep": _fraction(keep), "before": before, "entrance": _fraction(entrance)}
        return cls._shaped("step", numbers, False)

    @classmethod
    def ramp(
        cls,
        entrance: float = 1.0,
        *,
        start: int | None = None,
        stop: int | None = None,
        adaptive: bool = False,
    ) -> Schedule:
        """AIM's ramp, falling in equal steps between layers ``start`` and ``stop``.

        The released code keeps ``1 - (l - start + 1) / (stop - start)`` of the merged tokens
        *after* layer l, that is, at boundary l + 1; from boundary ``stop`` on none is left. Its
        literals are (14, 22) of 28 layers and (13, 21) of 32. Other depths: the middle, and 8/28
        of the depth.
        """
        numbers = {"entrance": _fraction(entrance), "start": start, "stop": stop}
        given = {name: value for name, value in numbers.items() if value is not None}
        return cls._shaped("ramp", given, adaptive)

    @classmethod
    def stages(cls, stages: Mapping[int, float] | Sequence[tuple[int, float]]) -> Schedule:
        """Steps at several boundaries, for example ``{8: .5, 16: .25, 24: .125}``."""
        pairs = sorted(dict(stages).items())
        return cls._shaped("stages", {"stages": tuple((int(b), float(a)) for b, a in pairs)}, False)

    @classmethod
    def pyramid(cls, keep: float = 0.125) -> Schedule:
        """PyramidDrop: equal factors at 1/4, 1/2 and 3/4 of the depth, down to ``keep``.

        0.125 is the released setting: 1/2, 1/4 and 1/8 from layers 8, 16 and 24 of 32 on.
        """
        return cls._shaped("pyramid", {"keep": _fraction(keep)}, False)

    @classmethod
    def sigmoid(
        cls, *, slope: float, middle: float, top: float = 1.0, full: int = 2, entrance: float = 1.0
    ) -> Schedule:
        """P-Sigmoid: ``top / (1 + exp(slope · (i - middle)))`` with i counted from 1.

        Clipped to 1, made monotone; the first ``full`` layers keep everything (2412.00556, fig. 2).
        """
        numbers = {"slope": slope, "middle": middle, "top": top, "full": full, "entrance": entrance}
        return cls._shaped("sigmoid", numbers, False)

    @classmethod
    def stretched(cls, curve: Sequence[float], keep: float | None = None) -> Schedule:
        """A published curve, interpolated to another depth, scaled to a mean of ``keep``."""
        numbers: dict[str, Any] = {"curve": tuple(float(a) for a in curve)}
        if keep is not None:
            numbers["keep"] = _fraction(keep)
        return cls._shaped("stretched", numbers, False)

    @classmethod
    def _shaped(cls, shape: str, numbers: Mapping[str, Any], adaptive: bool) -> Schedule:
        return cls(shape=shape, numbers=tuple(numbers.items()), adaptive=adaptive)

    def resolve(self, layers: int) -> Schedule:
        """The curve for a model of ``layers`` layers.

        Raises:
            ValueError: when this is a curve of another depth.
        """
        if self.alive:
            if len(self.alive) != layers:
                raise ValueError(
                    f"The recipe is for a model of {len(self.alive)} layers and this one has "
                    f"{layers}. Search one for this model, or use a preset: foveate.recipe('aim')."
                )
            return self
        curve = _SHAPES[self.shape](layers, **dict(self.numbers))
        return replace(self, alive=_falling(curve), shape="", numbers=())

    def count(self, boundary: int, tokens: int) -> int:
        """Tokens alive of ``tokens`` original ones: floor, but at least 1 if alive is above 0."""
        fraction = self.alive[boundary]
        return max(int(tokens * fraction + _EPSILON), int(fraction > 0 and tokens > 0))

    def cuts(self) -> tuple[int, ...]:
        """The boundaries inside the LLM at which the curve falls."""
        return tuple(b for b in range(1, len(self.alive)) if self.alive[b] < self.alive[b - 1])

    @property
    def mean(self) -> float:
        """Layer-averaged fraction alive: the KV cache's vision part relative to dense."""
        return sum(self.alive) / len(self.alive)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        said: dict[str, Any] = {"alive": list(self.alive)} if self.alive else {"shape": self.shape}
        said |= {name: _listed(value) for name, value in self.numbers}
        return said | ({"adaptive": True} if self.adaptive else {})

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Schedule:
        """Inverse of :meth:`to_dict`; unknown keys are refused."""
        rest = dict(said)
        adaptive = rest.pop("adaptive", False)
        if "alive" in rest:
            alive = rest.pop("alive")
            if rest:
                raise ValueError(
                    unknown("key of a schedule", next(iter(rest)), {"alive": 0, "adaptive": 0})
                )
            return cls(alive=tuple(alive), adaptive=adaptive)
        shape = rest.pop("shape", "")
        schedule = cls._shaped(shape, {n: _tupled(v) for n, v in rest.items()}, adaptive)
        try:
            schedule.resolve(max(8, *(int(b) + 1 for b, _ in rest.get("stages", [(0, 0)]))))
        except TypeError as error:
            raise ValueError(f"Schedule {dict(said)}: {error}.") from error
        return schedule


def _fraction(keep: float) -> float:
    """Check a keep ratio."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0.0 < keep <= 1.0:
        raise ValueError(
            f"keep is {keep!r}; it is the fraction of vision tokens kept and lies in (0, 1], "
            "for example keep=0.25."
        )
    return float(keep)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list | tuple) else value


def _falling(curve: Sequence[float]) -> tuple[float, ...]:
    alive: list[float] = []
    for fraction in curve:
        alive.append(min(max(fraction, 0.0), alive[-1] if alive else 1.0))
    return tuple(alive)


def _step(layers: int, *, keep: float, before: int, entrance: float = 1.0) -> list[float]:
    return [entrance if b < before else min(keep, entrance) for b in range(layers)]


def _ramp(
    layers: int, *, entrance: float, start: int | None = None, stop: int | None = None
) -> list[float]:
    first = start if start is not None else {32: 13}.get(layers, layers // 2)
    last = (
        stop
        if stop is not None
        else first + max(1, round(layers * (8 / 28 if layers != 32 else 0.25)))
    )
    slope = 1 / (last - first)
    return [entrance * (1.0 - slope * max(0, b - first)) for b in range(layers)]


def _stages(layers: int, *, stages: Sequence[tuple[int, float]]) -> list[float]:
    steps = dict(stages)
    alive, curve = 1.0, []
    for b in range(layers):
        alive = steps.get(b, alive)
        curve.append(alive)
    return curve


def _pyramid(layers: int, *, keep: float) -> list[float]:
    return [keep ** (b * 4 // layers / 3) for b in range(layers)]


def _sigmoid(
    layers: int, *, slope: float, middle: float, top: float, full: int, entrance: float
) -> list[float]:
    return [
        entrance
        if i <= full
        else min(entrance, top / (1 + math.exp(min(slope * (i - middle), 700.0))))
        for i in range(1, layers + 1)
    ]


def _stretched(layers: int, *, curve: Sequence[float], keep: float | None = None) -> list[float]:
    at = [i * (len(curve) - 1) / max(1, layers - 1) for i in range(layers)]
    base = [
        curve[int(p)] + (p - int(p)) * (curve[min(int(p) + 1, len(curve) - 1)] - curve[int(p)])
        for p in at
    ]
    return base if keep is None else _scaled(base, keep)


def _scaled(base: Sequence[float], keep: float) -> list[float]:
    """``base`` times the factor that makes its mean ``keep``; full layers stay full."""
    if keep == 1.0:
        return [1.0] * len(base)
    full = sum(a >= 1.0 for a in base)
    if keep * len(base) < full:
        raise ValueError(
            f"keep={keep} is below what the {full} full layers of the curve alone take "
            f"({full / len(base):.3f}); ask for more or use another recipe."
        )

    def scale(factor: float) -> list[float]:
        return [1.0 if a >= 1.0 else min(1.0, a * factor) for a in base]

    low, high = 0.0, 1.0 / max(min(base), 1e-6)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scale(middle)) < keep * len(base) else (low, middle)
    return scale(high)


_SHAPES: Mapping[str, Callable[..., list[float]]] = {
    "step": _step,
    "ramp": _ramp,
    "stages": _stages,
    "pyramid": _pyramid,
    "sigmoid": _sigmoid,
    "stretched": _stretched,
}
