"""Raising the opset: answers stay, subgraphs come along, and what does not convert is refused with the graph intact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import CONTEXT, assert_same_answers, random_x, small_graph

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.opset import raise_opset


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 22])
def test_answers_stay(opset: int, tmp_path: Path) -> None:
    # ReduceMean's axes moved from an attribute to an input in opset 18.
    reduce = (
        "m = ReduceMean<axes=[-1], keepdims=1>(x)"
        if opset < 18
        else "k = Constant<value_ints=[-1]>() m = ReduceMean<keepdims=1>(x, k)"
    )
    body = f"""
        s = ReduceSum<keepdims=0>(x)
        flag = Greater(s, zero)
        y = If(flag) <
            then_branch = yes () => (float[batch,length,32] b) {{ {reduce} b = Sub(x, m) }},
            else_branch = no () => (float[batch,length,32] c) {{ c = Add(x, x) }}
        >
    """
    graph = small_graph(body, weights={"zero": np.float32(0)}, opset=opset, ir_version=7)
    ir.save(graph.model, tmp_path / "before.onnx")
    raise_opset(graph, 23)
    assert graph.model.opset_imports[""] == 23
    assert graph.model.ir_version == 11
    ir.save(graph.model, tmp_path / "after.onnx")
    assert_same_answers(tmp_path, [{"x": random_x(2, 3, 32)}, {"x": -random_x(2, 3, 32)}], tolerance=0)


def test_a_later_opset_stays() -> None:
    graph = small_graph("y = Relu(x)", opset=23, ir_version=10)
    model = graph.model
    raise_opset(graph, 20)
    assert graph.model is model
    assert (model.opset_imports[""], model.ir_version) == (23, 11)


def test_group_normalization_is_converted_where_its_channels_are_known(tmp_path: Path) -> None:
    graph = small_graph(
        "y = GroupNormalization<num_groups=2>(x, scale, bias)",
        inputs="float[batch,4,8] x",
        outputs="float[batch,4,8] y",
        weights={"scale": np.array([1.0, 3.0], np.float32), "bias": np.array([0.5, -1.0], np.float32)},
    )
    ir.save(graph.model, tmp_path / "before.onnx")
    raise_opset(graph, 23)
    ir.save(graph.model, tmp_path / "after.onnx")
    assert_same_answers(tmp_path, [{"x": random_x(3, 4, 8)}])


def unconvertible(body: str) -> Graph:
    """GroupNormalization's scale became one number a channel in opset 21; here the channels are not known."""
    weights = {
        "scale": np.array([1.0, 3.0], np.float32),
        "bias": np.zeros(2, np.float32),
        "last": np.array([-1]),
        "epsilon": np.float32(1e-6),
        "weight": np.ones(8, np.float32),
    }
    return small_graph(
        f"g = GroupNormalization<num_groups=2>(x, scale, bias) {body}",
        inputs="float[batch,channels,8] x",
        outputs="float[batch,channels,8] g, float[batch,channels,8] y",
        weights=weights,
    )


def test_what_does_not_convert_is_refused_and_stays() -> None:
    graph = unconvertible("y = Relu(x)")
    model = graph.model
    with pytest.raises(ConversionError, match=r"opset 18 .* 23: GroupNormalization_0's channels are not known"):
        raise_opset(graph, 23)
    assert graph.model is model
    assert model.opset_imports[""] == 18
    raise_opset(graph, 20)  # GroupNormalization changed in 21
    assert graph.model.opset_imports[""] == 20


def test_a_pass_says_why_it_changed_nothing() -> None:
    graph = unconvertible(
        "q = Mul(x, x) m = ReduceMean(q, last) v = Add(m, epsilon) r = Sqrt(v) d = Div(x, r) y = Mul(d, weight)"
    )
    before = graph.operators()
    result = make_pass("fuse-layer-norm").apply(graph, CONTEXT)
    assert result.changes == 0
    assert result.graph.operators() == before
    assert "opset 18 and does not convert to 23" in result.notes[0]
