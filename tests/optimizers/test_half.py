"""fp16 and bf16: weights halve, inputs and outputs keep their dtype, the listed operators stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target

CONTEXT = PassContext(target=target("cuda"))


def graph_of(nodes: list[Any], weights: dict[str, Any]) -> Graph:
    values = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    proto = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", 32])],
        [helper.make_tensor_value_info("y", 1, None)],
        values,
    )
    model = ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return Graph(model=model, signature=Signature(task="module", inputs=(), outputs=()))


def small_graph() -> Graph:
    random = np.random.default_rng(0)
    return graph_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
            helper.make_node("ReduceL2", ["h", "axes"], ["norm"], name="norm", keepdims=1),
            helper.make_node("Div", ["h", "norm"], ["y"], name="divide"),
        ],
        {"w": random.standard_normal((32, 16)).astype("f4"), "axes": np.array([-1])},
    )


def run(graph: Graph, x: Any, path: Path) -> Any:
    ir.save(graph.model, path / "graph.onnx")
    session = onnxruntime.InferenceSession(path / "graph.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_fp16_halves_weights_and_keeps_the_interface(tmp_path: Path) -> None:
    graph = small_graph()
    # Row norms of about 300: their squares, summed in fp16, would pass 65504.
    x = 50 * np.random.default_rng(1).standard_normal((4, 32)).astype("f4")
    expected = run(graph, x, tmp_path)
    result = make_pass("fp16").apply(graph.clone(), CONTEXT)
    answers = run(result.graph, x, tmp_path)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, expected, atol=2e-3)  # 11 bits: 5e-4 of the largest value, a few roundings
    assert result.graph.model.graph.initializers["w_half"].dtype == ir.DataType.FLOAT16
    assert "w" not in result.graph.model.graph.initializers
    by_name = {node.name: node for node in result.graph.model.graph}
    assert by_name["norm"].inputs[0].dtype == ir.DataType.FLOAT
    assert by_name["linear"].inputs[1].dtype == ir.DataType.FLOAT16
    assert any("ReduceL2" in note for note in result.notes)


def test_zeros_that_are_float32_by_default_become_fp16(tmp_path: Path) -> None:
    graph = graph_of(
        [helper.make_node("ConstantOfShape", ["shape"], ["zeros"]), helper.make_node("Add", ["x", "zeros"], ["y"])],
        {"shape": np.array([32])},
    )
    x = np.ones((4, 32), "f4")
    np.testing.assert_array_equal(run(make_pass("fp16").apply(graph, CONTEXT).graph, x, tmp_path), x)


def test_kept_nodes_stay_in_float32() -> None:
    context = PassContext(target=target("cuda"), keep=frozenset({"linear"}))
    result = make_pass("fp16").apply(small_graph(), context)
    by_name = {node.name: node for node in result.graph.model.graph}
    assert by_name["linear"].inputs[1].dtype == ir.DataType.FLOAT
    assert "linear" not in result.touched


def test_what_goes_on_with_float32_stays_there(tmp_path: Path) -> None:
    """The mean of tokens and its norm: one cast in, none back."""
    graph = graph_of(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
            helper.make_node("ReduceSum", ["h", "axes"], ["sum"], name="sum", keepdims=1),
            helper.make_node("Clip", ["sum", "least"], ["clipped"], name="clip"),
            helper.make_node("ReduceL2", ["clipped", "axes"], ["norm"], name="norm", keepdims=1),
            helper.make_node("Div", ["clipped", "norm"], ["one"], name="divide"),
            helper.make_node("Mul", ["h", "one"], ["y"], name="mixed"),
        ],
        {"w": np.ones((32, 16), "f4"), "axes": np.array([-1]), "least": np.array(1e-9, "f4")},
    )
    x = np.random.default_rng(0).standard_normal((4, 32)).astype("f4")
    expected = run(graph, x, tmp_path)
    result = make_pass("fp16").apply(graph.clone(), CONTEXT)
    by_name = {node.name: node for node in result.graph.model.graph}
    for name in ("sum", "clip", "norm", "divide"):
        assert by_name[name].outputs[0].dtype == ir.DataType.FLOAT
        assert name not in result.touched
    assert by_name["mixed"].outputs[0].dtype == ir.DataType.FLOAT16  # one half is enough
    assert result.graph.operators()["Cast"] == 4  # x in, h out, one in, y out
    np.testing.assert_allclose(run(result.graph, x, tmp_path), expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_a_file_without_types_keeps_what_it_has_to(tmp_path: Path) -> None:
    """As torch's older exporter writes them: only inputs and outputs have types."""
    graph = small_graph()
    for node in graph.model.graph:
        for value in node.outputs:
            value.type = value.type if value.is_graph_output() else None
    result = make_pass("fp16").apply(graph, CONTEXT)
    by_name = {node.name: node for node in result.graph.model.graph}
    assert by_name["norm"].inputs[0].dtype == ir.DataType.FLOAT
    x = 50 * np.random.default_rng(1).standard_normal((4, 32)).astype("f4")
    np.testing.assert_allclose(run(result.graph, x, tmp_path), run(small_graph(), x, tmp_path), atol=2e-3)


def test_bf16_types() -> None:
    result = make_pass("bf16").apply(small_graph(), CONTEXT)
    assert result.graph.model.graph.initializers["w_half"].dtype == ir.DataType.BFLOAT16
    assert result.graph.model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_a_large_negative_mask_stays_finite(tmp_path: Path) -> None:
    graph = graph_of(
        [helper.make_node("Add", ["x", "mask"], ["m"]), helper.make_node("Softmax", ["m"], ["y"], axis=-1)],
        {"mask": np.where(np.arange(32) < 8, 0, -1e9).astype("f4")},
    )
    result = make_pass("fp16").apply(graph, CONTEXT)
    answers = run(result.graph, np.ones((1, 32), np.float32), tmp_path)
    np.testing.assert_allclose(answers[0, :8], 1 / 8, rtol=1e-3)
    assert np.all(answers[0, 8:] == 0)


def test_subgraphs_are_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "branch", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    graph = graph_of(
        [helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)], {"flag": np.array(True)}
    )
    with pytest.raises(ConversionError, match="subgraphs"):
        make_pass("fp16").apply(graph, CONTEXT)
