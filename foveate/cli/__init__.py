"""The command line. This file only makes sure that what it needs is there."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``foveate``."""
    try:
        from foveate.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("typer", "rich", "click"):
            raise
        line = f"foveate: the command line needs {package}: pip install 'foveate[cli]'"
        print(line, file=sys.stderr)
        raise SystemExit(2) from None
    app()
