"""Fold on small graphs: what is folded, what must not be, shapes, subgraphs, functions, large weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.fold import Fold
from onnxpress.optimizers.targets import target

CONTEXT = PassContext(target=target("cpu"))
X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto], constants: dict[str, Any] | None = None, *, inputs: Any = None, **more: Any
) -> onnx.ModelProto:
    """A model from x (batch, length, 8) to y."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), *more.pop("domains", [])],
        ir_version=10,
        **more,
    )


def folded(proto: onnx.ModelProto, **options: Any) -> tuple[Graph, int]:
    graph = Graph(model=ir.from_proto(proto), signature=Signature(task="module", inputs=(), outputs=()))
    result = Fold(**options).apply(graph, CONTEXT)
    onnx.checker.check_model(ir.to_proto(result.graph.model))
    return result.graph, result.changes


def answers(proto: onnx.ModelProto, feeds: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def assert_same(proto: onnx.ModelProto, graph: Graph, feeds: dict[str, Any]) -> None:
    """Folding moves no computation between kernels: the answers are equal bit for bit."""
    np.testing.assert_array_equal(answers(ir.to_proto(graph.model), feeds), answers(proto, feeds))


def test_constants_are_folded() -> None:
    proto = model(
        [
            helper.make_node("Cast", ["whole"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["number", "number"], ["square"]),
            helper.make_node("Add", ["x", "square"], ["y"]),
        ],
        {"whole": np.array([3])},
    )
    graph, changes = folded(proto)
    assert graph.operators() == {"Add": 1}
    assert changes == 2
    assert_same(proto, graph, {"x": X})


@pytest.mark.parametrize("more", [(), ("axis", "step")])
def test_known_sizes_are_folded_through_shape_arithmetic(more: tuple[str, ...]) -> None:
    """The scale that PyTorch's TorchScript exporter computes: 1 / sqrt(size of the last axis)."""
    constants = {"last": [-1], "end": [np.iinfo(np.int64).max], "axis": [0], "step": [1]}
    proto = model(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Slice", ["shape", "last", "end", *more], ["width"]),
            helper.make_node("Cast", ["width"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Sqrt", ["number"], ["root"]),
            helper.make_node("Div", ["x", "root"], ["y"]),
        ],
        {name: np.array(constants[name]) for name in ("last", "end", *more)},
    )
    graph, _ = folded(proto)
    assert graph.operators() == {"Div": 1}
    assert_same(proto, graph, {"x": X})


def test_numbers_of_several_axes_are_no_list_of_sizes() -> None:
    proto = model(
        [
            helper.make_node("Slice", ["table", "start", "end", "axis"], ["column"]),
            helper.make_node("Squeeze", ["column", "axis"], ["sizes"]),
            helper.make_node("Cast", ["sizes"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["numbers"], ["total"]),
            helper.make_node("Add", ["x", "total"], ["y"]),
        ],
        {"table": np.arange(6).reshape(2, 3), "start": np.array([1]), "end": np.array([2]), "axis": np.array([1])},
    )
    graph, _ = folded(proto)
    assert graph.operators() == {"Add": 1}
    assert_same(proto, graph, {"x": X})


def test_unknown_sizes_are_not_folded() -> None:
    proto = model(
        [
            helper.make_node("Shape", ["x"], ["shape"], start=0, end=1),
            helper.make_node("Cast", ["shape"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["x", "number"], ["y"]),
        ]
    )
    graph, changes = folded(proto)
    assert graph.operators() == {"Cast": 1, "Div": 1, "Shape": 1}
    assert changes == 0


def test_a_shape_that_an_input_overrides_is_not_a_constant() -> None:
    """Initializers that are also inputs are defaults."""
    value = helper.make_tensor_value_info("factor", TensorProto.FLOAT, [1])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8])
    proto = model(
        [helper.make_node("Sqrt", ["factor"], ["root"]), helper.make_node("Mul", ["x", "root"], ["y"])],
        {"factor": np.array([4], dtype=np.float32)},
        inputs=[x, value],
    )
    graph, _ = folded(proto)
    assert_same(proto, graph, {"x": X, "factor": np.array([9], dtype=np.float32)})


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [((0, 2, 1), (0, 2, 1), {"Relu": 1}), ((0, 2, 1), (1, 0, 2), {"Relu": 1, "Transpose": 1})],
)
def test_transposes_are_joined(first: tuple[int, ...], second: tuple[int, ...], left: dict[str, int]) -> None:
    proto = model(
        [
            helper.make_node("Transpose", ["x"], ["a"], perm=first),
            helper.make_node("Transpose", ["a"], ["b"], perm=second),
            helper.make_node("Relu", ["b"], ["y"]),
        ]
    )
    graph, _ = folded(proto)
    assert graph.operators() == left
    assert_same(proto, graph, {"x": X})


def test_reshapes_are_joined() -> None:
    proto = model(
        [
            helper.make_node("Reshape", ["x", "flat"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Reshape", ["b", "four"], ["c"]),
            helper.make_node("Reshape", ["c", "flat"], ["d"]),
            helper.make_node("Relu", ["d"], ["y"]),
        ],
        {"flat": np.array([-1, 8]), "four": np.array([-1, 2, 4])},
    )
    graph, _ = folded(proto)
    assert graph.operators() == {"Relu": 2, "Reshape": 2}
    assert_same(proto, graph, {"x": X})


def test_a_reshape_to_the_shape_that_is_there_is_dropped() -> None:
    proto = model(
        [
            helper.make_node("Shape", ["x"], ["sizes"], start=0, end=2),
            helper.make_node("Concat", ["sizes", "width"], ["target"], axis=0),
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Reshape", ["a", "target"], ["b"]),
            helper.make_node("Neg", ["b"], ["y"]),
        ],
        {"width": np.array([8])},
    )
    graph, _ = folded(proto)
    assert graph.operators() == {"Neg": 1, "Relu": 1}
    assert_same(proto, graph, {"x": X})


def test_casts_and_identities_go_and_the_output_keeps_its_name() -> None:
    proto = model(
        [
            helper.make_node("Identity", ["x"], ["a"]),
            helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("Identity", ["c"], ["y"]),
        ]
    )
    graph, _ = folded(proto)
    assert graph.operators() == {"Relu": 1}
    assert [output.name for output in graph.model.graph.outputs] == ["y"]
    assert_same(proto, graph, {"x": X})


def test_an_identity_between_an_input_and_an_output_stays() -> None:
    graph, _ = folded(model([helper.make_node("Identity", ["x"], ["y"])]))
    assert graph.operators() == {"Identity": 1}


def test_casts_that_round_stay() -> None:
    proto = model(
        [
            helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
        ]
    )
    graph, _ = folded(proto)
    assert graph.operators() == {"Cast": 2}
    assert_same(proto, graph, {"x": X})


def test_branches_keep_their_own_outputs() -> None:
    """A branch of an If may return a value from outside only through a node of its own."""
    relu = helper.make_node("Relu", ["x"], ["outside"])
    then = helper.make_graph(
        [helper.make_node("Identity", ["outside"], ["then_y"])],
        "then",
        [],
        [helper.make_tensor_value_info("then_y", TensorProto.FLOAT, None)],
    )
    otherwise = helper.make_graph(
        [
            helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2.0, dtype=np.float32))),
            helper.make_node("Mul", ["two", "two"], ["four"]),
            helper.make_node("Mul", ["outside", "four"], ["product"]),
            helper.make_node("Identity", ["product"], ["else_y"]),
        ],
        "else",
        [],
        [helper.make_tensor_value_info("else_y", TensorProto.FLOAT, None)],
    )
    branch = helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise)
    proto = model([relu, branch])
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    graph, _ = folded(proto)
    assert graph.operators() == {"Identity": 1, "If": 1, "Mul": 1, "Relu": 1}
    for flag in (True, False):
        assert_same(proto, graph, {"x": X, "flag": np.array(flag)})


