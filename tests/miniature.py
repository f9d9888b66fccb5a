"""Small stand-ins for data and for pinhole's parts, made in a folder. What is in them is known."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.pinhole.packed import Sizes, Student

IMAGE = 90
TEMPLATE = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"  # noqa: E501
LANGUAGE, VISION = "fake_language/text.gguf", "fake_vision/eye.onnx"


def photo_folder(
    folder: Path, captions: Sequence[Sequence[str]], split: str = "validation"
) -> Path:
    """``SPLIT.tar`` and ``SPLIT.jsonl``; photo i is of one colour, ``colour(i)``."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    with tarfile.open(folder / f"{split}.tar", "w") as archive:
        for i, said in enumerate(captions):
            data = io.BytesIO()
            Image.new("RGB", (40, 32), colour(i)).save(data, "JPEG", quality=95)
            info = tarfile.TarInfo(f"{split}-{i}.jpg")
            info.size = data.tell()
            archive.addfile(info, io.BytesIO(data.getvalue()))
            lines.append(json.dumps({"image": info.name, "captions": list(said)}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def colour(i: int) -> tuple[int, int, int]:
    return 40 + 8 * (i % 25), 200 - 6 * (i % 29), 60 + 5 * (i % 31)


def tokenizer_file(file: Path, texts: Sequence[str], image: str = "<image>") -> Path:
    """A tokenizer whose words are those of ``texts``; 0 is unknown and padding."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    made.add_special_tokens([AddedToken(image, special=True, normalized=False)])
    file.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(file))
    return file


def llava(*, vocabulary: int = 96, image_token: int = IMAGE, image_size: int = 56) -> Any:
    """A LLaVA of pinhole's layout, random weights: 3 layers of 192, DINOv2 of 3 of 128."""
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
        layerscale_value=0.5,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(image_size // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def with_processor(folder: Path, words: Sequence[str]) -> tuple[Any, Any]:
    """:func:`llava` with weights that give varied answers, and a processor that knows ``words``."""
    from transformers import BitImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    file = tokenizer_file(folder / "tokenizer.json", [" ".join(words)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<unk>", eos_token="<|im_end|>"
    )
    size = {"height": 56, "width": 56}
    images = BitImageProcessorPil(size=size, do_center_crop=False, crop_size=size)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = llava(vocabulary=96, image_token=image)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, processor


def student(model: Any, *, merged: bool = True) -> Student:
    """What trains ``model``, with deltas that already do something."""
    sizes = Sizes(
        layers=3,
        heads=3,
        kv_heads=1,
        theta=10_000.0,
        norm_eps=1e-5,
        vision_layers=2,
        vision_heads=2,
    )
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    table = state["model.vision_tower.embeddings.position_embeddings"]
    made = Student(state, sizes, table, rank=4, vision_rank=2, dtype=torch.float32, merged=merged)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return made


def wheel(folder: Path, name: str, members: dict[str, bytes], version: str = "0.1") -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    meta = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entries = members | {f"{about}/METADATA": meta.encode(), f"{about}/WHEEL": tags.encode()}
    record = "".join(f"{entry},,\n" for entry in [*entries, f"{about}/RECORD"])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in (entries | {f"{about}/RECORD": record.encode()}).items():
            archive.writestr(entry, data)
    return file


def gguf(file: Path) -> dict[str, Tensor]:
    """A Llama of 2 layers of 128 as llama.cpp stores it; what was written, by GGUF names."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_bytes(), "Ġa"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(tokens), 128), "output_norm": (128,)}
    layer = {"attn_norm": (128,), "ffn_norm": (128,), "attn_q": (128, 128), "attn_k": (64, 128)}
    layer |= {"attn_v": (64, 128), "attn_output": (128, 128), "ffn_gate": (96, 128)}
    layer |= {"ffn_up": (96, 128), "ffn_down": (128, 96)}
    shapes |= {f"blk.{i}.{k}": v for i in range(2) for k, v in layer.items()}
    drawn = torch.Generator().manual_seed(3)
    made = {k: torch.randn(*v, generator=drawn) * 0.1 for k, v in shapes.items()}
    for name, value in made.items():
        writer.add_tensor(f"{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def _bytes() -> list[str]:
    """GPT-2's 256 printable names of bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(len(rest))]


def onnx(file: Path) -> dict[str, Tensor]:
    """A DINOv2 of 2 layers of 64 as the exporter wrote it; the state that must come out."""
    from onnx import TensorProto, helper, numpy_helper, save

    drawn = torch.Generator().manual_seed(4)
    constants: list[Any] = []
    nodes: list[Any] = []
    state: dict[str, Tensor] = {}

    def constant(stored: str, *shape: int) -> Tensor:
        value = torch.randn(*shape, generator=drawn) * 0.1
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value.numpy()), stored))
        return value

    def named(stored: str, name: str, *shape: int) -> None:
        state[name] = constant(f"backbone.{stored}", *shape)

    def linear(stored: str, name: str, out: int, width: int) -> None:
        number = len(constants)
        state[f"{name}.weight"] = constant(f"onnx::MatMul_{number}", width, out).T
        named(f"{stored}.bias", f"{name}.bias", out)
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"m{number}"]))
        nodes.append(
            helper.make_node("Add", [f"backbone.{stored}.bias", f"m{number}"], [f"a{number}"])
        )

    stem = "embeddings.patch_embeddings.projection."
    named(f"{stem}weight", f"{stem}weight", 64, 3, 14, 14)
    named(f"{stem}bias", f"{stem}bias", 64)
    named("embeddings.cls_token", "embeddings.cls_token", 1, 1, 64)
    first, grid = constant("onnx::Concat_1", 1, 1, 64), constant("onnx::Add_9", 1, 37 * 37, 64)
    state["embeddings.position_embeddings"] = torch.cat([first, grid], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 64)
    for i in range(2):
        at = f"encoder.layer.{i}."
        for kind in ("norm1", "norm2"):
            named(f"{at}{kind}.weight", f"{at}{kind}.weight", 64)
            named(f"{at}{kind}.bias", f"{at}{kind}.bias", 64)
        for kind in ("layer_scale1", "layer_scale2"):
            named(f"{at}{kind}.lambda1", f"{at}{kind}.lambda1", 64)
        for kind, short in (("query", "q"), ("key", "k"), ("value", "v")):
            linear(f"{at}attention.attention.{kind}", f"{at}attention.{short}_proj", 64, 64)
        linear(f"{at}attention.output.dense", f"{at}attention.o_proj", 64, 64)
        linear(f"{at}mlp.fc1", f"{at}mlp.fc1", 256, 64)
        linear(f"{at}mlp.fc2", f"{at}mlp.fc2", 64, 256)
    named("layernorm.weight", "layernorm.weight", 64)
    named("layernorm.bias", "layernorm.bias", 64)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in ("x", "a0")]
    graph = helper.make_graph(nodes, "vit", ends[:1], ends[1:], constants)
    save(helper.make_model(graph), str(file))
    return state
