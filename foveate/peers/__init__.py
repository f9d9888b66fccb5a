"""How the field does it: the same recipes, carried out the way that released code does.

These are what ``foveate bench --compare`` measures against, and good for nothing else. Each was
written from a description of what such code does, gives the output that the recipe gives under
foveate, and is called as ``foveate.reduced`` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from foveate.peers.loops import LOOPS
from foveate.peers.masking import MASKING
from foveate.peers.peer import How, Peer
from foveate.peers.rerun import RERUN
from foveate.recipe import Recipe
from foveate.reducer import unknown

__all__ = ["PEERS", "Carried", "How", "Peer", "carried_out"]


@dataclass(frozen=True)
class Carried:
    """A recipe, called ``label``, and who carries it out."""

    label: str
    recipe: Recipe
    how: How


PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (MASKING, RERUN, LOOPS)}


def carried_out(recipes: Mapping[str, Recipe], compare: Iterable[str]) -> dict[str, Carried]:
    """The recipes that each peer of ``compare`` can carry out, by the name of their row.

    Raises:
        ValueError: for a peer that does not exist, or that can carry out none of the recipes.
    """
    made: dict[str, Carried] = {}
    for name in compare:
        if name not in PEERS:
            raise ValueError(unknown("peer", name, PEERS))
        peer = PEERS[name]
        mine = {label: recipe for label, recipe in recipes.items() if peer.serves(recipe)}
        if not mine:
            raise ValueError(
                f"The peer {name} carries out {peer.what}, and none of the recipes is that: "
                f"{', '.join(recipes) or 'there are none'}. Try --recipe {peer.example}."
            )
        for label, recipe in mine.items():
            made[f"{label} by {name}"] = Carried(label, recipe, peer.reduced)
    return made
