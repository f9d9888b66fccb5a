"""Where something was measured: device, versions, and how much memory it took at most."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch


def about(model: Any, name: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    first = next(model.parameters())
    return {
        "model": name or cast(str, model.config.model_type),
        "device": device_name(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads() if first.device.type == "cpu" else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides how fast a model is."""
    return {name: version_of(name) for name in ("foveate", "torch", "transformers")}


def version_of(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """The processor or accelerator as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{device.type} ({models[0] if models else platform.processor() or platform.machine()})"


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Peak bytes inside the block, weights included: torch's on CUDA, the process's on Linux.

    The list stays empty where neither can be read.
    """
    peak = Peak(device)
    found: list[int] = []
    wait(device)
    peak.forget()
    yield found
    found += peak.read()


class Peak:
    """The high-water mark of memory, which neither reading nor resetting makes a device wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known = True

    def forget(self) -> None:
        """Set the mark back to what is used now; what was freed before goes back to the system."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._known = False

    def read(self) -> list[int]:
        """Bytes at most since then, in a list of one; empty where it cannot be known."""
        if self.device.type == "cuda":
            return [torch.cuda.max_memory_allocated(self.device)]
        if not self._known:
            return []
        lines = Path("/proc/self/status").read_text().splitlines()
        return [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
