"""``foveate search``: a tolerance or a budget in, a recipe out."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import foveate
from foveate.cli import options, tables
from foveate.cli.options import Batch, Data, Device, Dtype, Model, Seed, Threads
from foveate.search.study import Direction, run

if TYPE_CHECKING:
    from foveate.recipe import Recipe
    from foveate.reducer import Reducer
    from foveate.search.auto import Auto
    from foveate.search.budget import Budget
    from foveate.search.probe import Probe
    from foveate.search.shards import Shards

    Entering = tuple[Reducer | None, float]

app = typer.Typer(
    help="Search a recipe: gsearch loses nothing, psigmoid keeps to a budget.",
    no_args_is_help=True,
)

Task = Annotated[
    list[str], typer.Option("--task", help="What is not to get worse; several: A,B or repeated.")
]
Out = Annotated[
    Path,
    typer.Option("-o", "--output", callback=options.writable, help="The recipe to write (JSON)."),
]
Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        help="score (the task's), or, without labels: match (same answers as dense) or kl.",
    ),
]
Split = Annotated[str, typer.Option("--split", help="What is searched on.")]
CheckSplit = Annotated[str, typer.Option("--check-split", help="What the result is measured on.")]
Limit = Annotated[int, typer.Option("--limit", min=2, help="Examples of each task to search on.")]
CheckTask = Annotated[
    list[str] | None,
    typer.Option("--check-task", help="What the result is measured on; default: --task."),
]
CheckLimit = Annotated[
    int, typer.Option("--check-limit", min=0, help="Examples of each task to measure on; 0: none.")
]
First = Annotated[int, typer.Option("--first", min=1, help="The first layer with fewer tokens.")]
Method = Annotated[str, typer.Option("--method", help="What ranks tokens between layers.")]
Confidence = Annotated[
    float,
    typer.Option(
        "--confidence",
        help="With which the drop, paired by example, is below --max-drop; 0.5: bare means.",
    ),
]
Storage = Annotated[
    str, typer.Option("--storage", help="URL or file of the Optuna study; default: beside -o.")
]
Entrance = Annotated[
    str,
    typer.Option(
        "--entrance",
        help="What reduces before the language model, as in prumerge+:keep=0.5; default: nothing.",
    ),
]
Memory = Annotated[
    float, typer.Option("--memory", help="GiB of hidden states kept in memory; the rest on disk.")
]


@dataclass
class Job:
    """What all searches share: the model, the calibration set before layer 0, the study."""

    model: Any
    processor: Any
    about: Mapping[str, Any]
    calibration: Any
    study: Any
    checks: Sequence[Any]
    shards: Shards
    asked: Mapping[str, Any]
    batch: int
    output: Path
    folder: Path
    begun: float
    say: Callable[[str], object]

    def probe(self, entrance: Entering, method: str, memory: float) -> Probe:
        """The calibration set before layer 0."""
        from foveate.search.prefix import Runner
        from foveate.search.probe import Probe

        held, reducer = int(memory * 2**30), foveate.reducer(method)
        runner = Runner(self.model, *entrance)
        return Probe(runner, self.calibration, reducer, self.folder, memory=held)

    def serves(self, search: Probe | Auto) -> bool:
        """Whether this process only ran what the first one asked for, and is done."""
        if self.shards.rank:
            self.shards.serve(search)
        return self.shards.rank > 0

    def finish(
        self,
        recipe: Recipe,
        search: Probe | Auto,
        tried: Sequence[Any],
        **facts: Any,
    ) -> None:
        """Measure the found recipe, write it with its report and picture, and say what it is."""
        from foveate.search.found import held_out, picture, stamped

        self.shards.stop()
        curve = recipe.schedule.alive
        spent = {
            "evaluations": search.runs,
            "forward_equivalents": round(search.forwards, 2),
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        measured: dict[str, Any] = {}
        if self.checks:
            self.say("measuring on examples that the search did not see")
            measured = held_out(
                self.model, self.processor, self.checks, recipe, batch_size=self.batch
            )
        rows = measured.pop("rows", [])
        known = {**self.asked, "data": self.calibration.fingerprint, **facts, **measured}
        recipe = stamped(recipe, self.model.config, known)
        recipe.save(self.output)
        report = {"recipe": str(self.output), **measured, **spent, **facts, "alive": list(curve)}
        report |= {"asked": self.asked, "rows": rows, "tried": list(tried)}
        options.write(self.output.with_suffix(".search.json"), report)
        picture({self.output.stem: curve}, self.output.with_suffix(".png"))
        console = tables.console()
        if rows:
            console.print(tables.evaluation({**self.about, "rows": rows, "notes": []}))
        kept = sum(curve) / len(curve)
        console.print(
            f"{self.output}: {kept:.1%} of vision tokens, averaged over layers; "
            f"{spent['evaluations']} probes, {spent['forward_equivalents']} forwards of the "
            f"calibration set, {spent['seconds']:.0f} s"
        )


@contextmanager
def _job(
    kind: str,
    asked: Mapping[str, Any],
    directions: Sequence[Direction] = ("maximize",),
    *,
    task: Task,
    output: Out,
    model: Model = "pinhole",
    objective: Objective = "score",
    data: Data = None,
    split: Split = "train",
    check_split: CheckSplit = "validation",
    check_task: CheckTask = None,
    limit: Limit = 128,
    check_limit: CheckLimit = 200,
    seed: Seed = 0,
    batch: Batch = 8,
    storage: Storage = "",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> Iterator[Job]:
    """Everything before the first probe. Its options are those that all searches share."""
    from foveate.bench import about
    from foveate.evaluate import digest, ready
    from foveate.search.objective import Calibration
    from foveate.search.shards import Shards
    from foveate.search.study import opened

    options.no_shape(model, "search")
    named = options.tasks(task, data=data, split=split, seed=seed, limit=limit)
    unseen: dict[str, Any] = {}
    if check_limit:
        where = {"data": data, "split": check_split, "seed": seed, "limit": check_limit}
        unseen = options.tasks(check_task or task, **where)
    same = [n for n in named if n in unseen and (n.endswith(".jsonl") or split == check_split)]
    if same:
        raise ValueError(
            f"{same[0]} would be searched and measured on the same examples; give another "
            "--check-split or --check-task, or --check-limit 0 to measure nothing."
        )
    checks = list(unseen.values())
    ready(list(named.values()))
    ready(checks)
    shards = Shards()
    loaded, processor = options.load(model, dtype, shards.device(device), threads, {})
    said = {"search": kind, "model": model, "tasks": list(named), "split": split, "limit": limit}
    said |= {"seed": seed, "objective": objective, **asked}
    facts = about(loaded, model) | {"split": check_split}
    asked_of = said | {"weights": digest(loaded), "dtype": facts["dtype"]}
    place = storage or str(output.with_suffix(".study"))
    study = None
    if not shards.rank:
        study = opened(place, kind, asked_of, seed=seed, directions=directions)
    begun = time.monotonic()
    with (
        options.waiting("the untouched model on the calibration set") as say,
        tempfile.TemporaryDirectory(prefix="foveate-") as folder,
    ):
        yield Job(
            model=loaded,
            processor=processor,
            about=facts,
            calibration=Calibration(
                loaded, processor, list(named.values()), objective, batch, shards
            ),
            study=study,
            checks=checks,
            shards=shards,
            asked=said,
            batch=batch,
            output=output,
            folder=Path(folder),
            begun=begun,
            say=say,
        )


def _sharing(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of ``_job`` besides its own; it gets them as ``shared``."""

    def named(function: Any) -> dict[str, inspect.Parameter]:
        given = inspect.signature(function, eval_str=True).parameters.values()
        return {p.name: p for p in given if p.kind is p.KEYWORD_ONLY}

    common, own = named(_job), named(command)

    @wraps(command)
    def merged(**given: Any) -> None:
        shared = {name: given.pop(name) for name in common}
        command(shared, **given)

    every = [*common.values(), *own.values()]
    merged.__annotations__ = {p.name: p.annotation for p in every}
    vars(merged)["__signature__"] = inspect.Signature(every)
    return merged


