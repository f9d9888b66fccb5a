"""The command line: what it prints and writes, and that refusals are messages, not tracebacks.

The model is a tiny LLaVA saved into a folder with a real processor, so ``--model FOLDER`` goes the
way a downloaded checkpoint goes.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import LAYERS, TEMPLATE, VISION, absent, never, refuses, run, works, wrote
from PIL import Image
from transformers import BatchFeature

import foveate
from foveate import catalogue, cli, demo, loading, trace
from foveate.adapter import vision_rows
from foveate.ask import prepare
from foveate.recipe import PRESETS
from foveate.reducer import discover

BLIND = "{% for m in messages %}what so{% endfor %}"
pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = torch.randint(0, 255, (60, 80, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file)
    return file


# What they print


def test_methods_lists_every_method_and_preset() -> None:
    printed = works("methods", "--json", "m.json")
    said = wrote("m.json")
    assert [row["name"] for row in said["rows"]] == list(discover())
    assert [row["name"] for row in said["presets"]] == list(PRESETS)
    for row in (*said["rows"], *said["presets"]):
        assert row["name"] in printed
        assert len(row["summary"]) > 10, row
        assert not row["summary"].endswith("arXiv")
    knobs = {row["name"]: row["knobs"] for row in said["rows"]}
    for name, cls in discover().items():
        assert knobs[name] == cls().knobs()


def test_markdown_holds_what_the_table_holds() -> None:
    printed = works("methods", "--markdown")
    assert printed.strip() == catalogue.BLOCK.around(catalogue.markdown())
    for name, cls in discover().items():
        (line,) = [row for row in printed.splitlines() if row.startswith(f"| `{name}` |")]
        assert all(f"`{knob}=" in line for knob in cls().knobs())
        assert line.count(" | ") == 3


def test_the_catalogue_is_written_between_the_markers() -> None:
    file = Path("README.md")
    file.write_text(f"before\n{catalogue.BLOCK.begin}\nold\n{catalogue.BLOCK.end}\nafter\n")
    now = catalogue.BLOCK.around(catalogue.markdown())
    for _ in range(2):
        works("methods", "--write", file)
        assert file.read_text() == f"before\n{now}\nafter\n"


def test_the_readme_has_the_catalogue_of_now() -> None:
    text = (Path(foveate.__file__).parents[1] / "README.md").read_text()
    begin, end = text.find(catalogue.BLOCK.begin), text.find(catalogue.BLOCK.end)
    assert 0 < begin < end, "put the two comments of catalogue.BLOCK into README.md"
    again = "run: foveate methods --markdown --write README.md"
    assert catalogue.BLOCK.replaced(text, catalogue.markdown()) == text, again


def test_models_follows_the_contract() -> None:
    printed = works("models", "--json", "m.json")
    rows = wrote("m.json")["rows"]
    for row in rows:
        assert row["family"] in printed
        assert isinstance(row["status"], str)
        assert set(row["methods"]) <= {*discover(), *PRESETS}
        assert all(isinstance(said, str) and said for said in row["methods"].values())
    from foveate.adapter import families

    assert {adapter.family for adapter in families().values()} <= {row["family"] for row in rows}


def test_models_shows_reasons(monkeypatch, tmp_path: Path) -> None:
    """A cell that does not work points to its reason below the table."""
    cells = {"pool": "works", "fastv": "needs two hands", "aim": "needs two hands"}
    row = {"family": "Kin", "model_type": "kin", "status": "tested", "methods": cells}
    monkeypatch.setattr(catalogue, "models", lambda: [row])
    lines = works("models").splitlines()
    (line,) = [line for line in lines if "kin" in line.split()]
    assert "1 of 3" in line and "fastv, aim (1)" in line
    assert [line for line in lines if "two hands" in line] == ["1  needs two hands"]


def test_version() -> None:
    lines = works("--version").split("\n")
    assert [line.split()[0] for line in lines if line] == ["foveate", "torch", "transformers"]
    assert torch.__version__.split("+")[0] in lines[1]


def test_help_names_every_command() -> None:
    printed = works("--help")
    for command in ("demo", "ask", "bench", "trace", "methods", "models"):
        assert command in printed
        assert "--json" in works(command, "--help")


# What they do


@torch.no_grad()
def test_ask_says_what_generate_says(checkpoint: Path, opened, photo: Path) -> None:
    model, processor = opened
    recipes = {"aim:keep=0.5": "aim:keep=0.5", "fastv": "fastv"}
    words = [word for text in recipes for word in ("--recipe", text)]
    more = ("--new-tokens", 4, "--dtype", "float32", "--device", "cpu", "--json", "a.json")
    printed = works("ask", photo, "what is this", "--model", checkpoint, *words, *more)
    said = wrote("a.json")
    assert (said["model"], said["dtype"]) == (str(checkpoint), "float32")
    rows = {row["recipe"]: row for row in said["rows"]}
    assert list(rows) == ["dense", *recipes]

    given = prepare(model, processor, loading.picture(photo), "what is this")
    rows_in = given["input_ids"].shape[1]
    for name, row in rows.items():
        assert name in printed
        recipe = foveate.recipe("pool", keep=1.0) if name == "dense" else parsed(name)
        with foveate.reduced(model, recipe) as report:
            out = model.generate(**given, max_new_tokens=4, do_sample=False)
        answer = processor.decode(out[0, rows_in:], skip_special_tokens=True).strip()
        assert (row["answer"], row["answer_tokens"]) == (answer, out.shape[1] - rows_in)
        assert row["flops"] == report.flops
        assert row["kv_bytes"] == report.kv_bytes
        assert row["vision_tokens_entrance"] == report.alive[0][0]
        assert row["vision_tokens_last"] == report.alive[-1][0]
        assert row["same_as_dense"] == (row["answer"] == rows["dense"]["answer"])
        assert row["prefill_ms"] > 0 and row["vision_ms"] > 0 and row["decode_ms"] > 0
    assert rows["dense"]["vision_tokens"] == VISION
    assert rows["aim:keep=0.5"]["vision_tokens_entrance"] == VISION // 2
    assert rows["dense"]["kv_bytes"] == rows_in * LAYERS * 2 * 2 * 8 * 4


def parsed(text: str) -> foveate.Recipe:
    from foveate.recipe import parse

    return parse(text)


def test_keep_goes_to_every_preset(loaded, photo: Path) -> None:
    words = ("--recipe", "pool", "--recipe", "prumerge", "--keep", 0.25, "--new-tokens", 2)
    works("ask", photo, "what", *words, "--json", "a.json")
    rows = {row["recipe"]: row["vision_tokens_entrance"] for row in wrote("a.json")["rows"]}
    assert rows == {"dense": VISION, "pool": VISION // 4, "prumerge": VISION // 4}


def test_a_saved_recipe_is_used_as_it_is(loaded, photo: Path) -> None:
    foveate.recipe("fastv", keep=0.25).resolve(LAYERS).save("mine.json")
    works("ask", photo, "what", "--recipe", "mine.json", "--new-tokens", 2, "--json", "a.json")
    row = wrote("a.json")["rows"][1]
    assert (row["recipe"], row["vision_tokens_last"]) == ("mine.json", VISION // 4)


def test_trace_draws_what_the_schedule_says(loaded, photo: Path) -> None:
    words = ("--recipe", "fastv:keep=0.25", "--layers", "0,2,5", "-o", "t.png", "--json", "t.json")
    works("trace", photo, *words)
    counts = [VISION] * 2 + [VISION // 4] * 4
    assert wrote("t.json")["alive"] == {"fastv:keep=0.25": [[n] for n in counts]}
    with Image.open("t.png") as picture:
        picture.load()
        assert picture.width > 2 * picture.height  # three panels in a row


def test_a_panel_shows_which_patches_are_alive(opened, photo: Path) -> None:
    """Kept, merged and dropped patches, from the report's own slots."""
    model, processor = opened
    given = prepare(model, processor, loading.picture(photo), "what")
    vision = vision_rows(model, given["input_ids"])[0].nonzero()[:, 0]
    with foveate.reduced(model, parsed("fastv:keep=0.25")) as report, torch.no_grad():
        model(**given)
    alive = torch.zeros(len(given["input_ids"][0]), dtype=torch.bool)
    alive[report.slots[3][0]] = True
    panel = trace.panel(report, vision, 3, "fastv")
    assert panel.title == f"fastv\nlayer 3: 9 of {VISION}"
    assert panel.light is not None and panel.light.shape == (6, 6)
    assert torch.equal(panel.light.flatten() == 1.0, alive[vision])
    assert trace.layers_worth_drawing(report) == [0, 2]
    with pytest.raises(ValueError, match="no layer 6; this model has 0 to 5"):
        trace.panel(report, vision, 6)
    with pytest.raises(ValueError, match="35 vision tokens of this prompt are no square"):
        trace.panel(report, vision[1:], 0)


