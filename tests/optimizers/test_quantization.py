"""int8, int8-dynamic and weight-only passes on small graphs: operators, numbers, what stays in float, tied weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from quantizable import residual
from small_graphs import small_graph

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.optimizers import PASSES, calibrates, make_pass
from onnxpress.optimizers.base import ChannelRange, PassContext
from onnxpress.optimizers.int8_dynamic import Int8Dynamic
from onnxpress.optimizers.rounding import Blocks, activation_uint8, block_size_for, blocks, per_channel_8bit
from onnxpress.optimizers.targets import target
from onnxpress.runtime.saturation import products_saturate

WIDTH, ROWS = 64, 512
CPU = target("cpu")


def run(graph: Graph, feeds: Mapping[str, Any], path: Path, kind: str = "cpu") -> list[Any]:
    ir.save(graph.model, path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.x64quantprecision", str(int(target(kind).exact_products and products_saturate()))
    )
    session = onnxruntime.InferenceSession(path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def feed_forward(*, bias: bool = True, gemm: bool = False, tied: bool = False) -> Graph:
    """ids → Gather → linear → Relu → linear; tied: the last layer reads the embedding table, transposed."""
    random = np.random.default_rng(0)
    weights = {
        "table": random.standard_normal((ROWS, WIDTH)),
        "w0": random.standard_normal((WIDTH, 2 * WIDTH)) / 8,
        "b0": random.standard_normal(2 * WIDTH),
        "w1": random.standard_normal((2 * WIDTH, WIDTH)) / 11,
        "b1": random.standard_normal(WIDTH),
    }
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"], name="embed")]
    if gemm:
        nodes += [
            helper.make_node("Reshape", ["x", "flat"], ["x2"]),
            helper.make_node("Gemm", ["x2", "w0", "b0"], ["h0"], name="first"),
        ]
    else:
        nodes += [
            helper.make_node("MatMul", ["x", "w0"], ["m0" if bias else "h0"], name="first"),
            *([helper.make_node("Add", ["b0", "m0"], ["h0"])] if bias else []),
        ]
    nodes += [
        helper.make_node("Relu", ["h0"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["m1"], name="second"),
        helper.make_node("Add", ["m1", "b1"], ["h1" if tied else "y"]),
    ]
    if tied:
        nodes += [
            helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
            helper.make_node("MatMul", ["h1", "head"], ["y"], name="output"),
        ]
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([-1, WIDTH]), "flat"))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("ids", 7, ["batch", "length"])],
            [helper.make_tensor_value_info("y", 1, None)],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=11,
    )
    return Graph(model=ir.from_proto(model), signature=Signature(task="module", inputs=(), outputs=()))


def observe_with(ids: Any, path: Path) -> Callable[[Graph, Sequence[str]], Mapping[str, ChannelRange]]:
    def observe(graph: Graph, names: Sequence[str]) -> Mapping[str, ChannelRange]:
        copy = graph.clone()
        values = {str(value.name): value for node in copy.model.graph for value in node.outputs}
        for name in names:
            values[name].type = ir.TensorType(ir.DataType.FLOAT)
            copy.model.graph.outputs.append(values[name])
        found = run(copy, {"ids": ids}, path)[1:]
        return {
            name: ChannelRange(
                low=array.reshape(-1, array.shape[-1]).min(0), high=array.reshape(-1, array.shape[-1]).max(0)
            )
            for name, array in zip(names, found, strict=True)
        }

    return observe


IDS = np.random.default_rng(1).integers(0, ROWS, (3, 5))


def relative_error(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


# The error of rounding to b bits is about range / 2^b / sqrt(12) a value; over two layers of Gaussian data that gives
# around 1 % at 8 bits and 10 % at 4 bits.
CASES = [("int8", 0.02), ("int8-dynamic", 0.02), ("int8-weights", 0.01), ("int4-weights", 0.15)]


@pytest.mark.parametrize(("name", "allowed"), CASES)
@pytest.mark.parametrize("form", ["plain", "no-bias", "gemm"])
def test_answers_stay_close(name: str, allowed: float, form: str, tmp_path: Path) -> None:
    graph = feed_forward(bias=form != "no-bias", gemm=form == "gemm")
    expected = run(graph, {"ids": IDS}, tmp_path)[0]
    context = PassContext(target=CPU, observe=observe_with(IDS, tmp_path))
    result = make_pass(name).apply(graph.clone(), context)
    assert result.changes == 3
    assert set(result.touched) == {"embed", "first", "second"}
    answers = run(result.graph, {"ids": IDS}, tmp_path)[0]
    assert answers.shape == expected.shape
    assert 0 < relative_error(answers, expected) < allowed
    assert "MatMul" not in result.graph.operators()
    assert result.graph.weight_bytes() < graph.weight_bytes() * (0.2 if name == "int4-weights" else 0.3)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("int8", "com.microsoft::MatMulIntegerToFloat"),
        ("int8-dynamic", "com.microsoft::DynamicQuantizeMatMul"),
        ("int8-weights", "com.microsoft::MatMulNBits"),
        ("int4-weights", "com.microsoft::MatMulNBits"),
    ],
)
def test_operators(name: str, operator: str, tmp_path: Path) -> None:
    context = PassContext(target=CPU, observe=observe_with(IDS, tmp_path))
    operators = make_pass(name).apply(feed_forward(), context).graph.operators()
    assert operators[operator] == 2
    assert operators["com.microsoft::GatherBlockQuantized"] == 1


@pytest.mark.parametrize("name", [case[0] for case in CASES if case[0] != "int4-weights"])
def test_kept_places_stay_in_float(name: str, tmp_path: Path) -> None:
    context = PassContext(target=CPU, observe=observe_with(IDS, tmp_path), keep=frozenset({"first", "embed"}))
    result = make_pass(name).apply(feed_forward(), context)
    assert result.touched == ("second",)
    operators = result.graph.operators()
    assert operators["MatMul"] == 1
    assert operators["Gather"] == 1


@pytest.mark.parametrize(("name", "allowed"), CASES)
def test_tied_weights_are_stored_once(name: str, allowed: float, tmp_path: Path) -> None:
    graph = feed_forward(tied=True)
    expected = run(graph, {"ids": IDS}, tmp_path)[0]
    context = PassContext(target=CPU, observe=observe_with(IDS, tmp_path))
    result = make_pass(name).apply(graph.clone(), context)
    assert "output" in result.touched
    answers = run(result.graph, {"ids": IDS}, tmp_path)[0]
    assert relative_error(answers, expected) < 1.5 * allowed  # one layer more than in test_answers_stay_close
    tables = [name for name in result.graph.model.graph.initializers if name.startswith("table")]
    assert sorted(tables) == ["table_blocks", "table_scales"]


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_a_weight_that_layers_share_is_stored_once(name: str) -> None:
    """As ALBERT's layers do."""
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    graph = small_graph("h = MatMul (x, w) r = Relu (h) y = MatMul (r, w)", weights={"w": weight})
    wide = ChannelRange(low=np.full(32, -4, np.float32), high=np.full(32, 4, np.float32))
    context = PassContext(target=CPU, observe=lambda _, names: dict.fromkeys(names, wide))
    result = make_pass(name).apply(graph, context)
    assert result.changes == 2
    constants = [value.const_value for value in result.graph.model.graph.initializers.values()]
    assert sum(tensor is not None and tensor.nbytes >= 512 for tensor in constants) == 1


