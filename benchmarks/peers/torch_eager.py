"""PyTorch with transformers: fp32 and bf16, scaled-dot-product attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import THREADS, Setting, tokens
from transformers import AutoModel


def open_peer(variant: str, setting: Setting) -> Peer:
    return Peer(setting.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[variant])


class Peer:
    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        torch.set_num_threads(THREADS)
        self.model = AutoModel.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
        self.description = f"torch {torch.__version__}, sdpa"

    def shape(self, batch: int, length: int) -> tuple[Callable[[], Any], str]:
        feeds = {name: torch.from_numpy(array) for name, array in tokens(batch, length).items()}

        def call() -> None:
            with torch.inference_mode():
                self.model(**feeds)

        return call, ""