def test_dropped_patches_are_lighter() -> None:
    black = Image.new("RGB", (60, 60))
    light = torch.tensor([[1.0, 0.12], [0.45, 0.12]])
    shown = trace._dimmed(black, light)
    corners = [float(shown[y, x, 0]) for y, x in ((5, 5), (5, 55), (55, 5), (55, 55))]
    assert corners == pytest.approx([0.0, 0.88, 0.55, 0.88])


def test_demo_shows_table_and_picture(loaded, photo: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "photo", lambda name: Image.open(photo).convert("RGB"))
    monkeypatch.setattr(demo, "QUESTIONS", {"one": ("what?", "is this?"), "two": ("so?",)})
    words = ("--model", "tiny", "--new-tokens", 2, "--recipe", "pool:keep=0.25", "--recipe", "aim")
    printed = works("demo", *words, "-o", "d.png", "--json", "d.json")
    said = wrote("d.json")
    asked = [(row["image"], row["question"]) for row in said["rows"] if row["recipe"] == "dense"]
    assert asked == [(name, q) for name, questions in demo.QUESTIONS.items() for q in questions]
    assert [row["recipe"] for row in said["rows"][:3]] == ["dense", "pool:keep=0.25", "aim"]
    assert {row["vision_tokens_last"] for row in said["rows"][1::3]} == {VISION // 4}
    assert all(question in printed for _, question in asked)
    with Image.open("d.png") as picture:
        picture.load()


@pytest.mark.parametrize("keep", [None, 0.5])
def test_demo_has_recipes_of_its_own(loaded, photo: Path, monkeypatch, keep: float | None) -> None:
    monkeypatch.setattr(demo, "photo", lambda name: Image.open(photo).convert("RGB"))
    monkeypatch.setattr(demo, "QUESTIONS", {"one": ("what",)})
    words = () if keep is None else ("--keep", keep)
    works("demo", "--model", "tiny", "--new-tokens", 2, *words, "--json", "d.json")
    rows = {row["recipe"]: row for row in wrote("d.json")["rows"]}
    assert list(rows) == ["dense", *demo.RECIPES]
    assert rows["prumerge+"]["vision_tokens_entrance"] == VISION * (keep or demo.KEEP)


def test_bench_follows_the_contract(loaded) -> None:
    words = ("--recipe", "fastv", "--keep", 0.25, "--repeats", 1, "--new-tokens", 2)
    printed = works("bench", "--model", "tiny", *words, "--json", "b.json", "--csv", "b.csv")
    said = wrote("b.json")
    assert {"device", "dtype", "model", "rows"} <= said.keys()
    assert [row["recipe"] for row in said["rows"]] == ["dense", "identity", "fastv"]
    wanted = {"recipe", "batch", "prompt_tokens", "vision_tokens", "vision_ms", "prefill_ms"}
    wanted |= {"reduce_ms", "decode_ms", "flops", "kv_bytes", "peak_bytes", "speedup", "limit"}
    assert all(wanted | {"attainable_ms", "efficiency"} <= row.keys() for row in said["rows"])
    assert all(verdict in " ".join(printed.split()) for verdict in said["verdicts"])
    assert said["rows"][2]["vision_tokens_last"] == VISION // 4
    assert len(Path("b.csv").read_text().splitlines()) == 4
    works("bench", "--model", "tiny", "--no-identity", "--no-attainable", *words, "--csv", "b.csv")
    lines = Path("b.csv").read_text().splitlines()
    assert len(lines) == 6
    assert len({line.split(",")[0] for line in lines}) == 2  # the header is there once


def test_bench_with_all_that_it_offers(loaded) -> None:
    words = ("--recipe", "aim", "--recipe", "fastv", "--compare", "masking, rerun", "--ragged")
    words += ("--batch", "2,1", "--new-tokens", "4,2", "--repeats", 1, "--profile", 99)
    printed = works("bench", "--model", "tiny", *words, "--json", "b.json")
    said = wrote("b.json")
    names = ["dense", "identity", "aim", "fastv", "aim by masking", "fastv by rerun"]
    assert [(row["batch"], row["recipe"]) for row in said["rows"]] == [
        (batch, name) for batch in (1, 2) for name in names
    ]
    assert [answer["new_tokens"] for answer in said["rows"][0]["answers"]] == [2, 4]
    assert said["prompt"]["ragged"] is True
    for text in ("batch 2, ragged", "fastv by rerun", "2 tokens s", "4 tokens s", "by the papers"):
        assert text in printed
    assert [(p["recipe"], p["batch"]) for p in said["profiles"]] == [
        (name, batch) for batch in (1, 2) for name in names[2:]
    ]
    assert "aim, batch 2: one prompt" in printed
    assert said["profiles"][0]["ops"][0]["op"] in printed
    assert not Path("b.json.rounds").exists()


# What they refuse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe aimm", "no preset or reducer 'aimm'. Did you mean 'aim'"),
        ("--recipe prumerge:neighbour=3", "Did you mean 'neighbours'"),
        ("--recipe fastv:keep", "'keep' in 'fastv:keep' is not key=value"),
        ("--keep 0", r"keep is 0.0.*\(0, 1\]"),
        ("--keep 1.5", r"keep is 1.5.*\(0, 1\]"),
        ("--keep nan", r"keep is nan.*\(0, 1\]"),
        ("--keep half", "--keep.*valid number"),
        ("--recipe fastv:keep=0.5 --keep 0.5", "said twice, --keep 0.5 and in 'fastv:keep=0.5'"),
        ("--recipe fastv:keep=0.5,pruning_rate=0.5", "said twice"),
        ("--recipe none.json", "no recipe file none.json"),
        ("--recipe mine.json --keep 0.5", "mine.json is a finished recipe; --keep goes with a pre"),
        ("--recipe deep.json", "deep.json: The recipe is for a model of 32 layers.*this one has 6"),
        ("--recipe other.json", "made for 'qwen2_5_vl' and this model is 'llava'"),
        ("--recipe broken.json", "broken.json is not JSON"),
        ("--recipe list.json", "list.json holds a list; a recipe is a JSON object"),
        ("--json gone/out.json", r"folder gone does not exist; make it \(mkdir -p gone\)"),
        ("--json mine.json/out.json", "folder mine.json is a file"),
        ("--json .", "is a folder; name a file to write"),
        ("--speed 3", "No such option.*--speed"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "bench", "demo"])
