"""FuseAttention over all combinations of scale, keys and mask, on several opsets: fused where it may be, equal always.

Rows without any key are among the inputs: Softmax of equal scores gives equal weights, and so must the fused form.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target

HEADS, HEAD_DIM = 2, 4
WIDTH = HEADS * HEAD_DIM
TOLERANCE = 1e-5  # float32, results of size 1
LOWEST = float(np.finfo(np.float32).min)

SCALES = ("none", "before the heads", "queries", "queries and keys", "divided", "multiplied")
KEYS = ("one transposition", "two transpositions")
# What masks the scores: the shape of the mask, and whether Where, an added mask, or something else.
FUSED_MASKS: dict[str, tuple[str, list[Any]]] = {
    "none": ("none", []),
    "added, all axes": ("add", ["batch", 1, "length", "keys"]),
    "added, keys only": ("add", ["batch", 1, 1, "keys"]),
    "added, two axes": ("add", ["length", "keys"]),
    "added, three axes": ("add", [HEADS, "length", "keys"]),
    "added, lowest number": ("lowest", ["batch", 1, "length", "keys"]),
    "filled with -inf": ("where -inf", ["batch", 1, "length", "keys"]),
    "filled with -1e9": ("where -1e9", ["batch", 1, 1, "keys"]),
    "bias and mask": ("two", ["batch", 1, 1, "keys"]),
}
OTHER_MASKS: dict[str, tuple[str, list[Any]]] = {
    "filled with -5": ("where -5", ["batch", 1, "length", "keys"]),
    "multiplied": ("multiply", ["batch", 1, "length", "keys"]),
    "scaled after": ("scaled after", ["batch", 1, "length", "keys"]),
}
OPSETS = (14, 17, 18, 20, 22, 23)
SIZES = ((1, 1, 3), (2, 5, 7), (3, 8, 2))  # batch, length, keys


class Builder:
    """Collects nodes; operands are names of values, or arrays, which become constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def __call__(self, op_type: str, *operands: Any, **attributes: Any) -> str:
        names = [operand if isinstance(operand, str) else self._constant(operand) for operand in operands]
        output = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], name=output, **attributes))
        return output

    def linear(self, value: str) -> str:
        weight = self.random.standard_normal((WIDTH, WIDTH)) * 0.4
        return self("Add", self("MatMul", value, weight), self.random.standard_normal(WIDTH))

    def heads(self, value: str, permutation: list[int]) -> str:
        return self("Transpose", self("Reshape", value, np.array([0, -1, HEADS, HEAD_DIM])), perm=permutation)

    def _constant(self, number: Any) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.asarray(number)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        self.constants.append(numpy_helper.from_array(array, name))
        return name


