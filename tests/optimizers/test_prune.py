"""Structured pruning of graphs: what goes together, how weights that stay make up for those that go, and what stays whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from small_graphs import small_graph

from onnxpress.calibration import ActivationStream, activations
from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.dependencies import NotFollowedError, attention_heads, follow, follow_heads
from onnxpress.optimizers.edits import add_constant, insert
from onnxpress.optimizers.layers import drop_layers, find_layers
from onnxpress.optimizers.prune import PruneOptions, prune, without
from onnxpress.optimizers.slicing import cut
from onnxpress.optimizers.targets import target
from onnxpress.pruned import Pruned
from onnxpress.workbench import Workbench

RANDOM = np.random.default_rng(0)
WIDTH, WIDE = 32, 64


def weight(*shape: int) -> Any:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def feed_forward(middle: str, **weights: Any) -> Graph:
    """x → up → middle → down → y, with a residual."""
    return small_graph(
        f"h = MatMul (x, up) g = Add (h, b) {middle} d = MatMul (m, down) y = Add (x, d)",
        weights={"up": weight(WIDTH, WIDE), "b": weight(WIDE), "down": weight(WIDE, WIDTH)} | weights,
        opset=20,
        ir_version=9,
    )


def layer(number: int, source: str) -> str:
    """A post-norm transformer layer with 4 heads of 8."""
    n = number
    return f"""
        q{n} = MatMul ({source}, wq{n}) k{n} = MatMul ({source}, wk{n}) v{n} = MatMul ({source}, wv{n})
        a{n} = Attention <q_num_heads = 4, kv_num_heads = 4> (q{n}, k{n}, v{n})
        o{n} = MatMul (a{n}, wo{n}) r{n} = Add (o{n}, {source}) s{n} = LayerNormalization (r{n}, ones)
        u{n} = MatMul (s{n}, up{n}) g{n} = Gelu (u{n}) d{n} = MatMul (g{n}, down{n})
        t{n} = Add (d{n}, s{n}) y{n} = LayerNormalization (t{n}, ones)
    """


def encoder(layers: int) -> Graph:
    body, source = "s = LayerNormalization (x, ones)", "s"
    weights: dict[str, Any] = {"ones": np.ones(WIDTH, np.float32)}
    for number in range(layers):
        body += layer(number, source)
        source = f"y{number}"
        weights |= {f"{name}{number}": weight(WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
        weights |= {f"up{number}": weight(WIDTH, WIDE), f"down{number}": weight(WIDE, WIDTH)}
    body += f" y = Identity ({source})"
    graph = small_graph(body, weights=weights, opset=23, ir_version=11)
    for node in graph.model.graph:  # onnx infers no shape for Attention without its optional inputs
        for value in node.outputs:
            if value.shape is None:
                value.shape = ir.Shape(["batch", "length", WIDTH])
    x = TensorSpec(name="x", dtype="float32", shape=("batch", "length", WIDTH))
    graph.signature = Signature(task="module", inputs=(x,), outputs=(), axes={"batch": (1, 8), "length": (1, 99)})
    return graph


def inputs(count: int = 12) -> Iterator[Arrays]:
    mix = np.random.default_rng(3).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 6
    for seed in range(count):
        yield {"x": np.random.default_rng(seed).standard_normal((1, 40, WIDTH)).astype(np.float32) @ mix}


def run(graph: Graph, folder: Path, feeds: Arrays) -> Any:
    path = folder / f"{id(graph)}.onnx"
    ir.save(graph.model, path)
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))[0]


def pruned(graph: Graph, folder: Path, *, training_follows: bool = False, **options: Any) -> Pruned:
    bench = Workbench(folder, target("cpu"))
    return prune(
        graph,
        PruneOptions(**options),
        stream=partial(ActivationStream, open_session=bench.open, inputs=inputs),
        activations=partial(activations, open_session=bench.open, inputs=inputs),
        training_follows=training_follows,
    )


@pytest.mark.parametrize(
    ("middle", "weights"),
    [
        ("m = Gelu (g)", {}),
        ("e = Sigmoid (g) m = Mul (g, e)", {}),
        ("e = Gelu (g) o = MatMul (x, up2) m = Mul (e, o)", {"up2": weight(WIDTH, WIDE)}),
        ("e = Gelu (g) m = Mul (e, scale)", {"scale": weight(WIDE)}),
        ("e = Relu (g) f = Reshape (e, two) n = Relu (f) m = Reshape (n, three)",
         {"two": np.array([-1, WIDE]), "three": np.array([1, -1, WIDE])}),
        ("l, r = Split <axis = 2, num_outputs = 2> (p) e = Gelu (l) n = Mul (e, r) o = MatMul (x, up3) m = Add (n, o)",
         {"up3": weight(WIDTH, WIDE)}),
    ],
)  # fmt: skip
def test_channels_without_a_reader_can_go_and_nothing_changes(middle: str, weights: Any, tmp_path: Path) -> None:
    if "Split" in middle:
        middle = "p = MatMul (x, both) " + middle.replace("e = Gelu (l)", "e0 = Gelu (l) e = Add (e0, g)")
        weights = weights | {"both": weight(WIDTH, 2 * WIDE)}
    graph = feed_forward(middle, **weights)
    lost = frozenset((0, 5, 6, 63))
    down = graph.model.graph.initializers["down"]
    array = down.const_value.numpy().copy()
    array[sorted(lost)] = 0
    down.const_value = ir.tensor(array, name="down")
    before = graph.clone()
    reader = next(node for node in graph.model.graph if node.inputs[-1] is graph.model.graph.initializers["down"])
    cut(graph, follow(reader.inputs[0], 2, lost))
    assert graph.model.graph.initializers["down"].shape == (WIDE - 4, WIDTH)
    assert graph.model.graph.initializers["up"].shape == (WIDTH, WIDE - 4)
    for feeds in inputs(3):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(before, tmp_path, feeds), atol=1e-5)


@pytest.mark.parametrize(
    ("middle", "said"),
    [
        ("m = Softmax (g)", r"Softmax_\d \(Softmax\) is no operator that channels can be followed through"),
        (
            "m = LayerNormalization (g, ones)",
            r"LayerNormalization_\d \(LayerNormalization\) normalizes over all channels",
        ),
        ("f = Reshape (g, odd) e = Relu (f) m = Reshape (e, even)", r"Reshape_\d \(Reshape\) mixes the channels"),
        ("t = Transpose <perm = [0, 2, 1]> (g) p = MatMul (g, t) m = MatMul (p, g)", "multiplies two computed values"),
    ],
)
def test_what_cannot_be_followed_is_named_and_left_whole(middle: str, said: str, tmp_path: Path) -> None:
    graph = feed_forward(
        middle,
        ones=np.ones(WIDE, np.float32),
        odd=np.array([1, -1, 2, WIDE // 4, 2]),
        even=np.array([1, -1, WIDE]),
    )
    before = graph.clone()
    reader = next(node for node in graph.model.graph if node.outputs[0].name == "d")
    with pytest.raises(NotFollowedError, match=said):
        follow(reader.inputs[0], 2, frozenset((1,)))
    with pytest.raises(RecipeError, match=f"nothing can go.*{said}"):
        pruned(graph, tmp_path, ffn=0.5)
    for feeds in inputs(2):
        np.testing.assert_array_equal(run(graph, tmp_path, feeds), run(before, tmp_path, feeds))


def test_layers_that_share_a_weight_lose_the_same_channels(tmp_path: Path) -> None:
    """ALBERT's layers: all uses of one weight become smaller, and its fit counts all of them."""
    more = "m = Gelu (g) i = MatMul (m, down) j = MatMul (i, up) k = Add (j, b) l = Gelu (k) o = MatMul (l, down)"
    graph = feed_forward(f"{more} r = Add (x, o) s = MatMul (r, up) t = Add (s, b) m2 = Gelu (t)")
    reader = next(node for node in graph.model.graph if node.outputs[0].name == "d")
    reader.replace_input_with(0, next(node for node in graph.model.graph if node.outputs[0].name == "m2").outputs[0])
    before = graph.clone()
    lost = frozenset((0, 5, 63))
    for item in (graph, before):
        down = item.model.graph.initializers["down"]
        array = down.const_value.numpy().copy()
        array[sorted(lost)] = 0
        down.const_value = ir.tensor(array, name="down")
    cut(graph, follow(reader.inputs[0], 2, lost))
    assert graph.model.graph.initializers["down"].shape == (WIDE - 3, WIDTH)
    assert graph.model.graph.initializers["up"].shape == (WIDTH, WIDE - 3)
    for feeds in inputs(3):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(before, tmp_path, feeds), atol=1e-5)
    result = pruned(graph, tmp_path, ffn=0.5, multiple=1)
    assert [note for note in result.notes if note.startswith("ffn: 1 places")], "one place, not three"
    assert graph.model.graph.initializers["down"].shape == (31, WIDTH)
    assert len(graph.model.graph.initializers["down"].uses()) == 3
    for feeds in inputs(3):
        wanted = run(before, tmp_path, feeds)
        assert np.square(run(graph, tmp_path, feeds) - wanted).mean() < 0.3 * np.square(wanted).mean()


