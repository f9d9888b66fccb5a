"""Recipes: what is handed around. Search writes them, inference reads them, people mail them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from foveate.reducer import Reducer, discover, reducer, unknown
from foveate.schedule import Schedule

FORMAT = 1
DEFAULT_KEEP = 0.25


@dataclass(frozen=True)
class Recipe:
    """A schedule, the reducers that carry it out, and where it came from.

    Attributes:
        schedule: how many vision tokens are alive at each boundary.
        entrance: the reducer of boundary 0, or None.
        layers: the reducer of every later boundary at which the schedule falls, or None.
        provenance: names and numbers only: preset, model type, layers, versions, seed, objective,
            measured value.
    """

    schedule: Schedule
    entrance: Reducer | None = None
    layers: Reducer | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.entrance is not None and self.entrance.site == "layers":
            raise ValueError(
                f"{self.entrance.name} ranks by attention inside the LLM and cannot act at the "
                f"entrance; give it as layers=foveate.reducer({self.entrance.name!r})."
            )
        if self.layers is not None and self.layers.site not in ("layers", "tokens"):
            raise ValueError(
                f"{self.layers.name} acts before the LLM (site {self.layers.site!r}) and cannot "
                f"act between layers; give it as entrance=foveate.reducer({self.layers.name!r})."
            )
        if self.layers is not None and self.layers.video:
            raise ValueError(
                f"{self.layers.name} compares the frames of a video, which it sees at the entrance "
                f"only; give it as entrance=foveate.reducer({self.layers.name!r})."
            )
        if self.schedule.adaptive and (self.entrance is None or not self.entrance.adaptive):
            raise ValueError(
                "An adaptive schedule needs an entrance reducer that chooses its count."
            )
        if self.schedule.alive:
            self._check_reducers()

    def _check_reducers(self) -> None:
        alive = self.schedule.alive
        if alive[0] < 1.0 and self.entrance is None:
            raise ValueError(f"alive[0] = {alive[0]} needs an entrance reducer, and there is none.")
        if self.schedule.cuts() and self.layers is None:
            raise ValueError(
                f"The schedule falls before layer {self.schedule.cuts()[0]} and there is no layers "
                "reducer; give one, for example layers=foveate.reducer('attention')."
            )

    def resolve(self, layers: int, model_type: str | None = None) -> Recipe:
        """This recipe for a model of ``layers`` layers.

        Raises:
            ValueError: for a curve of another depth, or a recipe made for another model type.
        """
        made_for = self.provenance.get("model_type")
        if made_for and model_type and made_for != model_type and self.schedule.alive:
            raise ValueError(
                f"The recipe was made for {made_for!r} and this model is {model_type!r}; search "
                "one for it, or remove model_type from the recipe's provenance to try it anyway."
            )
        return replace(self, schedule=self.schedule.resolve(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: numbers and names."""
        said: dict[str, Any] = {"format": FORMAT, "schedule": self.schedule.to_dict()}
        for slot in ("entrance", "layers"):
            method: Reducer | None = getattr(self, slot)
            said[slot] = None if method is None else {"name": method.name} | method.knobs()
        return said | {"provenance": dict(self.provenance)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: for another format, an unknown key, reducer or knob.
        """
        if said.get("format") != FORMAT:
            raise ValueError(
                f"The recipe's format is {said.get('format')!r} and this version reads {FORMAT}; "
                "upgrade with pip install -U foveate, or check that the file is a recipe."
            )
        names = {"format": 0, **{f.name: 0 for f in fields(cls)}}
        for key in said:
            if key not in names:
                raise ValueError(unknown("key of a recipe", key, names))
        if "schedule" not in said:
            raise ValueError(
                'The recipe has no "schedule"; add {"alive": [one fraction per layer]}.'
            )
        return cls(
            schedule=Schedule.from_dict(said["schedule"]),
            entrance=_method(said.get("entrance")),
            layers=_method(said.get("layers")),
            provenance=dict(said.get("provenance", {})),
        )

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON file."""
        try:
            said = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not JSON ({error}); a recipe is what Recipe.save wrote."
            ) from None
        if not isinstance(said, dict):
            raise ValueError(f"{path} holds a {type(said).__name__}; a recipe is a JSON object.")
        return cls.from_dict(said)


def _method(said: Mapping[str, Any] | None) -> Reducer | None:
    if said is None:
        return None
    knobs = dict(said)
    return reducer(str(knobs.pop("name", "")), **knobs)


