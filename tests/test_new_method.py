"""``foveate new-method`` writes what works, and the contract that it runs finds what does not."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from command import refuses, run, works

from foveate.contract import faults
from foveate.new_method import TEMPLATE
from foveate.ops.rows import full, slots
from foveate.reducer import Reducer, Reduction, Scorer, Tokens, top

registry = importlib.import_module("foveate.reducer")  # the function has the same name
pytestmark = pytest.mark.usefixtures("elsewhere", "forgotten")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Methods made here are gone afterwards."""
    before = dict(registry.discover())
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def test_elsewhere_it_writes_a_module_that_holds_the_contract() -> None:
    said = works("new-method", "my-norm")
    assert Path("my_norm.py").is_file()
    assert 'my_norm = "your_package.my_norm"' in said
    assert "my-norm holds the contract." in said
    assert registry.reducer("my-norm", power=2.0).knobs() == {"power": 2.0}


def test_in_a_checkout_it_runs_the_tests_there(tmp_path: Path, capfd) -> None:
    for name in ("foveate/reducers", "tests", "deep/down"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "foveate" / "reducers" / "__init__.py").touch()
    (tmp_path / "tests" / "test_reducers.py").touch()
    contract = tmp_path / "tests" / "test_contract.py"
    test = (
        "from pathlib import Path\nimport pytest\n"
        "@pytest.mark.parametrize('name', ['mine-llava', 'other'])\n"
        "def test_it(name): assert name != 'other' and Path('foveate/reducers/mine.py').is_file()\n"
    )
    contract.write_text(test)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "deep" / "down")
        said = works("new-method", "mine")
        assert "make matrix" in said
        contract.write_text(test.replace("!=", "=="))
        assert run("new-method", "mine-too").exit_code == 1
    written = sorted(p.name for p in (tmp_path / "foveate" / "reducers").glob("mine*.py"))
    assert written == ["mine.py", "mine_too.py"]
    assert "1 passed" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My_Method", "lower-case words with hyphens"),
        ("fastv", "a method 'fastv' already"),
    ],
)
def test_names_that_will_not_do(name: str, said: str) -> None:
    assert said in refuses("new-method", name)
    assert not list(Path().glob("*.py"))


def test_it_overwrites_nothing() -> None:
    Path("mine.py").write_text("precious")
    assert "is there already" in refuses("new-method", "mine")
    assert Path("mine.py").read_text() == "precious"


def test_the_template_is_in_the_house_style() -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.is_file():
        pytest.skip("ruff is not installed beside python")
    text = TEMPLATE.format(title="Mine", cls="Mine", name="mine")
    for check in (["check"], ["format", "--check"]):
        words = [ruff, *check, "--stdin-filename", "foveate/reducers/mine.py", "-"]
        root = Path(__file__).resolve().parents[1]
        subprocess.run(words, input=text, text=True, cwd=root, check=True)


# What the contract finds


@pytest.mark.parametrize(
    "name", ["random", "pool", "prumerge", "sparsevlm", "hiprune", "evs", "downsample"]
)
def test_methods_of_ours_hold_it(name: str) -> None:
    assert faults(name) == []


@dataclass(frozen=True)
class Bad(Reducer):
    """The first tokens, with one thing wrong."""

    def reduce(self, tokens: Tokens, budget: object) -> Reduction:
        wanted = budget[0]  # type: ignore[index]
        keep = slots(tokens.x)[:, :wanted]
        return self.spoilt(Reduction(keep, full(len(keep), wanted)), tokens)

    def spoilt(self, done: Reduction, tokens: Tokens) -> Reduction:
        raise NotImplementedError


def zeros(done: Reduction, tokens: Tokens) -> Reduction:
    return replace(done, x=tokens.x[:, : done.keep.shape[1]] * (done.keep[..., None] > 0))


def duplicates(done: Reduction, tokens: Tokens) -> Reduction:
    return replace(done, keep=done.keep // 2)


def fewer(done: Reduction, tokens: Tokens) -> Reduction:
    return replace(done, keep=done.keep[:, 1:], count=done.count - 1)


def turned(done: Reduction, tokens: Tokens) -> Reduction:
    return replace(done, keep=done.keep.flip(-1))


def neighbourly(done: Reduction, tokens: Tokens) -> Reduction:
    rank = tokens.x.sum((0, 2))  # of the whole batch
    return top(rank.expand(len(done.keep), -1), tokens.valid, done.count.tolist())


def failing(done: Reduction, tokens: Tokens) -> Reduction:
    raise KeyError("norm")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (zeros, "not finite or zero"),
        (duplicates, "it keeps the slots"),
        (fewer, "it gives"),
        (turned, "keeping all tokens changes"),
        (neighbourly, "when it is alone"),
        (failing, "budgets: KeyError: 'norm'"),
    ],
)
def test_the_contract_finds_what_is_wrong(spoil, said: str) -> None:
    dataclass(frozen=True)(type("Spoilt", (Bad,), {"spoilt": staticmethod(spoil)}, name="spoilt"))
    assert any(said in fault for fault in faults("spoilt"))


def test_the_contract_asks_a_model() -> None:
    @dataclass(frozen=True)
    class Rows(Scorer, name="rows"):
        """First or last tokens, by how long the longest sample is."""

        site = "layers"
        needs_attention = True

        def score(self, tokens: Tokens) -> torch.Tensor:
            assert tokens.q is not None
            return slots(tokens.x) * (1.0 if tokens.q.shape[2] > 60 else -1.0)

    assert any("in a batch than alone" in fault for fault in faults("rows"))