@app.command()
@_sharing
def gsearch(
    shared: Mapping[str, Any],
    *,
    max_drop: Annotated[
        str, typer.Option("--max-drop", help="Of the objective: 0.5% or 0.005; in nats for kl.")
    ] = "0.5%",
    confidence: Confidence = 0.8,
    optimiser: Annotated[
        str, typer.Option("--optimiser", help="bisect, or bo: the paper's Bayesian optimisation.")
    ] = "bisect",
    step: Annotated[float, typer.Option("--step", help="Keep ratios are multiples of it.")] = 1
    / 64,
    entrance: Entrance = "",
    method: Method = "attention",
    first: First = 2,
    memory: Memory = 2.0,
) -> None:
    """G-Search: layer by layer, the least tokens that lose no more than --max-drop."""
    from foveate.search.gsearch import GSearch, Tried, bayes, bisect

    choosers = {"bisect": lambda: bisect(step), "bo": lambda: bayes(step, seed=shared["seed"])}
    if optimiser not in choosers:
        raise ValueError(f"--optimiser is {optimiser!r}; it is bisect or bo.")
    allowed = _drop(max_drop)
    foveate.reducer(method)
    asked: dict[str, Any] = {"max_drop": allowed, "confidence": _sure(confidence), "step": step}
    asked |= {"optimiser": optimiser, "method": method, "first": first} | _said(entrance)
    entering = _entering(entrance)
    with _job("gsearch", asked, **shared) as job:
        probe = job.probe(entering, method, memory)
        if job.serves(probe):
            return
        search = GSearch(
            probe,
            allowed,
            confidence,
            choosers[optimiser](),
            first,
            known=[Tried(**t.user_attrs) for t in job.study.trials],
            note=lambda tried: _note(job.study, asdict(tried)),
        )
        curve: list[float] = []
        for curve in search.run():
            layer = probe.layer
            job.say(
                f"layer {layer}: {curve[layer]:.3f} kept, {probe.runs} probes, "
                f"{probe.forwards:.1f} forwards"
            )
        recipe = probe.runner.recipe(curve, probe.method)
        job.finish(recipe, probe, [asdict(t) for t in search.tried])


