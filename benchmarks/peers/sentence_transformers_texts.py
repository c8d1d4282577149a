"""sentence-transformers with its torch or its ONNX backend, on texts, batches of 32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from worker import THREADS


def open_peer(variant: str, model: Path, cache: Path, artifact: str | None) -> Peer:
    torch.set_num_threads(THREADS)
    if variant == "torch":
        return Peer(SentenceTransformer(str(model), device="cpu"))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    folder = cache / "sentence-transformers-onnx"  # the backend writes its export beside the model
    if not folder.exists():
        shutil.copytree(model, folder)
    arguments = {"session_options": options, "provider": "CPUExecutionProvider"}
    encoder = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=arguments)
    if not (folder / "onnx").exists():
        encoder.save_pretrained(str(folder))
    return Peer(encoder)


class Peer:
    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def describe(self) -> str:
        return f"sentence-transformers {sentence_transformers.__version__}, {THREADS} threads"

    def texts(self, texts: list[str]) -> Callable[[], Any]:
        return lambda: self.model.encode(texts, batch_size=32, show_progress_bar=False)
