"""fuse-attention: scale, mask and transposed keys in their spellings; near misses stay and are named.

What PyTorch's exporters write is in test_foreign_exports.py; here are small graphs, one trait each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import assert_same_answers, change, random_x, small_graph

from onnxpress.graph import Graph

HEADS, SIZE = 4, 8
LOWEST = np.finfo(np.float32).min
CONSTANTS = {
    "split": np.array([0, 0, HEADS, SIZE]),
    "merge": np.array([0, 0, -1]),
    "flat": np.array([-1, HEADS * SIZE]),
    "zero": np.float32(0),
    "one": np.float32(1),
    "scale": np.float32(SIZE**-0.5),
    "root_scale": np.float32(SIZE**-0.25),
    "divisor": np.float32(SIZE**0.5),
    "lowest": np.float32(LOWEST),
    "minus_infinity": np.float32(-np.inf),
    "minus_one": np.float32(-1),
    "minus_ten_thousand": np.float32(-1e4),
    **{
        name: (np.random.default_rng(seed).standard_normal((32, 32)) / 4).astype(np.float32)
        for seed, name in enumerate(("wq", "wk", "wv"))
    },
}
SPLIT = """
    ql = MatMul(x, wq) qr = Reshape(ql, split) q = Transpose<perm=[0,2,1,3]>(qr)
    kl = MatMul(x, wk) kr = Reshape(kl, split)
    vl = MatMul(x, wv) vr = Reshape(vl, split) v = Transpose<perm=[0,2,1,3]>(vr)
