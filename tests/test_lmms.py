"""lmms-eval's foveate model: answers are the untouched model's or the recipe's, costs the report's.

The tasks are drawn here and nothing is fetched. `make lmms` runs these: lmms-eval is no part of the
dev extra, because it does not install beside the versions in constraints.txt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

import foveate

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make lmms installs it")

WORDS = [chr(97 + i) + chr(97 + j) for i in range(8) for j in range(10)]
STEPS, VISION, LAYERS = 6, 16, 3
IMAGES = (1, 2, 0, 1, 1)  # of each document
RECIPES = {"fastv:keep=0.25": foveate.recipe("fastv", keep=0.25)} | {
    name: foveate.recipe(name.partition(":")[0], keep=0.5) for name in ("pool:keep=0.5",)
}
UTILS = """
from PIL import Image


def visuals(doc):
    return [Image.open(path) for path in doc["images"]]
"""
YAML = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
doc_to_visual: !function utils.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
SAY = """
output_type: generate_until
generation_kwargs: {{max_new_tokens: 6, until: ["{stop}"], image_aspect_ratio: original}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@dataclass(frozen=True)
class Bench:
    """A folder with a model, documents and tasks, and what the model says when asked by hand."""

    folder: Path
    model: Any
    processor: Any
    docs: list[dict[str, Any]]
    stop: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model"

    def inputs(self, doc: dict[str, Any], end: str = "") -> Any:
        images = [Image.open(path) for path in doc["images"]]
        text = doc["question"]
        if "<image>" not in text:
            text = " ".join([*["<image>"] * len(images), text])
        given = {"images": images} if images else {}
        return self.processor(text=[f"{text} {end}".strip()], return_tensors="pt", **given)

    def say(self, doc: dict[str, Any]) -> str:
        """Six greedy tokens, one document alone."""
        inputs = self.inputs(doc)
        out = self.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True)

    @torch.no_grad()
    def loss(self, doc: dict[str, Any], choice: str) -> float:
        ids = self.inputs(doc, f"{choice}<|im_end|>")
        logp = self.model(**ids).logits[0].log_softmax(-1)
        count, said = len(choice.split()) + 1, ids["input_ids"][0]
        return -sum(float(logp[k - 1, said[k]]) for k in range(-count, 0)) / count


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("lmms")
    model, processor = miniature.with_processor(folder / "tokenizer", WORDS)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model = type(model).from_pretrained(folder / "model").eval()
    docs = drawn(folder)
    made = Bench(folder, model, processor, docs, "")
    stop = made.say(docs[0]).split()[2]
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    (folder / "utils.py").write_text(UTILS)
    for task, more in (("say", SAY.format(stop=stop)), ("choose", CHOOSE)):
        text = YAML.format(task=task, folder=folder, more=more)
        (folder / f"{task}.yaml").write_text(text)
    return Bench(folder, model, processor, docs, stop)


def drawn(folder: Path) -> list[dict[str, Any]]:
    """Questions of different lengths about no, one and two pictures; one has its picture inside."""
    draw, docs = np.random.default_rng(0), []
    for i, count in enumerate(IMAGES):
        paths = [folder / f"{i}-{k}.png" for k in range(count)]
        for path in paths:
            noise = draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((60, 44)).save(path)
        words = WORDS[i : 2 * i + 2]
        question = " ".join([*words, "<image>", WORDS[40]] if i == 4 else words)
        choices = [" ".join(WORDS[3 * i + k : 3 * i + 2 * k + 1]) for k in range(3)]
        said = {"question": question, "answer": choices[1], "choices": choices}
        docs.append({"images": [str(path) for path in paths], **said})
    return docs


