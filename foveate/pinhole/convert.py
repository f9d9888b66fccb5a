"""Reading the published files into Hugging Face state dicts, all float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

State = dict[str, torch.Tensor]

_ONNX_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def missing(package: str) -> ImportError:
    """The error for an absent extra, with the line to type."""
    return ImportError(f"pinhole needs the package {package}: pip install 'foveate[pinhole]'")


def vision_state(path: Path) -> State:
    """``Dinov2Model`` weights out of the ONNX file (names of transformers 5).

    The exporter kept names for biases and norms only. A linear layer's weight is an anonymous
    constant of the MatMul whose result the named bias is added to; it is stored transposed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise missing("onnx") from error
    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weight_of = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    state: State = {}
    for name, array in arrays.items():
        if name.startswith("backbone."):
            state[_vision_name(name)] = array
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((i for i in node.input if i.startswith("backbone.") and i in arrays), None)
        product = next((i for i in node.input if i in weight_of), None)
        if bias and product:
            key = _vision_name(bias).removesuffix("bias") + "weight"
            state[key] = arrays[weight_of[product]].T.contiguous()
    grid = next(a for a in arrays.values() if a.dim() == 3 and a.shape[1] == 37 * 37)
    cls = state["embeddings.cls_token"]
    first = next(a for n, a in arrays.items() if n.startswith("onnx::Concat") and a.dim() == 3)
    state["embeddings.position_embeddings"] = torch.cat([first, grid], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, cls.shape[-1])
    return state


def vision_config(state: State) -> dict[str, Any]:
    """Keyword arguments of ``Dinov2Config`` for a state that ``vision_state`` made."""
    _, places, width = state["embeddings.position_embeddings"].shape
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layer.")}
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "image_size": math.isqrt(places - 1) * patch,
        "patch_size": patch,
    }


def _vision_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for old, new in _ONNX_NAMES.items():
        name = name.replace(old, new)
    return name


def older_name(name: str) -> str:
    """A vision tensor's name in transformers before 5.20 or so: the names of the ONNX file."""
    for old, new in _ONNX_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.") if ".vision_tower." in name else name
    return name


def language_state(path: Path) -> State:
    """``LlamaModel`` weights out of the GGUF file, dequantised."""
    reader = _reader(path)
    heads, kv_heads = (_field(reader, f"llama.attention.head_count{s}") for s in ("", "_kv"))
    state: State = {}
    for tensor in reader.tensors:
        array = _dequantize(tensor)
        name = tensor.name.removesuffix(".weight")
        if name == "token_embd":
            state["embed_tokens.weight"] = array
        elif name == "output_norm":
            state["norm.weight"] = array
        elif name.startswith("blk."):
            _, layer, kind = name.split(".")
            if kind in ("attn_q", "attn_k"):
                array = _unpermute(array, heads if kind == "attn_q" else kv_heads)
            state[f"layers.{layer}.{_GGUF_NAMES[kind]}.weight"] = array
    return state


def language_config(path: Path) -> dict[str, Any]:
    """Keyword arguments of ``LlamaConfig`` for the GGUF file (tied embeddings)."""
    reader = _reader(path)
    return {
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise missing("gguf") from error
    return GGUFReader(str(path))


def _field(reader: Any, name: str) -> Any:
    field = reader.fields[name]
    return field.parts[field.data[0]].tolist()[0]


def _dequantize(tensor: Any) -> torch.Tensor:
    from gguf.quants import dequantize

    array: np.ndarray[Any, Any] = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(array.copy()).float()


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of rotary halves."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)
