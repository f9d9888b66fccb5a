"""Checks of a method's knobs."""

from __future__ import annotations

from collections.abc import Sequence

from foveate.reducer import unknown


def one_of(method: str, knob: str, value: str, accepted: Sequence[str]) -> None:
    """Refuse a value that is not among the accepted ones."""
    if value not in accepted:
        raise ValueError(unknown(f"{knob} of {method}", value, dict.fromkeys(accepted)))


def within(
    method: str,
    knob: str,
    value: float,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
) -> None:
    """Refuse a number outside [low, high], or (low, high] with ``open_low``."""
    if not low <= value <= high or (open_low and value == low):
        above = f"above {low}" if open_low else f"at least {low}"
        most = "" if high == float("inf") else f" and at most {high}"
        raise ValueError(f"Knob {knob} of {method} is {value}; it must be {above}{most}.")