def attention(
    *, scale: str = "divided", keys: str = KEYS[0], mask: tuple[str, list[Any]], cross: bool = False, opset: int = 18
) -> onnx.ModelProto:
    """x (batch, length, WIDTH), with `cross` also memory (batch, keys, WIDTH) → y, as PyTorch's exporters spell it."""
    o = Builder()
    kind, shape = mask
    memory = "memory" if cross else "x"
    query = o.linear("x")
    if scale == "before the heads":
        query = o("Mul", query, HEAD_DIM**-0.5)
    query, key, value = o.heads(query, [0, 2, 1, 3]), o.linear(memory), o.heads(o.linear(memory), [0, 2, 1, 3])
    if keys == "one transposition":
        key = o.heads(key, [0, 2, 3, 1])
    else:
        key = o("Transpose", o.heads(key, [0, 2, 1, 3]), perm=[0, 1, 3, 2])
    if scale == "queries":
        query = o("Mul", HEAD_DIM**-0.5, query)
    if scale == "queries and keys":
        query, key = o("Mul", query, np.array([HEAD_DIM**-0.25])), o("Mul", key, np.array([HEAD_DIM**-0.25]))
    scores = o("MatMul", query, key)
    if scale == "divided":
        scores = o("Div", scores, HEAD_DIM**0.5)
    if scale == "multiplied":
        scores = o("Mul", scores, HEAD_DIM**-0.5)
    if kind == "two":
        scores = o("Add", scores, o.random.standard_normal((1, HEADS, 1, 1)))
    if kind.startswith("where"):
        scores = o("Where", o("Not", "mask"), float(kind.split()[1]), scores)
    elif kind == "multiply":
        scores = o("Mul", scores, "mask")
    elif kind != "none":
        scores = o("Add", scores, "mask")
    if kind == "scaled after":
        scores = o("Mul", scores, 0.5)
    joined = o("Transpose", o("MatMul", o("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    result = o("Reshape", joined, np.array([0, 0, WIDTH]))
    o.nodes.append(helper.make_node("Neg", [result], ["y"]))
    names = {"length": "length", "keys": "keys" if cross else "length"}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", WIDTH])]
    if cross:
        inputs.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, ["batch", "keys", WIDTH]))
    if kind != "none":
        of = TensorProto.BOOL if kind.startswith("where") else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info("mask", of, [names.get(axis, axis) for axis in shape]))
    return helper.make_model(
        helper.make_graph(
            o.nodes, "graph", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], o.constants
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def feeds(mask: tuple[str, list[Any]], *, cross: bool) -> list[dict[str, Any]]:
    """Inputs of several sizes; of masks that hide, the last row hides every key."""
    random = np.random.default_rng(1)
    kind, shape = mask
    result = []
    for batch, length, keys in SIZES:
        sizes = {"batch": batch, "length": length, "keys": keys if cross else length}
        feed = {"x": random.standard_normal((batch, length, WIDTH)).astype(np.float32)}
        if cross:
            feed["memory"] = random.standard_normal((batch, keys, WIDTH)).astype(np.float32)
        concrete = [sizes.get(axis, axis) for axis in shape]
        if kind.startswith("where") or kind == "lowest":
            allowed = random.random(concrete) < 0.6
            allowed[..., 0] = True
            if kind != "where -inf":  # not a number in the original
                allowed[..., -1, :] = False
            feed["mask"] = allowed if kind != "lowest" else np.where(allowed, 0, LOWEST).astype(np.float32)
        elif kind != "none":
            feed["mask"] = random.standard_normal(concrete).astype(np.float32)
        result.append(feed)
    return result


def press(proto: onnx.ModelProto) -> tuple[Graph, tuple[str, ...]]:
    graph = Graph(model=ir.from_proto(proto), signature=Signature(task="module", inputs=(), outputs=()))
    context = PassContext(target=target("cpu"))
    for name in ("fold", "deduplicate", "fuse-attention"):
        result = make_pass(name).apply(graph, context)
        graph = result.graph
    return graph, result.notes


def assert_same(proto: onnx.ModelProto, graph: Graph, inputs: list[dict[str, Any]], path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    ir.save(graph.model, path / "fused.onnx")
    original, fused = (
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        for source in (proto.SerializeToString(), path / "fused.onnx")
    )
    for feed in inputs:
        before, after = original.run(None, feed)[0], fused.run(None, feed)[0]
        np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", FUSED_MASKS.values(), ids=FUSED_MASKS.keys())
def test_every_scale_and_every_spelling_of_the_keys(mask: tuple[str, list[Any]], cross: bool, tmp_path: Path) -> None:
    for number, (scale, keys) in enumerate(itertools.product(SCALES, KEYS)):
        proto = attention(scale=scale, keys=keys, mask=mask, cross=cross, opset=OPSETS[number % len(OPSETS)])
        graph, notes = press(proto)
        assert notes == ("fused 1 of 1 Softmax as Attention",), (scale, keys)
        assert not {"Softmax", "Transpose"} & set(graph.operators())
        assert_same(proto, graph, feeds(mask, cross=cross), tmp_path)


@pytest.mark.parametrize("mask", OTHER_MASKS.values(), ids=OTHER_MASKS.keys())
def test_what_is_no_mask_is_left_alone(mask: tuple[str, list[Any]], tmp_path: Path) -> None:
    proto = attention(mask=mask)
    graph, notes = press(proto)
    assert notes[0] == "fused 0 of 1 Softmax as Attention"
    assert notes[1].startswith("nearest miss: softmax_")
    assert "Attention" not in graph.operators()
    assert_same(proto, graph, feeds(mask, cross=False), tmp_path)
