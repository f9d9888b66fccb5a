"""Single operations: both ways of each give the same, and the table says what was timed."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.bench import ops
from foveate.ops.bipartite import merge_to
from foveate.reducer import Reduction

CPU = torch.device("cpu")


@pytest.mark.parametrize("heads", [ops.Heads(4, 2, 8), ops.Heads(3, 3, 4)])
def test_pagerank_is_the_same_with_and_without_a_map(heads: ops.Heads) -> None:
    ways = ops.ranking(70, heads, torch.float32, CPU).ways
    ours, written = (ways[name]() for name in ("pagerank", "pagerank, map written down"))
    torch.testing.assert_close(ours, written, atol=1e-6, rtol=1e-4)
    out: Any = ways["its attention"]()
    assert out.shape == (1, heads.queries, 70, heads.width)


def test_long_maps_are_not_written_down(monkeypatch) -> None:
    monkeypatch.setattr(ops, "_WRITTEN", 69)
    assert list(ops.ranking(70, ops.Heads(), torch.float32, CPU).ways) == [
        "its attention", "pagerank",
    ]  # fmt: skip


def test_prumerge_is_the_same_in_a_loop() -> None:
    ours, loop = (way() for way in ops.pruning(12, torch.float32, CPU).ways.values())
    assert isinstance(ours, Reduction) and isinstance(loop, Reduction)
    assert torch.equal(ours.keep, loop.keep) and torch.equal(ours.count, loop.count)
    torch.testing.assert_close(ours.x, loop.x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budget", [20, 13, 6])
def test_aim_merge_is_the_same_in_a_loop(budget: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x, keys = (torch.randn(1, 23, 5, generator=draw) for _ in range(2))
    ours, _, _ = merge_to(x, keys, budget)
    loop = ops.merged_by_loop(x[0], keys[0], budget)
    torch.testing.assert_close(loop, ours[0])


def test_times_are_medians_of_rounds_that_take_turns(monkeypatch) -> None:
    """On a clock that only the ways move."""
    now, order = [0.0], []

    def way(name: str, *spent: float) -> Any:
        left = list(spent)

        def run() -> None:
            order.append(name)
            now[0] += left.pop(0) / 1e3

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    work = ops.Work("w", {"slow": way("slow", 99, 20, 40, 30), "fast": way("fast", 99, 6, 8, 7)})
    slow, fast = ops.measure(iter([work]), CPU, repeats=3)
    assert (slow["ms"], slow["ms_q1"], slow["ms_q3"]) == pytest.approx((30, 25, 35))
    assert (fast["ms"], fast["ratio"], slow["ratio"]) == pytest.approx((7, 7 / 30, 1))
    assert all({order[i], order[i + 1]} == {"slow", "fast"} for i in range(0, 8, 2))
    assert len({tuple(order[i : i + 2]) for i in range(0, 8, 2)}) == 2  # neither is always first


def test_memory_is_what_is_needed_beside_what_was_there() -> None:
    kept = torch.ones(16 << 20)  # 64 MiB that do not count

    def large() -> Any:
        return torch.ones(24 << 20) + kept[:1]  # twice 96 MiB

    work = ops.Work("w", {"small": lambda: kept[:8] + 1, "large": large})
    small, big = ops.measure(iter([work]), CPU, repeats=1)
    if small["extra_bytes"] is None:
        pytest.skip("this system does not tell peaks")
    assert small["extra_bytes"] < 16 << 20
    assert 180 << 20 < big["extra_bytes"] < 240 << 20


def test_the_command(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(ops, "merging", lambda *_: ops.Work("m", {"foveate": lambda: 1}))
    words = ["--rows", "40,50", "--heads", "4,2,8", "--kept", "3", "--repeats", "1"]
    words += ["--json", str(tmp_path / "o.json"), "--csv", str(tmp_path / "o.csv")]
    ops.main(words)
    ops.main([*words, "--profile"])
    said = json.loads((tmp_path / "o.json").read_text())
    assert {"date", "device", "dtype", "threads", "versions", "rows"} <= said.keys()
    names = ["pagerank, 40 rows"] * 3 + ["pagerank, 50 rows"] * 3 + ["prumerge, 576 to 4"] * 2
    assert [row["op"] for row in said["rows"]] == [*names, "m"]
    assert {"op", "way", "ms", "ratio", "extra_bytes"} <= said["rows"][0].keys()
    printed = capsys.readouterr().out
    assert "its attention" in printed and "loop" in printed
    assert "prumerge, 576 to 4, loop\naten::" in printed
    with (tmp_path / "o.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 9
    assert lines[0]["heads"] == "4/2×8"
    assert lines[0]["torch"] == said["versions"]["torch"]
