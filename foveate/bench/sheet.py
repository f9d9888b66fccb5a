"""Rows as lines of a CSV file that grows run by run."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COMMON = ("date", "model", "device", "dtype", "attention", "threads")
_PROMPT = ("images", "frames", "text_tokens", "image_size", "ragged")


def lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The result of ``foveate bench``: a line for each row and length of answer."""
    common = {key: result[key] for key in _COMMON} | result["versions"]
    common |= {key: result["prompt"][key] for key in _PROMPT}
    made = []
    for row in result["rows"]:
        plain = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        for key, (low, high) in row["spread"].items():
            plain |= {f"{key}_q1": low, f"{key}_q3": high}
        made += [common | plain | answer for answer in row["answers"]]
    return made


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put lines, all with the same names, at the end of a file; it is made if it is not there.

    Raises:
        ValueError: for a file with other columns, which is left as it is.
    """
    names = list(rows[0])
    with path.open("a+", newline="") as file:
        file.seek(0)
        known = next(csv.reader(file), names)
        if set(known) != set(names):
            raise ValueError(f"{path} has other columns than this version writes; name a new file.")
        writer = csv.DictWriter(file, fieldnames=known)
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerows(rows)
