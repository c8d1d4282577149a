"""raise_opset on each operator that changed between opsets: the answers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers.opset import raise_opset

X = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
GRID = np.random.default_rng(1).uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)
SCALES = np.array([1, 1, 2, 2], dtype=np.float32)
SOME = np.random.default_rng(2).standard_normal(4).astype(np.float32)
NOTHING = np.array([], dtype=np.float32)

# Operators that changed between opsets: name, opset, inputs beside x, attributes, number of outputs.
CHANGED: list[tuple[str, int, list[Any], dict[str, Any], int]] = [
    ("Softmax", 11, [], {"axis": 1}, 1),
    ("Unsqueeze", 11, [], {"axes": [0]}, 1),
    ("ReduceSum", 11, [], {"axes": [1], "keepdims": 0}, 1),
    ("ReduceMean", 13, [], {"axes": [-1]}, 1),
    ("ReduceMax", 17, [], {"axes": [2, 3], "keepdims": 0}, 1),
    ("ReduceL2", 13, [], {}, 1),
    ("Split", 11, [], {"axis": 1, "split": [1, 3]}, 2),
    ("Split", 13, [], {"axis": 1}, 2),
    ("Pad", 13, [np.array([0, 0, 1, 1, 0, 0, 1, 1])], {"mode": "reflect"}, 1),
    ("Clip", 11, [np.array(-0.5, dtype=np.float32), np.array(0.5, dtype=np.float32)], {}, 1),
    ("Resize", 13, [NOTHING, SCALES], {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}, 1),
    ("Upsample", 9, [SCALES], {"mode": "nearest"}, 1),
    ("GridSample", 16, [GRID], {"mode": "bilinear", "align_corners": 0}, 1),
    ("BatchNormalization", 9, [SOME, SOME, SOME, np.abs(SOME)], {}, 1),
    ("GroupNormalization", 18, [SOME[:2], SOME[:2]], {"num_groups": 2}, 1),
    ("Cast", 13, [], {"to": TensorProto.FLOAT16}, 1),
    ("ScatterElements", 13, [np.zeros((2, 4, 6, 6), dtype=np.int64), X + 1], {"axis": 1}, 1),
    ("Dropout", 11, [], {"ratio": 0.3}, 1),
    ("AveragePool", 11, [], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}, 1),
    ("Gemm", 9, [], {}, 1),
]


def model(op_type: str, opset: int, inputs: list[Any], attributes: dict[str, Any], outputs: int) -> onnx.ModelProto:
    names = ["" if array is NOTHING else f"input_{index}" for index, array in enumerate(inputs)]
    constants = [numpy_helper.from_array(array, name) for array, name in zip(inputs, names, strict=True) if name]
    results = [f"y{index}" for index in range(outputs)]
    if op_type == "Gemm":  # two axes, the third input not yet optional
        flat = helper.make_node("Flatten", ["x"], ["flat"])
        nodes = [flat, helper.make_node("Gemm", ["flat", "flat", "zero"], results, transB=1)]
        constants.append(numpy_helper.from_array(np.zeros(1, dtype=np.float32), "zero"))
    else:
        nodes = [helper.make_node(op_type, ["x", *names], results, **attributes)]
    kind = TensorProto.FLOAT16 if op_type == "Cast" else TensorProto.FLOAT
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(X.shape))],
            [helper.make_tensor_value_info(name, kind, None) for name in results],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=4,
    )


def answers(proto: onnx.ModelProto) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": X}))


def as_graph(proto: onnx.ModelProto) -> Graph:
    return Graph(model=ir.from_proto(proto), signature=Signature(task="module", inputs=(), outputs=()))


@pytest.mark.parametrize("version", [17, 20, 23])
@pytest.mark.parametrize("case", CHANGED, ids=[f"{case[0]}-{case[1]}" for case in CHANGED])
def test_answers_stay(case: tuple[str, int, list[Any], dict[str, Any], int], version: int) -> None:
    proto = model(*case)
    graph = as_graph(proto)
    raise_opset(graph, version)
    assert graph.model.opset_imports[""] >= version
    for after, before in zip(answers(ir.to_proto(graph.model)), answers(proto), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
