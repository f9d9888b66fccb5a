"""Whether the assumptions of progressive pruning hold on a model, layer by layer.

- Kendall's tau (b) of the ranking of vision tokens between a layer and the next: G-Search assumes
  that they agree (arXiv 2412.00556, figure 1; there 0.77 and 0.80 on average over two models).
- The share of the instruction's attention that goes to vision tokens.
- Redundancy: the cosine of a vision token and its nearest other one at the LLM's entrance, before
  and after merging (AIM, arXiv 2412.03248).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foveate
from foveate.adapter import Seen, family, vision_rows
from foveate.answer import prompts
from foveate.loading import missing
from foveate.recipe import parse
from foveate.reducer import Scorer, Tokens
from foveate.search.found import figure
from foveate.tasks import Example
from foveate.watch import Watch


@dataclass
class Findings:
    """Means over examples.

    Attributes:
        examples: how many.
        tau: of layer b and layer b + 1, one value less than layers.
        mass: of the instruction's attention on vision tokens, by layer.
        redundancy: nearest-neighbour cosine at the entrance, by what was done there.
    """

    examples: int
    tau: list[float]
    mass: list[float]
    redundancy: dict[str, float]


@torch.no_grad()
def analyse(
    model: Any,
    processor: Any,
    examples: Iterable[Example],
    *,
    method: str = "attention",
    merged: Sequence[str] = ("aim-merge:keep=0.25",),
    advance: Callable[[int], object] | None = None,
) -> Findings:
    """Look at every layer of the untouched model, prompt by prompt.

    Args:
        method: a scorer; its scores rank the tokens.
        merged: recipes whose entrance is compared.

    Raises:
        ValueError: for a method that does not rank by attention.
    """
    scorer = foveate.reducer(method)
    if not isinstance(scorer, Scorer) or not scorer.needs_attention:
        raise ValueError(f"{method} does not rank by attention; take attention or fastv.")
    recipes = {text: parse(text) for text in merged}
    taus: list[list[float]] = []
    masses: list[list[float]] = []
    near: dict[str, list[float]] = {name: [] for name in ("untouched", *recipes)}
    for example in examples:
        inputs = prompts(model, processor, [example])
        vision = vision_rows(model, inputs["input_ids"])[0]
        with _entering(model) as seen:
            scores = _scores(model, inputs, vision, scorer)
        taus.append([_tau(a, b) for a, b in pairwise(scores)])
        masses.append([float(s.sum()) for s in scores])
        near["untouched"].append(_redundancy(seen[0][vision]))
        for name, recipe in recipes.items():
            with foveate.reduced(model, recipe) as report, _entering(model) as seen:
                model(**inputs, use_cache=False, logits_to_keep=1)
            left = vision[report.slots[0][0].to(vision.device)]
            near[name].append(_redundancy(seen[0][left]))
        if advance:
            advance(1)
    if not taus:
        raise ValueError("There is nothing to look at; raise --limit.")
    return Findings(
        len(taus), _columns(taus), _columns(masses), {k: _mean(v) for k, v in near.items()}
    )


def picture(found: Findings, file: Path) -> None:
    """Agreement between layers, and attention on vision tokens, by layer."""
    drawn = figure(9, 3.2)
    left, right = drawn.subplots(1, 2)
    left.bar(range(len(found.tau)), found.tau)
    left.set(xlabel="layer and the next", ylabel="Kendall's tau of the ranking", ylim=(-0.2, 1))
    right.bar(range(len(found.mass)), found.mass)
    right.set(xlabel="layer", ylabel="attention on vision tokens", ylim=(0, 1))
    drawn.savefig(file, dpi=150)


def _scores(model: Any, inputs: Any, vision: Tensor, scorer: Scorer) -> list[Tensor]:
    """The score of each vision token (N,), by layer; ``vision`` (L,) says which rows they are."""
    at = vision.nonzero()[:, 0]
    after = len(vision) - 1 - int(at[-1])
    layers = list(cast(nn.ModuleList, family(model).text(model).layers))
    found: list[Tensor] = [torch.empty(0)] * len(layers)

    def look(layer: int, seen: Seen) -> None:
        length = seen.q.shape[2]
        found[layer] = scorer.score(
            Tokens(
                x=seen.q.new_zeros(1, len(at), 1),
                valid=torch.ones(1, len(at), dtype=torch.bool, device=at.device),
                q=seen.q,
                k=seen.k,
                at=at[None],
                rows=torch.ones(1, length, dtype=torch.bool, device=at.device),
                scale=seen.scale,
                causal=True,
                instruction=(after,),
            )
        )[0].float()

    armed = [(cast(nn.Module, m.self_attn), partial(look, i)) for i, m in enumerate(layers)]
    watch = Watch(cast(Any, armed))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        watch.remove()
    return found


@contextmanager
def _entering(model: Any) -> Iterator[list[Tensor]]:
    """Yields a list that gets the rows (L, D) which enter the first layer, of the first sample."""
    seen: list[Tensor] = []
    first = cast(nn.ModuleList, family(model).text(model).layers)[0]
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    try:
        yield seen
    finally:
        hook.remove()


def _redundancy(rows: Tensor) -> float:
    """Mean cosine of each of ``rows`` (N, D) and the one nearest to it."""
    tokens = F.normalize(rows.float(), dim=-1)
    alike = (tokens @ tokens.T).fill_diagonal_(-1.0)
    return float(alike.amax(-1).mean())


def _tau(one: Tensor, other: Tensor) -> float:
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise missing("scipy", "search") from error
    return float(kendalltau(one.cpu().numpy(), other.cpu().numpy()).statistic)


def _columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(column) for column in zip(*rows, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