def test_static_int8_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    result = make_pass("int8").apply(feed_forward(), PassContext(target=CPU, observe=observe_with(IDS, tmp_path)))
    together = run(result.graph, {"ids": IDS}, tmp_path)[0]
    alone = run(result.graph, {"ids": IDS[1:2]}, tmp_path)[0]
    np.testing.assert_array_equal(alone[0], together[1])


def test_dynamic_int8_depends_on_the_batch(tmp_path: Path) -> None:
    """What the gate's comparison alone against batched is there to find."""
    result = make_pass("int8-dynamic").apply(feed_forward(), PassContext(target=CPU))
    together = run(result.graph, {"ids": IDS}, tmp_path)[0]
    alone = run(result.graph, {"ids": IDS[1:2]}, tmp_path)[0]
    assert np.abs(alone[0] - together[1]).max() > 1e-4


def test_layers_share_one_quantized_input(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    names = ("q", "k", "v")
    weights = [
        numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH)).astype("f4"), f"w_{name}") for name in names
    ]
    nodes = [helper.make_node("Relu", ["ids"], ["x"])]
    nodes += [helper.make_node("MatMul", ["x", f"w_{name}"], [name], name=name) for name in names]
    graph_proto = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("ids", 1, ["batch", WIDTH])],
        [helper.make_tensor_value_info(name, 1, ["batch", WIDTH]) for name in names],
        weights,
    )
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    graph = Graph(model=ir.from_proto(model), signature=Signature(task="module", inputs=(), outputs=()))
    ones = ChannelRange(low=np.zeros(WIDTH, np.float32), high=np.full(WIDTH, 4, np.float32))
    result = make_pass("int8").apply(graph, PassContext(target=CPU, observe=lambda _, seen: dict.fromkeys(seen, ones)))
    assert result.graph.operators()["QuantizeLinear"] == 1
    assert [str(value.name) for value in result.graph.model.graph.outputs] == ["q", "k", "v"]
    run(result.graph, {"ids": random.standard_normal((2, WIDTH)).astype("f4")}, tmp_path)


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_names_that_a_graph_already_has_are_left_alone(name: str, tmp_path: Path) -> None:
    """Another exporter may call a weight of its own what a pass would call a new one."""
    taken = "r_scale", "r_zero_point", "r_uint8", "second_weight_8bit", "second_weight_scale", "second_weight_scales"
    graph = feed_forward()
    body = graph.model.graph
    for other in taken:
        value = ir.Value(name=other, const_value=ir.tensor(np.full(WIDTH, 3, np.float32), name=other))
        value.shape, value.type = ir.Shape([WIDTH]), ir.TensorType(ir.DataType.FLOAT)
        body.initializers[other] = value
        add = ir.node("Add", [body.outputs[0], value])
        add.outputs[0].name = f"y_{other}"
        body.append(add)
        body.outputs[0] = add.outputs[0]
    body.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    expected = run(graph, {"ids": IDS}, tmp_path)[0]
    context = PassContext(target=CPU, observe=observe_with(IDS, tmp_path))
    answers = run(make_pass(name).apply(graph.clone(), context).graph, {"ids": IDS}, tmp_path)[0]
    assert relative_error(answers, expected) < dict(CASES)[name]


