"""Where a build tries its graphs: weights written once, sessions without a second copy, and what is timed."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from small_graphs import small_graph

import onnxpress
from onnxpress import graph_files, machine, workbench
from onnxpress.errors import OutputError, RecipeError
from onnxpress.foreign import open_onnx
from onnxpress.graph import Graph, Widened
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target
from onnxpress.runtime.session import Session
from onnxpress.timing import alternate
from onnxpress.workbench import Workbench

WIDTH = 64


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Two layers whose weights, and a scale of a single number, are in a file beside the graph."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH)).astype(np.float32), f"w{index}")
        for index in range(2)
    ]
    weights.append(numpy_helper.from_array(np.array([0.5], np.float32), "scale"))
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], name="first"),
        helper.make_node("Mul", ["h", "scale"], ["s"], name="scaled"),
        helper.make_node("MatMul", ["s", "w1"], ["y"], name="second"),
    ]
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        weights,
    )
    path = tmp_path / "given" / "network.onnx"
    path.parent.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location="given.data", size_threshold=0)
    return path


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """With weights of their own files from the first byte on."""
    monkeypatch.setattr(graph_files, "_EXTERNAL_FROM", 1)
    folder = tmp_path / "work"
    folder.mkdir()
    return Workbench(folder, target("cpu"))


def pressed(graph: Graph) -> Graph:
    """With the second layer in 8 bits, and the first as it was."""
    context = PassContext(target=target("cpu"), keep=frozenset({"first"}))
    return make_pass("int8-dynamic").apply(graph.clone(), context).graph


def is_mapped(array: Any) -> bool:
    """Whether an array's numbers are those of a file."""
    return isinstance(array, np.memmap) or (array is not None and is_mapped(getattr(array, "base", None)))


def answers(runnable: Any) -> np.ndarray:
    feeds = {"x": np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)}
    found: Mapping[str, np.ndarray] = runnable.run(feeds)
    return found["y"]


def test_weights_are_written_once_for_all_graphs_that_have_them(
    network: Path, bench: Workbench, tmp_path: Path
) -> None:
    exported = open_onnx(network)
    plain = bench.open(exported.graph)
    eight = pressed(exported.graph)
    smaller = bench.open(eight)
    np.testing.assert_array_equal(answers(plain), answers(exported.reference))
    files = {path.name: path.stat().st_size for path in tmp_path.joinpath("work").iterdir()}
    _, last = graphs = sorted(name for name in files if name.endswith(".onnx"))
    own, shared = f"{last}.data", "weights.data"
    assert set(files) == {*graphs, own, shared}
    assert files[shared] == 2 * 4 * WIDTH * WIDTH
    assert files[own] == WIDTH * WIDTH  # 8-bit weights
    other = tmp_path / "other"
    other.mkdir()
    alone = Workbench(other, target("cpu")).open(pressed(exported.graph))
    np.testing.assert_array_equal(answers(smaller), answers(alone))
    held = [
        value.const_value.raw
        for value in eight.model.graph.initializers.values()
        if value.const_value.nbytes == WIDTH * WIDTH
    ]
    assert held
    assert all(is_mapped(array) for array in held), "what the pass has made is read from the file that the trial wrote"
    numbers = [array.copy() for array in held]
    del plain, smaller
    assert all(map(np.array_equal, held, numbers)), "though the file is gone"
    assert [path.name for path in tmp_path.joinpath("work").iterdir()] == ["weights.data"]
    again = bench.open(exported.graph)
    np.testing.assert_array_equal(answers(again), answers(exported.reference))


def test_text_stays_in_the_graph(network: Path, bench: Workbench, tmp_path: Path) -> None:
    """It has no form in a file of weights."""
    model = onnx.load(network)
    words = [f"word{index:02}" for index in range(WIDTH)]
    model.graph.initializer.append(
        helper.make_tensor("words", onnx.TensorProto.STRING, [WIDTH], [w.encode() for w in words])
    )
    model.graph.node.pop()
    model.graph.node.extend(
        [
            helper.make_node(
                "LabelEncoder",
                ["words"],
                ["numbers"],
                domain="ai.onnx.ml",
                keys_strings=words,
                values_floats=[float(index) for index in range(WIDTH)],
            ),
            helper.make_node("Mul", ["s", "numbers"], ["y"]),
        ]
    )
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, network)
    exported = open_onnx(network)
    expected = answers(exported.reference)
    assert np.abs(expected).max() > 1
    np.testing.assert_array_equal(answers(bench.open(exported.graph)), expected)
    path = tmp_path / "saved" / "model.onnx"
    path.parent.mkdir()
    graph_files.save(exported.graph, path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    np.testing.assert_array_equal(answers(Session(path, signature=exported.graph.signature)), expected)


def branching(path: Path) -> Path:
    """Weights in the branches of an If too, and sizes that ONNX Runtime infers shapes from, 256 bytes of them."""
    body = """
        h = MatMul (x, w)
        p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, p16, p17, p18, p19, p20, p21, p22, p23, p24, p25, p26, p27,
            p28, p29, p30, p31 = Split <axis: int = 1> (h, sizes)
        y = If (flag) <then_branch = one () => (a) { a = Add (p0, b) }, else_branch = two () => (c) { c = Sub (p31, b) }>
    """
    random = np.random.default_rng(0)
    graph = small_graph(
        body,
        inputs="float[batch,64] x, bool flag",
        outputs="float[batch,length] y",
        weights={
            "w": random.standard_normal((64, 128 * 32)).astype(np.float32),
            "sizes": np.full(32, 128, np.int64),
            "b": np.ones(128, np.float32),
        },
        opset=18,
    )
    model = ir.to_proto(graph.model)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):  # as exporters leave it: in the branch that reads it
                attribute.g.initializer.append(numpy_helper.from_array(np.full(128, 2, np.float32), "own"))
                attribute.g.node[0].input[1] = "own"
    onnx.save(model, path)
    return path


