"""int8-qdq and fp8-qdq on small graphs: the kernels that really run, numbers, what stays in float, SmoothQuant, biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from calibrating import PlainSession, calibrated
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from quantizable import IMAGE, images, normed, residual, together, vectors
from small_graphs import small_graph

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.matching import attribute
from onnxpress.optimizers.qdq import activation_scale
from onnxpress.optimizers.targets import TARGETS, target

CPUS = ["cpu", "cpu-avx2"]

TABLE = {"table": (512, 64), "w": (64, 32)}


def relative_error(one: Any, other: Any) -> float:
    """Of what differs between the samples: a common mean is no merit."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - other.mean(axis=0)))


def quantize(
    graph: Graph, folder: Path, samples: Any, *, name: str = "int8-qdq", kind: str = "cpu", **options: Any
) -> PassResult:
    keep = options.pop("keep", frozenset())
    result = make_pass(name, options).apply(graph.clone(), calibrated(samples, folder, kind=kind, keep=keep))
    onnx.checker.check_model(ir.to_proto(result.graph.model), full_check=True)
    return result


def open_for(result: PassResult, folder: Path, kind: str = "cpu") -> PlainSession:
    facts = target(kind)
    return PlainSession(result.graph, folder, disabled=facts.disabled_optimizers, exact=facts.exact_products)


def test_a_weight_that_layers_share_is_stored_once(tmp_path: Path) -> None:
    """As ALBERT's layers do."""
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    graph = small_graph("h = MatMul (x, w) r = Relu (h) y = MatMul (r, w)", weights={"w": weight})
    result = quantize(graph, tmp_path, vectors(64, seed=0))
    assert result.graph.operators()["QuantizeLinear"] >= 2
    sizes = [np.prod(item.shape.numpy()) for item in result.graph.model.graph.initializers.values() if item.shape]
    assert sizes.count(1024) == 1


@pytest.mark.parametrize(
    ("kind", "keep", "operator", "size"),
    [
        ("cpu", frozenset(), "com.microsoft::GatherBlockQuantized", 0.3),
        ("cpu", frozenset({"embed"}), "Gather", 1.01),
        ("tensorrt", frozenset(), "Gather", 1.01),
    ],
)
def test_embedding_tables_are_8_bits_on_the_cpu(
    kind: str, keep: frozenset[str], operator: str, size: float, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in TABLE.items()}
    graph = small_graph("e = Gather (table, x) y = MatMul (e, w)", inputs="int64[batch,n] x", weights=weights)
    next(node for node in graph.model.graph if node.op_type == "Gather").name = "embed"
    samples = [{"x": random.integers(0, 512, (2, 8))} for _ in range(8)]
    result = quantize(graph, tmp_path, samples, kind=kind, keep=keep)
    assert result.graph.operators()[operator] == 1
    assert ("embed" in result.touched) == (operator != "Gather")
    assert result.graph.weight_bytes() < size * graph.weight_bytes()
    answers, expected = (
        item.run(samples[0])["y"] for item in (open_for(result, tmp_path, kind), PlainSession(graph, tmp_path))
    )
    assert 0 < relative_error(answers, expected) < 0.02