def test_bad_options(
    command: str, words: str, message: str, loaded, photo: Path, monkeypatch
) -> None:
    """Each is refused before the model has run a single time."""
    finished = foveate.recipe("fastv", keep=0.5).resolve(LAYERS)
    finished.save("mine.json")
    foveate.recipe("fastv", keep=0.5).resolve(32).save("deep.json")
    said = finished.to_dict() | {"provenance": {"model_type": "qwen2_5_vl"}}
    Path("other.json").write_text(json.dumps(said))
    Path("broken.json").write_text('{"format": 1,')
    Path("list.json").write_text("[1]")
    monkeypatch.setattr(loaded[0], "forward", never)
    given = {"ask": (photo, "what"), "bench": (), "demo": ("--model", "tiny")}[command]
    assert re.search(message, refuses(command, *given, *words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ask p.png what --model pinehole", "no model 'pinehole'. Did you mean 'pinhole'"),
        ("bench --model shape:lava-1.5-7b", "no shape 'lava-1.5-7b'. Did you mean 'llava-1.5-7b'"),
        ("bench --model shape:llava-1.5-7b:depth=3", "give layers=8"),
        ("bench --model ./nowhere", "no model './nowhere'.*--model takes a Hub id"),
        ("bench --model empty", "'empty' cannot be loaded.*--model takes a Hub id"),
        ("bench --model words", "'words' cannot be loaded: its type is 'llama' and foveate knows"),
        ("bench --model unheard", "'unheard' cannot be loaded.*--model takes"),
        ("bench --dtype float8", "no dtype 'float8'. Did you mean 'float"),
        ("bench --device gpu", "device 'gpu' cannot be used.*--device cpu"),
        ("ask p.png what --model shape:internvl3-1b", "random weights.*--model pinhole.*bench"),
        ("trace p.png --model shape:internvl3-1b", "random weights.*--model pinhole"),
        ("demo --model shape:internvl3-1b", "random weights.*--model pinhole"),
        ("bench --image-size huge", "--image-size is 'huge'; give WIDTHxHEIGHT, for example 640x"),
        ("bench --image-size 0x10", "--image-size is '0x10'; give WIDTHxHEIGHT"),
        ("bench --batch 0", "--batch is '0'; give whole numbers of at least 1, such as 1,8"),
        ("bench --batch 1,many", "--batch is '1,many'; give whole numbers"),
        ("bench --new-tokens 16,1", "--new-tokens is '16,1'; give whole numbers of at least 2"),
        ("bench --compare maskin", "no peer 'maskin'. Did you mean 'masking'"),
        (
            "bench --recipe pool --compare loops",
            "loops carries out prumerge.*Try --recipe prumerge",
        ),
        ("bench --profile 0.9 --no-attainable", "leave --no-attainable away"),
        ("bench --repeats many", "--repeats.*valid integer"),
        ("ask p.png", "Missing argument.*question"),
        ("trace p.png --layers one", "--layers is 'one'; give layer numbers, such as 0,8,16"),
        ("trace p.png -o gone/t.png", "folder gone does not exist"),
        ("trace p.png -o t.doc", r"t.doc ends in .doc.*end it in .*\.png"),
        ("demo -o d.doc", r"d.doc ends in .doc.*end it in .*\.png"),
        ("bench --csv gone/b.csv", "folder gone does not exist"),
        ("methods --write gone.md", "gone.md does not exist; give a file with these two lines"),
        ("methods --write empty", "empty is a folder"),
        ("methods --write plain.md", "markers are missing; put these two lines in: <!-- methods"),
        ("bnech", "No such command.*bnech"),
    ],
)
def test_bad_names(words: str, message: str, photo: Path, monkeypatch) -> None:
    """Nothing is fetched or built for them."""
    Image.open(photo).save("p.png")
    Path("plain.md").write_text("# nothing here\n")
    for folder, config in (("empty", None), ("words", "llama"), ("unheard", "no-such-type")):
        Path(folder).mkdir()
        if config:
            (Path(folder) / "config.json").write_text(json.dumps({"model_type": config}))
    from foveate import pinhole

    monkeypatch.setattr(pinhole, "load", never)
    assert re.search(message, refuses(*words.split()))


