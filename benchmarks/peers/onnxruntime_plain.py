"""ONNX Runtime as its documentation says: torch's exporter, default settings, `quantize_dynamic` for int8.

The model is exported once with eager and once with scaled-dot-product attention, and the one that is faster at
(1, 128) is kept, so that the baseline is not slowed down by the form of its graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
from worker import THREADS, median_ms, tokens


def open_peer(variant: str, model: Path, cache: Path, artifact: str | None) -> Peer:
    path = cache / "onnxruntime-fp32.onnx"
    if not path.exists():
        candidates = [
            export(model, attention, cache / f"onnxruntime-{attention}.onnx") for attention in ("eager", "sdpa")
        ]
        times = {candidate: median_ms(Peer(candidate).shape(1, 128), 1.0) for candidate in candidates}
        path.write_bytes(min(times, key=lambda candidate: times[candidate]).read_bytes())
    if variant == "int8":
        return Peer(quantize(path, cache))
    return Peer(path)


def export(model: Path, attention: str, path: Path) -> Path:
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.inner(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    feeds = {name: torch.from_numpy(array) for name, array in tokens(2, 7).items()}
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Encoder().eval(),
            (),
            kwargs=feeds,
            dynamo=True,
            dynamic_shapes=dict.fromkeys(feeds, dynamic),
            input_names=list(feeds),
            output_names=["last_hidden_state"],
            opset_version=18,
            verbose=False,
        )
    program.save(path, external_data=False)
    return path


def quantize(path: Path, cache: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    result = cache / "onnxruntime-int8.onnx"
    if not result.exists():
        prepared = cache / "onnxruntime-prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, result, per_channel=True, weight_type=QuantType.QInt8)
    return result


class Peer:
    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = {value.name for value in self.session.get_inputs()}

    def describe(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}, {THREADS} threads"

    def shape(self, batch: int, length: int) -> Callable[[], Any]:
        feeds = {name: array for name, array in tokens(batch, length).items() if name in self.names}
        return lambda: self.session.run(None, feeds)
