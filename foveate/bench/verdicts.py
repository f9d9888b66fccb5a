"""What a row means to whoever reads it: when a recipe pays and when it does not, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

_WORTH = 0.05  # a gain under this share of the whole answer is called none

Row = Mapping[str, Any]


def verdict(row: Row, dense: Row) -> str:
    """One plain sentence: what a recipe saves, and when it does not pay.

    Args:
        row: of a recipe, with ``break_even_output`` and ``break_even_prompt``.
        dense: of the untouched model.
    """
    name = row["recipe"] if row["batch"] == 1 else f"{row['recipe']} at batch {row['batch']}"
    if not _sooner(row, dense):
        return _no_gain(name, row, dense)
    answer, untouched = row["answers"][-1], dense["answers"][-1]
    text = (
        f"{name} brings the first token after {row['ttft_ms']:.0f} ms instead of "
        f"{dense['ttft_ms']:.0f} ms (the vision encoder is {row['vision_ms']:.0f} ms of it) and "
        f"saves {1 - answer['total_ms'] / untouched['total_ms']:.0%} of a "
        f"{answer['new_tokens']}-token answer"
    )
    limit, least = row["break_even_output"], row["break_even_prompt"]
    if limit is not None:
        text += f"; beyond about {limit:,} tokens of answer the gain is under {_WORTH:.0%}"
    if least is not None:
        text += f"; prompts under about {least:,} tokens gain nothing"
    return text + "."


def beside(row: Row, ours: Row) -> str:
    """One plain sentence: a recipe as a peer carries it out, against the recipe as it is here."""
    batch = "" if row["batch"] == 1 else f" at batch {row['batch']}"
    text = (
        f"{row['recipe']}{batch} takes {row['prefill_ms'] / ours['prefill_ms']:.1f} times as long "
        f"for the prompt as {ours['recipe']} here"
    )
    if row["prefill_peak_bytes"] and ours["prefill_peak_bytes"]:
        more = (row["prefill_peak_bytes"] - ours["prefill_peak_bytes"]) / 2**20
        text += f" and {abs(more):,.0f} MiB {'more' if more >= 0 else 'less'} at its peak"
    return f"{text}."


def _sooner(row: Row, dense: Row) -> bool:
    """Whether the first token comes earlier, beyond the spread of both."""
    return bool(row["spread"]["ttft_ms"][1] < dense["spread"]["ttft_ms"][0])


def _no_gain(name: str, row: Row, dense: Row) -> str:
    text = (
        f"{name} does not pay on this prompt: the first token takes {row['ttft_ms']:.0f} ms "
        f"against {dense['ttft_ms']:.0f} ms untouched"
    )
    return text + (f", {row['reduce_ms']:.0f} ms of it reducing." if row["reduce_ms"] >= 1 else ".")


def break_even_output(row: Row, dense: Row) -> int | None:
    """The answer length from which on the gain is under what is worth having, if there is one."""
    saved, faster = dense["ttft_ms"] - row["ttft_ms"], dense["decode_ms"] - row["decode_ms"]
    per_token = _WORTH * dense["decode_ms"] - faster
    left = saved - _WORTH * dense["ttft_ms"]
    return max(1, round(left / per_token)) if per_token > 0 else None


def break_even_prompt(
    own_ms: float, lengths: Sequence[int], longest: int, text: int, typical: Mapping[int, float]
) -> int | None:
    """The prompt length at which a recipe saves as much as it costs of its own.

    Found by shrinking the picture in thought: the vision rows of every layer shrink alike, what the
    recipe costs of its own stays (it would shrink, too, so this errs on the high side).

    Args:
        own_ms: what the recipe costs beside its layers.
        lengths: rows of every layer under the recipe.
        longest: rows of the untouched model.
        text: rows of these that are text.
        typical: the untouched model's time at some lengths, the longest among them.

    Returns:
        None where it costs nothing of its own, or does not pay at the longest either.
    """
    takes = _between(typical)

    def gain(rows: float) -> float:
        share = (rows - text) / (longest - text)
        reduced = sum(takes(text + share * (n - text)) for n in lengths) / len(lengths)
        return takes(rows) - reduced - own_ms

    if own_ms <= 0 or longest <= text or gain(longest) <= 0:
        return None
    low, high = float(text), float(longest)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return round(high)


def _between(points: Mapping[int, float]) -> Callable[[float], float]:
    """Straight lines between known points; below the first, where weights are read, its value."""
    known = sorted(points.items())

    def value(at: float) -> float:
        for (a, low), (b, high) in pairwise(known):
            if a <= at <= b:
                return low + (high - low) * (at - a) / (b - a)
        return known[0][1] if at < known[0][0] else known[-1][1]

    return value