def _note(study: Any, tried: Mapping[str, Any]) -> None:
    import optuna

    study.add_trial(optuna.trial.create_trial(value=tried["spare"], user_attrs=dict(tried)))


def _drop(text: str) -> float:
    """``0.5%`` or ``0.005`` to 0.005."""
    number, percent, rest = text.strip().partition("%")
    try:
        drop = float(number) / (100 if percent else 1)
    except ValueError:
        drop = -1.0
    if drop < 0 or rest:
        raise ValueError(f"--max-drop is {text!r}; give 0.5% or 0.005.")
    return drop


@app.command()
@_sharing
def psigmoid(
    shared: Mapping[str, Any],
    *,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Fraction of the FLOPs that vision tokens cost, (0, 1]."),
    ] = None,
    flops: Annotated[
        str, typer.Option("--flops", help="Prefill FLOPs of the decoder layers, such as 2.74T.")
    ] = "",
    tokens: Annotated[
        float | None, typer.Option("--tokens", help="Vision tokens, averaged over layers.")
    ] = None,
    ttft: Annotated[
        str,
        typer.Option("--ttft", help="Time to the first token of one prompt here, such as 120ms."),
    ] = "",
    trials: Annotated[int, typer.Option("--trials", min=1, help="Slopes to try.")] = 20,
    both: Annotated[
        bool, typer.Option("--both", help="Search the height of the sigmoid, too.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option("--like", help="A recipe whose curve is fitted for a start.")
    ] = None,
    entrance: Entrance = "",
    method: Method = "attention",
    first: First = 2,
    memory: Memory = 2.0,
) -> None:
    """P-Sigmoid: the sigmoid of depth that is best within a budget."""
    from foveate.recipe import Recipe
    from foveate.search import clock
    from foveate.search.psigmoid import START, PSigmoid

    ways = {"--budget": budget, "--flops": flops, "--tokens": tokens, "--ttft": ttft}
    said = [name for name, value in ways.items() if value]
    if len(said) != 1:
        raise ValueError(f"The budget is said {len(said)} times; give one of {', '.join(ways)}.")
    start = Recipe.load(like).schedule.alive if like else ()
    asked: dict[str, Any] = {name[2:]: value for name, value in ways.items()} | {"both": both}
    asked |= {"method": method, "first": first} | _said(entrance)
    foveate.reducer(method)
    entering = _entering(entrance)
    milliseconds = _milliseconds(ttft) if ttft else None
    with _job("psigmoid", asked, **shared) as job:
        probe = job.probe(entering, method, memory)
        if job.serves(probe):
            return
        prompt = job.calibration.prompt() if milliseconds else None

        def largest(within: Budget) -> Recipe:
            curve = PSigmoid(probe, within, first).curve(START, 1.0)
            return probe.runner.recipe(curve, probe.method)

        if milliseconds:
            job.say("timing the layers")
            limits = clock.budget(milliseconds, probe.runner, prompt, probe.lengths, largest)
        else:
            limits = _limits(probe, budget, flops, tokens)
        search = PSigmoid(probe, limits, first, None if both else 1.0)
        probe.decide([probe.runner.keep] * probe.runner.shape.layers, first)
        if not job.study.trials:
            search.begin(job.study, start)
        run(job.study, search.objective, trials, job.say)
        best = job.study.best_trial
        tried = [
            {"value": t.value, **t.params, "alive": t.user_attrs.get("alive")}
            for t in job.study.trials
        ]
        recipe = probe.runner.recipe(best.user_attrs["alive"], probe.method)
        facts = {**best.params, "value": best.value}
        if milliseconds:
            facts["ttft_ms"] = round(clock.first_token(job.model, prompt, recipe), 1)
            job.say(f"{facts['ttft_ms']} ms to the first token")
        job.finish(recipe, probe, tried, **facts)