def test_a_graph_of_a_table_alone_loses_the_float_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {"table": random.standard_normal((512, 64)).astype(np.float32)}
    graph = small_graph("e = Gather (table, x) y = Relu (e)", inputs="int64[batch,n] x", weights=weights)
    result = quantize(graph, tmp_path, [{"x": random.integers(0, 512, (2, 8))}])
    assert result.changes == 1
    assert "no other" in result.notes[-1]
    assert result.graph.weight_bytes() < 0.3 * graph.weight_bytes()


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize("kind", CPUS)
def test_onnxruntime_runs_integers_throughout(kind: str, opset: int, tmp_path: Path) -> None:
    graph = residual(18)
    if opset != 18:
        graph.model.opset_imports[""] = opset
        if opset == 13:  # ReduceMean had its axes as an attribute
            node = next(node for node in graph.model.graph if node.op_type == "ReduceMean")
            node.attributes.add(ir.AttrInt64s("axes", [2, 3]))
            node.resize_inputs(1)
    test = together(images(64, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, images(128), kind=kind)
    session = open_for(result, tmp_path, kind)
    integers = {
        "QLinearConv": 3,
        "QLinearAdd": 1,
        "QLinearAveragePool": 1,
        "QLinearConcat": 1,
        "QLinearSigmoid": 1,
        "QLinearMul": 1,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
        "QuantizeLinear": 1,
    }
    assert {name: session.operators[name] for name in integers} == integers
    assert not {"Conv", "FusedConv", "Relu", "Clip", "Add", "Gemm", "DequantizeLinear"} & set(session.operators)
    assert result.changes == len(result.touched) == 12  # 4 layers, 8 nodes between
    allowed = 0.05 if kind == "cpu-avx2" else 0.03  # 7 and 8 bits
    assert 0 < relative_error(session.run(test)["y"], expected) < allowed


GATED = """
c0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
h0 = HardSwish(c0)
q = ReduceMean<keepdims=1>(h0, axes)
c1 = Conv(q, w1, b1)
g = HardSigmoid<alpha=0.16666667>(c1)
m = Mul(h0, g)
c2 = Conv(m, w2, b2)
h1 = HardSwish(c2)
y = Conv(h1, w3)
"""


def gated() -> Graph:
    """A layer of MobileNetV3's kind: HardSwish, and a gate for each channel."""
    random = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 16, 1, 1), "w2": (16, 16, 1, 1), "w3": (8, 16, 1, 1)}
    weights = {
        name: 2 * random.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()
    } | {f"b{index}": random.standard_normal(16) for index in range(3)}
    constants: dict[str, Any] = {name: array.astype(np.float32) for name, array in weights.items()}
    return small_graph(
        GATED,
        inputs=IMAGE,
        outputs="float[batch,8,8,8] y",
        weights=constants | {"axes": np.array([2, 3])},
        ir_version=10,
    )


