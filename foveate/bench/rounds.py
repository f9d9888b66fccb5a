"""Rounds already timed, kept in a file until all are: a run that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Part:
    """One prompt's measurements so far.

    Attributes:
        facts: by row, what does not vary from round to round.
        lengths: by row, the rows of every layer.
        vision_flops: of encoder and projector, whole batch.
        rounds: of each round, what every row took: ``{row: {key: value}}``.
        text: of each round, what the untouched model took on text: ``{rows: ms}``.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    vision_flops: int = 0
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    text: list[dict[int, float]] = field(default_factory=list)

    def samples(self, row: str, key: str) -> list[float]:
        """What a row took in every round."""
        return [one[row][key] for one in self.rounds]

    def text_ms(self, rows: int) -> list[float]:
        return [one[rows] for one in self.text]


@dataclass
class Rounds:
    """The parts of a run, and the file that keeps them while it lasts.

    Attributes:
        file: None keeps them in memory.
        asked: what decides the figures: where, with what, which rows and prompts.
    """

    file: Path | None
    asked: Mapping[str, Any]
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises ValueError for a file of another command, or a damaged one."""
        if self.file is None or not self.file.is_file():
            return
        try:
            said = json.loads(self.file.read_text())
            asked, parts = said["asked"], [Part(**part) for part in said["parts"]]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{self.file} holds no rounds that this version wrote; delete it to begin anew."
            ) from None
        if asked != json.loads(json.dumps(self.asked)):
            raise ValueError(
                f"{self.file} holds the rounds of another command:\n  there {json.dumps(asked)}\n"
                f"  now   {json.dumps(self.asked)}\nGive another --json, or delete the file to "
                "begin anew."
            )
        for part in parts:
            part.text = [{int(n): ms for n, ms in one.items()} for one in part.text]
        self.parts = parts

    def save(self) -> None:
        if self.file is None:
            return
        said = {"asked": self.asked, "parts": [asdict(part) for part in self.parts]}
        fresh = self.file.with_name(self.file.name + ".new")
        fresh.write_text(json.dumps(said))
        os.replace(fresh, self.file)

    def done(self) -> None:
        """All rounds are there: the same command now measures anew."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