def test_int8_without_calibration_data_is_refused() -> None:
    with pytest.raises(RecipeError, match="int8-dynamic"):
        make_pass("int8").apply(feed_forward(), PassContext(target=CPU))


def test_convolutions_that_stay_in_float_are_said() -> None:
    said = "3 convolutions, which are most of the weights, stay in float: int8-qdq is for them"
    assert said in Int8Dynamic(minimum_elements=1).apply(residual(), PassContext(target=CPU)).notes
    result = Int8Dynamic(minimum_elements=1).apply(feed_forward(), PassContext(target=CPU))
    assert not any("convolutions" in note for note in result.notes)


def test_computed_weights_are_left_alone() -> None:
    """A MatMul of two activations is no linear layer."""
    graph_proto = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        "graph",
        [helper.make_tensor_value_info(name, 1, [WIDTH, WIDTH]) for name in "ab"],
        [helper.make_tensor_value_info("y", 1, [WIDTH, WIDTH])],
    )
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    graph = Graph(model=ir.from_proto(model), signature=Signature(task="module", inputs=(), outputs=()))
    for name in ("int8-dynamic", "int8-weights", "int4-weights"):
        result = make_pass(name).apply(graph.clone(), PassContext(target=CPU))
        assert result.changes == 0
        assert result.graph.operators() == {"MatMul": 1}


