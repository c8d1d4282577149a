"""fp16 and bf16: weights halve, inputs and outputs keep their dtype, the listed operators stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper, parser

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.stand_in import computes_in_half, holds_bfloat16, holds_half, in_float32
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


def test_integer_graphs_of_other_tools_keep_their_float32(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["m"]),
        helper.make_node("DynamicQuantizeLinear", ["m"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = graph_of(nodes, {"two": np.array(2, "f4")})
    for value in (graph.model.graph[1].outputs[0], graph.model.graph[1].outputs[2]):
        value.type = ir.TensorType(ir.DataType.UINT8)
    result = make_pass("fp16").apply(graph.clone(), CONTEXT)
    x = np.random.default_rng(0).standard_normal((2, 32)).astype("f4")
    np.testing.assert_allclose(run(result.graph, x, tmp_path), run(graph, x, tmp_path), atol=0.05)


def test_bf16_types() -> None:
    result = make_pass("bf16").apply(small_graph(), CONTEXT)
    assert result.graph.model.graph.initializers["w_half"].dtype == ir.DataType.BFLOAT16
    assert result.graph.model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_bf16_leaves_in_float_what_cuda_has_no_kernel_for(tmp_path: Path) -> None:
    """And numbers that are whole are not said to be in float32."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
        helper.make_node("Floor", ["h"], ["f"], name="floor"),
        helper.make_node("Mul", ["h", "f"], ["y"], name="times"),
    ]
    graph = graph_of(nodes, {"w": np.eye(32, dtype="f4")})
    result = make_pass("bf16").apply(graph, CONTEXT)
    types = {node.name: node.outputs[0].dtype for node in result.graph.model.graph}
    assert types["floor"] == ir.DataType.FLOAT
    assert types["times"] == ir.DataType.BFLOAT16
    assert result.notes == ("2 operators; in float32: Floor",)
    assert make_pass("fp16").apply(graph_of(nodes, {"w": np.eye(32, dtype="f4")}), CONTEXT).notes == ("3 operators",)


def test_a_stand_in_rounds_each_result_to_bfloat16(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    weights = {name: random.standard_normal((32, 32)).astype("f4") for name in ("w", "v")}
    half = make_pass("bf16").apply(
        graph_of(
            [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])],
            dict(weights),
        ),
        CONTEXT,
    )
    assert holds_bfloat16(half.graph)
    stand_in = in_float32(half.graph)
    assert not any(value.dtype == ir.DataType.BFLOAT16 for value in stand_in.model.graph.initializers.values())

    def rounded(array: Any) -> Any:
        return torch.from_numpy(array).bfloat16().float().numpy()

    x = random.standard_normal((4, 32)).astype("f4")
    expected = rounded(rounded(rounded(x) @ rounded(weights["w"])) @ rounded(weights["v"]))
    np.testing.assert_array_equal(run(stand_in, x, tmp_path), rounded(run(stand_in, x, tmp_path)))
    # A sum whose order differs may fall to the other side of a tie: by one step of bfloat16, and not often.
    found = run(stand_in, x, tmp_path)
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=0.02)
    assert np.mean(found == expected) > 0.95


@pytest.mark.parametrize(("weights", "half"), [("float", False), ("float16", True)])
def test_where_types_are_left_out_weights_say_what_a_graph_computes_in(weights: str, half: bool) -> None:
    """Beside a table of float16, as a file of few bytes has it."""
    text = f"""
        <ir_version: 11, opset_import: ["" : 23]>
        agraph (int64[n] x) => ({weights}[n, 2] y)
        <float16[3, 2] table = {{1, 2, 3, 4, 5, 6}}, {weights}[2, 2] one = {{1, 0, 0, 1}}, {weights}[2, 2] other = {{1, 0, 0, 1}}> {{
            rows = Gather(table, x)
            wide = Cast<to = {1 if weights == "float" else 10}>(rows)
            turned = MatMul(wide, one)
            y = MatMul(turned, other)
        }}
    """
    model = ir.from_proto(parser.parse_model(text))
    graph = Graph(model=model, signature=Signature(task="module", inputs=(), outputs=()))
    assert holds_half(graph)
    assert computes_in_half(graph) == half


def test_a_stand_in_keeps_names_and_gives_float32(tmp_path: Path) -> None:
    """Where outputs, inputs and constants are bfloat16 themselves."""
    text = """
        <ir_version: 11, opset_import: ["" : 23]>
        agraph (bfloat16[n] x) => (bfloat16[n] y, bfloat16[n] z) {
            one = Constant<value = bfloat16 {16256}>()
            y = Add(x, one)
            wide = Cast<to = 1>(y)
            z = Cast<to = 16>(wide)
        }
    """
    model = ir.from_proto(parser.parse_model(text))
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(
                ir.DataType.FLOAT if value.name == "wide" else ir.DataType.BFLOAT16
            )
    spec = {name: TensorSpec(name=name, dtype="bfloat16", shape=("n",)) for name in "xyz"}
    graph = Graph(model=model, signature=Signature(task="module", inputs=(spec["x"],), outputs=(spec["y"], spec["z"])))
    stand_in = in_float32(graph)
    assert {one.dtype for one in (*stand_in.signature.inputs, *stand_in.signature.outputs)} == {"float32"}
    ir.save(stand_in.model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["y", "z"]
    y, z = session.run(None, {"x": np.array([0.00390625, 3.0], np.float32)})
    np.testing.assert_array_equal(y, [1.0, 4.0])  # 1.00390625 lies between two bfloat16
    np.testing.assert_array_equal(z, y)


def test_pooling_in_bf16_is_refused_for_cuda() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[1])
    with pytest.raises(ConversionError, match=r"MaxPool.*fp16"):
        make_pass("bf16").apply(graph_of([pool], {}), CONTEXT)
    make_pass("bf16").apply(graph_of([pool], {}), PassContext(target=target("tensorrt")))


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


def test_a_stand_in_of_float16_overflows_as_it_would(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider computes float16 in float32 from one end to the other."""
    nodes = [helper.make_node("Mul", ["x", "large"], ["h"]), helper.make_node("Mul", ["h", "small"], ["y"])]
    weights = {"large": np.float32(60000), "small": np.float32(1 / 60000)}
    half = make_pass("fp16").apply(graph_of(nodes, weights), CONTEXT).graph
    assert holds_half(half)
    assert not holds_bfloat16(half)
    x = np.full((1, 32), 3, np.float32)
    np.testing.assert_allclose(run(half, x, tmp_path), x, rtol=2e-3)
    assert np.isinf(run(in_float32(half), x, tmp_path)).all()


def test_scales_of_old_opsets_constants_and_names(tmp_path: Path) -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[n, 32] x) => (float[n, 32] y)
        <float scale = {0.1}, int8 zero = {0}> {
            q = QuantizeLinear(x, scale, zero)
            x_half = DequantizeLinear(q, scale, zero)
            two = Constant<value_float = 2.0>()
            y_half = Mul(x_half, two)
            some = Constant<value_floats = [1.0]>()
            y = Add(y_half, some)
        }
    """
    model = ir.from_proto(parser.parse_model(text))
    graph = Graph(model=model, signature=Signature(task="module", inputs=(), outputs=()))
    half = make_pass("fp16").apply(graph, CONTEXT).graph
    found = run(half, np.full((2, 32), 0.5, np.float32), tmp_path)
    np.testing.assert_allclose(found, np.full((2, 32), 2, np.float32), rtol=1e-2)