def test_a_weight_that_something_else_reads_stays_whole(tmp_path: Path) -> None:
    graph = feed_forward(
        "m = Gelu (g) t = Transpose <perm = [1, 0]> (down) p = MatMul (x, t) z = ReduceSum (p, last)",
        last=np.array([2]),
    )
    d = next(node for node in graph.model.graph if node.outputs[0].name == "d")
    add = next(node for node in graph.model.graph if node.outputs[0].name == "y")
    add.replace_input_with(0, next(node for node in graph.model.graph if node.outputs[0].name == "z").outputs[0])
    assert d.outputs[0] in add.inputs
    with pytest.raises(RecipeError, match=r"nothing can go.*shares its weight down with \S+ \(Transpose\)"):
        pruned(graph, tmp_path, ffn=0.5)


def test_a_channel_that_is_an_output_stays(tmp_path: Path) -> None:
    graph = small_graph(
        "m = MatMul (x, up) y = MatMul (m, down)",
        outputs=f"float[batch,length,{WIDTH}] y, float[batch,length,{WIDE}] m",
        weights={"up": weight(WIDTH, WIDE), "down": weight(WIDE, WIDTH)},
    )
    with pytest.raises(RecipeError, match="m is an input or output of the graph"):
        pruned(graph, tmp_path, ffn=0.5)


