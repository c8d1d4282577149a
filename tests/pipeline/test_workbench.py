"""Where a build tries its graphs: weights written once, sessions without a second copy, and what is timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxpress
from onnxpress import machine, workbench
from onnxpress.errors import OutputError, RecipeError
from onnxpress.foreign import open_onnx
from onnxpress.graph import Graph
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target
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
    monkeypatch.setattr(workbench, "_EXTERNAL_FROM", 1)
    folder = tmp_path / "work"
    folder.mkdir()
    return Workbench(folder, target("cpu"))


def pressed(graph: Graph) -> Graph:
    """With the second layer in 8 bits, and the first as it was."""
    context = PassContext(target=target("cpu"), keep=frozenset({"first"}))
    return make_pass("int8-dynamic").apply(graph.clone(), context).graph


def answers(runnable: Any) -> np.ndarray:
    feeds = {"x": np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)}
    found: Mapping[str, np.ndarray] = runnable.run(feeds)
    return found["y"]


def test_weights_are_written_once_and_linked_where_graphs_share_them(
    network: Path, bench: Workbench, tmp_path: Path
) -> None:
    exported = open_onnx(network)
    plain = bench.open(exported.graph)
    smaller = bench.open(pressed(exported.graph))
    np.testing.assert_array_equal(answers(plain), answers(exported.reference))
    files = [session.path.with_name("weights.data").stat() for session in (plain, smaller)]
    assert files[0].st_ino == files[1].st_ino
    assert not plain.path.with_name("model.onnx.data").exists()
    own = smaller.path.with_name("model.onnx.data").stat().st_size  # 8-bit weights and their scales
    assert WIDTH * WIDTH < own < 2 * WIDTH * WIDTH
    alone = Workbench(tmp_path, target("cpu")).open(pressed(exported.graph))
    np.testing.assert_array_equal(answers(smaller), answers(alone))
    folder = plain.path.parent
    del plain
    assert not folder.exists()
    again = bench.open(exported.graph)  # the file outlives the session that came first
    np.testing.assert_array_equal(answers(again), answers(exported.reference))


def test_without_links_each_graph_has_its_own_file(
    network: Path, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(workbench.os, "link", refuse)
    exported = open_onnx(network)
    session = bench.open(exported.graph)
    assert session.path.with_name("model.onnx.data").stat().st_size >= 2 * 4 * WIDTH * WIDTH
    np.testing.assert_array_equal(answers(session), answers(exported.reference))


def test_a_full_disk_is_said(network: Path, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workbench.ir.external_data, "convert_tensors_to_external", fail)
    with pytest.raises(OutputError, match=r"No space left on device\. Free space or choose another --out"):
        bench.open(open_onnx(network).graph)


def test_weights_that_are_not_packed_answer_alike(network: Path, bench: Workbench) -> None:
    exported = open_onnx(network)
    mapped = bench.open(exported.graph, packed=False)
    np.testing.assert_allclose(answers(mapped), answers(bench.open(exported.graph)), rtol=1e-5, atol=1e-5)
    assert mapped._opening._options(1, record_placement=False).get_session_config_entry("session.disable_prepacking") == "1"  # fmt: skip


def test_nothing_is_timed_where_memory_is_short(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2.5 * 4 * (2 * WIDTH * WIDTH + 1)
    monkeypatch.setattr(workbench, "free_memory_bytes", lambda: int(needed) - 1)
    artifact = onnxpress.build(str(network), out=tmp_path / "short", precision="int8-dynamic", budget="50%")
    assert "not timed: two sessions" in artifact.measured["note"]
    assert artifact.measured["rows"] == []
    with pytest.raises(RecipeError, match=r"nothing is timed here .*GiB are free"):
        onnxpress.build(str(network), out=tmp_path / "none", budget="50%", prefer="speed")
    monkeypatch.setattr(workbench, "free_memory_bytes", lambda: int(needed) + 1)
    artifact = onnxpress.build(str(network), out=tmp_path / "enough", precision="int8-dynamic", budget="50%")
    assert artifact.measured["note"] == ""
    assert artifact.measured["rows"]


def test_free_memory_is_the_smaller_of_the_machines_and_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_LIMITS", (str(limit),))
    free = machine.free_memory_bytes()
    assert free is None or 2**20 < free <= (machine.describe()["memory_bytes"] or 0)
    limit.write_text("max\n")
    assert (machine.free_memory_bytes() is None) == (free is None)
    limit.write_text("1048576\n")
    assert machine.free_memory_bytes() == 2**20


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
