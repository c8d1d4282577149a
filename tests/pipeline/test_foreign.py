"""Builds from .onnx files that somebody else exported: what their inputs are taken for, and which files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import onnxpress
from onnxpress.errors import ConversionError, OnnxpressError, SourceError
from onnxpress.foreign import open_onnx
from onnxpress.runtime import ModuleRunner

QUICK: dict[str, Any] = {"measure": False, "samples": 24, "calibration_samples": 16}


def test_an_onnx_file_of_an_encoder_is_judged_on_its_vocabulary(tmp_path: Path) -> None:
    """Ids are drawn from the rows of the table that they look up, masks are ones, axes go by name."""
    rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Cast", ["mask"], ["m"], to=1),
        helper.make_node("Unsqueeze", ["m", "last"], ["m3"]),
        helper.make_node("Mul", ["x", "m3"], ["y0"]),
        helper.make_node("Unsqueeze", ["bias", "last1"], ["b1"]),
        helper.make_node("Add", ["y0", "b1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("ids", 7, ["rows", "seq"]),
            helper.make_tensor_value_info("mask", 7, ["rows", "seq"]),
            helper.make_tensor_value_info("bias", 1, ["seq"]),
        ],
        [helper.make_tensor_value_info("y", 1, ["rows", "seq", 16])],
        [
            numpy_helper.from_array(rows, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "last1"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    ir.save(ir.from_proto(model), tmp_path / "encoder.onnx")
    exported = open_onnx(tmp_path / "encoder.onnx")
    assert [spec.bounds for spec in exported.graph.signature.inputs] == [(0, 199), None, None]
    assert exported.example["ids"].max() > 100
    assert (exported.example["mask"] == 1).all()
    assert exported.example["ids"].shape[1:] == exported.example["bias"].shape
    assert exported.graph.signature.axes == {"rows": (1, 1024), "seq": (1, 2**20)}


def test_a_file_with_a_state_is_judged_on_whole_calls(tmp_path: Path) -> None:
    """The state's batch is its second axis, and one input is a single number."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ReduceSum", ["state", "first"], ["s"], keepdims=0),
        helper.make_node("Add", ["h", "s"], ["a"]),
        helper.make_node("Cast", ["rate"], ["r"], to=1),
        helper.make_node("Div", ["a", "r"], ["y"]),
        helper.make_node("Add", ["state", "a"], ["next"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", 1, ["batch", 8]),
            helper.make_tensor_value_info("state", 1, [2, "batch", 16]),
            helper.make_tensor_value_info("rate", 7, []),
        ],
        [
            helper.make_tensor_value_info("y", 1, ["batch", 16]),
            helper.make_tensor_value_info("next", 1, [2, "batch", 16]),
        ],
        [
            numpy_helper.from_array(random.standard_normal((8, 16)).astype(np.float32), "w"),
            numpy_helper.from_array(np.array([0]), "first"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "state.onnx")
    for name in ("dev", "calibration"):
        x, state = (random.standard_normal(shape).astype(np.float32) for shape in ((30, 1, 8), (30, 2, 1, 16)))
        np.savez(tmp_path / f"{name}.npz", x=x, state=state, rate=np.full(30, 4))
    built = onnxpress.build(
        tmp_path / "state.onnx", precision="int8-qdq", out=tmp_path / "artifact",
        file=str(tmp_path / "dev.npz"), calibration=str(tmp_path / "calibration.npz"), budget=0.95, **QUICK,
    )  # fmt: skip
    first, last = built.manifest.ledger[0], built.manifest.ledger[-1]
    assert "evaluated on 24 of 30 samples of dev.npz" in first["notes"]
    assert (last["pass"], last["changes"], last["metric"]) == ("int8-qdq", 1, "variance_kept")
    assert "batch_cosine" not in last
    assert "on random inputs" not in (built.path / "report.html").read_text()
    random_build = onnxpress.build(tmp_path / "state.onnx", precision="fp32", out=tmp_path / "random", **QUICK)
    assert "within budget on random inputs" in (random_build.path / "report.html").read_text()


def test_an_onnx_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Mul", ["r", "r"], ["rr"]),
        helper.make_node("Mul", ["rr", "factor"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", 8]), helper.make_tensor_value_info("factor", 1, [])],
        [helper.make_tensor_value_info("y", 1, ["batch", 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    ir.save(ir.from_proto(model), tmp_path / "square.onnx")
    built = onnxpress.build(tmp_path / "square.onnx", out=tmp_path / "out", precision="fp32", **QUICK)
    runner = onnxpress.load(built.path)
    assert isinstance(runner, ModuleRunner)
    x = np.array([[-1, 2, 3, 0, 0, 0, 0, 4]], np.float32)
    factor = np.array(2, np.float32)  # no axes at all
    np.testing.assert_array_equal(runner.run({"x": x, "factor": factor})["y"], 2 * np.maximum(x, 0) ** 2)


@pytest.mark.parametrize("constant", [False, True])
def test_an_onnx_file_with_its_weights_beside_it(constant: bool, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    shapes = [helper.make_tensor_value_info(name, 1, ["batch", 16]) for name in "xy"]
    nodes, tensor = [helper.make_node("MatMul", ["x", "w"], ["y"])], numpy_helper.from_array(weight, "w")
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    graph = helper.make_graph(nodes, "graph", shapes[:1], shapes[1:], [] if constant else [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "file.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0, convert_attribute=True)
    assert (tmp_path / "weights").stat().st_size >= weight.nbytes
    built = onnxpress.build(tmp_path / "file.onnx", out=tmp_path / "out", precision="fp32", measure=False)
    feeds = {"x": np.ones((2, 16), np.float32)}
    np.testing.assert_allclose(onnxpress.load(built.path).run(feeds)["y"], feeds["x"] @ weight, atol=1e-5)


@pytest.mark.parametrize(("given", "answered"), [("unk__1", "unk__2"), (None, None), ("batch", "batch")])
def test_an_onnx_file_whose_answers_count_the_same_rows_by_another_name(
    given: str | None, answered: str | None, tmp_path: Path
) -> None:
    """As tf2onnx and torch's older exporter write them. Another output has two rows, whatever the batch is."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("ReduceMax", ["w", "last"], ["z"])]
    tensors = [
        numpy_helper.from_array(np.eye(2, dtype=np.float32), "w"),
        numpy_helper.from_array(np.array([1]), "last"),
    ]
    outputs = [
        helper.make_tensor_value_info("y", 1, [answered, 2]),
        helper.make_tensor_value_info("z", 1, ["two", 1]),
    ]
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", 1, [given, 2])], outputs, tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "file.onnx"
    )
    signature = open_onnx(tmp_path / "file.onnx").graph.signature
    assert signature.outputs[0].shape == signature.inputs[0].shape
    assert signature.outputs[1].shape == ("two", 1)


def test_axes_of_minus_one_are_of_any_size(tmp_path: Path) -> None:
    """As paddle2onnx writes them."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", 1, [-1, 3])],
        [helper.make_tensor_value_info("y", 1, [-1, 3])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "file.onnx"
    )
    signature = open_onnx(tmp_path / "file.onnx").graph.signature
    assert signature.inputs[0].shape == ("x_0", 3)
    assert signature.outputs[0].shape == ("x_0", 3)
    assert signature.axes == {"x_0": (1, 1024)}


def test_axes_that_are_called_by_a_question_mark_have_no_name(tmp_path: Path) -> None:
    """As paddle2onnx writes them: two need not be equally long."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", 1, [-1, 3, "?", "?"])],
        [helper.make_tensor_value_info("y", 1, [-1, 3, "?", "?"])],
    )
    path = tmp_path / "file.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 19)).astype(np.float32)
    np.testing.assert_array_equal(onnxpress.load(built.path).run({"x": x})["y"], np.maximum(x, 0))


@pytest.mark.parametrize("given", [False, True])
def test_a_batch_that_is_declared_and_runs_with_one_row_alone(given: bool, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("MatMul", ["r", "v"], ["y"])]
    weights = [
        numpy_helper.from_array(np.array([1, 3]), "shape"),
        numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32), "v"),
    ]
    path = saved(tmp_path / "file.onnx", nodes, [Y], *weights)
    x = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x)
    file = {"file": str(tmp_path / "samples.npz")} if given else {}
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", **file, **QUICK)
    assert built.manifest.signature.inputs[0].shape == (1, 3)
    assert "batch: 1; the file declares any, and runs with no other" in built.manifest.ledger[0]["notes"]
    assert onnxpress.load(built.path).run({"x": x[:1]})["y"].shape == (1, 3)


def test_labels_are_about_the_scores_behind_the_class(tmp_path: Path) -> None:
    """skl2onnx's classifiers answer the class first."""
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["s"]),
        helper.make_node("ArgMax", ["s"], ["label"], axis=1, keepdims=0),
        helper.make_node("Softmax", ["s"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info("label", 7, ["batch"]),
        helper.make_tensor_value_info("probabilities", 1, ["batch", 3]),
    ]
    weight = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    path = saved(tmp_path / "file.onnx", nodes, outputs, numpy_helper.from_array(weight, "v"))
    x = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    labels = (x @ weight).argmax(1)
    labels[:5] = (labels[:5] + 1) % 3
    np.savez(tmp_path / "samples.npz", x=x, labels=labels)
    file = str(tmp_path / "samples.npz")
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", file=file, **QUICK)
    assert (built.manifest.ledger[0]["metric"], built.manifest.ledger[0]["quality"]) == ("accuracy", 75.0)


def test_a_file_with_inputs_of_bfloat16_is_given_float32(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["wide"], to=1), helper.make_node("MatMul", ["wide", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", 16, ["batch", 3])],
        [helper.make_tensor_value_info("y", 1, ["batch", 3])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "file.onnx"
    )
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32))
    built = onnxpress.build(
        tmp_path / "file.onnx", out=tmp_path / "out", precision="fp32", file=str(tmp_path / "samples.npz"), **QUICK
    )
    assert built.manifest.signature.inputs[0].dtype == "bfloat16"
    answers = onnxpress.load(built.path).session.run({"x": np.array([[1.00390625, 2, 3]], np.float32)})
    np.testing.assert_array_equal(answers["y"], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("operator", "said"),
    [("MatMul", r"weights in .*file.onnx are damaged: w holds"), ("Pow", r"answers with numbers that are none")],
)
def test_an_onnx_file_that_answers_no_numbers_is_named(operator: str, said: str, tmp_path: Path) -> None:
    weight = np.full((2, 2), np.nan if operator == "MatMul" else 0.5, np.float32)  # roots of negative numbers
    shapes = [helper.make_tensor_value_info(name, 1, ["batch", 2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "graph",
        shapes[:1],
        shapes[1:],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "file.onnx"
    )
    with pytest.raises(SourceError, match=said):
        open_onnx(tmp_path / "file.onnx")


def test_the_first_samples_of_a_file_are_the_example(tmp_path: Path) -> None:
    """A logarithm takes positive numbers, and random ones are like the samples from there on."""
    nodes = [helper.make_node("Log", ["x"], ["l"]), helper.make_node("MatMul", ["l", "w"], ["y"])]
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32), "w")
    path = saved(tmp_path / "file.onnx", nodes, [Y], weight)
    with pytest.raises(SourceError, match=r"real ones with --eval"):
        open_onnx(path)
    x = np.random.default_rng(1).uniform(0.5, 2, (20, 3)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", x=x)
    np.testing.assert_array_equal(open_onnx(path, samples=tmp_path / "samples.npz").example["x"], x[:2])
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", file=str(tmp_path / "samples.npz"), **QUICK)
    assert built.manifest.ledger[0]["quality"] == 1
    np.savez(tmp_path / "negative.npz", x=-x)
    with pytest.raises(SourceError, match=r"for the first samples of .*negative\.npz"):
        onnxpress.build(path, out=tmp_path / "out", precision="fp32", file=str(tmp_path / "negative.npz"), **QUICK)


def test_an_onnx_file_with_a_sequence_inside(tmp_path: Path) -> None:
    """It stays one where shapes are inferred, which takes it for a tensor."""
    nodes = [
        helper.make_node("Dropout", ["x"], ["d", "mask"]),
        helper.make_node("SplitToSequence", ["d"], ["s"], axis=1),
        helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=1),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    shapes = [helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy"]
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "graph", shapes[:1], shapes[1:], [weight])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "file.onnx"
    )
    built = onnxpress.build(tmp_path / "file.onnx", out=tmp_path / "out", precision="fp32", **QUICK)
    assert {row["pass"]: row["status"] for row in built.manifest.ledger}["fold"] == "kept"


FLOATS, INTEGERS, TEXT = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.STRING


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    outputs: list[onnx.ValueInfoProto],
    *tensors: onnx.TensorProto,
    x: int = FLOATS,
) -> Path:
    """A file of a model from x (batch, 3), with a weight of zeros and ones."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", x, ["batch", 3])],
        outputs,
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "w"), *tensors],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), path)
    return path


PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])
Y = helper.make_tensor_value_info("y", FLOATS, ["batch", 3])
WORDS = helper.make_tensor("words", TEXT, [3], [b"3", b"4", b"5"])


@pytest.mark.parametrize(
    ("nodes", "output", "said"),
    [
        (
            [helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0), helper.make_node("Gather", ["words", "best"], ["z"])],
            helper.make_tensor_value_info("z", TEXT, ["batch"]),
            "the output z is text",
        ),
        (
            [helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])],
            helper.make_value_info(
                "z", helper.make_sequence_type_proto(helper.make_map_type_proto(INTEGERS, helper.make_tensor_type_proto(FLOATS, [])))
            ),
            r"the output z is seq\(map\(.*zipmap",
        ),
        (
            [helper.make_node("SequenceConstruct", ["y"], ["z"])],
            helper.make_value_info("z", helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOATS, None))),
            r"the output z is seq\(tensor\(float\)\); .*extract_model",
        ),
    ],
)  # fmt: skip
def test_outputs_that_are_no_numbers_are_named(
    nodes: list[onnx.NodeProto], output: onnx.ValueInfoProto, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=said):
        open_onnx(saved(tmp_path / "file.onnx", [PRODUCT, *nodes], [Y, output], WORDS))


def test_inputs_of_text_sparse_weights_and_empty_axes_are_named(tmp_path: Path) -> None:
    read = [helper.make_node("Cast", ["x"], ["numbers"], to=FLOATS), helper.make_node("Relu", ["numbers"], ["y"])]
    with pytest.raises(ConversionError, match="the input x is text"):
        open_onnx(saved(tmp_path / "text.onnx", read, [Y], x=TEXT))
    sparse = onnx.load(saved(tmp_path / "file.onnx", [PRODUCT], [Y]))
    sparse.graph.initializer.pop()
    values, places = helper.make_tensor("w", FLOATS, [2], [1.0, 2.0]), helper.make_tensor("at", INTEGERS, [2], [0, 8])
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3, 3]))
    onnx.save(sparse, tmp_path / "sparse.onnx")
    with pytest.raises(ConversionError, match=r"sparse tensors \(w\)"):
        open_onnx(tmp_path / "sparse.onnx")
    node = helper.make_node("Constant", [], ["constant"], sparse_value=sparse.graph.sparse_initializer[0])
    nodes = [node, helper.make_node("MatMul", ["x", "constant"], ["y"])]
    with pytest.raises(ConversionError, match=r"sparse tensors \(constant\)"):
        open_onnx(saved(tmp_path / "constant.onnx", nodes, [Y]))
    empty = onnx.load(tmp_path / "file.onnx")
    empty.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    empty.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 0
    onnx.save(empty, tmp_path / "empty.onnx")
    with pytest.raises(ConversionError, match="'x' of the graph has an axis of size 0"):
        open_onnx(tmp_path / "empty.onnx")


@pytest.mark.parametrize("operator", ["RandomNormalLike", "Dropout"])
def test_answers_that_are_drawn_at_each_call_are_named(operator: str, tmp_path: Path) -> None:
    inputs = ["hidden", "", "training"] if operator == "Dropout" else ["hidden"]
    training = numpy_helper.from_array(np.array(True), "training")
    body = [helper.make_node("MatMul", ["x", "w"], ["hidden"]), helper.make_node(operator, inputs, ["y"])]
    with pytest.raises(ConversionError, match=rf"otherwise at each call \({operator}\).*evaluation mode"):
        open_onnx(saved(tmp_path / "file.onnx", body, [Y], training))


def test_outputs_that_are_declared_by_their_names_alone(tmp_path: Path) -> None:
    model = onnx.load(saved(tmp_path / "declared.onnx", [PRODUCT], [Y]))
    model.graph.output[0].ClearField("type")
    onnx.save(model, tmp_path / "file.onnx")
    exported = open_onnx(tmp_path / "file.onnx")
    (spec,) = exported.graph.signature.outputs
    assert (spec.dtype, len(spec.shape)) == ("float32", 2)
    assert onnxpress.build(tmp_path / "file.onnx", out=tmp_path / "built", precision="fp32", **QUICK)
    twice = saved(tmp_path / "twice.onnx", [PRODUCT], [Y, Y])
    assert [spec.name for spec in open_onnx(twice).graph.signature.outputs] == ["y"]
    wrong = helper.make_tensor_value_info("y", FLOATS, ["batch", 7])
    exported = open_onnx(saved(tmp_path / "wrong.onnx", [PRODUCT], [wrong]))
    assert exported.graph.signature.outputs[0].shape == ("batch", "y_1")


def test_text_between_numbers_stays(tmp_path: Path) -> None:
    """Folding leaves it alone, whether it is read or made."""
    nodes = [
        PRODUCT,
        helper.make_node("Gather", ["words", "places"], ["some"]),
        helper.make_node("Cast", ["some"], ["read"], to=FLOATS),
        helper.make_node("Cast", ["places"], ["written"], to=TEXT),
        helper.make_node("Cast", ["written"], ["again"], to=FLOATS),
        helper.make_node("Mul", ["read", "again"], ["scale"]),
        helper.make_node("Mul", ["y", "scale"], ["z"]),
    ]
    places = numpy_helper.from_array(np.array([2, 0, 1]), "places")
    output = helper.make_tensor_value_info("z", FLOATS, ["batch", 3])
    built = onnxpress.build(
        saved(tmp_path / "file.onnx", nodes, [output], WORDS, places), out=tmp_path / "out", precision="fp32", **QUICK
    )
    answers = onnxpress.load(built.path).session.run({"x": np.ones((1, 3), np.float32)})
    np.testing.assert_array_equal(answers["z"], [[10, 0, 4]])


def test_answers_whose_size_hangs_on_the_input_are_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=0),
        helper.make_node("Squeeze", ["flat", "first"], ["all"]),
        helper.make_node("Relu", ["all"], ["positive"]),
        helper.make_node("Cast", ["positive"], ["some"], to=onnx.TensorProto.BOOL),
        helper.make_node("Compress", ["all", "some"], ["y"]),
    ]
    first = numpy_helper.from_array(np.array([0]), "first")
    path = saved(tmp_path / "file.onnx", nodes, [helper.make_tensor_value_info("y", FLOATS, ["found"])], first)
    with pytest.raises(OnnxpressError, match=r"answers with \d+ to \d+ numbers, which hangs on what is in its inputs"):
        onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("opset", [7, 9, 13])
@pytest.mark.parametrize("precision", ["int8", "int8-qdq"])
def test_files_of_old_opsets_are_quantized(precision: str, opset: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    shapes = [helper.make_tensor_value_info(name, FLOATS, ["batch", 64]) for name in "xy"]
    weight = numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "graph", shapes[:1], shapes[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.save(model, tmp_path / "file.onnx")
    built = onnxpress.build(tmp_path / "file.onnx", out=tmp_path / "out", precision=precision, target="cpu", **QUICK)
    x = random.standard_normal((3, 64)).astype(np.float32)
    expected = open_onnx(tmp_path / "file.onnx").reference.run({"x": x})["y"]
    answers = onnxpress.load(built.path).session.run({"x": x})["y"]
    assert 0 < np.abs(answers - expected).max() < 0.05 * expected.max()


def test_a_function_of_another_opset_stays_a_function(tmp_path: Path) -> None:
    """ONNX Runtime takes such files."""
    body = [helper.make_node("Constant", [], ["c"], value_float=2.0), helper.make_node("Mul", ["a", "c"], ["b"])]
    function = helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    path = saved(
        tmp_path / "file.onnx", [PRODUCT, helper.make_node("Twice", ["y"], ["z"], domain="mine")],
        [helper.make_tensor_value_info("z", FLOATS, ["batch", 3])],
    )  # fmt: skip
    model = onnx.load(path)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, path)
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)
    answers = onnxpress.load(built.path).session.run({"x": np.ones((1, 3), np.float32)})
    np.testing.assert_array_equal(answers["z"], [[2, 2, 2]])


def test_a_file_that_lists_its_weights_as_inputs_stays_valid(tmp_path: Path) -> None:
    """As IR version 3 has to."""
    model = onnx.load(saved(tmp_path / "file.onnx", [PRODUCT], [Y]))
    model.ir_version = 3
    model.opset_import[0].version = 8
    model.graph.input.append(helper.make_tensor_value_info("w", FLOATS, [3, 3]))
    onnx.save(model, tmp_path / "file.onnx")
    onnx.checker.check_model(tmp_path / "file.onnx")
    built = onnxpress.build(tmp_path / "file.onnx", out=tmp_path / "out", precision="fp32", **QUICK)
    assert [spec.name for spec in built.manifest.signature.inputs] == ["x"]
    onnx.checker.check_model(built.path / "model.onnx")


def test_a_file_of_float16_for_a_card_that_is_not_here(tmp_path: Path) -> None:
    """It is its own original, so that its trials do not round what it does not."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=10),
        helper.make_node("MatMul", ["half", "v"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=1),
    ]
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 3)).astype(np.float16), "v")
    path = saved(tmp_path / "file.onnx", nodes, [Y], weight)
    assert onnxpress.build(path, out=tmp_path / "out", target="cuda", precision="fp32", **QUICK)