def test_heads_go_with_their_queries_keys_and_values(tmp_path: Path) -> None:
    graph = encoder(1)
    out = graph.model.graph.initializers["wo0"]
    array = out.const_value.numpy().copy()
    array[8:16] = array[24:32] = 0
    out.const_value = ir.tensor(array, name="wo0")
    before = graph.clone()
    attention = next(node for node in graph.model.graph if node.op_type == "Attention")
    cut(graph, follow_heads(attention, [1, 3]))
    sizes = {name: tuple(value.shape or ()) for name, value in graph.model.graph.initializers.items()}
    assert [sizes[name] for name in ("wq0", "wk0", "wv0", "wo0")] == [(WIDTH, 16)] * 3 + [(16, WIDTH)]
    assert attention.attributes["q_num_heads"].value == 2
    for feeds in inputs(3):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(before, tmp_path, feeds), atol=1e-5)


# Queries, keys and values out of one tensor; attention spelled out, and as one operator on four axes.
PACKED = "h = MatMul (x, qkv) f = Reshape (h, five) "
SLICES = """
    a = Slice (f, zero, one, two) b = Slice (f, one, two, two) c = Slice (f, two, three, two)
    qa = Squeeze (a, two) ka = Squeeze (b, two) va = Squeeze (c, two)
"""
GATHERS = "qa = Gather <axis = 2> (f, i0) ka = Gather <axis = 2> (f, i1) va = Gather <axis = 2> (f, i2)"
TURNED = "q = Transpose <perm = [0, 2, 1, 3]> (qa) k = Transpose <perm = [0, 2, 1, 3]> (ka) v = Transpose <perm = [0, 2, 1, 3]> (va)"
SPELLED_OUT = """
    kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) w = Softmax (s) n = IsNaN (w) g = Where (n, none, w)
    t = MatMul (g, v)
"""
BIASED = """
    e = Gather (table, near) eh = Transpose <perm = [2, 0, 1]> (e) eu = Unsqueeze (eh, zero) ex = Expand (eu, four)
    kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) sb = Add (s, ex) w = Softmax (sb) t = MatMul (w, v)
"""
MERGED = " u = Transpose <perm = [0, 2, 1, 3]> (t) o = Reshape (u, flat) d = MatMul (o, wo) y = Add (x, d)"