def run(
    bench: Bench, task: str, *, size: int = 1, **more: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples of lmms-eval and the lines of the log, both by document."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    log = bench.folder / "cost.jsonl"
    args = {"pretrained": bench.checkpoint, "device": "cpu", "dtype": "float32", "log": log} | more
    found = simple_evaluate(
        "foveate",
        model_args=",".join(f"{k}={v}" for k, v in args.items()),
        tasks=[task],
        batch_size=size,
        task_manager=TaskManager(
            include_path=str(bench.folder), include_defaults=False, model_name="foveate"
        ),
        bootstrap_iters=0,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    return samples, sorted(lines, key=lambda c: (c["doc_id"], c["request"]))


def answers(samples: list[dict[str, Any]]) -> list[str]:
    return [s["resps"][0][0] for s in samples]


def test_dense_answers_are_those_of_generate(bench: Bench) -> None:
    whole = [bench.say(doc) for doc in bench.docs]
    assert len(set(whole)) > 3, "the model says the same to everything: nothing was tested"
    samples, lines = run(bench, "say")
    assert answers(samples) == [text.split(bench.stop)[0] for text in whole]
    assert answers(samples)[0] != whole[0]
    assert [c["recipe"] for c in lines] == ["dense"] * 5
    assert [c["vision_tokens_before"] for c in lines] == [VISION * n for n in IMAGES]
    assert all(c["vision_tokens"] == c["vision_tokens_before"] for c in lines)
    assert all(c["flops"] == c["dense_flops"] and c["flops_ratio"] == 1 for c in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_answers_and_costs_what_its_report_says(bench: Bench, name: str) -> None:
    method, _, keep = name.partition(":keep=")
    samples, lines = run(bench, "say", recipe=method, keep=keep)
    expected = []
    for doc, line in zip(bench.docs, lines, strict=True):
        with foveate.reduced(bench.model, RECIPES[name]) as report:
            expected.append(bench.say(doc).split(bench.stop)[0])
        if not doc["images"]:
            assert (line["vision_tokens_before"], line["flops_ratio"]) == (0, 1)
            continue
        said = report.to_dict()
        assert line["vision_tokens"] == sum(map(sum, said["alive"])) / LAYERS
        assert (line["flops"], line["dense_flops"]) == (said["flops"], said["dense_flops"])
        assert line["flops_ratio"] == said["dense_flops"] / said["flops"] > 1
        assert line["recipe"] == name and line["ttft_ms"] > 0
        assert line["peak_of"] == "process" and (line["peak_bytes"] or 2**30) > 2**20
    assert answers(samples) == expected != answers(run(bench, "say")[0])


def test_a_recipe_file_is_the_same_recipe(bench: Bench) -> None:
    file = bench.folder / "mine.json"
    RECIPES["fastv:keep=0.25"].save(file)
    by_file, by_name = run(bench, "say", recipe=file), run(bench, "say", recipe="fastv:keep=0.25")
    assert answers(by_file[0]) == answers(by_name[0])
    assert [c["flops"] for c in by_file[1]] == [c["flops"] for c in by_name[1]]


MEASURED = ("ttft_ms", "peak_bytes", "batch")


@pytest.mark.parametrize("task", ["say", "choose"])
@pytest.mark.parametrize("recipe", [{}, {"recipe": "fastv", "keep": 0.25}], ids=["dense", "fastv"])
def test_a_batch_is_as_its_members(bench: Bench, task: str, recipe: dict[str, Any]) -> None:
    one, some = (run(bench, task, size=size, **recipe) for size in (1, 3))
    assert [c["batch"] for c in one[1]] == [1] * len(one[1])
    assert max(c["batch"] for c in some[1]) == 3
    plain = [[{k: v for k, v in c.items() if k not in MEASURED} for c in r[1]] for r in (one, some)]
    assert plain[0] == plain[1]
    if task == "say":
        assert answers(one[0]) == answers(some[0])
    else:
        losses = [[loss for s in r[0] for loss, _ in s["filtered_resps"]] for r in (one, some)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_choices_are_weighed(bench: Bench) -> None:
    """lmms-eval takes the smallest loss; a reduced model's losses are its own."""
    samples, lines = run(bench, "choose")
    expected = [[bench.loss(doc, c) for c in doc["choices"]] for doc in bench.docs]
    for s, losses, doc in zip(samples, expected, bench.docs, strict=True):
        assert [loss for loss, _ in s["filtered_resps"]] == pytest.approx(losses, abs=1e-5)
        assert s["acc"] == float(doc["choices"][int(np.argmin(losses))] == doc["answer"])
    assert [(c["doc_id"], c["request"]) for c in lines] == [
        (d, r) for d in range(5) for r in range(3)
    ]
    with foveate.reduced(bench.model, RECIPES["pool:keep=0.5"]):
        reduced = [bench.loss(bench.docs[0], c) for c in bench.docs[0]["choices"]]
    pooled, _ = run(bench, "choose", recipe="pool", keep=0.5)
    assert [loss for loss, _ in pooled[0]["filtered_resps"]] == pytest.approx(reduced, abs=1e-5)
    assert reduced != pytest.approx(expected[0], abs=1e-3)


def model_of(bench: Bench, **more: Any) -> Any:
    from foveate.lmms import Foveate

    return Foveate(str(bench.checkpoint), device="cpu", dtype="float32", **more)


def test_beams_and_sampling(bench: Bench) -> None:
    """A prompt is counted once, however many beams it has."""
    from lmms_eval.api.instance import Instance

    def ask(**settings: Any) -> tuple[list[str], list[Any]]:
        made = model_of(bench, recipe="fastv", keep=0.25, batch_size=3)
        made.task_dict["say"] = {"test": bench.docs}
        show = lambda doc: [Image.open(path) for path in doc["images"]]  # noqa: E731
        requests = [
            Instance(
                "generate_until",
                (doc["question"], {"max_new_tokens": STEPS, **settings}, show, i, "say", "test"),
                0,
                {"task": "say", "doc_id": i, "repeats": 1},
            )
            for i, doc in enumerate(bench.docs)
        ]
        return made.generate_until(requests), requests

    greedy, _ = ask()
    beams, _ = ask(num_beams=3)
    with foveate.reduced(bench.model, RECIPES["fastv:keep=0.25"]):
        inputs = bench.inputs(bench.docs[1])
        out = bench.model.generate(**inputs, max_new_tokens=STEPS, num_beams=3, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    assert beams[1] == bench.processor.tokenizer.decode(new, skip_special_tokens=True)
    assert greedy != beams
    assert ask(temperature=0, do_sample=True)[0] == greedy
    torch.manual_seed(0)
    assert ask(temperature=5.0, top_p=0.9)[0] != greedy


def test_one_system_prompt_before_the_question(bench: Bench) -> None:
    file = bench.folder / "system.txt"
    file.write_text("hj hi\n")
    made = model_of(bench, system_prompt=str(file))
    made.task_dict["say"] = {"test": bench.docs}

    class Request:
        args = ("aa <image>", {}, lambda doc: [Image.open(doc["images"][0])], 0, "say", "test")

    assert made._prompt(Request()).text == "hj hi aa  <image> "


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"recipie": "aim"}, "recipie.*recipe.*pretrained.*max_frames.*log"),
        ({"keep": 0.5}, "keep=0.5 goes with a recipe"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; give a whole number"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"recipe": "aimm"}, "aimm.*aim"),
    ],
)
def test_wrong_arguments_are_named(bench: Bench, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model_of(bench, **more)


def test_what_is_not_offered_is_said(bench: Bench) -> None:
    from foveate.lmms import _kind

    with pytest.raises(NotImplementedError, match="single-round"):
        model_of(bench).generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="shows a dict"):
        _kind({"array": [], "sampling_rate": 16000})


# --- video -------------------------------------------------------------------------------------


def video(file: Path, frames: int = 12, rate: int = 4) -> Path:
    """Frame i is grey of brightness 20 i."""
    import av

    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            grey = np.full((64, 64, 3), 20 * i, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ({"max_frames": 4}, [0, 3, 7, 11]),
        ({"max_frames": 4, "fps": 1.0}, [0, 5, 11]),
        ({"max_frames": 2, "fps": 2.0}, [0, 11]),
        ({}, list(range(12))),
    ],
)
def test_frames_of_a_video(bench: Bench, more: dict[str, Any], taken: list[int]) -> None:
    frames, metadata = model_of(bench, **more)._frames(str(video(bench.folder / "v.mp4")))
    assert list(metadata.frames_indices) == taken and metadata.fps == 4
    assert [round(float(f.mean()) / 20) for f in frames] == taken


# --- the bundled model -------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", [{}, {"recipe": "aim", "keep": 0.25}], ids=["dense", "aim"])
def test_pinhole_answers_as_by_hand(bench: Bench, recipe: dict[str, Any]) -> None:
    from contextlib import nullcontext

    from foveate import loading

    samples, lines = run(bench, "say", size=2, pretrained="pinhole", **recipe)
    model, processor = loading.model("pinhole", dtype="float32", device="cpu")
    made = foveate.recipe("aim", keep=0.25)
    expected = []
    with foveate.reduced(model, made) if recipe else nullcontext():
        for doc in bench.docs:
            images = [Image.open(path) for path in doc["images"]]
            before, _, after = doc["question"].rpartition("<image>")
            shown = [{"type": "image"}] * len(images)
            content = [*shown, {"type": "text", "text": after}]
            if before:
                content.insert(0, {"type": "text", "text": before})
            chat = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            given = {"images": images} if images else {}
            inputs = processor(text=[text], return_tensors="pt", **given)
            out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.decode(new, skip_special_tokens=True).split(bench.stop)[0])
    assert answers(samples) == expected
    assert [c["vision_tokens_before"] for c in lines] == [256 * n for n in IMAGES]


# --- several processes -------------------------------------------------------------------------


def test_processes_that_do_not_know_each_other_are_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun gives on a machine without GPU; lmms-eval would share the documents anyway."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started and accelerate sees 1"):
        model_of(bench)
