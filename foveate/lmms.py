r"""A model of lmms-eval: public benchmarks, dense or reduced, and what every prompt cost.

    lmms-eval --model foveate --tasks pope \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,recipe=aim,keep=0.25,log=cost.jsonl

lmms-eval finds :class:`Foveate` by the entry-point group ``lmms_eval.models``. It is of the kind
that lmms-eval calls simple, because only those are given multiple-choice tasks.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from foveate import loading
from foveate.answer import continued, tails
from foveate.ask import costs
from foveate.bench import DENSE, Stopwatch, peak_bytes
from foveate.recipe import parse, with_keep
from foveate.reducer import unknown

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise loading.missing("lmms-eval", "lmms") from error

PLACE = "<image>"  # what tasks write where an image belongs
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_NEW_TOKENS = 1024


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("foveate", simple_class_path="foveate.lmms.Foveate")


@dataclass(frozen=True)
class Cost:
    """What one prompt cost: a line of the log.

    Attributes:
        request: which of the document's requests; multiple choice makes one of each choice.
        batch: prompts in the same forward.
        vision_tokens_before: before any reduction.
        vision_tokens: the mean over layers.
        flops: prefill of the text model (``cost.TextShape``).
        flops_ratio: ``dense_flops / flops``.
        ttft_ms: vision encoder, projector, reducing and prompt, of the whole batch; neither the
            processor nor lm_head.
        peak_bytes: of the whole batch, weights included; None where it cannot be read.
        peak_of: what that is: ``cuda`` (allocated by torch) or ``process`` (resident).
    """

    task: str
    doc_id: int
    request: int
    recipe: str
    batch: int
    vision_tokens_before: int
    vision_tokens: float
    flops: int
    dense_flops: int
    flops_ratio: float
    ttft_ms: float
    peak_bytes: int | None
    peak_of: str


@dataclass(frozen=True)
class Prompt:
    """One request as the processor takes it; ``videos`` are frames with where they were taken."""

    text: str
    images: list[Any]
    videos: list[tuple[Any, Any]]


class Foveate(lmms):  # type: ignore[misc]
    """Any model that foveate reduces, with a recipe or, to compare with, without one."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        recipe: str | None = None,
        keep: float | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        max_frames: int = 32,
        fps: float | None = None,
        system_prompt: str | None = None,
        log: str | None = None,
        max_batch_size: int | None = None,
        **more: Any,
    ) -> None:
        """What ``--model_args`` says.

        Args:
            pretrained: a Hub id, a local folder or ``pinhole``.
            recipe: as on foveate's command line: a preset or method, with a knob as
                ``name:key=value``, or a JSON file, which more knobs need because lmms-eval splits
                at commas. None leaves the model untouched.
            keep: the fraction of vision tokens kept.
            dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
            device: ``cpu``, ``cuda``, … or ``auto``; with several processes, accelerate's.
            batch_size: prompts in one forward.
            attn_implementation: ``sdpa``, ``flash_attention_2``, …; None: transformers' choice.
            max_frames: the most frames of a video, spread evenly from the first to the last.
            fps: frames per second of video, at most ``max_frames``.
            system_prompt: text, or a file that holds it.
            log: a JSONL file that gets a :class:`Cost` per prompt; with several processes each
                writes its own, ``NAME.rank0.jsonl`` and so on.
            max_batch_size: given by lmms-eval; not used.

        Raises:
            ValueError: for an argument that is not among these, a model or recipe that cannot be
                had, a processor without a chat template, or processes that accelerate does not see.
        """
        super().__init__()
        for name in more:
            known = [p for p in inspect.signature(Foveate).parameters if p != "more"]
            raise ValueError(unknown("model_args of foveate", name, dict.fromkeys(known)))
        if recipe is None and keep is not None:
            raise ValueError(f"keep={keep} goes with a recipe; add recipe=aim, for example.")
        self.batch_size = _count("batch_size", batch_size)
        self.max_frames, self.fps = _count("max_frames", max_frames), fps
        self._join()
        self.recipe = None if recipe is None else parse(recipe, keep)
        self.recipe_name = DENSE if recipe is None else with_keep(recipe, keep)
        place = self.accelerator.device if self._world_size > 1 else device
        self.model, self.processor = loading.model(pretrained, dtype=dtype, device=str(place))
        self.device = self.model.device
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"The processor of {pretrained} has no chat template, so foveate cannot put "
                "questions to it; give an instruction-tuned model."
            )
        if attn_implementation is not None:
            self.model.set_attn_implementation(attn_implementation)
        self._system = self._resolve_system_prompt(system_prompt)
        self._log = None if log is None else self._file(Path(log))

    def _join(self) -> None:
        """Take a place among accelerate's processes, of which there may be one."""
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        started = int(os.environ.get("WORLD_SIZE", 1))  # lmms-eval shares the documents by this
        if started != self._world_size:
            raise ValueError(
                f"{started} processes were started and accelerate sees {self._world_size}, as it "
                "does without a GPU; start one process, or launch on a machine with GPUs."
            )

    def _file(self, log: Path) -> Path:
        """The log of this process, emptied."""
        file = log if self._world_size == 1 else log.with_suffix(f".rank{self._rank}.jsonl")
        file.write_text("")
        return file

    # What lmms-eval asks

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, cut at the first stop string.

        Of a task's ``generation_kwargs`` these are heeded: ``until``, ``max_new_tokens``,
        ``do_sample``, ``temperature``, ``top_p`` and ``num_beams``.
        """
        return self._batched(requests, self._generate)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, whether greedy decoding says it) of each continuation and the end of the turn.

        The loss is the mean negative log-probability of a token: lmms-eval takes the choice with
        the *smallest* value, as its own models return losses.
        """
        return self._batched(requests, self._weigh)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(
            "foveate answers single-round tasks: generate_until, loglikelihood, multiple_choice. "
            "Choose another model for this task."
        )

    def _batched(
        self, requests: Sequence[Any], run: Callable[[list[Any]], tuple[list[Any], list[Cost]]]
    ) -> list[Any]:
        """What ``run`` says to each request, in their order; costs are logged as they come."""
        from tqdm import tqdm

        found: dict[int, Any] = {}
        noted: list[Cost] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="foveate") as bar:
            for chunk in _batches(requests, self.batch_size):
                said, cost = run([requests[i] for i in chunk])
                found |= dict(zip(chunk, said, strict=True))
                noted += cost
                self._write(cost)
                bar.update(len(chunk))
        print(summary(noted), flush=True)
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _generate(self, requests: list[Any]) -> tuple[list[str], list[Cost]]:
        asked = requests[0].args[1]
        prompts = [self._prompt(r) for r in requests]
        inputs, settings = self._inputs(prompts), _settings(asked)
        out, cost = self._measured(
            requests,
            inputs,
            lambda: self.model.generate(**inputs, **settings),
            settings["num_beams"],
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [_cut(text, asked.get("until")) for text in texts], cost

    @torch.no_grad()
    def _weigh(self, requests: list[Any]) -> tuple[list[Any], list[Cost]]:
        from lmms_eval.api.instance import GenerationResult

        prompts = [self._prompt(r) for r in requests]
        inputs = self._inputs(prompts)
        said = [self._target(r, p) for r, p in zip(requests, prompts, strict=True)]
        ids, real = tails(self.processor, said, self.model.device)

        def forward() -> Any:
            """The prompt, then the continuation on its cache: methods see the question last."""
            first = self.model(**inputs, use_cache=True, logits_to_keep=1)
            mask = inputs["attention_mask"]
            return continued(self.model, first.logits, first.past_key_values, mask, ids)

        logits, cost = self._measured(requests, inputs, forward)
        logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * real
        losses = (-logp.sum(-1) / real.sum(-1)).tolist()
        greedy = ((logits.argmax(-1) == ids) | ~real).all(-1).tolist()
        # lmms-eval 0.7.3 makes a string of a bare pair, and multiple choice fails on that
        return [GenerationResult(pair) for pair in zip(losses, greedy, strict=True)], cost

    # From requests to tensors

    def _target(self, request: Any, prompt: Prompt) -> str:
        """The continuation, without the task's delimiter where the prompt ends in one."""
        target = request.args[1]
        text: str = target if isinstance(target, str) else target(self._doc(request))
        return text.lstrip() if prompt.text[-1:].isspace() else text

    def _doc(self, request: Any) -> Any:
        doc_id, task, split = request.args[3:6]
        return self.task_dict[task][split][doc_id]

    def _prompt(self, request: Any) -> Prompt:
        """One user turn: images and videos where the task put them, else before the text."""
        context, _, doc_to_visual = request.args[:3]
        visuals = doc_to_visual(self._doc(request)) or []
        kinds = [_kind(v) for v in visuals]
        chat = [{"role": "user", "content": _content(context, kinds)}]
        if self._system:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system}]})
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        by_kind = list(zip(kinds, visuals, strict=True))
        return Prompt(
            text,
            [_opened(v) for kind, v in by_kind if kind == "image"],
            [self._frames(v) for kind, v in by_kind if kind == "video"],
        )

    def _frames(self, video: str) -> tuple[Any, Any]:
        """Frames ``(T, height, width, 3)`` of a file and their metadata."""
        import numpy as np
        from transformers.video_utils import load_video

        def chosen(metadata: Any, **_: Any) -> Any:
            if not metadata.total_num_frames:
                raise ValueError(f"{video} does not say how many frames it has; convert it to MP4.")
            count = self.max_frames
            if self.fps is not None:
                count = min(count, max(1, round(metadata.duration * self.fps)))
            return np.unique(np.linspace(0, metadata.total_num_frames - 1, count, dtype=int))

        load: Any = load_video  # its annotation leaves paths out
        frames, metadata = load(video, sample_indices_fn=chosen)
        return frames, metadata

    def _inputs(self, prompts: Sequence[Prompt]) -> Any:
        """The processor's output, padded on the left."""
        images = [p.images for p in prompts]
        videos = [video for p in prompts for video in p.videos]
        given: dict[str, Any] = {"images": images} if any(images) else {}
        if videos:
            frames, metadata = zip(*videos, strict=True)
            given |= {"videos": list(frames), "video_metadata": list(metadata)}
            given["do_sample_frames"] = False
        made = self.processor(
            text=[p.text for p in prompts],
            padding=len(prompts) > 1,
            padding_side="left",
            return_tensors="pt",
            **given,
        )
        return made.to(self.model.device, self.model.dtype)

    # What it cost

    def _measured(
        self, requests: Sequence[Any], inputs: Any, call: Callable[[], Any], copies: int = 1
    ) -> tuple[Any, list[Cost]]:
        """What ``call`` returns under the recipe; beams make ``copies`` of every prompt."""
        watch = Stopwatch(self.model)
        with peak_bytes(watch.device) as peak, watch.around(self.recipe) as report:
            out = call()
        ids, mask = (
            inputs[k].repeat_interleave(copies, 0) for k in ("input_ids", "attention_mask")
        )
        found = costs(self.model, report, ids, mask)[::copies]
        dense = costs(self.model, None, ids, mask)[::copies]
        ttft_ms = watch.forwards()[0].total_ms
        return out, [
            Cost(
                task=request.task_name,
                doc_id=request.doc_id,
                request=request.idx,
                recipe=self.recipe_name,
                batch=len(requests),
                vision_tokens_before=before["vision_tokens_entrance"],
                vision_tokens=now["vision_tokens"],
                flops=now["flops"],
                dense_flops=before["flops"],
                flops_ratio=before["flops"] / now["flops"],
                ttft_ms=ttft_ms,
                peak_bytes=next(iter(peak), None),
                peak_of="cuda" if watch.device.type == "cuda" else "process",
            )
            for request, before, now in zip(requests, dense, found, strict=True)
            if not request.metadata.get("__padding_only__")  # repeats that even out processes
        ]

    def _write(self, noted: Sequence[Cost]) -> None:
        if self._log is not None:
            with self._log.open("a") as out:
                out.writelines(json.dumps(asdict(cost)) + "\n" for cost in noted)