@app.command()
@_sharing
def auto(
    shared: Mapping[str, Any],
    *,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Fraction of the FLOPs that vision tokens cost, (0, 1]."),
    ] = None,
    max_drop: Annotated[
        str, typer.Option("--max-drop", help="Of the objective: 0.5% or 0.005; in nats for kl.")
    ] = "",
    confidence: Confidence = 0.8,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Recipes to try.")] = 40,
) -> None:
    """Methods, places and schedule together: the recipes that no other beats, and the one to take.

    With --budget the best that costs no more; with --max-drop the cheapest that loses no more.
    """
    from foveate.recipe import Recipe
    from foveate.search import auto as leaf

    if (budget is None) is not bool(max_drop):
        raise ValueError("Give either --budget, such as 0.125, or --max-drop, such as 0.5%.")
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"--budget is {budget}; it is a fraction in (0, 1], such as 0.125.")
    allowed = _drop(max_drop) if max_drop else None
    shares = (budget / 4, budget) if budget else (0.05, 0.9)
    asked = {"budget": budget, "max_drop": allowed, "confidence": _sure(confidence)}
    with _job("auto", asked, ("maximize", "minimize"), **shared) as job:
        search = leaf.Auto(job.model, job.calibration, shares)
        if job.serves(search):
            return
        search.begin(job.study)
        run(job.study, search.objective, trials, job.say)
        done = leaf.complete(job.study)
        if not done:
            raise ValueError("No trial made a recipe within the budget; raise --trials.")
        best, within = search.recommended(done, allowed, confidence)
        front = leaf.front(done)
        folder = job.output.with_suffix(".front")
        folder.mkdir(exist_ok=True)
        for n, trial in enumerate(front):
            Recipe.from_dict(trial.user_attrs["recipe"]).save(folder / f"{n:02d}.json")
        dense = sum(search.dense) / len(search.dense)
        leaf.picture(done, front, best, dense, folder / "front.png")
        tried = [{"value": t.values[0], "share": t.values[1], **t.params} for t in done]
        kept = {"value": best.values[0], "share": best.values[1], "front": len(front)}
        job.finish(Recipe.from_dict(best.user_attrs["recipe"]), search, tried, **kept)
        if not within:
            job.say("")
            tables.console().print(
                f"No recipe tried lost less than {max_drop}; this is the best one. Raise --trials."
            )