@pytest.mark.parametrize("split", [SLICES, GATHERS], ids=["slices", "gathers"])
@pytest.mark.parametrize(
    "attention", [SPELLED_OUT, BIASED, " t = Attention (q, k, v)"], ids=["spelled out", "biased", "operator"]
)
def test_heads_of_attention_that_is_not_fused_go(split: str, attention: str, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    weights: dict[str, Any] = {"qkv": weight(WIDTH, 3 * WIDTH), "wo": weight(WIDTH, WIDTH), "table": weight(7, 4) * 3}
    weights |= {
        "five": np.array([0, 0, 3, -1, 8]),
        "flat": np.array([0, 0, WIDTH]),
        "near": random.integers(0, 7, (40, 40)),
    }
    weights |= {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "three": np.array([3])}
    weights |= {
        "i0": np.array(0),
        "i1": np.array(1),
        "i2": np.array(2),
        "none": np.float32(0),
        "four": np.array([1, 4, 40, 40]),
    }
    body = PACKED + split + TURNED + attention + MERGED
    used = {name: array for name, array in weights.items() if name in re.findall(r"\w+", body)}
    graph = small_graph(body, weights=used, opset=23, ir_version=11)
    graph = make_pass("fold").apply(graph, PassContext(target=target("cpu"))).graph
    for node in graph.model.graph:  # onnx infers no shape for Attention without its optional inputs
        if node.op_type == "Attention":
            node.outputs[0].shape = ir.Shape(["batch", 4, "length", 8])
        elif node.outputs[0].name == "u":
            node.outputs[0].shape = ir.Shape(["batch", "length", 4, 8])
    out = graph.model.graph.initializers["wo"]
    array = out.const_value.numpy().copy()
    array[8:16] = array[24:32] = 0
    out.const_value = ir.tensor(array, name="wo")
    before = graph.clone()
    (place,) = [node for node in graph.model.graph if attention_heads(node) is not None]
    cut(graph, follow_heads(place, [1, 3]))
    sizes = {name: tuple(value.shape or ()) for name, value in graph.model.graph.initializers.items()}
    assert sizes["qkv"] == (WIDTH, 3 * 16)
    assert sizes["wo"] == (16, WIDTH)
    assert sizes.get("table", (7, 2)) == (7, 2)
    for feeds in inputs(3):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(before, tmp_path, feeds), atol=1e-5)
    assert any(note.startswith("heads: 1 places, 0.0 %") for note in pruned(before, tmp_path, heads=2).notes)
    assert before.model.graph.initializers["wo"].shape == (16, WIDTH)


def test_a_norm_over_all_heads_is_scaled_to_those_that_stay(tmp_path: Path) -> None:
    """The largest queries go, so that the root mean square of the others is a fraction of all heads'."""
    graph = encoder(1)
    weights = graph.model.graph.initializers
    attention = next(node for node in graph.model.graph if node.op_type == "Attention")
    scale = np.random.default_rng(1).uniform(0.5, 1.5, WIDTH).astype(np.float32)
    query = attention.inputs[0]
    assert query is not None
    norm = insert(
        attention,
        "RMSNormalization",
        [query, add_constant(graph, "scale", scale)],
        {"axis": -1},
        name="norm",
        dtype=query.dtype,
        shape=query.shape,
    )
    attention.replace_input_with(0, norm)
    larger, zeros = weights["wq0"].const_value.numpy().copy(), weights["wo0"].const_value.numpy().copy()
    larger[:, 24:] *= 10
    zeros[24:] = 0
    weights["wq0"].const_value, weights["wo0"].const_value = ir.tensor(larger, name="wq0"), ir.tensor(zeros, name="wo0")
    before = graph.clone()
    result = pruned(graph, tmp_path, heads=1)
    assert "1 norms over all heads take their mean over those that stay" in " ".join(result.notes)
    assert {name: weights[name].shape[-1] for name in ("wq0", "scale")} == {"wq0": 24, "scale": 24}
    fitted = result.changes["scale"].after
    ratio = fitted / scale[:24]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert 0.1 < ratio[0] < 0.4, "three heads of size 1 beside one of 10"
    unfitted = graph.clone()
    unfitted.model.graph.initializers["scale"].const_value = ir.tensor(scale[:24], name="scale")
    errors = []
    for item in (graph, unfitted):
        pairs = [(run(item, tmp_path, feeds), run(before, tmp_path, feeds)) for feeds in inputs(3)]
        errors.append(np.mean([np.square(found - wanted).mean() for found, wanted in pairs]))
    assert errors[0] < 0.1 * errors[1]


