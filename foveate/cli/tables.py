"""Tables for people. Every number in them is in the JSON as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate import scoreboard

Row = Mapping[str, Any]
_ABREAST = 4  # columns of recipes that fit into 80 characters


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
    """Stages, then what was gained against what could be; a column a recipe, four at a time."""
    prompt = result["prompt"]
    items = f"{prompt['frames']} frames" if prompt["frames"] else f"{prompt['images']} image(s)"
    ragged = ", ragged" if prompt["ragged"] else ""
    parts: list[RenderableType] = []
    for batch in prompt["batch"]:
        rows = [row for row in result["rows"] if row["batch"] == batch]
        head = (
            f"{result['model']} on {result['device']}, {result['dtype']}: batch {batch}{ragged}, "
            f"{items}, {rows[0]['prompt_tokens']} tokens"
        )
        some = [rows[i : i + _ABREAST] for i in range(0, len(rows), _ABREAST)]
        parts += [Text(head, "bold"), *map(_stages, some)]
    notes = [*result["verdicts"], _legend(result)]
    return Group(*parts, *map(_profile, result["profiles"]), *(Text(note) for note in notes))


def _stages(rows: Sequence[Row]) -> Table:
    table = _table("")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["recipe"], style="cyan", justify="right", overflow="fold")
    for name, said in _STAGES.items():
        table.add_row(name, *(said(row) for row in rows), end_section=name in _LAST)
        if name == _BEFORE_ANSWERS:
            for place, answer in enumerate(rows[0]["answers"]):
                each = [row["answers"][place] for row in rows]
                label = f"{answer['new_tokens']} tokens s"
                table.add_row(label, *(f"{one['total_ms'] / 1e3:.2f}" for one in each))
                table.add_row("  tokens/s", *(f"{one['tokens_per_s']:.1f}" for one in each))
            table.add_section()
    return table


def _profile(found: Row) -> Table:
    """Where the time of a row goes that missed its goal."""
    table = _numbers(
        f"{found['recipe']}, batch {found['batch']}: one prompt", "calls", "ms", "share", first="op"
    )
    for op in found["ops"]:
        table.add_row(op["op"], str(op["calls"]), f"{op['ms']:.1f}", f"{op['share']:.0%}")
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
        "the same lengths; efficiency = attainable ÷ prefill; FLOPs: of the prompt in the text "
        "model, every product counted, and by the papers' formula 4nd² + 2n²d + 2ndm. Medians of "
        f"{result['settings']['repeats']} interleaved rounds."
    )


def evaluation(result: Row) -> RenderableType:
    """What each recipe costs over all tasks, then a table of scores for each task."""
    head = f"{result['model']} on {result['device']}, {result['dtype']}, {result['split']} split"
    tasks = dict.fromkeys(row["task"] for row in result["rows"])
    parts = [[row for row in result["rows"] if row["task"] == task] for task in tasks]
    lines, budgets = scoreboard.lines(result["rows"]), scoreboard.budgeted(result["rows"])
    made = [_costs(lines, budgets), *map(_scores, parts)]
    if budgets:
        bases = dict.fromkeys(task for line in lines for task in line.tasks)
        made = [_costs(lines, budgets), *(_gains(lines, task) for task in bases)]
    more = scoreboard.BUDGETS.strip() if budgets else ""
    notes = [Text(note) for note in (*result["notes"], _SCORED, more) if note]
    return Group(Text(head, "bold"), *(part for table in made for part in ("", table)), "", *notes)


def _costs(lines: Sequence[scoreboard.Line], budgets: bool) -> Table:
    flops = "GFLOPs" if budgets else "FLOPs"
    table = _numbers("cost, all tasks", "vision tokens", flops, "prefill ms")
    for line in lines:
        fewer = f"{line.fewer:.2f}× fewer" if line.recipe != "dense" else ""
        spent = f"{line.flops / 1e9:.1f}" if budgets else fewer
        table.add_row(line.name, f"{line.vision_tokens:.1f}", spent, f"{line.prefill_ms:.0f}")
    return table


def _gains(lines: Sequence[scoreboard.Line], task: str) -> Table:
    """One task at all numbers of frames, the most FLOPs first."""
    rows = [line.tasks[task] for line in lines if task in line.tasks]
    title = f"{task}, {rows[0]['n']} examples"
    table = _numbers(title, "GFLOPs", "%", "95 %", "gain over fewer frames")
    for row in rows:
        score = [f"{100 * row['score']:.1f}", _between(row, "ci", "")]
        table.add_row(
            scoreboard.named(row), f"{row['flops'] / 1e9:.0f}", *score, scoreboard.gained(row)
        )
    return table


def _scores(rows: Sequence[Row]) -> Table:
    first = rows[0]
    title = f"{first['task']}, {first['n']} examples"
    table = _numbers(title, "%", "95 %", "− dense", "95 %", "same")
    for row in rows:
        score = [f"{100 * row['score']:.1f}", _between(row, "ci", "")]
        gained = [f"{100 * row['difference']:+.1f}{'*' if scoreboard.differs(row) else ' '}"]
        gained += [_between(row, "difference", "+"), f"{row['agreement']:.0%}"]
        same = row is first
        table.add_row(scoreboard.named(row), *score, *(("",) * 3 if same else gained))
    return table


def _between(row: Row, name: str, sign: str) -> str:
    return "…".join(f"{100 * row[f'{name}_{end}']:{sign}.1f}" for end in ("low", "high"))


def _numbers(title: str, *heads: str, first: str = "recipe") -> Table:
    """A table of numbers: of 80 characters, 32 are left for recipes and no number is cut."""
    table = _table(title)
    table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, (0, 0)
    table.title_style = "bold cyan"
    table.add_column(first, style="cyan", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def findings(found: Row) -> RenderableType:
    """What ``foveate search analyse`` saw, by layer."""
    title = f"over {found['examples']} examples"
    table = _numbers(title, "tau to the next", "attention", first="layer")
    for layer, mass in enumerate(found["mass"]):
        tau = f"{found['tau'][layer]:.2f}" if layer < len(found["tau"]) else "–"
        table.add_row(str(layer), tau, f"{mass:.3f}")
    alike = (f"{name} {value:.3f}" for name, value in found["redundancy"].items())
    said = (
        "tau: Kendall's, of the ranking of vision tokens; attention: of the instruction, on "
        "vision tokens. Cosine of a vision token and the one nearest to it, at the entrance: "
    )
    return Group(table, Text(said + ", ".join(alike)))


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
    """Families, how many methods work on each, and which do not; numbered reasons stand below."""
    table = _table("families, as the contract tests found them")
    table.add_column("family", style="cyan", no_wrap=True)
    for name in ("model_type", "encoder", "input", "methods", "but not"):
        table.add_column(name)
    reasons: list[str] = []
    for row in rows:
        said = row["methods"]
        works = sum(one == "works" for one in said.values())
        count = f"{works} of {len(said)}" if said else row["status"]
        about = (row.get(name, "–") for name in ("family", "model_type", "encoder", "input"))
        table.add_row(*about, count, _refused(said, reasons))
    return Group(table, *(Text(f"{i}  {why}") for i, why in enumerate(reasons, start=1)))


def _refused(methods: Mapping[str, str], reasons: list[str]) -> str:
    """The methods that do not work, by the numbers of their reasons, which are added."""
    found: dict[str, list[str]] = {}
    for name, said in methods.items():
        if said != "works":
            found.setdefault(said, []).append(name)
    reasons += [why for why in found if why not in reasons]
    return "; ".join(f"{', '.join(n)} ({reasons.index(why) + 1})" for why, n in found.items())


def scores(rows: Sequence[Row]) -> RenderableType:
    """Pinhole's measured scores, whatever columns they have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = _table("pinhole, measured (how: docs/pinhole.md)")
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in rows:
        table.add_row(*(_plain(row.get(name)) for name in names))
    return table


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
    "  prompt's part": lambda row: _mebi(row["prefill_peak_bytes"]),
    "vision ms": lambda row: f"{row['vision_ms']:.1f}",
    "prefill ms": lambda row: f"{row['prefill_ms']:.1f}",
    "  ± half IQR": _half_spread,
    "  reducing ms": lambda row: f"{row['reduce_ms']:.1f}",
    "first token ms": lambda row: f"{row['ttft_ms']:.1f}",
    "decode ms": lambda row: f"{row['decode_ms']:.1f}",
    "speed-up": lambda row: f"{row['speedup']:.2f}×",
    "FLOPs limit": lambda row: f"{row['limit']:.2f}×",
    "attainable ms": lambda row: _maybe(row["attainable_ms"], 1),
    "efficiency": lambda row: _maybe(row["efficiency"], 2),
    "GFLOPs": lambda row: f"{row['flops'] / 1e9:,.0f}",
    "  by the papers": lambda row: f"{row['paper_flops'] / 1e9:,.0f}",
}
_LAST = ("  prompt's part", "efficiency")  # a line below these
_BEFORE_ANSWERS = "decode ms"
_SCORED = (
    "− dense: percentage points over the same examples, with a paired bootstrap's 95 % interval; "
    "*: significant at the 95 % level, by McNemar's exact test where answers are right or wrong; "
    "same: answers equal to dense's. Vision tokens: mean over layers and examples; FLOPs: of the "
    "language model's prefill; prefill: per prompt, without the vision encoder."
)