@pytest.mark.parametrize(("kind", "allowed"), [("cpu", 0.03), ("cpu-avx2", 0.05), ("cpu-arm64", 0.03)])
def test_hard_swishes_and_gates_are_integer_products(kind: str, allowed: float, tmp_path: Path) -> None:
    graph, test = gated(), together(images(64, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, images(128), kind=kind)
    session = open_for(result, tmp_path, kind)
    assert relative_error(session.run(test)["y"], expected) < allowed
    if kind != "cpu-arm64":  # whose kernels are not this machine's
        assert session.operators["QLinearMul"] == 3
        assert session.operators["QLinearConv"] == 4
        assert not {"Conv", "Mul", "HardSwish"} & set(session.operators)


def test_a_range_that_hard_swish_alone_reads_begins_where_it_is_zero(tmp_path: Path) -> None:
    result = quantize(gated(), tmp_path, images(128))
    constants = result.graph.model.graph.initializers

    def lowest(name: str) -> float:
        quantize = next(node for node in result.graph.model.graph if node.name == f"{name}_quantize")
        scale, zero = (constants[str(value.name)].const_value for value in quantize.inputs[1:] if value is not None)
        assert scale is not None
        assert zero is not None
        return -float(scale.numpy()) * float(zero.numpy())

    assert -3.05 < lowest("c0") < -2.95
    assert lowest("c1") < -3.2  # which a HardSigmoid reads
    kept = quantize(gated(), tmp_path, images(128), keep=frozenset({"HardSwish_1"}))
    assert kept.graph.operators()["HardSwish"] == 1


MOVED = """
c0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0)
r = Relu(c0)
p = Pad(r, around, nothing, axes)
m = MaxPool<kernel_shape=[2,2], strides=[1,1]>(p)
c1 = Conv<kernel_shape=[2,2]>(p, w1)
k = Concat<axis=1>(m, c1)
a, b = Split<axis=1>(k, parts)
c2 = Conv(b, w2)
s = Add(c2, b)
e = Concat<axis=1>(a, b, s)
y = Conv(e, w3)
"""


@pytest.mark.parametrize("constant", [0.0, 0.5])
@pytest.mark.parametrize("kind", CPUS)
def test_padding_and_parts_of_images_are_integers(kind: str, constant: float, tmp_path: Path) -> None:
    """As at the beginning of HGNetV2, and in YOLO's layers."""
    random = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 16, 2, 2), "w2": (12, 12, 1, 1), "w3": (8, 44, 1, 1)}
    weights = {name: random.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    graph = small_graph(
        MOVED,
        inputs=IMAGE,
        outputs="float[batch,8,8,8] y",
        weights={name: array.astype(np.float32) for name, array in weights.items()}
        | {"around": np.array([0, 0, 1, 1]), "axes": np.array([2, 3]), "parts": np.array([20, 12])}
        | {"nothing": np.float32(constant)},
        ir_version=10,
    )
    test = together(images(16, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    session = open_for(quantize(graph, tmp_path, images(64), kind=kind), tmp_path, kind)
    # 0.036 with 8 bits and as much without integers in padding: tensors that are joined share the range of the widest
    assert relative_error(session.run(test)["y"], expected) < (0.045 if kind == "cpu" else 0.06)
    assert session.operators["QLinearConv"] == 4
    assert session.operators["QLinearConcat"] == 2
    assert session.operators["DequantizeLinear"] == (1 if constant == 0 else 2)


def grouped(groups: int, outputs: int = 16) -> Graph:
    random = np.random.default_rng(0)
    weights = {
        "w0": random.standard_normal((16, 3, 3, 3)) / 5,
        "w1": random.standard_normal((outputs, 16 // groups, 3, 3)) / np.sqrt(9 * 16 // groups),
        "b1": random.standard_normal(outputs) / 5,
    }
    return small_graph(
        f"""c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0)
        r = Relu(c)
        y = Conv<kernel_shape=[3,3], group={groups}>(r, w1, b1)""",
        inputs=IMAGE,
        outputs=f"float[batch,{outputs},6,6] y",
        weights={name: array.astype(np.float32) for name, array in weights.items()},
    )


@pytest.mark.parametrize(
    ("groups", "outputs", "kind", "keep", "left"),
    [
        (4, 16, "cpu", frozenset(), 1),
        (8, 24, "cpu", frozenset(), 1),  # three outputs a group
        (16, 32, "cpu", frozenset(), 1),  # a channel's two outputs have no kernel of their own either
        (16, 16, "cpu", frozenset(), 16),  # each channel by itself
        (1, 16, "cpu", frozenset(), 1),
        (4, 16, "cpu", frozenset({"Conv_2"}), 4),
        (4, 16, "tensorrt", frozenset(), 4),
    ],
)
def test_groups_of_few_channels_become_wider(
    groups: int, outputs: int, kind: str, keep: frozenset[str], left: int, tmp_path: Path
) -> None:
    graph, test = grouped(groups, outputs), together(images(16, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, images(64), kind=kind, keep=keep)
    last = [node for node in result.graph.model.graph if node.op_type == "Conv"][-1]
    assert attribute(last, "group", 1) == left
    # each channel by itself: 3.1 %, as what a channel reads has the scale of all of them
    assert 0 < relative_error(open_for(result, tmp_path, kind).run(test)["y"], expected) < 0.035


def test_groups_stay_below_32_channels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((96, 4, 1, 1)).astype(np.float32)
    graph = small_graph(
        "y = Conv<group=24>(x, w)", inputs="float[n,96,4,4] x", outputs="float[n,96,4,4] y", weights={"w": weight}
    )
    samples = [{"x": random.standard_normal((1, 96, 4, 4)).astype(np.float32)} for _ in range(8)]
    expected = PlainSession(graph, tmp_path).run(samples[0])["y"]
    result = quantize(graph, tmp_path, samples)
    (node,) = [node for node in result.graph.model.graph if node.op_type == "Conv"]
    assert attribute(node, "group", 1) == 3
    assert relative_error(open_for(result, tmp_path).run(samples[0])["y"][0], expected[0]) < 0.03


@pytest.mark.parametrize("keep", [frozenset(), frozenset({"BatchNormalization_1"})])
def test_a_norm_behind_no_convolution_runs_on_integers(keep: frozenset[str], tmp_path: Path) -> None:
    """As between a concatenation and a Relu of DenseNet."""
    random = np.random.default_rng(0)
    numbers = {name: random.uniform(0.5, 2, 16) for name in ("s", "b", "m", "v")}
    numbers |= {"w0": random.standard_normal((16, 3, 3, 3)) / 5, "w1": random.standard_normal((8, 16, 1, 1)) / 4}
    graph = small_graph(
        """c = Conv<kernel_shape=[3,3]>(x, w0)
        n = BatchNormalization(c, s, b, m, v)
        r = Relu(n)
        k = Concat<axis=1>(r, r)
        p = Slice(k, zero, sixteen, one)
        y = Conv(p, w1)""",
        inputs=IMAGE,
        outputs="float[batch,8,6,6] y",
        weights={name: array.astype(np.float32) for name, array in numbers.items()}
        | {"zero": np.array([0]), "sixteen": np.array([16]), "one": np.array([1])},
    )
    test = together(images(16, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, images(64), keep=keep)
    session = open_for(result, tmp_path)
    assert session.operators["QLinearConv"] == (2 if keep else 3)
    assert session.operators["BatchNormalization"] == (1 if keep else 0)
    assert 0 < relative_error(session.run(test)["y"], expected) < 0.03


RESIDUAL_NORM = "f = Conv(p, w1) g = Conv(n, w1) y = Add(f, g)"


def uneven(body: str, spread: float, last: str) -> Graph:
    """A convolution whose channels differ in size, and what stands behind it."""
    random = np.random.default_rng(0)
    sizes = np.geomspace(1, spread, 16)
    w0 = random.standard_normal((16, 3, 3, 3)) / 5 * sizes[:, None, None, None]
    numbers = {"w0": w0, "w1": random.standard_normal((8, 16, 1, 1)) / 4, "s": np.ones(16), "b": np.zeros(16)}
    weights = {name: array.astype(np.float32) for name, array in numbers.items()}
    graph = small_graph(body, inputs=IMAGE, outputs="float[batch,16,8,8] h", weights={"w0": weights["w0"]})
    found = ir.to_proto(graph.model)  # statistics of what it gives
    answers = onnxruntime.InferenceSession(found.SerializeToString()).run(None, together(images(64)))[0]
    weights |= {"m": answers.mean((0, 2, 3)), "v": answers.var((0, 2, 3))}
    return small_graph(
        f"{body} k = Concat<axis=1>(h, h) p = Slice(k, zero, sixteen, one) n = BatchNormalization(p, s, b, m, v) "
        + last,
        inputs=IMAGE,
        outputs="float[batch,8,8,8] y",
        weights=weights | {"zero": np.array([0]), "sixteen": np.array([16]), "one": np.array([1])},
    )


@pytest.mark.parametrize(
    ("spread", "last", "norms"), [(3.0, "y = Conv(n, w1)", 0), (400.0, "y = Conv(n, w1)", 1), (400.0, RESIDUAL_NORM, 0)]
)
def test_a_norm_of_channels_of_unlike_size_stays(spread: float, last: str, norms: int, tmp_path: Path) -> None:
    """Unless what it reads is quantized for a convolution too, as in RepVGG."""
    graph = uneven("h = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0)", spread, last)
    result = quantize(graph, tmp_path, images(64))
    assert [node.op_type for node in result.graph.model.graph].count("BatchNormalization") == norms


def test_a_norm_of_the_input_stays(tmp_path: Path) -> None:
    ones = np.ones(3, np.float32)
    weights = {"s": ones, "b": ones, "m": ones, "v": ones, "w": np.ones((8, 3, 1, 1), np.float32)}
    body = "n = BatchNormalization(x, s, b, m, v) y = Conv(n, w)"
    graph = small_graph(body, inputs=IMAGE, outputs="float[batch,8,8,8] y", weights=weights)
    assert quantize(graph, tmp_path, images(8)).graph.operators()["BatchNormalization"] == 1


@pytest.mark.parametrize(
    "middle",
    [
        "d = Cast<to=10>(c) n = BatchNormalization(d, s, s, s, s) e = Cast<to=1>(n)",
        "d = Cast<to=7>(c) n = ReduceMean<axes=[2,3], keepdims=1>(d) e = Cast<to=1>(n)",
    ],
)
def test_other_types_of_numbers_are_left_alone(middle: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((8, 3, 1, 1)), "v": random.standard_normal((8, 8, 1, 1)), "s": np.ones(8)}
    graph = small_graph(
        f"c = Conv(x, w) {middle} y = Conv(e, v)",
        inputs=IMAGE,
        outputs="float[batch,8,h,w2] y",
        weights={
            name: array.astype(np.float32) for name, array in weights.items() if name in ("w", "v") or "s," in middle
        },
        opset=15,
    )
    result = quantize(graph, tmp_path, images(8))
    open_for(result, tmp_path).run(images(1)[0])
    assert {"BatchNormalization", "ReduceMean"} & set(result.graph.operators())


def test_a_weight_of_groups_that_is_an_answer_too(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 4, 1, 1)).astype(np.float32)
    outputs = "float[n,16,4,4] y, float[16,4,1,1] w"
    graph = small_graph("y = Conv<group=4>(x, w)", inputs="float[n,16,4,4] x", outputs=outputs, weights={"w": weight})
    samples = [{"x": np.random.default_rng(1).standard_normal((1, 16, 4, 4)).astype(np.float32)}]
    answers = open_for(quantize(graph, tmp_path, samples), tmp_path).run(samples[0])
    np.testing.assert_array_equal(answers["w"], weight)


@pytest.mark.parametrize(
    ("name", "kind", "allowed"),
    [
        ("int8-qdq", "cpu-arm64", 0.05),  # with kernels of an x86 CPU
        ("int8-qdq", "cuda", 0.03),
        ("int8-qdq", "tensorrt", 0.03),
        ("fp8-qdq", "tensorrt", 0.12),  # FP8 E4M3 has 3 bits of fraction: 2.6 % a number
    ],
)
@pytest.mark.parametrize("method", ["min-max", "percentile", "entropy", "mse"])
def test_other_forms_stay_close(name: str, kind: str, allowed: float, method: str, tmp_path: Path) -> None:
    graph, test = residual(), together(images(64, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, images(128), name=name, kind=kind, calibration=method)
    answers = open_for(result, tmp_path, kind).run(test)["y"]
    assert 0 < relative_error(answers, expected) < allowed


def test_the_form_for_nvidia(tmp_path: Path) -> None:
    """Symmetric int8, no quantized bias, and of a residual sum the summand that is not the convolution's."""
    body = quantize(residual(), tmp_path, images(8), kind="tensorrt").graph.model.graph
    kinds = {node.outputs[0].name: node for node in body}
    for node in body:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = node.inputs[2].const_value.numpy()
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
        if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2:
            assert node.inputs[2].is_initializer()
    add = next(node for node in body if node.op_type == "Add")
    assert [kinds[value.name].op_type for value in add.inputs] == ["Conv", "DequantizeLinear"]


def test_transposed_convolutions_stay_in_float_on_the_cpu(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    graph = small_graph(
        "c = Conv<kernel_shape=[1,1]>(x, w0)\ny = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(c, w1)",
        inputs=IMAGE,
        outputs="float[batch,4,16,16] y",
        weights={
            "w0": random.standard_normal((6, 3, 1, 1)).astype(np.float32),
            "w1": random.standard_normal((6, 4, 2, 2)).astype(np.float32),
        },
    )
    assert quantize(graph, tmp_path, images(4)).touched == ("Conv_0",)
    result = quantize(graph, tmp_path, images(64), kind="tensorrt")
    assert result.touched == ("Conv_0", "ConvTranspose_1")
    test = together(images(8, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    assert 0 < relative_error(open_for(result, tmp_path, "tensorrt").run(test)["y"], expected) < 0.02


def test_kept_places_stay_in_float(tmp_path: Path) -> None:
    everything = quantize(residual(), tmp_path, images(4)).touched
    for name in everything:
        result = quantize(residual(), tmp_path, images(4), keep=frozenset({name}))
        assert name not in result.touched
        assert result.changes < len(everything)
        node = next((node for node in result.graph.model.graph if node.name == name), None)
        if node is not None and node.op_type == "Conv":
            assert node.inputs[1].is_initializer()
        open_for(result, tmp_path).run(images(1)[0])
    assert quantize(residual(), tmp_path, images(4), keep=frozenset(everything)).changes == 0


def test_what_no_layer_reads_stays_in_float(tmp_path: Path) -> None:
    """The end of a graph, where integers would cost quality and bring nothing."""
    graph = small_graph(
        "c = Conv<kernel_shape=[1,1]>(x, w)\ny = Sigmoid(c)",
        inputs=IMAGE,
        outputs="float[batch,4,8,8] y",
        weights={"w": np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)},
    )
    operators = open_for(quantize(graph, tmp_path, images(4)), tmp_path).operators
    assert operators["QLinearConv"] == operators["Sigmoid"] == 1


def test_outputs_keep_their_names_and_other_ranks_work(tmp_path: Path) -> None:
    """A convolution in one dimension whose output the graph gives, and somebody else reads."""
    random = np.random.default_rng(0)
    graph = small_graph(
        "y = Conv<kernel_shape=[3], pads=[1,1]>(x, w, b)\nz = Relu(y)",
        inputs="float[batch,3,length] x",
        outputs="float[batch,8,length] y, float[batch,8,length] z",
        weights={
            "w": random.standard_normal((8, 3, 3)).astype(np.float32),
            "b": random.standard_normal(8).astype(np.float32),
        },
    )
    # Lengths differ from sample to sample, as the last axis may.
    samples = [{"x": random.uniform(-1, 1, (1, 3, length)).astype(np.float32)} for length in (9, 64, 500)]
    expected = PlainSession(graph, tmp_path).run(samples[1])
    for kind in (*CPUS, "tensorrt"):
        for corrected in (False, True):
            result = quantize(graph, tmp_path, samples, kind=kind, bias_correction=corrected)
            session = open_for(result, tmp_path, kind)
            assert session.operators["QLinearConv"] == (0 if kind == "tensorrt" else 1)
            answers = session.run(samples[1])
            assert list(answers) == ["y", "z"]
            for name, answer in answers.items():
                assert 0 < np.abs(answer - expected[name]).max() < 0.03 * np.abs(expected[name]).max()


def test_a_computed_weight_and_nothing_to_quantize(tmp_path: Path) -> None:
    graph = small_graph(
        "d = Mul(w, w)\nc = Conv<kernel_shape=[1,1]>(x, d)\ny = Relu(c)",
        inputs=IMAGE,
        outputs="float[batch,4,8,8] y",
        weights={"w": np.ones((4, 3, 1, 1), np.float32)},
    )
    for name in ("int8-qdq", "fp8-qdq"):
        result = make_pass(name).apply(graph.clone(), calibrated(images(2), tmp_path))
        assert result.changes == 0
        assert "no Conv, MatMul or Gemm" in result.notes[0]


def test_a_weight_that_an_input_overrides_is_left_alone(tmp_path: Path) -> None:
    graph = residual()
    graph.model.graph.inputs.append(graph.model.graph.initializers["w0"])
    assert "Conv_0" not in quantize(graph, tmp_path, images(2)).touched


@pytest.mark.parametrize("kind", [*CPUS, "cpu-arm64", "tensorrt"])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30])
def test_activations_without_a_range(kind: str, size: float, tmp_path: Path) -> None:
    graph, samples = residual(), [{"x": np.full((1, 3, 8, 8), size, np.float32)}]
    answers = open_for(quantize(graph, tmp_path, samples, kind=kind), tmp_path, kind).run(samples[0])["y"]
    expected = PlainSession(graph, tmp_path).run(samples[0])["y"]
    np.testing.assert_allclose(answers, expected, atol=0.06 * np.abs(expected).max())


def test_a_large_bias_of_a_channel_of_tiny_weights(tmp_path: Path) -> None:
    """As batch normalization leaves dead channels: 32 bits would overflow at the scale of the weights alone."""
    graph = residual()
    weight, bias = (graph.model.graph.initializers[name].const_value.numpy().copy() for name in ("w0", "b0"))
    weight[3], bias[3] = weight[3] * 1e-12, 5.0
    graph.model.graph.initializers["w0"].const_value = ir.tensor(weight)
    graph.model.graph.initializers["b0"].const_value = ir.tensor(bias)
    test = together(images(64, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    answers = open_for(quantize(graph, tmp_path, images(16)), tmp_path).run(test)["y"]
    assert relative_error(answers, expected) < 0.05


def test_a_pass_needs_calibration() -> None:
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        make_pass("int8-qdq").apply(residual(), PassContext(target=target("cpu")))


def test_integers_for_nvidia_do_not_overflow_on_the_cpu(tmp_path: Path) -> None:
    """The largest products, where a graph is tried without a GPU."""
    graph = small_graph(
        "y = Conv<kernel_shape=[8,8]>(x, w)",
        inputs=IMAGE,
        outputs="float[batch,4,1,1] y",
        weights={"w": np.ones((4, 3, 8, 8), np.float32)},
    )
    ones = {"x": np.ones((1, 3, 8, 8), np.float32)}
    result = quantize(graph, tmp_path, [ones], kind="tensorrt")
    np.testing.assert_allclose(open_for(result, tmp_path, "tensorrt").run(ones)["y"], 192, rtol=1e-5)


def test_fp8_keeps_a_relu_where_the_fusion_is_off(tmp_path: Path) -> None:
    """ONNX Runtime drops it otherwise (1.30 takes no such graph): should this stop to be so, the target need not switch the fusion off."""
    graph = residual()
    test = together(images(16, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, images(16), name="fp8-qdq", kind="tensorrt")
    try:
        error = relative_error(PlainSession(result.graph, tmp_path).run(test)["y"], expected)
    except InvalidGraph:
        error = np.inf
    assert error > 0.2
    assert relative_error(open_for(result, tmp_path, "tensorrt").run(test)["y"], expected) < 0.12


@pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
def test_fp8_behind_a_clip(kind: str, tmp_path: Path) -> None:
    """ReLU6, over which a fusion of ONNX Runtime fails: the targets switch it off."""
    random = np.random.default_rng(0)
    weights = {name: 0.2 * random.standard_normal((8, 8, 3, 3)).astype(np.float32) for name in ("w", "v")}
    graph = small_graph(
        "c = Conv<pads=[1, 1, 1, 1]> (x, w) r = Clip (c, low, high) y = Conv<pads=[1, 1, 1, 1]> (r, v)",
        inputs="float[batch,8,6,6] x",
        outputs="float[batch,8,6,6] y",
        weights={**weights, "low": np.float32(0), "high": np.float32(6)},
    )
    samples = [{"x": random.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(16)]
    expected = PlainSession(graph, tmp_path).run(together(samples))["y"]
    result = quantize(graph, tmp_path, samples, name="fp8-qdq", kind=kind)
    assert relative_error(open_for(result, tmp_path, kind).run(together(samples))["y"], expected) < 0.12


def test_targets_offer_it() -> None:
    assert [name for name, facts in TARGETS.items() if "int8-qdq" in facts.precisions] == list(TARGETS)
    assert [name for name, facts in TARGETS.items() if "fp8-qdq" in facts.precisions] == ["cuda", "tensorrt"]


@pytest.mark.parametrize("form", ["uint8", "int8"])
def test_zero_is_exact(form: str) -> None:
    facts = target("cpu" if form == "uint8" else "cpu-arm64").qdq
    scale, zero_point = activation_scale(-1.0, 3.0, facts)
    assert zero_point.dtype == form
    bounds = np.iinfo(form)
    steps = np.rint(np.array([-1.0, 0.0, 3.0]) / scale) + int(zero_point)
    assert steps[0] == bounds.min
    assert steps[1] == int(zero_point)
    assert steps[2] == bounds.max


def test_smooth_leaves_the_float_graph_as_it_is(tmp_path: Path) -> None:
    from onnxpress.optimizers.smooth import smooth_norms

    graph, test = normed(), together(vectors(4, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    before = graph.model.graph.initializers["g"].const_value.numpy()
    context = calibrated(vectors(8, seed=0), tmp_path)
    assert context.observe is not None
    assert smooth_norms(graph, context.observe, 0.5) == ("1 norms smoothed",)
    answers = PlainSession(graph, tmp_path).run(test)["y"]
    np.testing.assert_allclose(answers, expected, atol=1e-5 * np.abs(expected).max())
    after = graph.model.graph.initializers["g_smooth"].const_value.numpy()
    assert np.abs(after).max() < 0.2 * np.abs(before).max()


@pytest.mark.parametrize("kind", CPUS)
def test_linear_layers_run_on_integers(kind: str, tmp_path: Path) -> None:
    graph, test = normed(), together(vectors(8, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    session = open_for(quantize(graph, tmp_path, vectors(64, seed=0), kind=kind, smooth=0.5), tmp_path, kind)
    assert session.operators["MatMulIntegerToFloat"] == 3
    assert session.operators["MatMul"] == 0
    assert 0 < relative_error(session.run(test)["y"], expected) < (0.06 if kind == "cpu-avx2" else 0.04)


def test_smooth_leaves_norms_that_others_read(tmp_path: Path) -> None:
    result = quantize(normed(residual_reads_norm=True), tmp_path, vectors(8, seed=0), smooth=0.5)
    assert "0 norms smoothed" in result.notes


@pytest.mark.parametrize("name", ["int8-qdq", "int8"])
def test_smooth_helps_where_channels_have_outliers(name: str, tmp_path: Path) -> None:
    graph, test = normed(), together(vectors(8, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    options: dict[str, Any] = {"minimum_elements": 0} if name == "int8" else {}
    errors = []
    for smooth in (0.0, 0.5):
        result = quantize(graph, tmp_path, vectors(8, seed=0), name=name, smooth=smooth, **options)
        assert len(result.touched) == 3
        errors.append(relative_error(open_for(result, tmp_path).run(test)["y"], expected))
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("kind", ["cpu", "tensorrt"])
def test_corrected_biases_take_the_mean_error_back(kind: str, tmp_path: Path) -> None:
    """Inputs far from zero turn the weights' rounding into a shift of each channel."""
    random = np.random.default_rng(0)

    def samples(count: int) -> list[dict[str, Any]]:
        return [{"x": (8 + random.standard_normal((1, 3, 8, 8))).astype(np.float32)} for _ in range(count)]

    weights = {
        "w0": random.standard_normal((16, 3, 3, 3)) / 5,
        "b0": random.standard_normal(16),
        "w1": random.standard_normal((1024, 8)) / 32,
        "b1": random.standard_normal(8),
    }
    graph = small_graph(
        """c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
        r = Relu(c)
        f = Flatten(r)
        m = MatMul(f, w1)
        y = Add(m, b1)""",
        inputs=IMAGE,
        outputs="float[batch,8] y",
        weights={name: array.astype(np.float32) for name, array in weights.items()},
    )
    calibration, test = samples(64), together(samples(64))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    shifts, errors = [], []
    for corrected in (False, True):
        result = quantize(graph, tmp_path, calibration, kind=kind, bias_correction=corrected)
        answers = open_for(result, tmp_path, kind).run(test)["y"]
        shifts.append(np.abs((answers - expected).mean(axis=0)).max())
        errors.append(relative_error(answers, expected))
    assert shifts[1] < 0.4 * shifts[0]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", ["cpu-avx2", "tensorrt"])
def test_a_number_behind_a_product_is_no_bias_to_correct(kind: str, tmp_path: Path) -> None:
    """What is behind it is corrected as well as without."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((32, 32)) / 5, "v": random.standard_normal((32, 32)) / 5}
    constants = {**weights, "number": np.array(0.7), "c": random.standard_normal(32)}
    graph = small_graph(
        "m = MatMul(x, w) a = Add(m, number) n = MatMul(a, v) y = Add(n, c)",
        inputs="float[batch,32] x",
        outputs="float[batch,32] y",
        weights={name: array.astype(np.float32) for name, array in constants.items()},
    )
    samples = [{"x": (8 + random.standard_normal((8, 32))).astype(np.float32)} for _ in range(16)]
    test = together(samples)
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    shifts = []
    for corrected in (False, True):
        result = quantize(graph, tmp_path, samples, kind=kind, bias_correction=corrected)
        answers = open_for(result, tmp_path, kind).run(test)["y"]
        shifts.append(np.abs((answers - expected).mean(axis=0)).max())
    assert shifts[1] < 0.1 * shifts[0]


def test_batch_normalization_goes_into_the_convolution_before(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    statistics = {f"{name}{part}": random.uniform(0.5, 2, 6) for name in "ab" for part in ("s", "b", "m", "v")}
    weights = {"w": random.standard_normal((6, 3, 3, 3)), "t": random.standard_normal((6, 6, 2, 2)), **statistics}
    graph = small_graph(
        """c = Conv<kernel_shape=[3,3]>(x, w)
        n = BatchNormalization<epsilon=0.01>(c, as, ab, am, av)
        d = ConvTranspose<kernel_shape=[2,2]>(n, t)
        y = BatchNormalization(d, bs, bb, bm, bv)""",
        inputs=IMAGE,
        outputs="float[batch,6,7,7] y",
        weights={name: array.astype(np.float32) for name, array in weights.items()},
    )
    test = together(images(4))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = make_pass("fold").apply(graph, PassContext(target=target("cpu")))
    assert result.graph.operators() == {"Conv": 1, "ConvTranspose": 1}
    answers = PlainSession(result.graph, tmp_path).run(test)["y"]
    np.testing.assert_allclose(answers, expected, atol=1e-5 * np.abs(expected).max())


def test_batch_normalization_stays_where_the_convolution_has_other_readers() -> None:
    ones = np.ones(6, np.float32)
    graph = small_graph(
        """c = Conv<kernel_shape=[1,1]>(x, w)
        n = BatchNormalization(c, s, b, m, v)
        y = Add(n, c)""",
        inputs=IMAGE,
        outputs="float[batch,6,8,8] y",
        weights={"w": np.ones((6, 3, 1, 1), np.float32), "s": ones, "b": ones, "m": ones, "v": ones},
    )
    operators = make_pass("fold").apply(graph, PassContext(target=target("cpu"))).graph.operators()
    assert operators["BatchNormalization"] == 1


def test_biases_around_fused_attention_are_corrected(tmp_path: Path) -> None:
    """The walk stops between the projections and Attention, which has to know how wide they are."""
    random = np.random.default_rng(0)
    graph = small_graph(
        """q0 = MatMul(x, wq)
        q = Add(q0, bq)
        k0 = MatMul(x, wk)
        k = Add(k0, bk)
        v0 = MatMul(x, wv)
        v = Add(v0, bv)
        a = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)
        o = MatMul(a, wo)
        y = Add(o, bo)""",
        weights={
            f"{kind}{name}": (random.standard_normal(shape) / 6).astype(np.float32)
            for name in "qkvo"
            for kind, shape in (("w", (32, 32)), ("b", (32,)))
        },
        opset=23,
        ir_version=10,
    )
    test = together(vectors(8, seed=1))
    expected = PlainSession(graph, tmp_path).run(test)["y"]
    result = quantize(graph, tmp_path, vectors(8, seed=0), bias_correction=True)
    assert "4 of 4 biases corrected" in result.notes
    assert 0 < relative_error(open_for(result, tmp_path).run(test)["y"], expected) < 0.05