def test_sinks_go_with_the_query_heads_that_have_them(tmp_path: Path) -> None:
    out = weight(WIDTH, WIDTH)
    out[16:] = 0  # so that what the second key-value head and its two queries say does not matter
    sizes = {"wq": (WIDTH, 32), "wk": (WIDTH, 16), "wv": (WIDTH, 16)}
    graph = small_graph(
        """
        q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
        a = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (q, k, v, , , ends, total, , , , , sinks)
        y = MatMul (a, wo)
        """,
        weights={name: weight(*shape) for name, shape in sizes.items()}
        | {"wo": out, "sinks": np.array([2, -1, 0.5, 1], np.float32), "ends": np.array([39], np.int32)}
        | {"total": np.array(40, np.int32)},
        opset=20,
        ir_version=9,
    )
    attention = next(node for node in graph.model.graph if node.op_type == "GroupQueryAttention")
    attention.outputs[0].shape = ir.Shape(["batch", "length", WIDTH])
    before = graph.clone()
    cut(graph, follow_heads(attention, [1]))
    (sinks,) = [value for value in attention.inputs if value is not None and value.name == "sinks"]
    assert sinks.const_value is not None
    assert sinks.const_value.numpy().tolist() == [2, -1]
    for feeds in inputs(3):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(before, tmp_path, feeds), atol=1e-5)


def test_a_mask_for_each_head_that_is_an_input_keeps_the_heads_whole() -> None:
    graph = small_graph(
        "y = Attention <q_num_heads = 4, kv_num_heads = 4> (x, x, x, mask)",
        inputs="float[batch,length,32] x, float[batch,4,length,length] mask",
        opset=23,
        ir_version=11,
    )
    with pytest.raises(NotFollowedError, match="mask is an input or output of the graph"):
        follow_heads(graph.model.graph[0], [0])


def test_the_weights_that_stay_make_up_for_those_that_go() -> None:
    """Correlated channels: a copy costs nothing to lose, and least squares on what stays is reached exactly."""
    random = np.random.default_rng(1)
    x = random.standard_normal((4000, 12)) @ random.standard_normal((12, 12))
    x = np.concatenate([x, x[:, :3]], axis=1)  # 12, 13 and 14 are copies
    matrix = random.standard_normal((15, 7))
    moments = (x.T @ x / len(x)).astype(np.float32)
    gone, (fitted,), error = without([(matrix, moments)], size=1, number=3)
    assert sorted(index % 12 for index in gone) == [0, 1, 2], "one of each pair"
    np.testing.assert_array_equal(fitted[gone], 0)
    stay = [index for index in range(15) if index not in gone]
    best = np.linalg.lstsq(x[:, stay], x @ matrix, rcond=None)[0]
    apart = x @ matrix
    least = float(((x[:, stay] @ best - apart) ** 2).sum() / (apart**2).sum())
    assert least < 1e-9, "copies are lost without loss"
    assert error < 0.01, "1 % damping"
    plain = matrix.copy()
    plain[gone] = 0
    assert float(((x @ plain - apart) ** 2).sum() / (apart**2).sum()) > 5 * error, "than leaving them out as they are"


@pytest.mark.parametrize("larger", [1, 10, 30])
def test_what_is_always_zero_goes_first(larger: float) -> None:
    """However large the weights are that read it."""
    random = np.random.default_rng(3)
    x = np.maximum(random.standard_normal((2000, 64)), 0)
    x[:, ::2] = 0
    matrix = random.standard_normal((64, 16))
    matrix[::2] *= larger
    gone, _, error = without([(matrix, (x.T @ x / len(x)).astype(np.float32))], size=1, number=32)
    assert gone == list(range(0, 64, 2))
    assert error < 1e-9


