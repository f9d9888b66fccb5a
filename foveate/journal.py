"""The answers of an evaluation, kept in a file: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str, bool]  # recipe, made, blank


@dataclass(frozen=True)
class Record:
    """One answer and what its prompt cost.

    ``made`` tells recipes of one name apart; ``vision_tokens`` is the mean over layers.
    """

    task: str
    recipe: str
    made: str
    blank: bool
    index: int
    kind: str
    answer: str
    score: float
    vision_tokens: float
    flops: int
    dense_flops: int
    prefill_ms: float


@dataclass
class Journal:
    """Records, and the file that keeps them.

    Attributes:
        file: lines of JSON, a record or a fact each, after a first line that says what was asked;
            None keeps them in memory.
        asked: what decides the answers besides recipe and task, such as model, split and seed.
        facts: what else was found out once.
    """

    file: Path | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a file that another command wrote, or a damaged one."""
        if self.file is None:
            return
        head = json.dumps(dict(self.asked), sort_keys=True)
        text = self.file.read_text() if self.file.is_file() else ""
        first, *lines = text.split("\n")
        if text and first != head:
            raise ValueError(
                f"{self.file} holds the answers of another command:\n  there {first}\n  now   "
                f"{head}\nGive another --json, or delete the file to begin anew."
            )
        whole = lines[:-1]  # what follows the last line break was cut off
        for number, line in enumerate(whole, 2):
            self._read(line, number)
        if not text.endswith("\n"):
            self.file.write_text("\n".join((head, *whole, "")))

    def _read(self, line: str, number: int) -> None:
        try:
            said = json.loads(line)
            if "fact" in said:
                self.facts[said["fact"]] = said["value"]
            else:
                self.records.append(Record(**said))
        except (ValueError, TypeError):
            raise ValueError(
                f"{self.file}, line {number} is no answer that this version wrote: {line[:80]}\n"
                "Give another --json, or delete the file to begin anew."
            ) from None

    def add(self, records: Sequence[Record]) -> None:
        self.records += records
        self._append(asdict(r) for r in records)

    def once(self, fact: str, find: Callable[[], Any]) -> Any:
        """What ``find`` found, JSON, the first time that it was asked for."""
        if fact not in self.facts:
            self.facts[fact] = find()
            self._append([{"fact": fact, "value": self.facts[fact]}])
        return self.facts[fact]

    def of(self, task: str) -> dict[Key, dict[int, Record]]:
        """The records of a task, by case and example."""
        found: dict[Key, dict[int, Record]] = {}
        for r in self.records:
            if r.task == task:
                found.setdefault((r.recipe, r.made, r.blank), {})[r.index] = r
        return found

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self.file is not None:
            with self.file.open("a") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
