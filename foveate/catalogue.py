"""The catalogue: what methods and presets there are, read from the code itself."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from foveate.markers import Block
from foveate.recipe import PRESETS
from foveate.reducer import Reducer, discover

BLOCK = Block("methods", "written by `foveate methods --markdown --write README.md`")
_WHERE = {
    "pixels": "on the input image",
    "features": "before the projector",
    "tokens": "at the entrance or between layers",
    "layers": "between layers",
}


def methods() -> list[dict[str, Any]]:
    """One row per reducer: name, what it is, paper, where it acts, knobs with their defaults."""
    return [_row(name, cls) for name, cls in discover().items()]


def presets() -> list[dict[str, Any]]:
    """One row per preset that is not simply the name of a reducer."""
    return [{"name": name, **_said(inspect.getdoc(make))} for name, make in PRESETS.items()]


def models() -> list[dict[str, Any]]:
    """The method × family matrix that the contract tests wrote; families alone if there is none."""
    file = Path(__file__).with_name("matrix.json")
    if file.is_file():
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
        return rows
    from foveate.adapter import families

    return [
        {"family": cls.family, "model_type": kind, "status": "untested", "methods": {}}
        for kind, cls in families().items()
    ]


def markdown() -> str:
    """The catalogue for the README."""
    lines = ["| method | acts | what it is | knobs |", "|---|---|---|---|"]
    for row in methods():
        knobs = ", ".join(f"`{k}={_literal(v)}`" for k, v in row["knobs"].items()) or "–"
        what = row["summary"] + (f" [{row['paper']}]({row['link']})" if row["link"] else "")
        lines.append(f"| `{row['name']}` | {row['where']} | {what} | {knobs} |")
    lines += ["", "Presets, each taking `keep=`:", ""]
    for row in presets():
        what = row["summary"] + (f" [{row['paper']}]({row['link']})" if row["link"] else "")
        lines.append(f"- `{row['name']}`: {what}")
    return "\n".join(lines)


def _row(name: str, cls: type[Reducer]) -> dict[str, Any]:
    return {
        "name": name,
        **_about(cls),
        "site": cls.site,
        "where": _WHERE[cls.site],
        "knobs": {field.name: field.default for field in fields(cls)},  # type: ignore[arg-type]
        "needs_attention": cls.needs_attention,
        "adaptive": cls.adaptive,
    }


def _about(cls: type[Reducer]) -> dict[str, str]:
    """The module's first line; where it holds several methods, each one's own with its paper."""
    said = _said(sys.modules[cls.__module__].__doc__)
    if sum(other.__module__ == cls.__module__ for other in discover().values()) > 1:
        own = _said(cls.__doc__)
        return said | {"summary": own["summary"] or said["summary"]}
    return said


def _said(doc: str | None) -> dict[str, str]:
    """The first line of a docstring: its sentence, and the paper it names."""
    first = (doc or "").strip().splitlines()[0] if (doc or "").strip() else ""
    found = re.search(r"(?:arXiv[: ]*)?(?:https://arxiv\.org/abs/)?\(?(\d{4}\.\d{4,5})", first)
    paper = found.group(1) if found else ""
    summary = re.sub(r"\s*(?:arXiv[: ]*|https://arxiv\.org/abs/)?\d{4}\.\d{4,5}\.?\s*$", "", first)
    link = f"https://arxiv.org/abs/{paper}" if paper else ""
    return {"summary": summary.strip(), "paper": paper and f"arXiv {paper}", "link": link}


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
