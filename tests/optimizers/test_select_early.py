"""select-early: one token that alone is read goes ahead through what treats each token by itself, and stops at all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import CONTEXT, assert_same_answers, change, random_x, small_graph

from onnxpress.graph import Graph
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.layers import find_layers
from onnxpress.optimizers.matching import attribute

RANDOM = np.random.default_rng(0)
WEIGHTS: dict[str, Any] = {
    **{name: (RANDOM.standard_normal((32, 32)) / 4).astype(np.float32) for name in ("wq", "wk", "wv", "wo")},
    "up": (RANDOM.standard_normal((32, 64)) / 4).astype(np.float32),
    "down": (RANDOM.standard_normal((64, 32)) / 4).astype(np.float32),
    "wide": (RANDOM.standard_normal((32, 128)) / 4).astype(np.float32),
    "bias": RANDOM.standard_normal(32).astype(np.float32),
    "gain": RANDOM.standard_normal(32).astype(np.float32),
    "first": np.array(0),
    "last": np.array(-1),
    "third": np.array(2),
}
ATTENTION = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)\n"
STANDARD = ATTENTION + "a = Attention <q_num_heads: int = 4, kv_num_heads: int = 4> (q, k, v)\n"
MASKED = ATTENTION + "a = Attention <q_num_heads: int = 4, kv_num_heads: int = 4> (q, k, v, mask)\n"
BEHIND = """
o = MatMul (a, wo) ob = Add (o, bias) s = Add (ob, x) n = LayerNormalization <axis: int = -1> (s, gain, bias)
u = MatMul (n, up) g = Gelu (u) d = MatMul (g, down) t = Add (d, n) h = LayerNormalization <axis: int = -1> (t, gain, bias)
"""
SHAPES = ((1, 3), (2, 7), (5, 20))


def classifier(body: str, *, index: str = "first", inputs: str = "", opset: int = 23) -> Graph:
    return small_graph(
        f"{body} y = Gather <axis: int = 1> (h, {index})",
        inputs=f"float[batch,length,32] x{inputs}",
        outputs="float[batch,32] y",
        weights=WEIGHTS,
        opset=opset,
        ir_version=10,
    )


def lengths(graph: Graph, *op_types: str) -> list[Any]:
    """How many tokens the outputs of operators have, in order."""
    nodes = [node for node in graph.model.graph if node.op_type in op_types]
    return [node.outputs[0].shape[1] for node in nodes if node.outputs[0].shape is not None]


def mask_for(batch: int, length: int) -> Any:
    """Another one for each query."""
    numbers = np.random.default_rng(1).standard_normal((batch, 1, length, length)).astype(np.float32)
    return np.where(numbers > 1, np.float32(-1e4), numbers)


@pytest.mark.parametrize("index", ["first", "last", "third"])
def test_attention_and_what_is_behind_it_are_computed_for_one_token(index: str, tmp_path: Path) -> None:
    result = change("select-early", classifier(STANDARD + BEHIND, index=index), tmp_path)
    assert result.changes == 3
    assert result.notes == ("3 products are computed for one token, the only one that is read",)
    products = lengths(result.graph, "MatMul")
    assert [size == 1 for size in products] == [False, False, False, True, True, True]
    assert lengths(result.graph, "Attention") == [1]
    assert_same_answers(tmp_path, [{"x": random_x(batch, length, 32)} for batch, length in SHAPES])


@pytest.mark.parametrize("shape", ["batch,1,length,length", "1,1,length,length", "length,length"])
def test_a_mask_loses_the_other_queries_too(shape: str, tmp_path: Path) -> None:
    result = change("select-early", classifier(MASKED + BEHIND, inputs=f", float[{shape}] mask"), tmp_path)
    assert result.changes == 3
    feeds = []
    for batch, length in SHAPES:
        mask = mask_for(batch, length)
        mask = {"b": mask, "1": mask[:1], "l": mask[0, 0]}[shape[0]]
        feeds.append({"x": random_x(batch, length, 32), "mask": mask})
    assert_same_answers(tmp_path, feeds)


@pytest.mark.parametrize("padding", [(), ("batch",), ("batch", "length")])
def test_attention_of_onnxruntime(padding: tuple[str, ...], tmp_path: Path) -> None:
    given = {(): "q, k, v", ("batch",): 'q, k, v, "", count', ("batch", "length"): 'q, k, v, "", mask, bias4'}[padding]
    inputs = {
        (): "",
        ("batch",): ", int32[batch] count",
        ("batch", "length"): ", int32[batch,length] mask, float[batch,1,length,length] bias4",
    }
    body = ATTENTION + f"a = com.microsoft.MultiHeadAttention <num_heads: int = 4> ({given})\n" + BEHIND
    graph = classifier(body, inputs=inputs[padding])
    attention = next(node for node in graph.model.graph if node.op_type == "MultiHeadAttention")
    attention.outputs[0].shape = ir.Shape(["batch", "length", 32])  # onnx knows no shapes of this domain
    for node in list(graph.model.graph)[4:-1]:
        node.outputs[0].shape = ir.Shape(["batch", "length", 64 if node.outputs[0].name in "ug" else 32])
    result = change("select-early", graph, tmp_path)
    assert result.changes == 3
    feeds = []
    for batch, length in SHAPES:
        kept = np.arange(length, 0, -1, dtype=np.int32)[:batch].clip(1)
        kept = np.resize(kept, batch)
        feed = {"x": random_x(batch, length, 32)}
        if padding == ("batch",):
            feed["count"] = kept
        elif padding:
            feed["mask"] = (np.arange(length) < kept[:, None]).astype(np.int32)
            feed["bias4"] = mask_for(batch, length)
        feeds.append(feed)
    assert_same_answers(tmp_path, feeds)


def test_causal_attention_is_not_passed(tmp_path: Path) -> None:
    """Its mask is made for as many queries as there are."""
    body = STANDARD.replace("kv_num_heads: int = 4", "kv_num_heads: int = 4, is_causal: int = 1") + BEHIND
    result = change("select-early", classifier(body, index="third"), tmp_path)
    assert result.changes == 3
    assert lengths(result.graph, "Attention") != [1]
    assert_same_answers(tmp_path, [{"x": random_x(batch, length, 32)} for batch, length in SHAPES])


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        # A gate of two halves, and numbers that are one for each token or the same for all.
        ("w = MatMul (x, wide) b, c = Split <axis: int = -1, num_outputs: int = 2> (w) m = Mul (b, c) h = MatMul (m, down)", 2),
        ("s = ReduceSum <keepdims: int = 1> (x, axis) m = Mul (x, s) h = MatMul (m, wq)", 1),
        ("m = Mul (x, same) h = MatMul (m, wq)", 1),
        # Positions have no axis for the batch: taken behind the sum.
        ("p = MatMul (x, wq) t = Slice (places, first1, size, first1) z = Add (p, t) h = MatMul (z, wk)", 1),
        # What mixes tokens, or lays them out anew, is not passed.
        ("m = Softmax <axis: int = 1> (x) h = MatMul (m, wq)", 1),
        ("t = Transpose <perm: ints = [0, 2, 1]> (x) r = Reshape (t, flat) z = Reshape (r, back) h = MatMul (z, wq)", 1),
        ("n = LayerNormalization <axis: int = 1> (x, square) h = MatMul (n, wq)", 1),
        # Nor are norms whose scales are another one for each token.
        ("n = LayerNormalization <axis: int = -1> (x, square) h = MatMul (n, wq)", 1),
        ("r = Relu (x) n = RMSNormalization <axis: int = -1> (x, r) h = MatMul (n, wq)", 1),
        # Nothing to save: no product.
        ("m = Relu (x) h = Add (m, bias)", 0),
        ("h = MatMul (x, x2)", 0),
    ],
)  # fmt: skip
def test_what_is_passed(body: str, changes: int, tmp_path: Path) -> None:
    more = {
        "axis": np.array([-1]),
        "same": random_x(1, 1, 32),
        "places": random_x(40, 32),
        "first1": np.array([0]),
        "size": np.array([20]),
        "flat": np.array([0, -1]),
        "back": np.array([0, -1, 32]),
        "square": np.ones((20, 32), np.float32),
    }
    graph = small_graph(
        f"{body} y = Gather <axis: int = 1> (h, third)",
        inputs="float[batch,20,32] x" + (", float[batch,32,32] x2" if "x2" in body else ""),
        outputs="float[batch,32] y",
        weights={**WEIGHTS, **{name: array for name, array in more.items() if name in body}},
        opset=23,
        ir_version=10,
    )
    result = change("select-early", graph, tmp_path)
    assert result.changes == changes
    feeds = [{"x": random_x(batch, 20, 32), "x2": random_x(batch, 32, 32)} for batch in (1, 3)]
    assert_same_answers(
        tmp_path, [{name: feed[name] for name in ("x", "x2") if name != "x2" or "x2" in body} for feed in feeds]
    )


@pytest.mark.parametrize(
    "form",
    [
        "h is an output",
        "n is read by a sum",
        "another token is read, too",
        "the place is computed",
        "several are taken",
    ],
)
def test_what_others_read_stays(form: str, tmp_path: Path) -> None:
    body = "n = MatMul (x, wq) g = Relu (n) h = MatMul (g, wk)"
    more, ending, outputs = "", "y = Gather <axis: int = 1> (h, first)", "float[batch,32] y"
    if form == "h is an output":
        outputs += ", float[batch,length,32] h"
    elif form == "n is read by a sum":
        ending += " z = ReduceSum (n)"
        outputs += ", float z"
    elif form == "another token is read, too":
        ending += " z = Gather <axis: int = 1> (h, third)"
        outputs += ", float[batch,32] z"
    elif form == "the place is computed":
        more, ending = ", int64 place", "y = Gather <axis: int = 1> (h, place)"
    else:
        ending, outputs = "y = Gather <axis: int = 1> (h, two)", "float[batch,2,32] y"
    graph = small_graph(
        f"{body} {ending}",
        inputs=f"float[batch,length,32] x{more}",
        outputs=outputs,
        weights={**WEIGHTS, **({"two": np.array([0, 1])} if "two" in ending else {})},
    )
    result = change("select-early", graph, tmp_path)
    products = [node for node in result.graph.model.graph if node.op_type == "MatMul"]
    assert result.changes == (1 if form == "n is read by a sum" else 0)
    assert len(products) == 2
    place = {"place": np.array(1)} if more else {}
    assert_same_answers(tmp_path, [{"x": random_x(batch, length, 32), **place} for batch, length in SHAPES])


def test_it_goes_on_through_several_layers_and_again_changes_nothing(tmp_path: Path) -> None:
    body = "a = MatMul (x, wq) b = Gelu (a) c = Add (b, x) d = MatMul (c, up) e = Relu (d) h = MatMul (e, down)"
    result = change("select-early", classifier(body), tmp_path)
    assert result.changes == 3
    assert make_pass("select-early").apply(result.graph.clone(), CONTEXT).changes == 0
    gathers = [node for node in result.graph.model.graph if node.op_type == "Gather"]
    assert [attribute(node, "axis", 0) for node in gathers] == [1, 1]
    assert gathers[0].inputs[0] is not None
    assert gathers[0].inputs[0].name == "x"
    assert_same_answers(tmp_path, [{"x": random_x(batch, length, 32)} for batch, length in SHAPES])


def test_a_norm_that_queries_keys_and_values_read_is_still_read_by_them_alone(tmp_path: Path) -> None:
    """So that its scale may take over factors of their inputs (SmoothQuant, AWQ)."""
    normed = "n = LayerNormalization <axis: int = -1> (x, gain, bias)\n" + STANDARD.replace("(x, w", "(n, w")
    behind = BEHIND.replace("n = L", "m = L").replace("(n, up)", "(m, up)").replace("(d, n)", "(d, m)")
    result = change("select-early", classifier(normed + behind), tmp_path)
    assert result.changes == 3
    norm = next(node for node in result.graph.model.graph if node.op_type == "LayerNormalization")
    assert [use.node.op_type for use in norm.outputs[0].uses()] == ["MatMul"] * 3
    assert_same_answers(tmp_path, [{"x": random_x(batch, length, 32)} for batch, length in SHAPES])


def test_padding_of_unknown_shape_and_operators_of_others_are_not_passed() -> None:
    """The one may be a mask for each query; the others may be anything."""
    attention = 'k = MatMul (x, wk) a = com.microsoft.MultiHeadAttention <num_heads: int = 4> (x, k, x, "", mask)'
    for body, inputs in ((f"{attention} h = MatMul (a, wq)", ", int32 mask"), ("a = Relu (x) h = MatMul (a, wq)", "")):
        graph = classifier(body, inputs=inputs)
        passed = next(node for node in graph.model.graph if node.outputs[0].name == "a")
        if inputs:
            mask = next(value for value in graph.model.graph.inputs if value.name == "mask")
            mask.shape = None
        else:
            passed.domain = "somebodys.own"
        for value in (passed.outputs[0], graph.model.graph[-2].outputs[0]):
            value.shape = ir.Shape(["batch", "length", 32])
        assert make_pass("select-early").apply(graph, CONTEXT).changes == 1
        assert passed.outputs[0].shape == ["batch", "length", 32]


def test_outputs_that_nothing_reads_keep_their_shapes() -> None:
    graph = classifier(STANDARD.replace("a = Attention", "a, keys, values = Attention") + BEHIND)
    attention = next(node for node in graph.model.graph if node.op_type == "Attention")
    for value in attention.outputs[1:]:
        value.shape = ir.Shape(["batch", 4, "length", 8])
    assert make_pass("select-early").apply(graph, CONTEXT).changes == 3
    assert [value.shape for value in attention.outputs] == [["batch", 1, 32], *[["batch", 4, "length", 8]] * 2]


def test_layers_of_one_token_and_of_many_cannot_stand_for_each_other(tmp_path: Path) -> None:
    def layers(count: int) -> str:
        body, x = "z = Relu (x)\n", "z"
        for index in range(count):
            names = {
                "x": x,
                **{
                    name: f"{name}{index}"
                    for name in ("q", "k", "v", "a", "o", "ob", "s", "n", "u", "g", "d", "t", "h")
                },
            }
            lines = (STANDARD + BEHIND).replace("(", "( ").replace(")", " )").replace(",", " ,")
            body += " ".join(names.get(word, word) for word in lines.split()) + "\n"
            x = names["h"]
        return body

    graph = classifier(layers(3).replace("h2", "h"), index="last")
    assert len(find_layers(graph)) == 3
    result = change("select-early", graph, tmp_path)
    assert result.changes == 3
    assert find_layers(result.graph) == ()
