"""Tables for people. Every number in them is in the JSON as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
_ABREAST = 5  # columns of recipes that fit into 80 characters


def console(*, stderr: bool = False) -> Console:
    """Where tables go, or messages."""
    return Console(highlight=False, stderr=stderr)


def answers(rows: Sequence[Row], title: str = "") -> RenderableType:
    """Answers side by side with what they cost; vision tokens are the mean over layers."""
    table = _table(title)
    table.box = box.SIMPLE_HEAD  # 80 characters leave no room for lines
    table.add_column("recipe", overflow="fold", min_width=11)
    table.add_column("answer", ratio=1, min_width=18)
    for name in ("vision\ntokens", "GFLOPs", "prefill\nms", "KV\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    asked: tuple[Any, Any] | None = None
    dense: Row = rows[0]
    for row in rows:
        now = (row.get("image"), row.get("question"))
        if now != asked:
            asked = now
            table.add_section()
            table.add_row(Text(str(now[0]), "bold"), Text(str(now[1]), "bold"))
        if row["recipe"] == "dense":
            dense = row
        table.add_row(*_answer(row, dense))
    return table


def _answer(row: Row, dense: Row) -> Iterable[RenderableType]:
    fewer = dense["flops"] / row["flops"]
    same = row["answer"] == dense["answer"]
    yield Text(row["recipe"], "cyan")
    yield Text(" ".join(row["answer"].split()), "" if same else "yellow")
    yield f"{row['vision_tokens']:.0f}"
    yield f"{row['flops'] / 1e9:.0f}" + (f" ({fewer:.1f}×)" if row is not dense else "")
    yield f"{row['prefill_ms']:.0f}"
    yield f"{row['kv_bytes'] / 2**20:.1f}"


def bench(result: Row) -> RenderableType:
    """Stages, then what was gained against what could be; a column a recipe, five at a time."""
    prompt, rows = result["prompt"], result["rows"]
    items = f"{prompt['frames']} frames" if prompt["frames"] else f"{prompt['images']} image(s)"
    title = (
        f"{result['model']} on {result['device']}, {result['dtype']}: batch {prompt['batch']}, "
        f"{items}, {rows[0]['prompt_tokens']} tokens"
    )
    parts = [rows[i : i + _ABREAST] for i in range(0, len(rows), _ABREAST)]
    notes = [*result["verdicts"], _legend(result)]
    return Group(Text(title, "bold"), *map(_stages, parts), *(Text(note) for note in notes))


def _stages(rows: Sequence[Row]) -> Table:
    table = _table("")
    table.add_column("")
    for row in rows:
        table.add_column(row["recipe"], style="cyan", justify="right", overflow="fold")
    for name, said in _STAGES.items():
        table.add_row(name, *(said(row) for row in rows), end_section=name in _LAST)
    return table


def _half_spread(row: Row) -> str:
    low, high = row["spread"]["prefill_ms"]
    return f"{(high - low) / 2:.1f}"


def _maybe(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _legend(result: Row) -> str:
    return (
        "prefill = one forward without vision encoder, projector and lm_head, reducing included; "
        "vision tokens are layer averages; attainable = what the untouched model needs at "
        "the same lengths; efficiency = attainable ÷ prefill. Medians of "
        f"{result['settings']['repeats']} interleaved rounds."
    )


def evaluation(result: Row) -> RenderableType:
    """Scores with their intervals, a section a task; what dense lost or gained beside them."""
    table = _table(f"{result['model']} on {result['device']}, {result['dtype']}, {result['split']}")
    table.add_column("recipe", style="cyan", overflow="fold")
    heads = ("score", "95 %", "against dense", "same", "tokens", "FLOPs", "prefill ms")
    for name in heads:
        table.add_column(name, justify="right")
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["task"] == task]
        table.add_section()
        table.add_row(Text(f"{task}, {rows[0]['n']} examples", "bold"))
        for row in rows:
            table.add_row(*_scored(row))
    notes = [*result["notes"], _SCORED]
    return Group(table, *(Text(note) for note in notes))


def _scored(row: Row) -> Iterable[str]:
    plain = row["recipe"] == "dense" and not row["blank"]
    yield row["recipe"] + (", blank images" if row["blank"] else "")
    yield f"{row['score']:.1%}"
    yield f"{row['ci_low']:.1%} – {row['ci_high']:.1%}"
    p = row["mcnemar_p"]
    yield (
        ""
        if plain
        else f"{100 * row['difference']:+.1f} ({100 * row['difference_low']:+.1f} … "
        f"{100 * row['difference_high']:+.1f}" + ("" if p is None else f"; p={p:.2g}") + ")"
    )
    yield "" if plain else f"{row['agreement']:.0%}"
    yield f"{row['vision_tokens']:.0f}"
    yield f"{row['flops_ratio']:.2f}× less" if not plain else ""
    yield f"{row['prefill_ms']:.0f}"


def methods(rows: Sequence[Row], presets: Sequence[Row]) -> RenderableType:
    """The catalogue."""
    table = _table("methods")
    table.add_column("method", style="cyan", no_wrap=True)
    table.add_column("what it is, where it acts, its knobs", ratio=1)
    for row in rows:
        needs = ["acts " + row["where"]]
        needs += ["reads attention"] if row["needs_attention"] else []
        needs += ["can choose its own count"] if row["adaptive"] else []
        knobs = " ".join(f"{key}={value}" for key, value in row["knobs"].items())
        more = "; ".join([*needs, *([f"knobs: {knobs}"] if knobs else [])])
        table.add_row(row["name"], Group(_linked(row), Text(more, "dim")))
    table.add_section()
    for row in presets:
        table.add_row(row["name"], Group(_linked(row), Text("a preset", "dim")))
    return table


def _linked(row: Row) -> Text:
    return Text(f"{row['summary']} {row['link']}".strip())


def models(rows: Sequence[Row]) -> RenderableType:
    """Families × methods; reasons stand below the table, numbered."""
    names = sorted({name for row in rows for name in row["methods"]})
    table = _table("families and methods, as the contract tests found them")
    for name in ("family", "model_type", "encoder", "status"):
        table.add_column(name, style="cyan" if name == "family" else "")
    for name in names:
        table.add_column(name, justify="center", overflow="fold")
    reasons: list[str] = []
    for row in rows:
        cells = [_cell(row["methods"].get(name), reasons) for name in names]
        table.add_row(
            row["family"], row["model_type"], row.get("encoder", "–"), row["status"], *cells
        )
    return Group(table, *(Text(f"{i}  {why}") for i, why in enumerate(reasons, start=1)))


def scores(rows: Sequence[Row]) -> RenderableType:
    """Pinhole's measured scores, whatever columns they have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = _table("pinhole, measured (how: docs/pinhole.md)")
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        table.add_row(*(_plain(row.get(name)) for name in names))
    return table