"""
KEYS = "kt = Transpose<perm=[0,2,3,1]>(kr)"
SCORES = "s = MatMul(q, kt) scores = Mul(s, scale)"
SOFTMAX = "p = Softmax<axis=-1>(masked)"
MERGE = "o = MatMul(p, v) ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, merge)"
SHAPES = ((1, 1), (2, 7), (3, 20))
X_AND_MASK = "float[batch,length,32] x, int64[batch,length] mask"


def attention(
    *,
    split: str = SPLIT,
    keys: str = KEYS,
    scores: str = SCORES,
    mask: str = "masked = Identity(scores)",
    softmax: str = SOFTMAX,
    merge: str = MERGE,
    **more: Any,
) -> Graph:
    weights = {**CONSTANTS, **more.pop("weights", {})}
    return small_graph(f"{split} {keys} {scores} {mask} {softmax} {merge}", weights=weights, **more)


def unmasked(**more: Any) -> Graph:
    """The scores go to the Softmax directly."""
    more.setdefault("softmax", "p = Softmax<axis=-1>(scores)")
    return attention(mask="", **more)


def feeds(*masks: str) -> list[dict[str, Any]]:
    """For each shape: x, and the named masks: padding on the right, on the left, and everywhere in one row."""
    given = []
    for batch, length in SHAPES:
        keep = np.maximum(1, length - 5 * np.arange(batch))[:, None]
        right = (np.arange(length)[None, :] < keep).astype(np.int64)
        rows = {
            "right": right,
            "left": right[:, ::-1].copy(),
            "all": np.where(np.arange(batch)[:, None] == 0, 0, right),
        }
        for name in masks:
            given.append({"x": random_x(batch, length, 32), "mask": rows[name]})
        if not masks:
            given.append({"x": random_x(batch, length, 32)})
    return given


def only_attention(graph: Graph) -> ir.Node:
    assert "Softmax" not in graph.operators()
    (node,) = [node for node in graph.model.graph if node.op_type == "Attention"]
    assert node.attributes["q_num_heads"].as_int() == HEADS
    assert node.attributes["kv_num_heads"].as_int() == HEADS
    return node


@pytest.mark.parametrize(
    ("keys", "scores", "scale"),
    [
        (KEYS, SCORES, SIZE**-0.5),
        (KEYS, "s = MatMul(q, kt) scores = Div(s, divisor)", SIZE**-0.5),
        (KEYS, "qs = Mul(root_scale, q) ks = Mul(kt, root_scale) scores = MatMul(qs, ks)", SIZE**-0.5),
        (KEYS, "qs = Div(q, divisor) scores = MatMul(qs, kt)", SIZE**-0.5),
        (KEYS, "scores = MatMul(q, kt)", 1.0),
        (
            "k = Transpose<perm=[0,2,1,3]>(kr) kt = Transpose<perm=[0,1,3,2]>(k)",
            "s = MatMul(q, kt) scores = Mul(scale, s)",
            SIZE**-0.5,
        ),
        (
            "k = Transpose<perm=[0,2,1,3]>(kr) ks = Mul(k, scale) kt = Transpose<perm=[0,1,3,2]>(ks)",
            "scores = MatMul(q, kt)",
            SIZE**-0.5,
        ),
        (
            """k = Transpose<perm=[0,2,1,3]>(kr) h = Shape<start=1,end=3>(k) e = Shape<start=3>(k) b = Shape<end=2>(k)
            n = Shape<start=2,end=3>(k) m = Constant<value_ints=[-1]>() f = Concat<axis=0>(m, n, e)
            k3 = Reshape(k, f) t3 = Transpose<perm=[0,2,1]>(k3) g = Concat<axis=0>(b, e, n) kt = Reshape(t3, g)""",
            SCORES,
            SIZE**-0.5,
        ),
    ],
)
def test_scales_and_transposed_keys(keys: str, scores: str, scale: float, tmp_path: Path) -> None:
    result = change("fuse-attention", unmasked(keys=keys, scores=scores), tmp_path)
    node = only_attention(result.graph)
    assert node.attributes["scale"].as_float() == pytest.approx(scale)
    assert result.graph.operators() == {"Attention": 1, "MatMul": 3}
    assert (result.graph.model.opset_imports[""], result.graph.model.ir_version) == (23, 11)
    assert (result.changes, result.notes) == (1, ("fused 1 of 1 Softmax as Attention",))
    assert_same_answers(tmp_path, feeds())


ROWS = "m1 = Unsqueeze(mask, middle) visible = Cast<to=9>(m1)"  # (batch, 1, 1, length)
MIDDLE = {"middle": np.array([1, 2])}


@pytest.mark.parametrize("fill", ["lowest", "minus_infinity"])
@pytest.mark.parametrize(
    "mask",
    [
        "masked = Where(visible, scores, {fill})",
        "hidden = Not(visible) masked = Where(hidden, {fill}, scores)",
        "added = Where(visible, zero, {fill}) masked = Add(scores, added)",
        "hidden = Not(visible) added = Where(hidden, {fill}, zero) masked = Add(added, scores)",
    ],
)
def test_masks_of_hidden_keys(mask: str, fill: str, tmp_path: Path) -> None:
    graph = attention(mask=f"{ROWS} {mask.format(fill=fill)}", inputs=X_AND_MASK, weights=MIDDLE)
    result = change("fuse-attention", graph, tmp_path)
    node = only_attention(result.graph)
    assert node.inputs[3] is not None
    assert node.inputs[3].dtype == ir.DataType.FLOAT
    # A row without any key: equal weights by the lowest number; by -inf, NaN in the original.
    assert_same_answers(tmp_path, feeds("right", "left", *(["all"] if fill == "lowest" else [])))


@pytest.mark.parametrize("fill", ["lowest", "minus_infinity"])
def test_rows_without_any_key_behind_a_guard(fill: str, tmp_path: Path) -> None:
    graph = attention(
        mask=f"{ROWS} added = Where(visible, zero, {fill}) masked = Add(scores, added)",
        softmax="w = Softmax<axis=-1>(masked) nan = IsNaN(w) p = Where(nan, zero, w)",
        inputs=X_AND_MASK,
        weights=MIDDLE,
    )
    result = change("fuse-attention", graph, tmp_path)
    only_attention(result.graph)
    assert "IsNaN" not in result.graph.operators()
    assert_same_answers(tmp_path, feeds("right", "left", "all"))


def test_a_computed_mask_and_a_bias(tmp_path: Path) -> None:
    """(1 - mask) * lowest, as older exporters write it, and a position bias of (1, heads, length, length)."""
    mask = """m1 = Unsqueeze(mask, middle) m2 = Cast<to=1>(m1) m3 = Sub(one, m2) added = Mul(m3, lowest)
        ht = Transpose<perm=[0,2,1,3]>(vr) bias = MatMul(ht, kt)
        biased = Add(scores, bias) masked = Add(biased, added)"""
    graph = attention(mask=mask, inputs=X_AND_MASK, weights=MIDDLE)
    result = change("fuse-attention", graph, tmp_path)
    only_attention(result.graph)
    assert_same_answers(tmp_path, feeds("right", "left", "all"))


@pytest.mark.parametrize(
    "shape", ["length,length", "1,length,length", "batch,1,length,length", "batch,4,length,length", "batch,1,1,length"]
)
def test_added_masks_of_any_rank(shape: str, tmp_path: Path) -> None:
    graph = attention(mask="masked = Add(scores, mask)", inputs=f"float[batch,length,32] x, float[{shape}] mask")
    result = change("fuse-attention", graph, tmp_path)
    only_attention(result.graph)
    full = shape in ("batch,1,length,length", "batch,4,length,length")
    assert ("Expand" in result.graph.operators()) is not full
    sizes = [{"batch": batch, "length": length} for batch, length in SHAPES]
    given = []
    for size in sizes:
        mask = 3 * random_x(*(size.get(name) or int(name) for name in shape.split(",")))
        mask[..., size["length"] // 2 + 1 :] = LOWEST
        given.append({"x": random_x(size["batch"], size["length"], 32), "mask": mask})
    assert_same_answers(tmp_path, given)


def test_a_constant_mask(tmp_path: Path) -> None:
    causal = np.where(np.tril(np.ones((7, 7), bool)), 0, LOWEST).astype(np.float32)
    inputs, outputs = "float[batch,7,32] x", "float[batch,7,32] y"
    graph = attention(mask="masked = Add(scores, causal)", weights={"causal": causal}, inputs=inputs, outputs=outputs)
    only_attention(change("fuse-attention", graph, tmp_path).graph)
    assert_same_answers(tmp_path, [{"x": random_x(3, 7, 32)}])


def test_layers_share_one_mask(tmp_path: Path) -> None:
    def layer(x: str, y: str, name: str) -> str:
        return f"""
            {name}ql = MatMul({x}, wq) {name}qr = Reshape({name}ql, split) {name}q = Transpose<perm=[0,2,1,3]>({name}qr)
            {name}kr = Reshape({x}, split) {name}k = Transpose<perm=[0,2,3,1]>({name}kr)
            {name}vr = Reshape({x}, split) {name}v = Transpose<perm=[0,2,1,3]>({name}vr)
            {name}s = MatMul({name}q, {name}k) {name}masked = Add({name}s, added) {name}p = Softmax({name}masked)
            {name}o = MatMul({name}p, {name}v) {name}ot = Transpose<perm=[0,2,1,3]>({name}o)
            {y} = Reshape({name}ot, merge)
        """

    graph = small_graph(
        f"{ROWS} added = Where(visible, zero, lowest) {layer('x', 'h', 'first_')} {layer('h', 'y', 'second_')}",
        weights={**CONSTANTS, **MIDDLE},
        inputs=X_AND_MASK,
    )
    result = change("fuse-attention", graph, tmp_path)
    nodes = [node for node in result.graph.model.graph if node.op_type == "Attention"]
    assert len(nodes) == 2
    assert nodes[0].inputs[3] is nodes[1].inputs[3]
    assert result.graph.operators()["Expand"] == 1
    assert result.notes == ("fused 2 of 2 Softmax as Attention",)
    assert_same_answers(tmp_path, feeds("right", "left", "all"))


def test_heads_merged_into_another_shape(tmp_path: Path) -> None:
    """As GPT-2 does: (batch * length, width)."""
    merge = "o = MatMul(p, v) ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, flat)"
    graph = unmasked(merge=merge, outputs="float[rows,32] y")
    only_attention(change("fuse-attention", graph, tmp_path).graph)
    assert_same_answers(tmp_path, feeds())


def test_keys_of_another_length(tmp_path: Path) -> None:
    """Attention across: keys and values from another sequence, of another batch-independent length."""
    graph = attention(
        split=SPLIT.replace("MatMul(x, wk)", "MatMul(z, wk)").replace("MatMul(x, wv)", "MatMul(z, wv)"),
        mask=f"{ROWS} masked = Where(visible, scores, lowest)",
        inputs="float[batch,length,32] x, float[batch,others,32] z, int64[batch,others] mask",
        weights=MIDDLE,
    )
    only_attention(change("fuse-attention", graph, tmp_path).graph)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert_same_answers(tmp_path, [{"x": random_x(2, 3, 32), "z": random_x(2, 5, 32), "mask": mask}])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_on_four_axes(kind: str, tmp_path: Path) -> None:
    """As PyTorch exports scaled_dot_product_attention at opset 23, with a mask that broadcasts batch and heads."""
    body = f"{SPLIT} k = Transpose<perm=[0,2,1,3]>(kr) o = Attention<scale=0.3>(q, k, v, mask) {MERGE.split(')', 1)[1]}"
    graph = small_graph(
        body, weights=CONSTANTS, inputs=f"float[batch,length,32] x, {kind}[length,length] mask", opset=23, ir_version=11
    )
    result = change("fuse-attention", graph, tmp_path)
    node = only_attention(result.graph)
    assert node.attributes["scale"].as_float() == pytest.approx(0.3)
    assert "Transpose" not in result.graph.operators()
    assert result.notes == ("fused 1 of 1 4-D Attention as 3-D Attention",)
    given = []
    for batch, length in SHAPES:
        visible = np.tril(np.ones((length, length), bool))
        mask = visible if kind == "bool" else np.where(visible, 0.5, -np.inf).astype(np.float32)
        given.append({"x": random_x(batch, length, 32), "mask": mask})
    assert_same_answers(tmp_path, given)


def test_grouped_heads_on_four_axes(tmp_path: Path) -> None:
    body = """
        qr = Reshape(x, split) q = Transpose<perm=[0,2,1,3]>(qr)
        kl = MatMul(x, wk) kr = Reshape(kl, few) k = Transpose<perm=[0,2,1,3]>(kr)
        vl = MatMul(x, wv) vr = Reshape(vl, few) v = Transpose<perm=[0,2,1,3]>(vr)
        o = Attention<is_causal=1>(q, k, v) ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, merge)
    """
    weights = {**CONSTANTS, "wk": CONSTANTS["wk"][:, :16], "wv": CONSTANTS["wv"][:, :16], "few": np.array([0, 0, 2, 8])}
    result = change("fuse-attention", small_graph(body, weights=weights, opset=23, ir_version=11), tmp_path)
    (node,) = [node for node in result.graph.model.graph if node.op_type == "Attention"]
    assert (node.attributes["q_num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()) == (4, 2)
    assert node.attributes["is_causal"].as_int() == 1
    assert_same_answers(tmp_path, feeds())


def test_twice_is_once(tmp_path: Path) -> None:
    result = change("fuse-attention", unmasked(), tmp_path)
    again = change("fuse-attention", result.graph, tmp_path)
    assert (again.changes, again.notes) == (0, ())


MIXED = np.array([-1, 7, HEADS, SIZE])


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (unmasked(softmax="p = Softmax<axis=2>(scores)"), "not over the last axis"),
        (unmasked(merge=f"{MERGE} z = Relu(scores)", outputs="float[b,l,32] y, float[b,h,l,m] z"), "scores are used"),
        (unmasked(merge=f"{MERGE} z = Relu(p)", outputs="float[b,l,32] y, float[b,h,l,m] z"), "weights are used"),
        (unmasked(scores="s = MatMul(q, kt) f = ReduceMax(s) scores = Mul(s, f)"), "not constant"),
        (unmasked(scores="s = MatMul(q, kt) scores = Mul(s, minus_one)"), "its scale is -1.0"),
        (
            attention(mask="b = Add(scores, one) masked = Mul(b, scale)", scores="scores = MatMul(q, kt)"),
            "scaled together",
        ),
        (
            attention(mask="g = Greater(scores, zero) masked = Where(g, scores, minus_one)"),
            "large negative number",
        ),
        (
            attention(
                mask="g = Greater(bias, zero) h = Where(g, scores, minus_ten_thousand) masked = Add(h, bias)",
                scores=f"{SCORES} bias = MatMul(q, kt)",
            ),
            "to which others are added",
        ),
        (unmasked(split=f"{SPLIT} q2 = Relu(q)", scores="s = MatMul(q2, kt) scores = Mul(s, scale)"), "the queries"),
        (unmasked(split=SPLIT.replace("split) v ", "mixed) v "), weights={"mixed": MIXED}), "the values may mix"),
        (unmasked(merge="o = MatMul(p, v) y = Reshape(o, merge)"), "not transposed back"),
        (unmasked(keys="kt = Transpose<perm=[0,2,1,3]>(kr)", scores="scores = MatMul(q, kt)"), "the keys"),
    ],
)
def test_near_misses_stay_and_are_told(graph: Graph, reason: str, tmp_path: Path) -> None:
    before = graph.operators()
    result = change("fuse-attention", graph, tmp_path)
    assert result.changes == 0
    assert result.graph.operators() == before
    assert result.graph.model.opset_imports[""] == 18
    assert result.notes[0] == "fused 0 of 1 Softmax as Attention"
    assert result.notes[1].startswith("nearest miss: Softmax")
    assert reason in result.notes[1]


def test_a_lone_softmax_is_no_candidate(tmp_path: Path) -> None:
    result = change("fuse-attention", small_graph("y = Softmax<axis=-1>(x)"), tmp_path)
    assert (result.changes, result.notes) == (0, ())
