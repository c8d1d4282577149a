"""sentence-transformers with its torch or its ONNX backend, on texts."""

from __future__ import annotations

import shutil
from typing import Any

import sentence_transformers
import torch
from measure import THREADS, Setting
from sentence_transformers import SentenceTransformer


def open_peer(variant: str, setting: Setting) -> Peer:
    torch.set_num_threads(THREADS)
    if variant == "torch":
        return Peer(SentenceTransformer(str(setting.model), device="cpu"), "torch backend")
    import onnxruntime

    folder = setting.cache / "sentence-transformers-onnx"
    if not (folder / "onnx" / "model.onnx").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(setting.model, folder, ignore=shutil.ignore_patterns("onnx", "openvino"))
        SentenceTransformer(str(folder), backend="onnx", device="cpu").save_pretrained(str(folder))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    arguments: dict[str, Any] = {
        "session_options": options,
        "provider": "CPUExecutionProvider",
        "file_name": "onnx/model.onnx",
    }
    encoder = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=arguments)
    return Peer(encoder, f"ONNX backend, onnxruntime {onnxruntime.__version__}")


class Peer:
    def __init__(self, model: SentenceTransformer, backend: str) -> None:
        self.model = model
        self.description = f"sentence-transformers {sentence_transformers.__version__}, {backend}"

    def embed(self, texts: list[str], batch_size: int) -> Any:
        return self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)
