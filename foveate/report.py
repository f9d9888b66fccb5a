"""Reports: what happened to the last prompt of a session. Benchmark, demo and trace read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.cost import TextShape


@dataclass
class Report:
    """The last prompt that went through a reduced model.

    Attributes:
        vision: vision tokens of each sample before any reduction.
        alive: per layer, the vision tokens alive in each sample.
        rows: per layer, all rows (text and vision, padding left out) of each sample.
        flops: prefill FLOPs of the text model (``cost.TextShape``), batch summed.
        dense_flops: the same for the untouched model.
        kv_bytes: bytes of keys and values of the prompt, padding left out.
        dense_kv_bytes: the same for the untouched model.
        slots: per layer, one LongTensor per sample: the positions in the original prompt of all
            rows alive at that layer.
        groups: per image or frame, the survivor (0..K-1) of each of its tokens at the entrance, -1
            where it was dropped; empty when nothing happened there.
        notes: what a method did otherwise than its paper because of this model, one line each.
    """

    shape: TextShape
    vision: list[int] = field(default_factory=list)
    alive: list[list[int]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    dense_rows: list[int] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _slots: list[Callable[[], list[Tensor]]] = field(default_factory=list, repr=False)
    _clock: list[tuple[Any, Any]] = field(default_factory=list, repr=False)
    _done: bool = False

    @property
    def slots(self) -> list[list[Tensor]]:
        return [read() for read in self._slots]

    @property
    def flops(self) -> int:
        return sum(self.shape.prefill_flops(rows) for rows in zip(*self.rows, strict=True))

    @property
    def dense_flops(self) -> int:
        return sum(self.shape.prefill_flops([n] * self.shape.layers) for n in self.dense_rows)

    @property
    def kv_bytes(self) -> int:
        return sum(self.shape.kv_bytes(rows) for rows in zip(*self.rows, strict=True))

    @property
    def dense_kv_bytes(self) -> int:
        return sum(self.shape.kv_bytes([n] * self.shape.layers) for n in self.dense_rows)

    @property
    def reduce_ms(self) -> float:
        """Milliseconds spent choosing, merging and gathering."""
        return sum(elapsed(start, stop) for start, stop in self._clock)

    @contextmanager
    def clock(self, device: torch.device) -> Iterator[None]:
        """Count the block's time: events on CUDA (no synchronisation), a wall clock elsewhere."""
        start = tick(device)
        yield
        self._clock.append((start, tick(device)))

    def finish(self) -> None:
        """The prompt is through; what comes next belongs to another."""
        self._done = True

    def begin(self) -> None:
        """Forget the prompt before, if it is through; the object stays the one the user holds."""
        if not self._done:
            return
        self._done = False
        for values in (self.vision, self.alive, self.rows, self.dense_rows, self.groups):
            values.clear()
        self.notes.clear()
        self._slots.clear()
        self._clock.clear()

    def to_dict(self) -> dict[str, Any]:
        """JSON for other programs."""
        return {
            "vision": self.vision,
            "alive": self.alive,
            "flops": self.flops,
            "dense_flops": self.dense_flops,
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "reduce_ms": self.reduce_ms,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        if not self.alive:
            return "No prompt with vision tokens has gone through yet."
        per_layer = [sum(alive) for alive in self.alive]
        total = sum(self.vision)
        mean = sum(per_layer) / len(per_layer)
        lines = [
            f"vision tokens  {total} -> {per_layer[0]} at the entrance, {per_layer[-1]} in the "
            f"last layer, {mean:.1f} layer-averaged ({mean / max(total, 1):.1%})",
            f"prefill FLOPs  {self.dense_flops / 1e12:.3f} T -> {self.flops / 1e12:.3f} T "
            f"({self.dense_flops / max(self.flops, 1):.2f}x fewer)",
            f"KV cache       {self.dense_kv_bytes / 2**20:.1f} MiB -> "
            f"{self.kv_bytes / 2**20:.1f} MiB",
            f"reducing took  {self.reduce_ms:.1f} ms",
            *self.notes,
        ]
        return "\n".join(lines)


def tick(device: torch.device) -> Any:
    """Now: an event on that device's stream, which nobody waits for, or seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Any, stop: Any) -> float:
    """Milliseconds between two ticks; only here a device is waited for."""
    if isinstance(start, float):
        return (float(stop) - start) * 1e3
    stop.synchronize()
    return float(start.elapsed_time(stop))