def recipe(
    name: str, *, keep: float | None = None, pruning_rate: float | None = None, **knobs: Any
) -> Recipe:
    """Build a recipe from a preset or from the name of any reducer.

    Args:
        name: ``aim``, ``gsearch-llava-1.5-7b``, or a reducer: ``prumerge``, ``fastv``, ``pool``, …
            (see ``foveate methods``). A reducer that acts before the LLM is used at the entrance;
            one that acts inside it prunes once, before layer 2 (``before=`` says another). One that
            can do both is used inside where ``before=`` is given.
        keep: fraction of vision tokens kept, in (0, 1]; 1.0 leaves the model untouched. For ``aim``
            it is what the merge keeps (the ramp then prunes on), for ``pyramiddrop`` what the last
            stage leaves, for ``sparsevlm`` and a published curve the layer-averaged fraction. None
            means the method's own default.
        pruning_rate: the same said the other way round, ``1 - keep``.
        knobs: the method's own, for example ``neighbours=16``.

    Raises:
        ValueError: for an unknown name or knob, a keep outside (0, 1], or both ways of saying it.
    """
    if keep is not None and pruning_rate is not None:
        raise ValueError(
            f"The budget is said twice, keep={keep} and pruning_rate={pruning_rate}; give one."
        )
    if pruning_rate is not None:
        keep = 1.0 - pruning_rate
    made = PRESETS[name](keep, knobs) if name in PRESETS else _single(name, keep, knobs)
    said: dict[str, Any] = {"preset": name} | ({"keep": keep} if keep is not None else {})
    return replace(made, provenance={**made.provenance, **said})


def parse(text: str, keep: float | None = None) -> Recipe:
    """A recipe from the command line: a JSON file, a preset, or ``name:key=value,…``."""
    if finished(text):
        if keep is not None:
            raise ValueError(f"{text} is a finished recipe; --keep goes with a preset.")
        if not Path(text).is_file():
            raise ValueError(f"There is no recipe file {text}.")
        return Recipe.load(text)
    name, _, rest = text.partition(":")
    knobs = settings(rest, text)
    if keep is not None and ("keep" in knobs or "pruning_rate" in knobs):
        raise ValueError(f"The budget is said twice, --keep {keep} and in {text!r}; give one.")
    return recipe(name, **({"keep": keep} if keep is not None else {}) | knobs)


def settings(rest: str, text: str) -> dict[str, Any]:
    """``key=value,…`` of the command line's ``text``, the values as JSON has them."""
    said: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} in {text!r} is not key=value.")
        if key in said:
            raise ValueError(f"{key} is said twice in {text!r}; give one.")
        said[key] = _literal(value)
    return said


def with_keep(text: str, keep: float | str | None) -> str:
    """The command line's ``text`` with the budget in it; None leaves it as it is."""
    share = f"{keep:.4g}" if isinstance(keep, float) else keep
    return text if share is None else f"{text}{',' if ':' in text else ':'}keep={share}"


def finished(text: str) -> bool:
    """Whether the command line's ``text`` names a recipe file instead of a preset."""
    return text.endswith(".json") or Path(text).is_file()