def test_weights_of_branches_and_sizes_that_shapes_hang_on(bench: Workbench, tmp_path: Path) -> None:
    exported = open_onnx(branching(tmp_path / "branching.onnx"))
    session = bench.open(exported.graph)
    again = bench.open(exported.graph.clone())
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)}
    for flag in (True, False):
        expected = exported.reference.run({**feeds, "flag": np.array(flag)})["y"]
        for one in (session, again):
            np.testing.assert_array_equal(one.run({**feeds, "flag": np.array(flag)})["y"], expected)


def test_a_graph_with_quantized_weights_answers_alike_whether_it_is_timed_or_not(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    graph = small_graph(
        "y = com.microsoft.MatMulNBits <K = 256, N = 256, bits = 4, block_size = 32, accuracy_level = 4> (x, w, s)",
        inputs="float[batch,256] x",
        outputs="float[batch,256] y",
        weights={
            "w": random.integers(0, 256, (256, 8, 16), dtype=np.uint8),
            "s": random.random((256, 8)).astype(np.float32),
        },
    )
    path = tmp_path / "quantized.onnx"
    ir.save(graph.model, path)
    artifact = onnxpress.build(str(path), out=tmp_path / "out", precision="fp32", measure=False)
    assert artifact.manifest.ledger[0]["status"] == "kept"


def test_the_digest_is_of_nodes_and_numbers(network: Path) -> None:
    graph = open_onnx(network).graph
    assert graph.digest() == open_onnx(network).graph.digest() == graph.clone().digest()
    assert pressed(graph).digest() != graph.digest()
    other = graph.clone()
    value = other.model.graph.initializers["w1"]
    value.const_value = ir.tensor(value.const_value.numpy() + 1, name="w1")
    assert other.digest() != graph.digest()


def test_a_full_disk_is_said(network: Path, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_files.ir.external_data, "convert_tensors_to_external", fail)
    with pytest.raises(OutputError, match=r"No space left on device\. Free space or choose another --out"):
        bench.open(open_onnx(network).graph)


def test_floats_are_not_packed_where_nothing_is_timed(network: Path, bench: Workbench, tmp_path: Path) -> None:
    exported = open_onnx(network)
    other = tmp_path / "other"
    other.mkdir()
    mapped = Workbench(other, target("cpu"), measure=False)
    floats = mapped.open(exported.graph)
    np.testing.assert_allclose(answers(floats), answers(bench.open(exported.graph)), rtol=1e-5, atol=1e-5)
    assert not packs(floats)
    assert packs(mapped.open(pressed(exported.graph)))
    assert packs(bench.open(exported.graph))


def packs(session: Session) -> bool:
    options = session._opening._options(1, record_placement=False)
    try:
        return options.get_session_config_entry("session.disable_prepacking") != "1"
    except RuntimeError:  # nobody said anything
        return True


def test_nothing_is_timed_where_memory_is_short(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2.5 * 4 * (2 * WIDTH * WIDTH + 1)
    monkeypatch.setattr(workbench, "free_memory_bytes", lambda: int(needed) - 1)
    artifact = onnxpress.build(str(network), out=tmp_path / "short", precision="int8-dynamic", budget="50%")
    assert "not timed: two sessions" in artifact.measured["note"]
    assert artifact.measured["rows"] == []
    with pytest.raises(RecipeError, match=r"nothing is timed here \(two sessions .*GiB are free\)"):
        onnxpress.build(str(network), out=tmp_path / "none", budget="50%", prefer="speed")
    monkeypatch.setattr(workbench, "free_memory_bytes", lambda: int(needed) + 1)
    artifact = onnxpress.build(str(network), out=tmp_path / "enough", precision="int8-dynamic", budget="50%")
    assert "not timed" not in artifact.measured["note"]  # that others crowd the machine may be in it
    assert artifact.measured["rows"]


def test_free_memory_is_the_smaller_of_the_machines_and_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, usage = tmp_path / "memory.max", tmp_path / "memory.stat"
    monkeypatch.setattr(machine, "_CONTAINERS", ((str(limit), str(usage), "anon"),))
    free = machine.free_memory_bytes()
    assert free is None or 2**20 < free <= (machine.describe()["memory_bytes"] or 0)
    limit.write_text("max\n")
    usage.write_text("file 7\nanon 1000\n\nanon_thp 5\n")
    assert (machine.free_memory_bytes() is None) == (free is None)
    limit.write_text("1048576\n")
    assert machine.free_memory_bytes() == 2**20 - 1000
    limit.write_text("10\n")
    assert machine.free_memory_bytes() == 0
    for odd in ("", "anon", "anon x", "other 3"):
        usage.write_text(odd)
        assert (machine.free_memory_bytes() is None) == (free is None)


def test_long_calls_are_warmed_once() -> None:
    calls: list[str] = []

    def long() -> None:
        calls.append("long")
        time.sleep(0.02)

    def short() -> None:
        calls.append("short")
        time.sleep(0.004)

    times = alternate({"long": long, "short": short}, rounds=3, seconds=0.01)
    assert calls.count("long") == 1 + 3
    assert calls.count("short") >= 3 * (1 + 2)
    assert times["long"] >= 20
    assert times["short"] >= 4


def test_a_small_graph_takes_along_what_it_reads_from_another_folder(
    network: Path, bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a large one is pressed to is no longer large, and has some of its weights."""
    exported = open_onnx(network)
    expected = answers(exported.reference)
    bench.open(exported.graph)
    monkeypatch.setattr(graph_files, "_EXTERNAL_FROM", 64_000_000)
    path = tmp_path / "artifact" / "model.onnx"
    path.parent.mkdir()
    graph_files.save(exported.graph, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(answers(Session(path, signature=exported.graph.signature)), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("half", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
def test_weights_in_half_precision_are_widened_one_after_the_other(half: ir.DataType, tmp_path: Path) -> None:
    """128 MB of them in float32, a table that is an output layer too among them; and the graph answers as it does with them in float32."""
    random, width, layers = np.random.default_rng(0), 1024, 28

    def constant(name: str, *shape: int) -> ir.Value:
        numbers = (random.standard_normal(shape, np.float32) / 32).astype(half.numpy())
        widened = Widened(ir.Tensor(numbers, dtype=half, name=name))
        return ir.Value(name=name, const_value=widened, type=ir.TensorType(widened.dtype), shape=widened.shape)

    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    table = constant("table", 4096, width)
    weights = [constant(f"w{index}", width, width) for index in range(layers)]
    nodes = [ir.node("Gather", [table, ids])]
    for weight in weights:
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weight]))
    nodes.append(ir.node("Transpose", [table], {"perm": [1, 0]}))
    nodes.append(ir.node("MatMul", [nodes[-2].outputs[0], nodes[-1].outputs[0]]))
    nodes.append(ir.node("Sum", [nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4096])
    inner = ir.Graph([ids], [y], nodes=nodes, initializers=[table, *weights], opset_imports={"": 21})
    given = TensorSpec(name="ids", dtype="int64", shape=("n",), bounds=(0, 4095))
    signature = Signature(
        task="module",
        inputs=(given,),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("n", 4096)),),
        axes={"n": (1, 64)},
    )
    graph = Graph(model=ir.Model(inner, ir_version=10), signature=signature)
    feeds = {"ids": np.arange(3, 8)}
    graph_files.save(graph, tmp_path / "whole.onnx")
    assert (tmp_path / "whole.onnx.data").stat().st_size == graph.weight_bytes()
    expected = Session(tmp_path / "whole.onnx", signature=signature).run(feeds)["y"]

    bench = Workbench(tmp_path / "work", target("cpu"), measure=False)
    session = bench.open(graph)
    assert (tmp_path / "work" / "weights.data").stat().st_size == graph.weight_bytes() // 2
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed before hides what is taken now
    with machine.PeakMemory() as memory:
        time.sleep(0.3)  # it looks ten times a second
        before = memory.peak
        answers = [session.run(feeds)["y"] for _ in range(5)]
        time.sleep(0.3)
    assert before is not None
    assert memory.peak is not None
    assert memory.peak - before < graph.weight_bytes()
    for answer in answers:
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
    assert graph.widens()
    assert {node.op_type for node in graph.model.graph} == {"Gather", "MatMul", "Transpose", "Sum"}, (
        "its file alone casts"
    )
