"""Deduplicate on small graphs: what is merged and what must not be."""

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
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.deduplicate import Deduplicate
from onnxpress.optimizers.targets import target

X = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, Any] | None = None, outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)],
        ir_version=10,
    )


def deduplicated(proto: onnx.ModelProto) -> PassResult:
    graph = Graph(model=ir.from_proto(proto), signature=Signature(task="module", inputs=(), outputs=()))
    return Deduplicate().apply(graph, PassContext(target=target("cpu")))


def answers(proto: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )


def assert_same(proto: onnx.ModelProto, result: PassResult, **feeds: Any) -> None:
    """Merging changes no number."""
    given = ir.to_proto(result.graph.model)
    for before, after in zip(answers(proto, {"x": X, **feeds}), answers(given, {"x": X, **feeds}), strict=True):
        np.testing.assert_array_equal(after, before)


def test_equal_nodes_are_merged_down_the_line() -> None:
    proto = model(
        [
            helper.make_node("Exp", ["x"], ["a"]),
            helper.make_node("Exp", ["x"], ["b"]),
            helper.make_node("Softmax", ["a"], ["c"], axis=-1),
            helper.make_node("Softmax", ["b"], ["d"], axis=-1),
            helper.make_node("Softmax", ["b"], ["e"], axis=0),
            helper.make_node("Sum", ["c", "d", "e"], ["y"]),
        ]
    )
    result = deduplicated(proto)
    assert result.graph.operators() == {"Exp": 1, "Softmax": 2, "Sum": 1}
    assert result.changes == 2
    assert_same(proto, result)


def test_equal_constants_are_merged() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("MatMul", ["a", "w1"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["y"]),
    ]
    proto = model(nodes, {"w0": weight, "w1": weight.copy(), "w2": weight.T.copy()})
    result = deduplicated(proto)
    assert set(result.graph.model.graph.initializers) == {"w0", "w2"}
    assert_same(proto, result)


def test_weights_that_are_transposed_views_are_merged_by_content() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    proto = model(
        [helper.make_node("MatMul", ["x", "w0"], ["a"]), helper.make_node("MatMul", ["a", "w1"], ["y"])],
        {"w0": weight, "w1": weight},
    )
    graph = Graph(model=ir.from_proto(proto), signature=Signature(task="module", inputs=(), outputs=()))
    stored_transposed = np.ascontiguousarray(weight.T)
    graph.model.graph.initializers["w1"].const_value = ir.Tensor(stored_transposed.T, name="w1")
    result = Deduplicate().apply(graph, PassContext(target=target("cpu")))
    assert set(result.graph.model.graph.initializers) == {"w0"}
    assert_same(proto, result)


def test_constants_of_different_shape_or_type_stay_apart() -> None:
    """A scalar 1 and a vector of one 1 hold the same bytes, and so do int32 and float32 zeros."""
    proto = model(
        [
            helper.make_node("Unsqueeze", ["x", "axis"], ["a"]),
            helper.make_node("Gather", ["a", "index"], ["b"], axis=1),
            helper.make_node("Cast", ["zero"], ["c"], to=TensorProto.FLOAT),
            helper.make_node("Sum", ["b", "c", "float_zero"], ["y"]),
        ],
        {
            "axis": np.array([0]),
            "index": np.array(0),
            "zero": np.zeros(1, dtype=np.int32),
            "float_zero": np.zeros(1, dtype=np.float32),
        },
    )
    result = deduplicated(proto)
    assert set(result.graph.model.graph.initializers) == {"axis", "index", "zero", "float_zero"}
    assert_same(proto, result)


@pytest.mark.parametrize(
    "node",
    [
        ("RandomNormalLike", ["x"], {}),
        ("RandomUniformLike", ["x"], {}),
        ("Bernoulli", ["x"], {}),
        ("Dropout", ["x", "ratio", "training"], {}),
    ],
    ids=lambda node: node[0],
)
def test_random_numbers_are_drawn_as_often_as_before(node: tuple[str, list[str], dict[str, Any]]) -> None:
    kind, inputs, attributes = node
    proto = model(
        [helper.make_node(kind, inputs, [name], **attributes) for name in ("a", "b")]
        + [helper.make_node("Sub", ["a", "b"], ["y"])],
        {"ratio": np.array(0.5, dtype=np.float32), "training": np.array(True)} if kind == "Dropout" else None,
    )
    assert deduplicated(proto).graph.operators() == {kind: 2, "Sub": 1}


def test_operators_of_unknown_domains_are_left_alone() -> None:
    proto = model(
        [helper.make_node("Count", ["x"], [name], domain="com.example") for name in ("a", "b")]
        + [helper.make_node("Add", ["a", "b"], ["y"])]
    )
    assert deduplicated(proto).graph.operators() == {"Add": 1, "com.example::Count": 2}


def test_outputs_of_the_graph_stay() -> None:
    proto = model([helper.make_node("Exp", ["x"], [name]) for name in ("y", "z")], outputs=("y", "z"))
    result = deduplicated(proto)
    assert result.graph.operators() == {"Exp": 2}
    assert_same(proto, result)


def test_an_optional_output_that_only_one_node_gives_keeps_them_apart() -> None:
    proto = model(
        [
            helper.make_node("LayerNormalization", ["x", "w"], ["a"]),
            helper.make_node("LayerNormalization", ["x", "w"], ["b", "mean"]),
            helper.make_node("Sum", ["a", "b", "mean"], ["y"]),
        ],
        {"w": np.ones(8, dtype=np.float32)},
    )
    result = deduplicated(proto)
    assert result.graph.operators() == {"LayerNormalization": 2, "Sum": 1}
    assert_same(proto, result)


def test_branches_use_what_stands_outside_but_not_each_other() -> None:
    def branch(name: str) -> onnx.GraphProto:
        return helper.make_graph(
            [
                helper.make_node("Exp", ["x"], [f"{name}_exp"]),
                helper.make_node("Neg", ["x"], [f"{name}_neg"]),
                helper.make_node("Add", [f"{name}_exp", f"{name}_neg"], [f"{name}_y"]),
            ],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
        )

    proto = model(
        [
            helper.make_node("Exp", ["x"], ["outside"]),
            helper.make_node("If", ["flag"], ["chosen"], then_branch=branch("then"), else_branch=branch("else")),
            helper.make_node("Mul", ["outside", "chosen"], ["y"]),
        ]
    )
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    result = deduplicated(proto)
    assert result.graph.operators() == {"Add": 2, "Exp": 1, "If": 1, "Mul": 1, "Neg": 2}
    for flag in (True, False):
        assert_same(proto, result, flag=np.array(flag))
