"""Parts of a document that a command writes: what stands between two comments is replaced."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """A part of a document, between ``<!-- name -->`` or ``<!-- name: … -->`` and its end.

    Attributes:
        name: as the two comments say it.
        by: what the first comment says further, such as the command that writes the part.
    """

    name: str
    by: str = ""

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}{self.by and f': {self.by}'} -->"

    @property
    def end(self) -> str:
        return f"<!-- /{self.name} -->"

    def around(self, body: str) -> str:
        """``body`` between the comments."""
        return f"{self.begin}\n{body}\n{self.end}"

    def replaced(self, text: str, body: str) -> str:
        """``text`` with ``body`` between its comments, which stay as they are.

        Raises:
            ValueError: when the comments are not there.
        """
        name = re.escape(self.name)
        found = re.search(rf"(<!-- {name}(?::[^\n]*?)? -->).*?(<!-- /{name} -->)", text, re.DOTALL)
        if not found:
            raise ValueError(
                f"The markers are missing; put these two lines in:\n{self.begin}\n{self.end}"
            )
        begin, end = found.groups()
        return f"{text[: found.start()]}{begin}\n{body}\n{end}{text[found.end() :]}"

    def write(self, file: Path, body: str) -> None:
        """Put ``body`` between the comments of ``file``; errors as in :meth:`check`."""
        self.check(file)
        file.write_text(self.replaced(file.read_text(), body))

    def check(self, file: Path) -> None:
        """Raises ValueError for a file that is not there or lacks the comments."""
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            lines = f"{self.begin}\n{self.end}"
            raise ValueError(f"{file} {what}; give a file with these two lines:\n{lines}")
        try:
            self.replaced(file.read_text(), "")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
