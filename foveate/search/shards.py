"""One calibration set over the processes of ``torchrun``: each holds a part and runs every probe.

The first process searches and tells the others what to run; values come back in the order of
ranks. Without ``torchrun`` there is one process and nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(hours=6)  # for the first process, which may be measuring something


class Shards:
    """The processes of one search.

    Attributes:
        rank: 0 searches, the others serve it.
        world: how many there are.
    """

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=WAIT)

    def device(self, asked: str) -> str:
        """The device of this process, each its own where ``asked`` leaves that open."""
        if self.world == 1 or asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def part(self, count: int) -> range:
        """The examples of ``count`` that this process holds."""
        return range(self.rank, count, self.world)

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, in the order of ranks."""
        if self.world == 1:
            return [mine]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, mine)
        return every

    def joined(self, mine: Sequence[Any]) -> list[Any]:
        """The lists of all processes as one."""
        return [value for part in self.gather(list(mine)) for value in part]

    def tell(self, method: str, *given: Any) -> None:
        """The others are to call this ``method`` of what they serve; only the first tells."""
        if self.world > 1 and self.rank == 0:
            dist.broadcast_object_list([(method, given)])

    def serve(self, target: Any) -> None:
        """Call what the first process tells, until it stops."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told)
            method, given = told[0]
            if method == "stop":
                return
            getattr(target, method)(*given)

    def stop(self) -> None:
        """No more probes: the others end."""
        self.tell("stop")
        if self.world > 1:
            dist.destroy_process_group()
            self.world = 1