def _cell(said: str | None, reasons: list[str]) -> str:
    if said is None:
        return "–"
    if said == "works":
        return "✓"
    if said not in reasons:
        reasons.append(said)
    return str(reasons.index(said) + 1)


def _plain(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _mebi(value: int | None) -> str:
    return (
        "–"
        if value is None
        else f"{value / 2**20:,.0f}"
        if value >= 2**27
        else f"{value / 2**20:.1f}"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim")


_STAGES: Mapping[str, Callable[[Row], str]] = {
    "vision tokens": lambda row: f"{row['vision_tokens']:.0f}",
    "KV MiB": lambda row: _mebi(row["kv_bytes"]),
    "peak MiB": lambda row: _mebi(row["peak_bytes"]),
    "vision ms": lambda row: f"{row['vision_ms']:.1f}",
    "prefill ms": lambda row: f"{row['prefill_ms']:.1f}",
    "  ± half IQR": _half_spread,
    "  reducing ms": lambda row: f"{row['reduce_ms']:.1f}",
    "decode ms": lambda row: f"{row['decode_ms']:.1f}",
    "speed-up": lambda row: f"{row['speedup']:.2f}×",
    "FLOPs limit": lambda row: f"{row['limit']:.2f}×",
    "attainable ms": lambda row: _maybe(row["attainable_ms"], 1),
    "efficiency": lambda row: _maybe(row["efficiency"], 2),
}
_LAST = ("peak MiB", "decode ms")  # a line below these
_SCORED = (
    "against dense: percentage points with a paired bootstrap's 95 % interval, and McNemar's exact "
    "p; same: answers equal to dense's; tokens: vision tokens, mean over layers; prefill: per "
    "prompt, without the vision encoder."
)
