"""Session-scoped tiny models, and the method × family matrix that the contract tests produce."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path
from typing import Any

import asking
import command
import miniature
import pytest
import tiny
import torch

import foveate
from foveate import loading

MATRIX = Path(foveate.__file__).parent / "matrix.json"
FAMILIES = ("llava",)
METHODS = ("attention", "prumerge+")  # in turn: one inside the LLM, one at the entrance
CELLS = ("test_contract", "test_mixed")  # where tests are of a method on a family


@pytest.fixture(scope="session")
def models():
    """Tiny models by family name, built once."""

    @functools.cache
    def build(name: str) -> Any:
        return tiny.FAMILIES[name].build()

    return build


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small LLaVA (16 vision tokens) and a processor that fits it."""
    return miniature.with_processor(tmp_path_factory.mktemp("tokenizer"), asking.WORDS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with its processor, as ``save_pretrained`` leaves it."""
    return command.save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def opened(checkpoint: Path) -> tuple[Any, Any]:
    """The same, opened once."""
    return loading.model(str(checkpoint), dtype="float32", device="cpu")


@pytest.fixture
def loaded(opened, monkeypatch) -> tuple[Any, Any]:
    """Whatever ``--model`` says, this is the model; the opening itself is tested elsewhere."""
    monkeypatch.setattr(loading, "model", lambda name, **_: opened)
    return opened


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> None:
    """Commands write into a folder of their own; tables are wide enough not to fold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.delenv("FOVEATE_TRACEBACK", raising=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write foveate/matrix.json")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny tensors; `make test` runs two processes
    if config.getoption("--write-matrix"):
        config.pluginmanager.register(Matrix(), "foveate-matrix")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All methods on some families, one on each other; ``make matrix`` runs every cell."""
    others = {f: METHODS[i % 2] for i, f in enumerate(sorted({*tiny.FAMILIES} - {*FAMILIES}))}
    for item in items:
        cell = cell_of(item)
        if cell and others.get(cell[0], cell[1]) != cell[1]:
            item.add_marker("wide")


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: the benchmark looks for some before each timing."""
    gc.freeze()


def cell_of(item: pytest.Item) -> tuple[str, str] | None:
    """(family, method) of a test of methods on families, by their names."""
    called = getattr(item, "callspec", None)
    family, method = ((called.params if called else {}).get(k) for k in ("family", "method"))
    return (family, method) if isinstance(family, str) and isinstance(method, str) else None


class Matrix:
    """Collects the contract's outcomes: a cell works when every test of it passed."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        cell = cell_of(item) if item.path.stem in CELLS else None
        report.user_properties += [("cell", cell)] if cell else []
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Here, with ``-n``, the reports of all workers arrive."""
        for _, (family, method) in (p for p in report.user_properties if p[0] == "cell"):
            cell = self.cells.setdefault((family, method), set())
            if report.failed:
                cell.add(f"fails {report.nodeid.split('::')[1].split('[')[0]}")
            elif report.skipped:
                cell.add(str(report.longrepr[2]).removeprefix("Skipped: "))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        from foveate.adapter import family

        if hasattr(session.config, "workerinput"):
            return

        rows = []
        for name, tiny_family in tiny.FAMILIES.items():
            model = tiny_family.build()
            found = {
                m: "; ".join(sorted(said)) or "works"
                for (f, m), said in self.cells.items()
                if f == name
            }
            rows.append(
                {
                    "family": family(model).family,
                    "model_type": model.config.model_type,
                    "encoder": tiny_family.encoder or model.config.vision_config.model_type,
                    "input": "video" if tiny.VIDEO in tiny_family.ids else "image",
                    "status": "tested" if found else "untested",
                    "methods": dict(sorted(found.items())),
                }
            )
        MATRIX.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