def test_block_size_divides_the_width() -> None:
    assert block_size_for(1536, preferred=128) == 128
    assert block_size_for(96, preferred=128) == 32
    assert block_size_for(16, preferred=32) == 16
    assert block_size_for(20, preferred=32) is None


@pytest.mark.parametrize("options", [{"block_size": 24}, {"block_size": 8}])
def test_wrong_block_sizes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="power of two"):
        make_pass("int4-weights", options)


def test_unknown_passes_and_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="fold, deduplicate"):
        make_pass("int9")
    with pytest.raises(RecipeError, match="minimum_elements"):
        make_pass("int8", {"speed": 3})


@pytest.mark.parametrize("limit", [63, 127])
def test_per_channel_rounding_is_within_half_a_step(limit: int) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    integers, scales, zero_points = per_channel_8bit(weight, limit=limit)
    assert integers.dtype == zero_points.dtype == np.int8
    steps = integers.astype(np.int32) - zero_points
    assert np.abs(steps).max() == limit
    assert np.all(np.abs(steps * scales - weight) <= scales / 2 + 1e-7)


@pytest.mark.parametrize("name", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("kind", ["cpu", "cpu-avx2"])
def test_the_largest_products_do_not_overflow(name: str, kind: str, tmp_path: Path) -> None:
    """Two neighbouring products at the end of both ranges: 16 bits do not hold their sum at 8 bits each."""
    weight = np.ones((WIDTH, 2 * WIDTH), np.float32)
    graph_proto = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", 1, ["batch", 2 * WIDTH])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    graph = Graph(model=ir.from_proto(model), signature=Signature(task="module", inputs=(), outputs=()))
    seen = ChannelRange(low=np.zeros(WIDTH, np.float32), high=np.ones(WIDTH, np.float32))
    context = PassContext(target=target(kind), observe=lambda _, names: dict.fromkeys(names, seen))
    result = make_pass(name).apply(graph, context)
    x = np.ones((3, WIDTH), np.float32)
    np.testing.assert_allclose(run(result.graph, {"x": x}, tmp_path, kind)[0], x @ weight, rtol=1e-5)


def test_activation_range_contains_zero_exactly() -> None:
    scale, zero_point = activation_uint8(2.0, 5.0)
    assert zero_point == 0
    assert np.isclose(scale * 255, 5.0)
    scale, zero_point = activation_uint8(-1.0, 3.0)
    assert abs((int(zero_point) - zero_point) * scale) == 0
    assert np.isclose(scale * 255, 4.0)


def restored(found: Blocks, bits: int, block_size: int) -> np.ndarray:
    """float32 (out, in), read back as MatMulNBits is documented to."""

    def unpacked(array: np.ndarray, count: int) -> np.ndarray:
        halves = np.stack([array & 15, array >> 4], -1) if bits == 4 else array[..., None]
        return halves.reshape(*array.shape[:-1], -1)[..., :count].astype(np.float32)

    rows, count = found.scales.shape
    zeros = np.full((rows, count), 1 << (bits - 1), np.float32)
    if found.zero_points is not None:
        zeros = unpacked(found.zero_points, count)
    values = (unpacked(found.packed, block_size) - zeros[..., None]) * found.scales[..., None]
    return values.reshape(rows, -1)


@pytest.mark.parametrize("bits", [4, 8])
def test_block_rounding_keeps_the_largest_value(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    found = blocks(weight, bits=bits, block_size=32)
    values, blocked = restored(found, bits, 32).reshape(4, 2, 32), weight.reshape(4, 2, 32)
    place = np.abs(blocked).argmax(-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(values, place, -1), np.take_along_axis(blocked, place, -1), rtol=1e-6)
    # A step's half, but for the end of the range that two's complement lacks.
    assert np.abs(values - blocked).max() <= np.abs(found.scales).max() + 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_searched_ranges_lose_less_in_every_block(block_size: int, symmetric: bool) -> None:
    """Weights with outliers, and a number of blocks that leaves half a byte of zero points over."""
    random = np.random.default_rng(1)
    weight = random.standard_t(3, (96, 3 * block_size)).astype(np.float32) + np.float32(0.5)

    def errors(search: bool) -> np.ndarray:
        found = blocks(weight, bits=4, block_size=block_size, search=search, symmetric=symmetric)
        lost = np.square(restored(found, 4, block_size) - weight)
        return lost.reshape(96, 3, block_size).sum(-1)

    plain, searched = errors(False), errors(True)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_operator_reads_blocks_as_they_were_written(bits: int, symmetric: bool, count: int, tmp_path: Path) -> None:
    """One-hot rows pick the weight's columns out: what the operator multiplies with is what was rounded."""
    weight = np.random.default_rng(2).uniform(0.5, 2.0, (16, 32 * count)).astype(np.float32)  # far from symmetric
    graph = linear_graph(weight.T)
    step = make_pass(f"int{bits}-weights", {"block_size": 32, "symmetric": symmetric, "minimum_elements": 1})
    result = step.apply(graph, PassContext(target=CPU))
    expected = restored(blocks(weight, bits=bits, block_size=32, symmetric=symmetric), bits, 32)
    found = run(result.graph, {"x": np.eye(32 * count, dtype=np.float32)}, tmp_path)[0]
    np.testing.assert_allclose(found, expected.T, rtol=2e-2, atol=1e-6)  # one value is read back in int8 by the kernel


def test_blocks_with_a_zero_point_of_their_own_lose_less_where_weights_are_one_sided() -> None:
    weight = np.random.default_rng(2).uniform(0.5, 2.0, (16, 96)).astype(np.float32)
    errors = [
        np.square(restored(blocks(weight, bits=4, block_size=32, symmetric=symmetric), 4, 32) - weight).mean()
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_places_that_are_kept_have_eight_bits_under_four_bit_weights(tmp_path: Path) -> None:
    feeds = {"ids": np.arange(40).reshape(2, 20)}
    result = make_pass("int4-weights").apply(feed_forward(), PassContext(target=CPU, keep=frozenset({"second"})))
    bits = {
        node.name: node.attributes["bits"].value for node in result.graph.model.graph if node.op_type == "MatMulNBits"
    }
    assert bits == {"first": 4, "second": 8}
    assert result.kept_as == "at 8 bits"
    assert "second" in result.touched
    plain = make_pass("int4-weights").apply(feed_forward(), PassContext(target=CPU))
    expected = run(feed_forward(), feeds, tmp_path)[0]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mixed_error = np.abs(run(result.graph, feeds, tmp_path / "a")[0] - expected).mean()
    assert mixed_error < np.abs(run(plain.graph, feeds, tmp_path / "b")[0] - expected).mean()


@pytest.mark.parametrize("kept", ["embed", "output"])
def test_a_tied_table_that_is_kept_has_eight_bits_for_all_who_read_it(kept: str) -> None:
    graph = feed_forward(tied=True)
    names = {node.name for node in graph.model.graph}
    assert kept in names
    result = make_pass("int4-weights").apply(graph, PassContext(target=CPU, keep=frozenset({kept})))
    bits = {node.name: node.attributes["bits"].value for node in result.graph.model.graph if "bits" in node.attributes}
    assert bits == {"embed": 8, "output": 8, "first": 4, "second": 4}
    assert result.notes[0].endswith("0 embedding tables at 4 and 1 at 8")


def linear_graph(weight: np.ndarray) -> Graph:
    """y = x @ weight."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", 1, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(np.ascontiguousarray(weight), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return Graph(model=ir.from_proto(model), signature=Signature(task="module", inputs=(), outputs=()))


def test_the_passes_that_calibrate_are_those_that_cannot_do_without_inputs() -> None:
    refusing = set()
    for name in PASSES.keys() - {"int8-prompts"}:  # which is for language models
        try:
            make_pass(name).apply(feed_forward(), PassContext(target=target("tensorrt")))
        except RecipeError as error:
            refusing.add(name if "calibration" in str(error) else str(error))
    assert refusing == {name for name in PASSES if calibrates(make_pass(name))}
    assert calibrates(make_pass("int4-weights", {"method": "awq"}))
