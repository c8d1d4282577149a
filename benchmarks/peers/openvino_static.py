"""OpenVINO: fp32, bf16, and int8 by NNCF's post-training quantization (transformer preset, with SmoothQuant).

Each shape is tried with the latency hint, and with the throughput hint: one stream a core over chunks of rows, of several
sizes; int8 with fp32 and with bf16 for what is not quantized. The fastest counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
from measure import EXPORTED, THREADS, Setting, fastest, tokens

PRECISIONS = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("f32", "bf16")}
CHUNK_ROWS = (1, 2, 4, 8, 16)


def open_peer(variant: str, setting: Setting) -> Peer:
    path = setting.cache / EXPORTED
    return Peer(quantize(path, setting) if variant == "int8" else path, PRECISIONS[variant])


def quantize(exported: Path, setting: Setting) -> Path:
    digest = hashlib.sha256(setting.calibration.read_bytes()).hexdigest()[:12]
    result = setting.cache / f"openvino-int8-{digest}.xml"
    if result.exists():
        return result
    import nncf
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(setting.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    graph = openvino.Core().read_model(exported)
    names = {value.any_name for value in graph.inputs}

    def feeds(text: str) -> dict[str, Any]:
        encoding = tokenizer.encode(text)
        arrays = {
            "input_ids": np.array([encoding.ids]),
            "attention_mask": np.array([encoding.attention_mask]),
            "token_type_ids": np.array([encoding.type_ids]),
        }
        return {name: array for name, array in arrays.items() if name in names}

    texts = json.loads(setting.calibration.read_text(encoding="utf-8"))[:300]  # NNCF's own default is 300 samples
    data = nncf.Dataset(texts, feeds)
    quantized = nncf.quantize(graph, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
    part = setting.cache / f"openvino-part-{os.getpid()}.xml"
    openvino.save_model(quantized, part)
    part.with_suffix(".bin").rename(result.with_suffix(".bin"))
    part.rename(result)
    return result


class Peer:
    def __init__(self, path: Path, precisions: tuple[str, ...]) -> None:
        core = openvino.Core()
        self.compiled: dict[tuple[str, str], Any] = {}
        for precision in precisions:
            for hint in ("LATENCY", "THROUGHPUT"):
                options: dict[str, str | int] = {
                    "INFERENCE_PRECISION_HINT": precision,
                    "INFERENCE_NUM_THREADS": THREADS,
                    "PERFORMANCE_HINT": hint,
                }
                if hint == "THROUGHPUT":
                    options["NUM_STREAMS"] = THREADS
                self.compiled[hint, precision] = core.compile_model(path, "CPU", options)
        self.best: dict[tuple[int, int], tuple[Callable[[], Any], str]] = {}
        # Where the processor lacks bf16, OpenVINO computes in f32: what it chose is what it says here.
        chosen = sorted(
            {model.get_property("INFERENCE_PRECISION_HINT").get_type_name() for model in self.compiled.values()}
        )
        self.description = f"openvino {openvino.__version__.split('-')[0]}, inference precision {', '.join(chosen)}"

    def shape(self, batch: int, length: int) -> tuple[Callable[[], Any], str]:
        if (batch, length) not in self.best:
            calls: dict[str, Callable[[], Any]] = {}
            for (hint, precision), compiled in self.compiled.items():
                if hint == "LATENCY":
                    calls[f"latency {precision}"] = whole(compiled, batch, length)
                    continue
                for rows in CHUNK_ROWS:
                    if rows < batch:
                        calls[f"throughput {precision}, {rows} rows"] = chunked(compiled, batch, length, rows)
            setting = fastest(calls)
            self.best[batch, length] = calls[setting], setting
        return self.best[batch, length]


def feeds_of(compiled: Any, batch: int, length: int) -> dict[str, Any]:
    names = {value.any_name for value in compiled.inputs}
    return {name: array for name, array in tokens(batch, length).items() if name in names}


def whole(compiled: Any, batch: int, length: int) -> Callable[[], Any]:
    feeds = feeds_of(compiled, batch, length)
    request = compiled.create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


def chunked(compiled: Any, batch: int, length: int, rows: int) -> Callable[[], Any]:
    feeds = feeds_of(compiled, batch, length)
    queue = openvino.AsyncInferQueue(compiled, THREADS)
    parts = [{name: array[start : start + rows] for name, array in feeds.items()} for start in range(0, batch, rows)]

    def run() -> None:
        for part in parts:
            queue.start_async(part, share_inputs=True)
        queue.wait_all()

    return run