def test_units_of_several_channels_go_together() -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((1000, 12)) * np.repeat([1.0, 0.01, 1.0], 4)
    moments = (x.T @ x / len(x)).astype(np.float32)
    gone, (fitted,), _ = without([(random.standard_normal((12, 5)), moments)], size=4, number=1)
    assert gone == [1]
    np.testing.assert_array_equal(fitted[4:8], 0)


def test_layers_are_found_and_taken_out(tmp_path: Path) -> None:
    graph, shorter = encoder(4), encoder(3)
    layers = find_layers(graph)
    assert [(layer.before.name, layer.after.name) for layer in layers] == [
        ("s", "y0"), ("y0", "y1"), ("y1", "y2"), ("y2", "y3")
    ]  # fmt: skip
    assert layers[1].constants() == {"wq1", "wk1", "wv1", "wo1", "up1", "down1"}, "and not the shared norm"
    for old, new in ((0, 0), (2, 1), (3, 2)):
        for name in ("wq", "wk", "wv", "wo", "up", "down"):
            tensor = graph.model.graph.initializers[f"{name}{old}"].const_value
            shorter.model.graph.initializers[f"{name}{new}"].const_value = ir.tensor(
                tensor.numpy(), name=f"{name}{new}"
            )
    drop_layers(graph, [layers[1]])
    assert len(graph.model.graph) == len(shorter.model.graph)
    assert "wq1" not in graph.model.graph.initializers
    for feeds in inputs(2):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(shorter, tmp_path, feeds), atol=1e-6)


def test_layers_ahead_of_the_last_go_where_training_follows(tmp_path: Path) -> None:
    result = pruned(encoder(4), tmp_path, training_follows=True, layers=2)
    assert result.kept_layers == (0, 3)


def test_the_layer_that_does_least_goes(tmp_path: Path) -> None:
    graph = encoder(3)
    for name in ("wo1", "down1"):
        tensor = graph.model.graph.initializers[name].const_value.numpy() * 0.01
        graph.model.graph.initializers[name].const_value = ir.tensor(tensor, name=name)
    before = graph.clone()
    result = pruned(graph, tmp_path, layers=1)
    assert result.kept_layers == (0, 2)
    assert result.layers == (frozenset({"wq1", "wk1", "wv1", "wo1", "up1", "down1"}),)
    for feeds in inputs(2):
        np.testing.assert_allclose(run(graph, tmp_path, feeds), run(before, tmp_path, feeds), atol=0.1)


