"""Writes language models of real shapes with random weights: speed does not depend on the weights, quality would.

    python benchmarks/language_shapes.py --tokenizer FOLDER --out FOLDER [--only NAME]

Writes OUT/smollm2-135m, OUT/qwen2.5-0.5b, OUT/lfm2-350m and OUT/qwen3.5-0.8b (of its text alone), the shapes of these models' published
configs, as transformers saves them, and OUT/olmoe-halved, OLMoE-1B-7B's with half of its widths, layers and experts. The larger
qwen2.5-1.5b, -3b and -7b, in bfloat16 as they are published, are written where --only names them. FOLDER holds any tokenizer of
fewer tokens than theirs: benchmarks/train_language_model.py makes one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)


def qwen2(hidden: int, feed_forward: int, layers: int, heads: tuple[int, int], **more: Any) -> Qwen2Config:
    """heads: of queries, and of keys and values."""
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=0,
        eos_token_id=0,
        **{"vocab_size": 151936, "tie_word_embeddings": True, **more},
    )


LARGE = ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
SHAPES: dict[str, tuple[Any, Any]] = {
    "smollm2-135m": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "qwen2.5-0.5b": (Qwen2ForCausalLM, qwen2(896, 4864, 24, (14, 2))),
    "qwen2.5-1.5b": (Qwen2ForCausalLM, qwen2(1536, 8960, 28, (12, 2))),
    "qwen2.5-3b": (Qwen2ForCausalLM, qwen2(2048, 11008, 36, (16, 2))),
    "qwen2.5-7b": (
        Qwen2ForCausalLM,
        qwen2(3584, 18944, 28, (28, 4), vocab_size=152064, tie_word_embeddings=False),
    ),
    "lfm2-350m": (
        Lfm2ForCausalLM,
        Lfm2Config(
            vocab_size=65536,
            hidden_size=1024,
            intermediate_size=6656,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=8,
            layer_types=["full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)],
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "qwen3.5-0.8b": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig(
            vocab_size=248320,
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "olmoe-halved": (
        OlmoeForCausalLM,
        OlmoeConfig(
            vocab_size=50304,
            hidden_size=1024,
            intermediate_size=512,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=16,
            num_experts=32,
            num_experts_per_tok=8,
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=SHAPES)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    for name, (kind, config) in SHAPES.items():
        if name == arguments.only or (arguments.only is None and name not in LARGE):
            torch.set_default_dtype(torch.bfloat16 if name in LARGE else torch.float32)
            torch.manual_seed(0)
            kind(config).save_pretrained(arguments.out / name)
            tokenizer.save_pretrained(arguments.out / name)


if __name__ == "__main__":
    main()