def _literal(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


def _single(name: str, keep: float | None, knobs: dict[str, Any]) -> Recipe:
    """One reducer with one cut: at the entrance, or before a layer (FastV's K)."""
    known = discover()
    if name not in known:
        raise ValueError(unknown("preset or reducer", name, {**PRESETS, **known}))
    if known[name].site == "layers" or (known[name].site == "tokens" and "before" in knobs):
        before = knobs.pop("before", 2)
        if not isinstance(before, int) or before < 1:
            raise ValueError(
                f"before is {before!r}; it is the layer that first works on fewer tokens."
            )
        kept = _DEFAULTS.get(name, DEFAULT_KEEP) if keep is None else keep
        return Recipe(Schedule.step(kept, before=before), layers=reducer(name, **knobs))
    if keep is None and known[name].adaptive:
        return Recipe(Schedule.flat(1.0, adaptive=True), entrance=reducer(name, **knobs))
    return Recipe(
        Schedule.flat(DEFAULT_KEEP if keep is None else keep), entrance=reducer(name, **knobs)
    )


def _aim(keep: float | None, knobs: dict[str, Any]) -> Recipe:
    """AIM: merge to `keep` before the LLM, then the PageRank ramp inside it. arXiv 2412.03248.

    Knobs: ``at="features"`` merges encoder features by key similarity (LLaVA-1.5), ``at="tokens"``
    projected tokens by their own (OneVision video); ``start`` and ``stop`` move the ramp.
    """
    keep = DEFAULT_KEEP if keep is None else keep
    merges = {"features": "aim-merge", "tokens": "aim-merge-tokens"}
    at = knobs.pop("at", "features")
    if at not in merges:
        raise ValueError(f"at={at!r}; aim merges at 'features' or at 'tokens'.")
    known = {"at", "start", "stop"}
    for knob in knobs:
        if knob not in known:
            raise ValueError(unknown("knob of aim", knob, dict.fromkeys(sorted(known))))
    schedule = Schedule.flat(1.0) if keep == 1.0 else Schedule.ramp(keep, **knobs)
    return Recipe(schedule, entrance=reducer(merges[at]), layers=reducer("pagerank"))


def _pyramiddrop(keep: float | None, knobs: dict[str, Any]) -> Recipe:
    """PyramidDrop: 1/2, 1/4, 1/8 from a quarter, half, three quarters on. arXiv 2410.17247.

    ``keep`` is what the last stage leaves, 0.125 as released; the stages fall by equal factors.
    """
    schedule = Schedule.pyramid() if keep is None else Schedule.pyramid(keep)
    return Recipe(schedule, layers=reducer("pyramiddrop", **knobs))


def _sparsevlm(keep: float | None, knobs: dict[str, Any]) -> Recipe:
    """SparseVLM: three stages, before layers 2, 6 and 15, as released. arXiv 2410.04417.

    ``keep`` is about the layer-averaged fraction in a model of 32 layers: 192, 128, 96 and 64 of
    576 have the released numbers of tokens kept, others lie between them; 192 of 576 is the
    default. Layers are counted as released whatever the depth.
    """
    keep = 1 / 3 if keep is None else keep
    Schedule.flat(keep)  # refuses what is no fraction
    wanted = 576 * keep
    above = next(i for i, (total, _) in enumerate(_SPARSEVLM) if i and wanted <= total + 0.5)
    (low, few), (high, many) = _SPARSEVLM[above - 1 : above + 1]
    part = 1.0 if high - wanted <= 0.5 else (wanted - low) / (high - low)
    left = ((f + part * (m - f)) / 576 for f, m in zip(few, many, strict=True))
    stages = dict(zip((2, 6, 15), left, strict=True))
    return Recipe(Schedule.stages(stages), layers=reducer("sparsevlm", **knobs))


def _gsearch(keep: float | None, knobs: dict[str, Any]) -> Recipe:
    """G-Search's curve for LLaVA-1.5-7B, digitised from the paper's figure 1c. arXiv 2412.00556.

    Read off the pixels of the figure (±0.003); its last layer is not drawn and repeats the one
    before. Other depths are interpolated, which the paper did not test.
    """
    if knobs:
        raise ValueError(unknown("knob of gsearch-llava-1.5-7b", next(iter(knobs)), {}))
    curve = (
        *(1.0, 1.0, 0.649, 0.639, 0.619, 0.619, 0.616, 0.503, 0.499, 0.498, 0.497, 0.485, 0.239),
        *(0.237, 0.237, 0.237, 0.182, 0.182, 0.179, 0.079, 0.074, 0.073, 0.070, 0.070, 0.069),
        *(0.060, 0.041, 0.041, 0.039, 0.033, 0.031, 0.031),
    )
    made = Recipe(Schedule.stretched(curve, keep), layers=reducer("attention"))
    return replace(made, provenance={"source": "digitised from figure 1c of arXiv 2412.00556"})


# Tokens in all of 576, and those that stages 1 to 3 keep of them; the ends are ours.
_SPARSEVLM = (
    (0, (0, 0, 0)),
    (64, (66, 30, 17)),
    (96, (238, 48, 26)),
    (128, (303, 110, 36)),
    (192, (300, 200, 110)),
    (576, (576, 576, 576)),
)
_DEFAULTS: Mapping[str, float] = {"fastv": 0.5}  # the paper's own setting
PRESETS: Mapping[str, Callable[[float | None, dict[str, Any]], Recipe]] = {
    "aim": _aim,
    "gsearch-llava-1.5-7b": _gsearch,
    "pyramiddrop": _pyramiddrop,
    "sparsevlm": _sparsevlm,
}
