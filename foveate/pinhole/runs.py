"""What training runs share: a learning rate that follows the clock, and files that are whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch


def share(done: float) -> float:
    """Of the peak learning rate, when ``done`` (0 to 1) of the time is over."""
    return min(1.0, done / 0.03) * math.pow(1 - done, 0.7)


def save(state: dict[str, Any], file: Path) -> None:
    """``torch.save``, so that ``file`` is the old state or the new one, never half of it."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)
