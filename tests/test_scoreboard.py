"""The table over all tasks: its numbers follow from the rows, and it goes between its marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foveate.markers import Block
from foveate.scoreboard import BLOCK, collapses, differs, lines, markdown


def row(task: str, recipe: str, n: int, **more: Any) -> dict[str, Any]:
    one: dict[str, Any] = {"task": task, "recipe": recipe, "n": n, "blank": False}
    one |= {"adaptive": False, "score": 0.5, "ci_low": 0.401, "ci_high": 0.599}
    one |= {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0, "mcnemar_p": 1.0}
    one |= {"vision_tokens": 256.0, "flops": 1000, "dense_flops": 1000, "prefill_ms": 40.0}
    return one | more


def result() -> dict[str, Any]:
    """Two tasks of 100 and 300 examples."""
    fewer = {"flops": 100, "vision_tokens": 16.0, "prefill_ms": 10.0}
    rows = [
        row("easy", "dense", 100),
        row("easy", "dense", 100, blank=True, score=0.25, mcnemar_p=0.001),
        row("easy", "prumerge", 100, adaptive=True, score=0.4, mcnemar_p=0.051, **fewer),
        row("captions", "dense", 300, mcnemar_p=None),
        row("captions", "dense", 300, blank=True, mcnemar_p=None, difference_high=-0.01),
        row("captions", "prumerge", 300, adaptive=True, mcnemar_p=None, difference_high=0.01)
        | {"flops": 500, "vision_tokens": 32.0, "prefill_ms": 20.0},
    ]
    about = {"model": "tiny", "device": "cpu (one)", "dtype": "float32", "threads": 2}
    about |= {"versions": {"foveate": "not installed", "torch": "2.13"}}
    about |= {"split": "train", "seed": 7, "date": "2026-01-02"}
    return about | {"command": "foveate eval --task easy,captions", "rows": rows}


@pytest.mark.parametrize(
    ("task", "recipe", "high", "warned"),
    [
        ("scenes-words", "aim", 0.40, True),
        ("scenes-count", "aim", 0.40, True),
        ("scenes-words", "aim", 0.401, False),  # the intervals meet
        ("scenes-where", "aim", 0.1, False),  # asks for nothing small
        ("scenes-words", "dense", 0.1, False),  # blank images are meant to lose
    ],
)
def test_lost_detail_is_said(task: str, recipe: str, high: float, warned: bool) -> None:
    blank = recipe == "dense"
    worse = {"score": 0.05, "ci_low": 0.01, "ci_high": high, "blank": blank}
    rows = [row(task, "dense", 100), row(task, recipe, 100, **worse)]
    said = collapses([*rows, row("easy", "dense", 100)])
    assert len(said) == warned
    if warned:
        assert f"aim loses fine detail: {task} falls from 50.0 % to 5.0 %" in said[0]
        assert "near-duplicates" in said[0]


def test_costs_are_means_over_all_examples() -> None:
    dense, blank, reduced = lines(result()["rows"])
    assert (dense.fewer, dense.vision_tokens, dense.prefill_ms) == (1, 256, 40)
    assert (blank.name, reduced.name) == ("dense, blank images", "prumerge, adaptive")
    assert reduced.vision_tokens == (16 + 3 * 32) / 4
    assert reduced.fewer == 4000 / (100 + 3 * 500)
    assert reduced.prefill_ms == 17.5


@pytest.mark.parametrize(
    ("n", "p", "low", "high", "said"),
    [
        (9, 0.049, -0.1, 0.1, True),
        (20, 0.05, 0.1, 0.2, False),  # where answers are right or wrong, McNemar decides
        (20, None, -0.1, 0.1, False),
        (20, None, 0.01, 0.1, True),
        (19, None, 0.01, 0.1, False),  # too few for a bootstrap
        (20, None, -0.1, -0.01, True),
        (20, None, 0.0, 0.0, False),
    ],
)
def test_what_differs(n: int, p: float | None, low: float, high: float, said: bool) -> None:
    one = row("easy", "aim", n, mcnemar_p=p, difference_low=low, difference_high=high)
    assert differs(one) is said


def test_markdown_says_all_of_it() -> None:
    head, _, dense, blank, reduced, _, *about = markdown(result()).split("\n")
    assert head == "| recipe | vision tokens | FLOPs | prefill ms | easy | captions |"
    same = "50.0 (40–60)"
    assert dense == f"| dense | 256 | 1.0× | 40 | {same} | {same} |"
    blanked = "**25.0** (40–60) | **50.0** (40–60)"
    assert blank == f"| dense, blank images | 256 | 1.0× | 40 | {blanked} |"
    cells = f"28 | 2.5× fewer | 18 | 40.0 (40–60) | {same}"
    assert reduced == f"| `prumerge`, adaptive | {cells} |"
    said = " ".join(about)
    assert "tiny on cpu (one), float32, CPU threads: 2; split train, 100 examples of easy" in said
    assert "(seed 7); begun 2026-01-02; foveate from a checkout, torch 2.13. Made by `fov" in said
    assert "McNemar's exact test (for captions the paired bootstrap's interval)" in said
    assert all(len(line) <= 120 for line in about)


def test_the_readme_has_a_place_for_the_table() -> None:
    BLOCK.check(Path(__file__).parents[1] / "README.md")


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file, block = tmp_path / "a.md", Block("here", "by me")
    before = "a\n<!-- here: as somebody wrote -->old\nold<!-- /here -->b\n<!-- /here -->\n"
    file.write_text(before)
    for _ in range(2):
        block.write(file, r"new \1")
        now = "a\n<!-- here: as somebody wrote -->\nnew \\1\n<!-- /here -->b\n<!-- /here -->\n"
        assert file.read_text() == now
    assert Block("here").begin == "<!-- here -->"
    assert Block("here").replaced("<!-- here --><!-- /here -->", "x") == Block("here").around("x")


@pytest.mark.parametrize(
    "text", ["", "<!-- /here --><!-- here: by me -->", "<!-- her --><!-- /her -->"]
)
def test_a_block_that_is_not_there(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(text)
    with pytest.raises(
        ValueError, match=r"a\.md: The markers are missing.*\n<!-- here: by me -->\n"
    ):
        Block("here", "by me").check(tmp_path / "a.md")
