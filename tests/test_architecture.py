"""The shape of the package: what imports what, and what an import pulls in."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import foveate

ROOT = Path(foveate.__file__).parent
EXTRAS = ("typer", "rich", "matplotlib", "skimage", "PIL", "scipy", "optuna", "peft", "easy_vqa")


def imported(file: Path) -> set[str]:
    """Modules that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("folder", ["reducers", "ops"])
def test_methods_know_no_model(folder: str) -> None:
    for file in (ROOT / folder).glob("*.py"):
        for name in imported(file):
            assert name.split(".")[0] in {*sys.stdlib_module_names, "torch", "foveate"}, (
                file,
                name,
            )
            if name.startswith("foveate"):
                assert name.startswith(("foveate.reducer", "foveate.ops")), (file, name)


@pytest.mark.parametrize(
    "leaf", ["cli", "bench", "peers", "trace", "evaluate", "lmms", "contract", "new_method"]
)
def test_leaves_do_not_reach_inside(leaf: str) -> None:
    inside = {"foveate.session", "foveate.prompt", "foveate.entrance", "foveate.watch"}
    files = [*ROOT.glob(f"{leaf}.py"), *(ROOT / leaf).glob("*.py")]
    assert files
    for file in files:
        assert not imported(file) & inside, file


def test_the_core_knows_no_leaf() -> None:
    core = ["reducer", "schedule", "recipe", "adapter", "session", "report", "cost"]
    core += ["prompt", "entrance", "watch"]
    leaves = ("cli", "bench", "peers", "trace", "evaluate", "lmms", "search")
    leaves += ("contract", "new_method")
    leaves += ("tasks", "pinhole", "shapes")
    for module in core:
        for name in imported(ROOT / f"{module}.py"):
            assert not name.startswith(tuple(f"foveate.{leaf}" for leaf in leaves)), (module, name)


def test_a_bare_import_pulls_in_no_extra() -> None:
    """transformers itself imports what is installed; only what foveate adds counts."""
    code = f"""
import sys, transformers.modeling_utils
before = {{m for m in {EXTRAS} if m in sys.modules}}
import foveate
print([m for m in {EXTRAS} if m in sys.modules and m not in before])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_absent_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "foveate.lmms", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'foveate\[lmms\]'"):
        importlib.import_module("foveate.lmms")


def test_the_public_names() -> None:
    assert foveate.__all__ == sorted(foveate.__all__)
    assert all(vars(foveate)[name] is not None for name in foveate.__all__)
