"""ONNX Runtime as its documentation says: torch's exporter, default settings, `quantize_dynamic` for int8.

The model is exported in every form of attention that torch's exporter knows, and each shape is timed on the form that is
fastest there, so that the baseline is not slowed down by the form of its graph. int8 starts from all of them too.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
from measure import THREADS, Setting, fastest, tokens

# attention of the PyTorch model, opset; at opset 23 scaled-dot-product attention becomes one Attention operator
FORMS = (("eager", 18), ("sdpa", 18), ("sdpa", 23))


def open_peer(variant: str, setting: Setting) -> Peer:
    paths = {}
    for attention, opset in FORMS:
        form = f"{attention}-opset{opset}"
        path = setting.cache / f"onnxruntime-fp32-{form}.onnx"
        if not path.exists():
            export(setting.model, attention, opset, path)
        paths[form] = quantize(path, setting.cache / f"onnxruntime-int8-{form}.onnx") if variant == "int8" else path
    return Peer(paths)


def export(model: Path, attention: str, opset: int, path: Path) -> None:
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
            opset_version=opset,
            verbose=False,
        )
    part = path.with_suffix(f".part-{os.getpid()}")
    program.save(part, external_data=False)
    part.rename(path)


def quantize(path: Path, result: Path) -> Path:
    if result.exists():
        return result
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, part = (result.with_suffix(f".{name}-{os.getpid()}") for name in ("prepared", "part"))
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    # It takes the standard Attention operator for its own of that name and writes a graph that does not load.
    attention = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Attention"]
    quantize_dynamic(prepared, part, per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=attention)
    prepared.unlink()
    part.rename(result)
    return result


class Peer:
    def __init__(self, paths: dict[str, Path]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        self.sessions = {
            form: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for form, path in paths.items()
        }
        self.best: dict[tuple[int, int], str] = {}
        self.description = f"onnxruntime {onnxruntime.__version__}, exported as {', '.join(paths)}"

    def shape(self, batch: int, length: int) -> tuple[Callable[[], Any], str]:
        calls = {form: self._call(session, batch, length) for form, session in self.sessions.items()}
        if (batch, length) not in self.best:
            self.best[batch, length] = fastest(calls)
        form = self.best[batch, length]
        return calls[form], form

    def _call(self, session: onnxruntime.InferenceSession, batch: int, length: int) -> Callable[[], Any]:
        names = {value.name for value in session.get_inputs()}
        feeds = {name: array for name, array in tokens(batch, length).items() if name in names}
        return lambda: session.run(None, feeds)
