"""Single operations against what they stand beside or replace: ``python -m foveate.bench.ops``.

PageRank is set against the attention of the layer that it ranks by (the fast kernel, without its
projections) and against the same ranking from a map that is written down; the merges against a
Python loop over tokens. PruMerge's released code is such a loop. AIM's is not: there the loop is
only the plainest way to say the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from foveate.bench import sheet
from foveate.bench.machine import Peak, device_name, versions, wait
from foveate.bench.profiling import hottest
from foveate.ops import prumerge
from foveate.ops.bipartite import merge_to
from foveate.ops.pagerank import pagerank
from foveate.ops.prumerge import Image
from foveate.peers import loops, masking
from foveate.peers.prefill import additive
from foveate.report import elapsed, tick

_WRITTEN = 2000  # rows up to which the map is written down: four of them are 14 GB at 8,000


@dataclass(frozen=True)
class Work:
    """One thing done in several ways; the first is what the others are set against."""

    name: str
    ways: Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and the width of each: those of Qwen2-0.5B."""

    queries: int = 14
    keys: int = 2
    width: int = 64


def ranking(rows: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> Work:
    """PageRank over ``rows`` rows beside the attention that it looks at."""
    q = _noise((1, heads.queries, rows, heads.width), dtype, device)
    k, v = (_noise((1, heads.keys, rows, heads.width), dtype, device) for _ in range(2))
    scale, grouped = heads.width**-0.5, heads.queries != heads.keys

    def written() -> Tensor:
        every = k.repeat_interleave(heads.queries // heads.keys, dim=1)
        return masking.importance(q @ every.mT * scale + additive(None, rows, rows, q))

    ways: dict[str, Callable[[], object]] = {
        "its attention": lambda: scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=grouped
        ),
        "pagerank": lambda: pagerank(q, k, scale=scale),
    }
    if rows <= _WRITTEN:
        ways["pagerank, map written down"] = written
    return Work(f"pagerank, {rows} rows", ways)


def pruning(kept: int, dtype: torch.dtype, device: torch.device) -> Work:
    """PruMerge's merge of 576 tokens of width 1024 into ``kept`` and an extra one."""
    x, keys = (_noise((1, 576, 1024), dtype, device) for _ in range(2))
    image = Image(x, keys, _noise((1, 576), torch.float32, device).softmax(-1))
    slots = image.attn.argsort(dim=-1, descending=True)[:, :kept]
    count = torch.tensor([kept])
    return Work(
        f"prumerge, 576 to {kept + 1}",
        {
            "foveate": lambda: prumerge.merge(image, slots, count, prumerge.Rule()),
            "loop": lambda: loops.merge(image, slots, count),
        },
    )


def merging(dtype: torch.dtype, device: torch.device) -> Work:
    """AIM's merge of 576 tokens of width 1024 into 72, in three rounds, by their keys."""
    x, keys = (_noise((1, 576, 1024), dtype, device) for _ in range(2))
    return Work(
        "aim-merge, 576 to 72",
        {
            "foveate": lambda: merge_to(x, keys, 72),
            "loop": lambda: merged_by_loop(x[0], keys[0], 72),
        },
    )


def merged_by_loop(x: Tensor, metric: Tensor, budget: int) -> Tensor:
    """``merge_to`` of one group, token by token: (N, D) and (N, C) to (budget, D)."""
    while len(x) > budget:
        unit = normalize(metric.float(), dim=-1)
        best: dict[int, tuple[float, int]] = {}
        for source in range(0, len(x), 2):
            similar, target = (unit[1::2] @ unit[source]).max(dim=0)
            best[source] = float(similar), 2 * int(target) + 1
        order = sorted(best, key=lambda source: -best[source][0])
        merged = min(len(x) // 2, len(x) - budget)
        into: dict[int, list[int]] = {target: [target] for target in range(1, len(x), 2)}
        for source in order[:merged]:
            into[best[source][1]].append(source)
        groups = [[source] for source in order[merged:]] + list(into.values())
        x, metric = (
            torch.stack([torch.stack([rows[i] for i in group]).mean(0) for group in groups])
            for rows in (x, metric)
        )
    return x


def measure(
    works: Iterator[Work], device: torch.device, repeats: int = 5, warmup: int = 1
) -> list[dict[str, Any]]:
    """A row for every way: medians and quartiles of interleaved rounds, the peak of untimed ones.

    ``ratio`` is its time over that of the first way; ``extra_bytes`` what it needs beside what was
    there before, as the process or the device tells (None where neither does).
    """
    made, draw = [], random.Random(0)
    for work in works:
        took: dict[str, list[float]] = {way: [] for way in work.ways}
        extra: dict[str, list[int]] = {way: [] for way in work.ways}
        for turn in range(warmup + repeats):
            order = list(work.ways)
            draw.shuffle(order)
            for way in order:
                if turn < warmup:
                    extra[way] += _extra(work.ways[way], device)
                else:
                    took[way].append(_once(work.ways[way], device))
        first = statistics.median(next(iter(took.values())))
        for way, samples in took.items():
            low, high = _quartiles(samples)
            ms = statistics.median(samples)
            row = {"op": work.name, "way": way, "ms": ms, "ms_q1": low, "ms_q3": high}
            made.append(row | {"ratio": ms / first, "extra_bytes": max(extra[way], default=None)})
    return made


@torch.no_grad()
def _once(way: Callable[[], object], device: torch.device) -> float:
    """Milliseconds."""
    gc.collect()
    wait(device)
    start = tick(device)
    done = way()
    stop = tick(device)
    del done
    return elapsed(start, stop)


@torch.no_grad()
def _extra(way: Callable[[], object], device: torch.device) -> list[int]:
    """Bytes at most beside what was there before, in a list of one; empty if nothing tells."""
    peak = Peak(device)
    gc.collect()
    wait(device)
    peak.forget()
    before = peak.read()
    way()
    return [after - b for after, b in zip(peak.read(), before, strict=True)]


@torch.no_grad()
def profiled(work: Work, device: torch.device) -> Iterator[str]:
    """The operators of each way that take a twentieth of its time or more."""
    for way, run in work.ways.items():
        yield f"\n{work.name}, {way}"
        for op in hottest(run, device):
            if op["share"] >= 0.05:
                yield f"{op['op']:50}{op['calls']:7}{op['ms']:10.2f} ms{op['share']:6.0%}"


def _quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).to(device, dtype)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.ops", description=__doc__)
    parser.add_argument("--rows", type=_numbers, default=[1700, 6400], help="of PageRank: 1700,…")
    parser.add_argument("--heads", type=_numbers, default=[14, 2, 64], help="query, key, width")
    parser.add_argument("--kept", type=_numbers, default=[32, 144], help="by PruMerge: 32,144")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--json", type=Path, help="also write the result as JSON")
    parser.add_argument("--csv", type=Path, help="append the rows to a CSV file")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Measure, print a table, write what was asked for."""
    asked = _options(words)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device, dtype = asked.device, getattr(torch, asked.dtype)
    heads = Heads(*asked.heads)

    def works() -> Iterator[Work]:  # one at a time is in memory
        yield from (ranking(rows, heads, dtype, device) for rows in asked.rows)
        yield from (pruning(kept, dtype, device) for kept in asked.kept)
        yield merging(dtype, device)

    about = {
        "date": str(date.today()),
        "device": device_name(device),
        "dtype": asked.dtype,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "heads": f"{heads.queries}/{heads.keys}×{heads.width}",
    }
    rows = measure(works(), device, asked.repeats)
    print(f"{about['device']}, {asked.dtype}, {asked.repeats} interleaved rounds, medians")
    for row in rows:
        more = row["extra_bytes"]
        print(
            f"{row['op']:22}{row['way']:28}{row['ms']:12.2f} ms{row['ratio']:9.2f}×"
            f"{'–' if more is None else f'{more / 2**20:,.0f}':>10} MiB"
        )
    if asked.profile:
        print("\n".join(line for work in works() for line in profiled(work, device)))
    if asked.json is not None:
        result = about | {"versions": versions(), "rows": rows}
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    if asked.csv is not None:
        sheet.append(asked.csv, [about | versions() | row for row in rows])


if __name__ == "__main__":
    main(sys.argv[1:])