def _sure(confidence: float) -> float:
    if not 0.5 <= confidence < 1.0:
        raise ValueError(f"--confidence is {confidence}; it is at least 0.5 and below 1.")
    return confidence


def _said(entrance: str) -> dict[str, str]:
    """What a study is asked about ``entrance``: nothing where there is none."""
    return {"entrance": entrance} if entrance else {}


def _entering(text: str) -> Entering:
    """The method and the ratio of ``--entrance``."""
    from foveate.recipe import parse

    if not text:
        return None, 1.0
    recipe = parse(text)
    if recipe.entrance is None or recipe.layers is not None or recipe.schedule.adaptive:
        raise ValueError(
            f"--entrance is {text!r}; give a method that acts before the language model and how "
            "much it keeps, such as prumerge+:keep=0.5."
        )
    return recipe.entrance, recipe.schedule.resolve(1).alive[0]


def _limits(probe: Probe, share: float | None, flops: str, tokens: float | None) -> Budget:
    from foveate.search import budget

    shape = probe.runner.shape
    if share:
        return budget.share(share, shape, probe.lengths)
    if flops:
        return budget.flops(_number(flops), shape, probe.lengths)
    return budget.tokens(tokens or 0.0, probe.lengths)


def _milliseconds(text: str) -> float:
    """``120ms``, ``0.12s`` or ``120`` to 120.0."""
    seconds = text.endswith("s") and not text.endswith("ms")
    try:
        found = float(text.removesuffix("ms").removesuffix("s")) * (1000 if seconds else 1)
    except ValueError:
        found = 0.0
    if found <= 0:
        raise ValueError(f"--ttft is {text!r}; give a time such as 120ms or 0.12s.")
    return found


def _number(text: str) -> float:
    """``2.74T`` to 2.74e12."""
    units = {"G": 1e9, "T": 1e12, "P": 1e15}
    unit = units.get(text[-1:].upper())
    try:
        return float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        raise ValueError(f"--flops is {text!r}; give a number such as 2.74T or 2.74e12.") from None


@app.command()
def analyse(
    task: Task,
    output: Annotated[
        Path, typer.Option("-o", "--output", callback=options.writable, help="JSON to write.")
    ],
    model: Model = "pinhole",
    method: Method = "attention",
    merged: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="Recipes whose entrance is compared; default aim-merge."),
    ] = None,
    data: Data = None,
    split: Split = "validation",
    limit: Limit = 32,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Whether layers rank vision tokens alike, how much they look at them, how alike those are."""
    from foveate.bench import about
    from foveate.search import analyse as leaf

    options.no_shape(model, "search")
    named = options.tasks(task, data=data, split=split, seed=seed, limit=limit)
    loaded, processor = options.load(model, dtype, device, threads, {})
    examples = (t.example(i) for t in named.values() for i in range(len(t)))
    with options.progress() as bar:
        job = bar.add_task("looking", total=sum(map(len, named.values())))
        found = leaf.analyse(
            loaded,
            processor,
            examples,
            method=method,
            merged=merged or ["aim-merge:keep=0.25"],
            advance=lambda count: bar.advance(job, count),
        )
    result = about(loaded, model) | {"split": split, "tasks": list(named), "method": method}
    options.write(output, result | asdict(found))
    leaf.picture(found, output.with_suffix(".png"))
    tables.console().print(tables.findings(asdict(found)))
