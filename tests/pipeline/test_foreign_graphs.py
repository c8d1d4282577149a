"""Builds from .onnx files whose graphs other tools write in ways that ONNX Runtime takes: nothing but one clear error, or a right artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from small_graphs import random_x

import onnxpress
from onnxpress.errors import BudgetError, ConversionError
from onnxpress.foreign import open_onnx

QUICK: dict[str, Any] = {"measure": False, "samples": 24, "calibration_samples": 16}


def saved(
    path: Path,
    body: str,
    weights: dict[str, np.ndarray[Any, Any]],
    *,
    inputs: str = "float[batch,16] x",
    opset: int = 18,
    backwards: bool = False,
    more: str = "",
) -> Path:
    """A file of a graph in ONNX's own words, from inputs to y (batch, …); unlike small_graph's it says no shapes between them."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}{more}]> g ({inputs}) => (float[batch,n] y) {{ {body} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    if backwards:
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "options", [{"precision": "int8"}, {"precision": "int4-weights", "passes": {"int4-weights": {"method": "gptq"}}}]
)
def test_a_layer_that_reads_a_constant(options: dict[str, Any], tmp_path: Path) -> None:
    """Learned queries: there is nothing to observe, for int8, nor to follow."""
    body = "q = MatMul(queries, w) s = MatMul(x, w) t = ReduceSum<keepdims=0>(q, first) y = Add(s, t)"
    weights = {"queries": random_x(4, 64), "w": random_x(64, 64) / 4, "first": np.array([0])}
    path = saved(tmp_path / "model.onnx", body, weights, inputs="float[batch,64] x")
    built = onnxpress.build(path, out=tmp_path / "out", keep_all=True, **options, **QUICK)
    (row,) = (row for row in built.manifest.ledger if row["pass"] == options["precision"])
    assert row["changes"] >= 1


def test_nodes_in_another_order(tmp_path: Path) -> None:
    """Which ONNX does not allow, and ONNX Runtime takes."""
    path = saved(tmp_path / "model.onnx", "h = MatMul(x, w) y = Relu(h)", {"w": random_x(16, 16)}, backwards=True)
    onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)


def test_bounds_of_a_slice_that_are_attributes(tmp_path: Path) -> None:
    body = "s = Shape(x) n = Slice<starts=[0], ends=[1]>(s) c = Concat<axis=0>(n, wide) y = Reshape(x, c)"
    path = saved(tmp_path / "model.onnx", body, {"wide": np.array([16])}, opset=9)
    onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)


def test_shapes_are_known_where_nothing_is_folded(tmp_path: Path) -> None:
    body = (
        "m = ReduceMean<axes=[-1]>(x) c = Sub(x, m) s = Mul(c, c) v = ReduceMean<axes=[-1]>(s) e = Add(v, epsilon) d = Sqrt(e) "
        "n = Div(c, d) h = Mul(n, g) y = Add(h, b)"
    )
    weights = {"epsilon": np.float32([1e-5]), "g": random_x(16), "b": random_x(16)}
    path = saved(tmp_path / "model.onnx", body, weights, opset=17)
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)
    assert "LayerNormalization" in {node.op_type for node in onnx.load(built.path / "model.onnx").graph.node}


def test_a_size_that_is_cast_to_truth(tmp_path: Path) -> None:
    body = "s = Shape(x) g = Gather(s, one) b = Cast<to=9>(g) i = Cast<to=7>(b) u = Unsqueeze(i, zero) f = Cast<to=1>(u) y = Mul(x, f)"
    path = saved(tmp_path / "model.onnx", body, {"one": np.array(1), "zero": np.array([0])})
    built = onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)
    assert {row["pass"]: row["status"] for row in built.manifest.ledger}["fold"] == "kept"
    x = random_x(3, 16)
    np.testing.assert_array_equal(onnxpress.load(built.path).session.run({"x": x})["y"], x)


def test_numbers_that_a_resize_puts_around(tmp_path: Path) -> None:
    """They may lie outside of what the integers before it cover."""
    body = (
        'c = Conv<pads=[1,1,1,1]>(x, w) r = Resize<mode="nearest", coordinate_transformation_mode="tf_crop_and_resize", '
        "extrapolation_value=60.0>(c, roi, scales) d = Conv<pads=[1,1,1,1]>(r, v) e = GlobalAveragePool(d) y = Flatten(e)"
    )
    weights = {
        "w": random_x(16, 3, 3, 3) / 5,
        "v": random_x(16, 16, 3, 3) / 12,
        "scales": np.float32([1, 1, 2, 2]),
    }
    weights["roi"] = np.float32([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5])
    path = saved(tmp_path / "model.onnx", body, weights, inputs="float[batch,3,8,8] x")
    built = onnxpress.build(path, out=tmp_path / "out", precision="int8-qdq", keep_all=True, **QUICK)
    x = random_x(4, 3, 8, 8)
    expected, found = (
        one.run({"x": x})["y"] for one in (open_onnx(path).reference, onnxpress.load(built.path).session)
    )
    assert np.square(found - expected).sum() < 0.01 * np.square(expected - expected.mean()).sum()


def test_what_cannot_be_run_is_no_corrupt_file(tmp_path: Path) -> None:
    """ONNX Runtime fuses a pool with dilations between integers, and then finds that its kernel has none."""
    body = (
        "c = Conv<pads=[1,1,1,1]>(x, w) p = AveragePool<kernel_shape=[2,2], dilations=[2,2], pads=[1,1,1,1]>(c) "
        "d = Conv<pads=[1,1,1,1]>(p, v) e = GlobalAveragePool(d) y = Flatten(e)"
    )
    weights = {"w": random_x(16, 3, 3, 3), "v": random_x(16, 16, 3, 3)}
    path = saved(tmp_path / "model.onnx", body, weights, inputs="float[batch,3,8,8] x", opset=19)
    with pytest.raises(
        BudgetError, match=r"int8-qdq was asked for and cannot be kept: ONNX Runtime does not run what comes out of it"
    ):
        onnxpress.build(path, out=tmp_path / "out", precision="int8-qdq", **QUICK)
    built = onnxpress.build(path, out=tmp_path / "out", budget="2%", **QUICK)
    assert built.manifest.options is not None


def test_operators_that_know_float32_alone(tmp_path: Path) -> None:
    body = "h = ai.onnx.ml.Scaler<offset=[0.5], scale=[2.0]>(x) y = MatMul(h, w)"
    path = saved(tmp_path / "model.onnx", body, {"w": random_x(16, 16)}, more=', "ai.onnx.ml" : 3')
    with pytest.raises(ConversionError, match="Scaler has to stay in float32"):
        onnxpress.build(path, out=tmp_path / "out", target="cuda", precision="fp16", **QUICK)


def test_a_sequence_that_goes_through_others(tmp_path: Path) -> None:
    body = "s = SequenceConstruct(x, x) t = Identity(s) f = SequenceAt(t, z) y = MatMul(f, w)"
    path = saved(tmp_path / "model.onnx", body, {"z": np.array(0), "w": random_x(16, 16)}, opset=17)
    onnxpress.build(path, out=tmp_path / "out", precision="fp32", **QUICK)