def summary(noted: Sequence[Cost]) -> str:
    """A line per task: the median of time, the highest peak of memory, means of the rest."""
    lines = []
    for task in dict.fromkeys(cost.task for cost in noted):
        some = [cost for cost in noted if cost.task == task]
        tokens = statistics.mean(c.vision_tokens for c in some)
        before = statistics.mean(c.vision_tokens_before for c in some)
        ratio = sum(c.dense_flops for c in some) / sum(c.flops for c in some)
        ttft = statistics.median(c.ttft_ms for c in some)
        peak = max((c.peak_bytes for c in some if c.peak_bytes), default=None)
        memory = f"{peak / 2**30:.2f} GiB ({some[0].peak_of})" if peak else "unknown"
        lines.append(
            f"foveate, {task}, {some[0].recipe}, n={len(some)}: {tokens:.1f} of "
            f"{before:.1f} vision tokens, {ratio:.2f}x fewer prefill FLOPs, first token after "
            f"{ttft:.0f} ms (batches of up to {max(c.batch for c in some)}), peak {memory}"
        )
    return "\n".join(lines)


def _batches(requests: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Indices of requests that may share a forward, the longest first."""

    def settings(i: int) -> str:
        asked = requests[i].args[1]
        return repr(sorted(asked.items())) if isinstance(asked, dict) else ""

    order = sorted(range(len(requests)), key=lambda i: (settings(i), -len(requests[i].args[0])))
    for _, group in groupby(order, settings):
        some = list(group)
        yield from (some[i : i + size] for i in range(0, len(some), size))


def _settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate``; sampling needs a temperature above 0, or ``do_sample`` alone."""
    temperature = asked.get("temperature")
    if temperature is None:
        temperature = 1.0 if asked.get("do_sample") else 0.0
    sample = temperature > 0 and asked.get("do_sample") is not False
    return {
        "max_new_tokens": asked.get("max_new_tokens", MAX_NEW_TOKENS),
        "num_beams": asked.get("num_beams") or 1,
        "do_sample": sample,
        "temperature": temperature if sample else None,
        "top_p": asked.get("top_p") if sample else None,
    }


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text


def _content(context: str, kinds: Sequence[str]) -> list[dict[str, str]]:
    """A turn: the text around its images and videos, or after them."""
    parts = context.split(PLACE)
    if len(parts) != len(kinds) + 1:
        parts = [*[""] * len(kinds), "".join(parts)]
    said: list[dict[str, str]] = []
    for part, kind in zip(parts, (*kinds, None), strict=True):
        said += [{"type": "text", "text": part}] if part.strip() else []
        said += [{"type": kind}] if kind else []
    return said


def _kind(visual: Any) -> str:
    if isinstance(visual, str):
        return "image" if Path(visual).suffix.lower() in PICTURES else "video"
    if isinstance(visual, Image.Image):
        return "image"
    raise NotImplementedError(
        f"The task shows a {type(visual).__name__}; foveate takes pictures, and files of pictures "
        "or videos. Choose another task."
    )


def _opened(visual: Any) -> Image.Image:
    return loading.picture(visual) if isinstance(visual, str) else visual.convert("RGB")


def _count(name: str, value: Any) -> int:
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise ValueError(f"{name} is {value!r}; give a whole number above 0.")