def test_all_at_once(tmp_path: Path) -> None:
    graph = encoder(3)
    before = graph.clone()
    result = pruned(graph, tmp_path, ffn=0.5, heads=0.25, multiple=1)
    sizes = {name: tuple(value.shape or ()) for name, value in graph.model.graph.initializers.items()}
    assert sizes["up2"] == (WIDTH, WIDE // 2)
    assert sizes["wo1"] == (24, WIDTH)
    assert set(result.changes) == {name for name in sizes if name != "ones"}
    assert result.changes["down0"].before.shape == (WIDE, WIDTH)
    assert graph.weight_bytes() < 0.7 * before.weight_bytes()
    # Random weights have no spare channels; fitted ones answer far better than ones that are left out as they are.
    crude = before.clone()
    for name, change in result.changes.items():
        if name.startswith(("down", "wo")):
            array = change.before.copy()
            rows = [index for index in range(len(array)) if not _is_there(before, result, name, index)]
            array[rows] = 0
            crude.model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    feeds = next(iter(inputs(1)))
    wanted, found, plain = (run(item, tmp_path, feeds) for item in (before, graph, crude))
    assert np.square(found - wanted).mean() < 0.7 * np.square(plain - wanted).mean()


def _is_there(before: Graph, result: Pruned, name: str, index: int) -> bool:
    """Whether the column of the projection that gives a channel is still in the pruned graph."""
    giver = {"down": "up", "wo": "wv"}[name[:-1]] + name[-1]
    column = before.model.graph.initializers[giver].const_value.numpy()[:, index]
    return any(np.array_equal(column, other) for other in result.changes[giver].after.T)


def test_channels_that_stay_are_a_multiple(tmp_path: Path) -> None:
    graph = encoder(1)
    pruned(graph, tmp_path, ffn=0.3, multiple=16)
    assert tuple(graph.model.graph.initializers["up0"].shape or ()) == (WIDTH, 48), "45 would be 70 %"
    graph = encoder(1)
    pruned(graph, tmp_path, ffn=0.2)
    assert tuple(graph.model.graph.initializers["up0"].shape or ()) == (WIDTH, 32), "and not all 64, the nearest of 32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing is to go"),
        ({"ffn": 1.5}, r"ffn is 1.5; it takes a share below 1, e.g. 0.5, or a whole number"),
        ({"heads": -1}, "heads is -1"),
        ({"heads": float("nan")}, "heads is nan"),
        ({"heads": 4}, "heads is 4, but there are 4; at least one has to stay"),
        ({"heads": 9}, "heads is 9, but there are 4"),
        ({"layers": 2}, "layers is 2, but there are 2"),
        ({"ffn": 64}, "ffn is 64, but there are 64"),
        ({"ffn": 0.5, "multiple": 0}, "multiple is 0"),
        ({"heads": 0.1}, "so small a share of 4 heads is none at all"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        pruned(encoder(2), tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "stays", "said"),
    [
        ({"ffn": 1}, 32, "ffn: 2 places, a multiple of 32 channels stays, "),
        ({"ffn": 1, "multiple": 1}, 63, "ffn: 2 places, "),
    ],
)
def test_channels_that_stay_are_a_multiple_and_the_ledger_says_so(
    options: dict[str, Any], stays: int, said: str, tmp_path: Path
) -> None:
    result = pruned(encoder(2), tmp_path, **options)
    (note,) = [note for note in result.notes if note.startswith(said)]
    assert ("multiple" in note) == ("multiple" in said)
    assert result.graph.model.graph.initializers["up0"].shape.numpy() == (WIDTH, stays)


def test_weights_in_half_precision_are_named(tmp_path: Path) -> None:
    graph = feed_forward("m = Gelu (g)")
    for value in graph.model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.dtype = ir.DataType.FLOAT16
    with pytest.raises(
        RecipeError, match=r"nothing can go\. The weights are in half precision: prune the float32 model"
    ):
        pruned(graph, tmp_path, ffn=0.5)


def test_layers_that_cannot_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="layers cannot be told apart"):
        pruned(feed_forward("m = Gelu (g)"), tmp_path, layers=1)


def test_channels_of_experts_are_named(tmp_path: Path) -> None:
    graph = small_graph(
        """
        s = MatMul (x, router) e = ArgMax <axis = 2, keepdims = 0> (s) u = Gather (up, e) d = Gather (down, e)
        c = Unsqueeze (x, last) h = MatMul (u, c) g = Gelu (h) o = MatMul (d, g) y = Squeeze (o, last)
        """,
        weights={
            "router": weight(WIDTH, 4),
            "up": weight(4, WIDE, WIDTH),
            "down": weight(4, WIDTH, WIDE),
            "last": np.array([3]),
        },
        opset=20,
        ir_version=9,
    )
    with pytest.raises(
        RecipeError, match=r"nothing can go.*channels of experts stay whole: each token picks its own of 2 stacks"
    ):
        pruned(graph, tmp_path, ffn=0.5)


def test_channels_of_experts_in_one_operator_are_named(tmp_path: Path) -> None:
    graph = small_graph(
        """
        s = MatMul (x, router) r = Reshape (s, rows)
        y = com.microsoft.MoE <k = 1, activation_type = "silu"> (x, r, up, , down)
        """,
        weights={
            "router": weight(WIDTH, 4),
            "up": weight(4, WIDE, WIDTH),
            "down": weight(4, WIDTH, WIDE),
            "rows": np.array([-1, 4]),
        },
        opset=20,
        ir_version=9,
    )
    with pytest.raises(RecipeError, match=r"nothing can go.*each token picks its own of 2 stacks"):
        pruned(graph, tmp_path, ffn=0.5)


def test_heads_without_attention(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no attention whose heads could be told apart"):
        pruned(feed_forward("m = Gelu (g)"), tmp_path, heads=1)
