"""Small graphs out of ONNX's text form, for the tests of passes: made, changed, run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper, parser, shape_inference

from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.targets import target

CONTEXT = PassContext(target=target("cpu"))


def small_graph(
    body: str,
    *,
    inputs: str = "float[batch,length,32] x",
    outputs: str = "float[batch,length,32] y",
    weights: Mapping[str, Any] | None = None,
    opset: int = 18,
    ir_version: int = 8,
) -> Graph:
    """body: nodes, one a line, in the language of `onnx.parser`. Shapes are inferred."""
    domains = f'"": {opset}' + (', "com.microsoft": 1' if "com.microsoft" in body else "")
    text = f"<ir_version: {ir_version}, opset_import: [{domains}]> small ({inputs}) => ({outputs}) {{ {body} }}"
    model = parser.parse_model(text)
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    model = shape_inference.infer_shapes(model, data_prop=True)
    return Graph(model=ir.from_proto(model), signature=Signature(task="module", inputs=(), outputs=()))


def change(name: str, graph: Graph, folder: Path) -> PassResult:
    """Keep the graph as before.onnx, run one pass, keep its result as after.onnx and check that it is valid."""
    ir.save(graph.model, folder / "before.onnx")
    result = make_pass(name).apply(graph, CONTEXT)
    ir.save(result.graph.model, folder / "after.onnx")
    onnx.checker.check_model(folder / "after.onnx")
    return result


def assert_same_answers(folder: Path, feeds: Sequence[Mapping[str, Any]], *, tolerance: float = 1e-5) -> None:
    """before.onnx and after.onnx give the same on ONNX Runtime, whose own fusions are off for the former."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    after = onnxruntime.InferenceSession(folder / "after.onnx", options, providers=["CPUExecutionProvider"])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    before = onnxruntime.InferenceSession(folder / "before.onnx", options, providers=["CPUExecutionProvider"])
    for feed in feeds:
        for wanted, given in zip(before.run(None, dict(feed)), after.run(None, dict(feed)), strict=True):
            assert given.shape == wanted.shape
            assert given.dtype == wanted.dtype
            np.testing.assert_allclose(given, wanted, rtol=0, atol=tolerance)


def random_x(*shape: int, scale: float = 1.0) -> Any:
    """Standard normal float32 numbers, the same for the same shape."""
    return (scale * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
