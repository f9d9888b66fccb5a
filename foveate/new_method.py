"""``foveate new-method``: a method's file from a template, and the contract that it must hold."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from foveate.reducer import discover

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TESTS = ("tests/test_contract.py", "tests/test_reducers.py")

TEMPLATE = '''"""{title}: one sentence that says what is kept or merged, and the arXiv number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.ops.knobs import within
from foveate.reducer import Scorer, Tokens


@dataclass(frozen=True)
class {cls}(Scorer, name="{name}"):
    """What it ranks by; which paper or released code it follows, and where it leaves it.

    To say where it acts and what it reads, set class flags (see ``foveate.reducer.Reducer``):
    ``site: ClassVar[str] = "features"``, ``needs_attention: ClassVar[bool] = True``. A method that
    merges derives from Reducer and writes ``reduce``.

    Attributes:
        power: what the knob does.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        within(self.name, "power", self.power, 0, open_low=True)

    def score(self, tokens: Tokens) -> Tensor:
        """Length of each vector (B, N); higher is kept."""
        return tokens.x.norm(dim=-1) ** self.power
'''


@dataclass(frozen=True)
class Written:
    """A new method's file.

    Attributes:
        name: the method's.
        file: where it lies.
        root: the checkout of foveate that it is part of, or None.
        advice: what to do with it.
    """

    name: str
    file: Path
    root: Path | None
    advice: str


def write(name: str, folder: Path) -> Written:
    """Write the file of a method ``name``: into the checkout that ``folder`` is in, or there.

    Raises:
        ValueError: for a name that is taken or not fit for one, or a file that is there already.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name for a method; use lower-case words with hyphens: my-method."
        )
    if name in discover():
        raise ValueError(f"There is a method {name!r} already; give another name.")
    root = next((up for up in (folder, *folder.parents) if _is_checkout(up)), None)
    module = name.replace("-", "_")
    file = (root / "foveate" / "reducers" if root else folder) / f"{module}.py"
    if file.exists():
        raise ValueError(f"{file} is there already; remove it or give another name.")
    title = name.replace("-", " ").capitalize()
    cls = "".join(word.capitalize() for word in name.split("-"))
    file.write_text(TEMPLATE.format(title=title, cls=cls, name=name))
    return Written(name, file, root, _IN_TREE if root else _OUTSIDE.format(module=module))


def check(written: Written) -> bool:
    """Hold the method to the contract and say how that went: whether it does."""
    if written.root is not None:
        words = ["-m", "pytest", "-q", *_TESTS, "-m", "not heavy", "-k", written.name]
        print(f"In {written.root}: python {shlex.join(words)}", flush=True)
        return subprocess.run([sys.executable, *words], cwd=written.root).returncode == 0
    from foveate.contract import faults

    _load(written)
    found = faults(written.name)
    for line in found:
        print(f"breaks the contract: {line}")
    if not found:
        print(f"{written.name} holds the contract.")
    return not found


def _is_checkout(folder: Path) -> bool:
    return all((folder / part).is_file() for part in ("foveate/reducers/__init__.py", *_TESTS))


def _load(written: Written) -> None:
    """Import the file, which makes the method known."""
    spec = importlib.util.spec_from_file_location(written.file.stem, written.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


_IN_TREE = (
    "say in it what the method does, add a comparison with a naive loop to tests/test_reducers.py, "
    "then `make matrix` and `foveate methods --write README.md`."
)
_OUTSIDE = """\
say in it what the method does.
foveate finds it when your package names it, in pyproject.toml:

    [project.entry-points."foveate.reducers"]
    {module} = "your_package.{module}"

To run the contract again: `foveate.contract.faults(name)` is empty for a method that holds it.
"""
