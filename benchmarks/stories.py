"""A real trained model through the whole pipeline: its greedy text has to be the one that its authors publish.

    python benchmarks/stories.py --data FOLDER [--json FILE]

FOLDER has stories260K.bin and tok512.bin of llama2.c (https://github.com/karpathy/llama2.c, MIT): 260 thousand parameters, 5
layers. They are read as data and written as a transformers folder; then builds at fp32 and with 8-bit and 4-bit weights answer.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import onnxpress
from onnxpress.runtime import Generator

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
PRECISIONS = ("fp32", "int8-weights", "int8-dynamic", "int4-weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = save_folder(arguments.data, Path(folder) / "stories260k")
        for precision in PRECISIONS:
            artifact = onnxpress.build(
                source, precision=precision, keep_all=True, measure=False, out=Path(folder) / precision
            )
            generator = onnxpress.load(artifact.path)
            assert isinstance(generator, Generator)
            found = generator.generate([[1]], max_new_tokens=60, ignore_eos=True)[0]
            same = found.text.lstrip().startswith(TEXT)
            quality = artifact.manifest.ledger[-1]["quality"]
            rows[precision] = {"text": found.text, "as_published": same, "likelihood_kept": quality}
            print(
                f"{precision}: {'as published' if same else 'DIFFERENT'}, likelihood kept {quality}: {found.text[:100]!r}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if not rows["fp32"]["as_published"] or not rows["int8-weights"]["as_published"]:
        sys.exit("The greedy text is not the published one.")


def save_folder(data: Path, folder: Path) -> Path:
    """Checkpoint and tokenizer as a transformers folder."""
    content = (data / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", content[:28])
    numbers = np.frombuffer(content[28:], np.float32)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.tensor(array) for name, array in weights(numbers, config).items()})
    model.save_pretrained(folder)
    tokenizer(data / "tok512.bin", vocabulary).save_pretrained(folder)
    return folder


def weights(numbers: np.ndarray, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The checkpoint's arrays by transformers' names."""
    dim, layers, head = config.hidden_size, config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    hidden, kv = config.intermediate_size, config.num_key_value_heads * head
    shapes = {
        "embed": (config.vocab_size, dim),
        "input_layernorm": (layers, dim),
        "q_proj": (layers, dim, dim),
        "k_proj": (layers, kv, dim),
        "v_proj": (layers, kv, dim),
        "o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "gate_proj": (layers, hidden, dim),
        "down_proj": (layers, dim, hidden),
        "up_proj": (layers, hidden, dim),
        "norm": (dim,),
    }
    found, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = numbers[start : start + size].reshape(shape)
        start += size
    state = {
        "model.embed_tokens.weight": found["embed"],
        "lm_head.weight": found["embed"],
        "model.norm.weight": found["norm"],
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj"):  # rotary pairs stand side by side there, half a head apart here
            array = found[name][layer]
            pairs = array.reshape(-1, head // 2, 2, dim).swapaxes(1, 2)
            state[f"{prefix}.self_attn.{name}.weight"] = pairs.reshape(array.shape)
        for name in ("v_proj", "o_proj"):
            state[f"{prefix}.self_attn.{name}.weight"] = found[name][layer]
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{prefix}.mlp.{name}.weight"] = found[name][layer]
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{name}.weight"] = found[name][layer]
    return state


def tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """SentencePiece's pieces with their scores; merges are what the scores imply."""
    content, position = path.read_bytes(), 4
    pieces = []
    for _ in range(vocabulary):
        score, length = struct.unpack("fi", content[position : position + 8])
        piece = content[position + 8 : position + 8 + length].decode("utf-8", errors="replace")
        pieces.append((piece.replace(" ", "▁") or f"<empty{len(pieces)}>", score))
        position += 8 + length
    index = {}
    for number, (piece, _) in enumerate(pieces):
        index.setdefault(piece if piece not in index else f"<again{number}>", number)
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(pieces, key=lambda item: -item[1])
        for cut in range(1, len(piece))
        if piece[:cut] in index and piece[cut:] in index and not piece.startswith("<")
    ]
    inner = Tokenizer(models.BPE(index, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    special = [piece for piece, _ in pieces[:3]]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=special[0],
        bos_token=special[1].strip("▁\n"),
        eos_token=special[2].strip("▁\n"),
    )


if __name__ == "__main__":
    main()
