"""Where the time of a run goes, operator by operator (torch.profiler)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SHOWN = 12  # operators


def hottest(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The operators that take the longest themselves, longest first.

    Args:
        run: what to look at; it is run once before.
        device: where it works.

    Returns:
        ``{"op", "calls", "ms", "share"}`` of each: ``ms`` without what it calls, on the device.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        run()
    on_device = device.type == "cuda"
    found = [
        (event.self_device_time_total if on_device else event.self_cpu_time_total, event)
        for event in seen.key_averages()
    ]
    total = sum(took for took, _ in found)
    found.sort(key=lambda pair: -pair[0])
    return [
        {"op": event.key, "calls": event.count, "ms": took / 1e3, "share": took / max(total, 1e-9)}
        for took, event in found[:_SHOWN]
    ]
