"""Trains a small language model of the Llama architecture, on whose quality quantization can be judged.

    python benchmarks/train_language_model.py --data FOLDER --out FOLDER [--steps 1500]

The folder has lm_wikitext2/valid.txt and lm_tinyshakespeare/input.txt. Of each the last tenth is kept from training, as
held_out.txt; calibration.txt is part of what it is trained on. 14.7 M parameters, a byte-level BPE tokenizer of 4,096 tokens trained on the same text, fixed seeds. Rerun
with the same arguments it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FILES = ("lm_wikitext2/valid.txt", "lm_tinyshakespeare/input.txt")
END = "<|endoftext|>"
CONTEXT, BATCH, LEARNING_RATE, WARMUP = 256, 8, 1e-3, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train_text, held_out = split_texts([arguments.data / name for name in FILES])
    (arguments.out / "held_out.txt").write_text(held_out, encoding="utf-8")
    (arguments.out / "calibration.txt").write_text(excerpts(train_text), encoding="utf-8")
    tokenizer = train_tokenizer(train_text)
    tokenizer.save_pretrained(arguments.out)
    tokens = torch.tensor(tokenizer(train_text)["input_ids"])
    model = LlamaForCausalLM(config(len(tokenizer)))
    train(model, tokens, arguments.out, arguments.steps)


def config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def split_texts(paths: list[Path]) -> tuple[str, str]:
    """All texts but their last tenths, and these."""
    train, held_out = "", ""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        cut = text.rindex("\n", 0, len(text) * 9 // 10)
        train += text[:cut]
        held_out += text[cut:]
    return train, held_out


def excerpts(text: str) -> str:
    """Forty pieces of 5,000 characters from all over a text, each from the beginning of a line."""
    starts = [text.index("\n", len(text) * part // 41) + 1 for part in range(40)]
    return "".join(text[start : start + 5000] for start in starts)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, out: Path, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoint = out / "checkpoint.pt"
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    model.train()
    started = time.perf_counter()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])
        share = min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            model.save_pretrained(out)
            (out / "training.json").write_text(json.dumps({"steps": step + 1, "loss": loss.item()}))


if __name__ == "__main__":
    main()