def test_a_hub_that_cannot_be_reached(monkeypatch) -> None:
    from transformers import AutoConfig

    def offline(name: str, **_: Any) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nMore lines\nfollow")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    said = refuses("bench", "--model", "some/thing")
    assert re.search(r"'some/thing' cannot be loaded: We couldn't connect.*local folder", said)
    assert "More lines" not in said


def no_picture(folder: Path) -> dict[str, Path]:
    """Files that are no pictures, and pictures that are no good."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    huge = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", *(100_000,) * 2, 8, 2, 0, 0, 0)
    )
    wide = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", 11_000, 10_000, 8, 2, 0, 0, 0)
    )
    noise = torch.randint(0, 255, (60, 80, 3)).to(torch.uint8).numpy()
    Image.fromarray(noise).save(folder / "whole.png")
    Image.fromarray(noise).save(folder / "whole.jpg")
    made = {
        "huge.png": huge + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        "wide.png": wide + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        "text.png": b"this is no picture",
        "empty.jpg": b"",
        "cut.png": (folder / "whole.png").read_bytes()[:3000],
        "cut.jpg": (folder / "whole.jpg").read_bytes()[:900],
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    (folder / "album").mkdir()
    return {name: folder / name for name in (*made, "album", "gone.png")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huge.png", "megapixels and at most 100 are taken.*make it smaller"),
        ("wide.png", r"11000 × 10000 = 110 megapixels and at most 100"),
        ("text.png", "not a picture that Pillow can read; give a JPEG"),
        ("empty.jpg", "not a picture that Pillow can read; give a JPEG"),
        ("cut.png", "damaged or cut short.*get the file again"),
        ("cut.jpg", "damaged or cut short.*get the file again"),
        ("album", "is a folder; give the file of a picture"),
        ("gone.png", "does not exist; give the file of a picture"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "trace"])
def test_bad_pictures(command: str, name: str, message: str, tmp_path: Path, monkeypatch) -> None:
    """They are refused before any model is loaded."""
    monkeypatch.setattr(loading, "model", never)
    file = no_picture(tmp_path)[name]
    said = refuses(command, file, *(["what"] if command == "ask" else []))
    assert re.search(message, said)
    assert name in said


@pytest.mark.parametrize(
    ("template", "question", "message"),
    [
        (BLIND, "what", "makes no prompt of this picture.*model and processor belong together"),
        (None, "what", "no processor with a chat template.*--model pinhole"),
        (TEMPLATE, "  ", "question is empty; ask something"),
    ],
)
def test_bad_prompts(
    loaded, photo: Path, monkeypatch, template: str | None, question: str, message: str
) -> None:
    monkeypatch.setattr(loaded[1], "chat_template", template)
    assert re.search(message, refuses("ask", photo, question))


def test_a_processor_that_leaves_the_picture_out(loaded, photo: Path, monkeypatch) -> None:
    def blind(self: Any, images: Any, text: Any, **_: Any) -> Any:
        return BatchFeature(dict(self.tokenizer(["what so"], return_tensors="pt")))

    monkeypatch.setattr(type(loaded[1]), "__call__", blind)
    said = refuses("ask", photo, "what")
    assert "no vision tokens in the prompt" in said
    assert "Check that model and processor belong together" in said


def test_layers_that_are_not_there(loaded, photo: Path) -> None:
    assert "no layer 6; this model has 0 to 5" in refuses("trace", photo, "--layers", "0,6")


@pytest.mark.parametrize(
    ("size", "status", "message"),
    [("64x48", 2, "only 48x48 is taken"), ("1x1", 2, "only 48x48 is taken")],
)
def test_image_sizes_the_encoder_cannot_take(loaded, size, status, message) -> None:
    said = refuses("bench", "--model", "tiny", "--image-size", size, status=status)
    assert message in said


@pytest.mark.parametrize(
    ("command", "module", "line"),
    [
        ("ask p.png what", "PIL", "pip install 'foveate[pinhole]'"),
        ("trace p.png", "matplotlib", "pip install 'foveate[demo]'"),
        ("demo", "matplotlib", "pip install 'foveate[demo]'"),
        ("demo", "skimage", "pip install 'foveate[demo]'"),
    ],
)
def test_missing_extras(command: str, module: str, line: str, photo: Path, monkeypatch) -> None:
    """The line to type is said before any model is loaded."""
    Image.open(photo).save("p.png")
    monkeypatch.setattr(loading, "model", never)
    absent(module, monkeypatch)
    assert line in refuses(*command.split())


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_the_command_line_itself_can_be_missing(module: str, monkeypatch, capsys) -> None:
    for name in [name for name in sys.modules if name.startswith("foveate.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(cli, "app")
    absent(module, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == f"foveate: the command line needs {module}: pip install 'foveate[cli]'\n"


def failing(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("odd"), 1, r"did not expect: RuntimeError: odd FOVEATE_TRACEBACK=1"),
        (KeyError("x"), 1, "did not expect: KeyError"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "Out of memory; try a smaller --batch"),
        (MemoryError(), 2, "Out of memory; try a smaller --batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "Out of memory"),
    ],
)
def test_errors_nobody_expected(error: Exception, status: int, message: str, monkeypatch) -> None:
    monkeypatch.setattr(loading, "model", failing(error))
    assert re.search(message, refuses("bench", "--model", "tiny", status=status))


def test_the_traceback_can_be_had(monkeypatch) -> None:
    monkeypatch.setattr(loading, "model", failing(ValueError("odd")))
    monkeypatch.setenv("FOVEATE_TRACEBACK", "1")
    assert isinstance(run("bench", "--model", "tiny").exception, ValueError)


def test_a_csv_of_other_columns_is_left_alone(loaded) -> None:
    Path("b.csv").write_text("name,price\nx,1\n")
    words = ("--repeats", 1, "--new-tokens", 2, "--recipe", "pool", "--no-attainable")
    result = run("bench", "--model", "tiny", *words, "--csv", "b.csv")
    assert result.exit_code == 2
    assert "b.csv has other columns than this version writes; name a new file" in result.stderr
    assert "pool" in result.stdout  # the table is shown all the same
    assert Path("b.csv").read_text() == "name,price\nx,1\n"
