"""Making trained weights the released pinhole: scores into the file's header and into the docs.

    python -m foveate.pinhole.release runs/pinhole/weights.safetensors
    foveate eval --task easyvqa,… --blank --json scores.json
    python -m foveate.pinhole.release runs/pinhole/weights.safetensors scores.json [more.json …]

The first line puts the weights beside this file, so that ``pinhole.load`` and the second line use
them; the third adds what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.bench import DENSE
from foveate.markers import Block
from foveate.pinhole import weights
from foveate.pinhole.train import write_weights

BLOCK = Block("scores")
LARGEST = 40 * 2**20
KEPT = ("task", "blank", "n", "score", "ci_low", "ci_high")


def release(
    trained: Path,
    scores: Sequence[Path],
    target: Path,
    card: Path,
    other: Path | None = None,
    share: float = 0.5,
) -> None:
    """``trained`` to ``target``, with all ``scores`` in its metadata and as a table in ``card``.

    With ``other``, the average of both files is released (``average``).
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    size = trained.stat().st_size
    if size > LARGEST:
        raise ValueError(
            f"{trained} has {size / 2**20:.1f} MiB and at most {LARGEST // 2**20} are shipped; "
            "train with a smaller --rank."
        )
    with safe_open(trained, framework="pt") as opened:
        about = dict(opened.metadata() or {})
    if scores:
        measured = [json.loads(file.read_text()) for file in scores]
        rows = [row for one in measured for row in one["rows"] if row["recipe"] == DENSE]
        text = written(card, {**measured[0], "rows": rows})
        about["scores"] = json.dumps([_short(row) for row in rows])
        card.write_text(text)
    tensors = load_file(trained)
    if other is not None:
        tensors = average(tensors, load_file(other), share)
        about["averaged"] = f"{share:g} of these, {1 - share:g} of an earlier point of the run"
    write_weights(tensors, target, about)
    target.chmod(0o644)


def average(one: weights.State, other: weights.State, share: float) -> weights.State:
    """Weights of two points of one run: ``share`` of ``one``, the rest of ``other``, in bf16.

    Raises:
        ValueError: for weights of different layers or ranks.
    """
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        raise ValueError("The two files have other layers or ranks, so they cannot be averaged.")
    mixed = {k: share * one[k].float() + (1 - share) * other[k].float() for k in one}
    return {k: v.to(one[k].dtype).contiguous() for k, v in mixed.items()}


def written(card: Path, measured: dict[str, Any]) -> str:
    """The text of ``card`` with the table of ``measured`` between the markers."""
    said = f"Measured on {measured['device']}, {measured['dtype']}.\n\n" + table(measured["rows"])
    BLOCK.check(card)
    return BLOCK.replaced(card.read_text(), said)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The untouched model's rows in markdown: one line a task, blanked images beside it."""
    lines = ["| task | n | score | 95 % interval | images blanked |", "|---|--:|--:|---|--:|"]
    blanked = {row["task"]: row["score"] for row in rows if row["blank"]}
    for row in rows:
        if not row["blank"]:
            beside = blanked.get(row["task"])
            lines.append(
                f"| {row['task']} | {row['n']} | {row['score']:.1%} "
                f"| {row['ci_low']:.1%} – {row['ci_high']:.1%} "
                f"| {'–' if beside is None else f'{beside:.1%}'} |"
            )
    return "\n".join(lines)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(row[k], 4) if isinstance(row[k], float) else row[k] for k in KEPT}


def main(
    trained: Annotated[Path, typer.Argument(help="weights.safetensors of a training run")],
    scores: Annotated[list[Path] | None, typer.Argument(help="JSON of foveate eval")] = None,
    card: Annotated[Path, typer.Option(help="the model card")] = Path("docs/pinhole.md"),
    other: Annotated[Path | None, typer.Option(help="weights to average them with")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="of TRAINED in the average")] = 0.5,
) -> None:
    """Put trained weights into the package, with their scores when they are given."""
    from safetensors import SafetensorError

    try:
        release(trained, scores or [], weights.file(), card, other, share)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        said = (
            f"{' '.join(map(str, scores or []))} lacks {error}"
            if isinstance(error, KeyError)
            else error
        )
        typer.echo(f"foveate: {said}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{weights.file()} is up to date.")


if __name__ == "__main__":
    typer.run(main)