def test_functions_are_inlined() -> None:
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["sum"]), helper.make_node("Relu", ["sum"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    proto = model(
        [helper.make_node("Twice", ["x"], ["y"], domain="local")],
        functions=[function],
        domains=[helper.make_opsetid("local", 1)],
    )
    graph, changes = folded(proto)
    assert changes == 1  # the call is gone, though there are more nodes than before
    assert graph.operators() == {"Add": 1, "Relu": 1}
    assert dict(graph.model.opset_imports) == {"": 20}
    assert_same(proto, graph, {"x": X})


def test_nothing_is_computed_that_is_larger_than_the_limit() -> None:
    weight = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    proto = model(
        [
            helper.make_node("Expand", ["one", "wide"], ["ones"]),
            helper.make_node("ReduceSum", ["ones"], ["sum"], keepdims=0),
            helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["product"]),
            helper.make_node("Add", ["product", "sum"], ["y"]),
        ],
        {"one": np.array([1], dtype=np.float32), "wide": np.array([1000]), "weight": weight},
    )
    graph, changes = folded(proto, limit=100)
    assert changes == 0
    assert graph.operators() == {"Add": 1, "Expand": 1, "MatMul": 1, "ReduceSum": 1, "Transpose": 1}
    small, _ = folded(proto, limit=1000)
    assert small.operators() == {"Add": 1, "MatMul": 1}
    np.testing.assert_allclose(
        answers(ir.to_proto(small.model), {"x": X}), answers(proto, {"x": X}), rtol=1e-6, atol=1e-5
    )


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    """Weights in external data are neither read nor copied: the file may even be absent."""
    proto = model(
        [helper.make_node("MatMul", ["x", "weight"], ["a"]), helper.make_node("Identity", ["a"], ["y"])],
        {"weight": np.ones((8, 512), dtype=np.float32)},
    )
    onnx.save_model(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    loaded = ir.load(tmp_path / "model.onnx")
    (tmp_path / "model.data").unlink()
    graph = Graph(model=loaded, signature=Signature(task="module", inputs=(), outputs=()))
    result = Fold().apply(graph, CONTEXT)
    assert result.changes == 1
    assert isinstance(result.graph.model.graph.initializers["weight"].const_value, ir.ExternalTensor)


def test_symbolic_shapes_are_inferred() -> None:
    proto = model(
        [
            helper.make_node("Shape", ["x"], ["sizes"], start=0, end=2),
            helper.make_node("Concat", ["sizes", "heads"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["a"]),
            helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3]),
            helper.make_node("Relu", ["b"], ["y"]),
        ],
        {"heads": np.array([2, 4])},
    )
    graph, _ = folded(proto)
    shape = graph.model.graph.outputs[0].shape
    assert shape is not None
    assert [str(size) for size in shape] == ["batch", "2", "length", "4"]


def test_the_limit_is_checked() -> None:
    with pytest.raises(RecipeError, match="from 1 on, not 0"):
        Fold(limit=0)
