"""Writes a Llama, Qwen2 or LFM2 model folder as GGUF with 16-bit weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
}


def write(model: Path, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    kind, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    if kind == "lfm2":
        with safe_open(model / "model.safetensors", "np") as tensors:
            width = tensors.get_slice("model.layers.0.feed_forward.w1.weight").get_shape()[0]  # not as in the config
        writer.add_feed_forward_length(width)
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        writer.add_head_count_kv([kv_heads if layer == "full_attention" else 0 for layer in config["layer_types"]])
    else:
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["norm_eps" if kind == "lfm2" else "rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")  # token ids are given; the texts of the tokens are never looked at
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{index}" for index in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    with safe_open(model / "model.safetensors", "np") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dict
            layer, _, field = name.rpartition(".")
            array = tensors.get_tensor(name).astype(np.float32)
            if convolution := name.endswith("conv.conv.weight"):
                array = array[:, 0]
            if layer.startswith("model.layers."):
                _, _, number, inner = layer.split(".", 3)
                target = f"blk.{number}.{_LAYER_NAMES[inner]}"
                if kind == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                    count = heads if inner.endswith("q_proj") else kv_heads
                    halves = array.reshape(count, 2, head // 2, *array.shape[1:])  # llama.cpp turns neighbours
                    array = halves.swapaxes(1, 2).reshape(array.shape)
            else:
                target = _NAMES[layer]
            writer.add_tensor(
                f"{target}.{field}", array if convolution or array.ndim == 1 else array.astype(np.float16)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
