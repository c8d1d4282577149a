"""OpenVINO: fp32, bf16, and int8 by NNCF's post-training quantization (transformer preset, with SmoothQuant).

Each shape is tried with the latency and the throughput hint (two streams over halves of the batch), and int8 with fp32
and bf16 for what is not quantized; the fastest counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
from worker import THREADS, median_ms, tokens


def open_peer(variant: str, model: Path, cache: Path, artifact: str | None) -> Peer:
    if variant == "int8":
        return Peer(quantize(model, cache), ("f32", "bf16"))
    return Peer(cache / "onnxruntime-fp32.onnx", ({"fp32": "f32", "bf16": "bf16"}[variant],))


def quantize(model: Path, cache: Path) -> Path:
    result = cache / "openvino-int8.xml"
    if result.exists():
        return result
    import nncf
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    lines = (Path(__file__).parents[2] / "onnxpress" / "data" / "sentences.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows if row["language"] == "en"][:300]

    def feeds(text: str) -> dict[str, Any]:
        encoding = tokenizer.encode(text)
        arrays = {
            "input_ids": np.array([encoding.ids]),
            "attention_mask": np.array([encoding.attention_mask]),
            "token_type_ids": np.array([encoding.type_ids]),
        }
        return {name: array for name, array in arrays.items() if name in names}

    graph = openvino.Core().read_model(cache / "onnxruntime-fp32.onnx")
    names = {value.any_name for value in graph.inputs}
    data = nncf.Dataset(texts, feeds)
    quantized = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
    openvino.save_model(quantized, result)
    return result


class Peer:
    def __init__(self, path: Path, precisions: tuple[str, ...]) -> None:
        core = openvino.Core()
        self.compiled = {
            (hint, precision): core.compile_model(
                path,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": precision,
                    "INFERENCE_NUM_THREADS": THREADS,
                    "PERFORMANCE_HINT": hint,
                    **({"NUM_STREAMS": THREADS} if hint == "THROUGHPUT" else {}),
                },
            )
            for hint in ("LATENCY", "THROUGHPUT")
            for precision in precisions
        }
        self.best: dict[tuple[int, int], Callable[[], Any]] = {}

    def describe(self) -> str:
        return f"openvino {openvino.__version__.split('-')[0]}, {THREADS} threads"

    def shape(self, batch: int, length: int) -> Callable[[], Any]:
        if (batch, length) not in self.best:
            calls = [call(compiled, hint, batch, length) for (hint, _), compiled in self.compiled.items()]
            self.best[batch, length] = min(calls, key=lambda item: median_ms(item, 1.0))
        return self.best[batch, length]


def call(compiled: Any, hint: str, batch: int, length: int) -> Callable[[], Any]:
    names = {value.any_name for value in compiled.inputs}
    feeds = {name: array for name, array in tokens(batch, length).items() if name in names}
    if hint == "LATENCY" or batch < 2 * THREADS:
        request = compiled.create_infer_request()
        return lambda: request.infer(feeds)
    queue = openvino.AsyncInferQueue(compiled, THREADS)
    rows = max(1, 512 // length)  # chunks of a few rows, as large as suits caches
    parts = [{name: array[start : start + rows] for name, array in feeds.items()} for start in range(0, batch, rows)]

    def run() -> None:
        for part in parts:
            queue.start_async(part)
        queue.wait_all()

    return run
