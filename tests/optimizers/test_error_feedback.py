"""Rounding that looks at the layer's inputs: GPTQ's error feedback, AWQ's scales, and the walk through the graph that feeds them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import small_graph

from onnxpress import calibration
from onnxpress.calibration import ActivationStream
from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.graph_files import save
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.error_feedback import blocks_with_feedback, channel_scales
from onnxpress.optimizers.rounding import blocks, unpack
from onnxpress.optimizers.targets import target
from onnxpress.runtime.session import Session
from onnxpress.workbench import Workbench

CPU = target("cpu")


def correlated(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Inputs of which a few directions and a few channels hold most of the energy."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, 12)) @ random.standard_normal((12, width))
    return ((mixed + 0.1 * random.standard_normal((count, width))) * random.lognormal(0, 1, width)).astype(np.float32)


def moments_of(x: np.ndarray) -> np.ndarray:
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 128), (8, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_feedback_loses_far_less_on_inputs_it_has_not_seen(bits: int, block_size: int, symmetric: bool) -> None:
    weight = np.random.default_rng(1).standard_normal((48, 256)).astype(np.float32)
    x, unseen = np.split(correlated(2048, 256), 2)
    options = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
    plain = unpack(blocks(weight, **options), bits=bits, block_size=block_size)
    found = blocks_with_feedback(weight, moments_of(x), **options)
    fed = unpack(found, bits=bits, block_size=block_size)
    error = {name: np.square(unseen @ (w - weight).T).sum() for name, w in (("plain", plain), ("fed", fed))}
    assert error["fed"] < 0.3 * error["plain"]
    assert found.scales.shape == (48, 256 // block_size)
    assert (found.zero_points is None) == symmetric


def test_without_correlations_it_is_rounding_to_the_nearest() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32)
    energy = np.random.default_rng(2).uniform(0.1, 9, 256).astype(np.float32)
    fed = blocks_with_feedback(weight, np.diag(energy), bits=4, block_size=32)
    plain = blocks(weight, bits=4, block_size=32)
    np.testing.assert_array_equal(fed.packed, plain.packed)
    np.testing.assert_array_equal(fed.scales, plain.scales)


@pytest.mark.parametrize("x", [np.zeros((4, 64)), np.ones((1, 64)), np.eye(64)[:3] * 1e-20])
def test_inputs_that_say_little_give_finite_weights(x: np.ndarray) -> None:
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    found = blocks_with_feedback(weight, moments_of(x.astype(np.float32)), bits=4, block_size=32)
    assert np.isfinite(found.scales).all()
    assert np.abs(unpack(found, bits=4, block_size=32)).max() < 10


def test_scales_pay_where_some_inputs_are_large() -> None:
    weight = np.random.default_rng(1).standard_normal((48, 256)).astype(np.float32)
    rounder = partial(blocks, bits=4, block_size=32)
    x = np.random.default_rng(2).standard_normal((512, 256)).astype(np.float32)
    x[:, ::32] *= 30
    scales = channel_scales(weight, moments_of(x), rounder, bits=4, block_size=32)
    assert scales is not None
    assert scales[::32].min() > 1.5 * scales[1::32].max()
    scaled = unpack(rounder(weight * scales), bits=4, block_size=32) / scales
    plain = unpack(rounder(weight), bits=4, block_size=32)
    assert np.square(x @ (scaled - weight).T).sum() < 0.5 * np.square(x @ (plain - weight).T).sum()
    assert channel_scales(weight, np.eye(256, dtype=np.float32), rounder, bits=4, block_size=32) is None


def norms_and_layers() -> Graph:
    """norm → two layers that are multiplied → a layer, added to the input; then another norm and layer."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(np.float32) / 8 for name, shape in
               (("w1", (32, 64)), ("w2", (32, 64)), ("w3", (64, 32)), ("w4", (32, 32)))}  # fmt: skip
    weights |= {name: random.lognormal(0, 1.5, 32).astype(np.float32) for name in ("g1", "g2")}
    weights |= {"b1": random.standard_normal(32).astype(np.float32)}
    return small_graph(
        "n = LayerNormalization(x, g1, b1) a = MatMul(n, w1) b = MatMul(n, w2) m = Mul(a, b) c = MatMul(m, w3)"
        " r = Add(x, c) k = LayerNormalization(r, g2) y = MatMul(k, w4)",
        weights=weights,
    )


def inputs(lengths: tuple[int, ...] = (5, 9, 40, 3)) -> Iterator[dict[str, np.ndarray]]:
    for seed, length in enumerate(lengths):
        yield {"x": np.random.default_rng(seed).standard_normal((1, length, 32)).astype(np.float32)}


def answers(graph: Graph, folder: Path, *names: str) -> list[dict[str, np.ndarray]]:
    copy = graph.clone()
    values = {str(value.name): value for node in copy.model.graph for value in node.outputs}
    copy.model.graph.outputs.extend(values[name] for name in names)
    save(copy, folder / "model.onnx")
    session = Session(folder / "model.onnx")
    return [session.run(feeds) for feeds in inputs()]


def test_the_stream_sees_what_the_whole_graph_does(tmp_path: Path) -> None:
    graph = norms_and_layers()
    opened: list[list[str]] = []
    bench = Workbench(tmp_path, CPU)

    def recording(part: Graph) -> Session:
        opened.append([node.op_type for node in part.model.graph])
        return bench.open(part)

    stream = ActivationStream(graph, recording, inputs)
    values = {str(value.name): value for node in graph.model.graph for value in node.outputs}
    expected = answers(graph, tmp_path, "n", "m", "k")
    for name in ("n", "m", "k"):
        x = np.concatenate([answer[name].reshape(-1, answer[name].shape[-1]) for answer in expected])
        np.testing.assert_allclose(stream.second_moments(values[name]), moments_of(x), rtol=1e-4, atol=1e-6)
    assert opened == [
        ["LayerNormalization"],
        ["MatMul", "MatMul", "Mul"],
        ["MatMul", "Add", "LayerNormalization"],
    ], "every node runs once"
    assert set(stream._live) == {"k"}, "nothing is kept that no later part reads"
    (x,) = graph.model.graph.inputs
    given = np.concatenate([feeds["x"][0] for feeds in inputs()])
    np.testing.assert_allclose(stream.second_moments(x), moments_of(given), rtol=1e-4, atol=1e-6)


def test_of_large_inputs_the_first_are_walked_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer answers to all of them would be gigabytes."""
    lengths = (5, 9, 40, 3, 7, 11, 2, 6, 8, 13)
    monkeypatch.setattr(calibration, "_WALKED_BYTES", 1000)
    graph = norms_and_layers()
    stream = ActivationStream(graph, Workbench(tmp_path, CPU).open, lambda: inputs(lengths))
    (x,) = graph.model.graph.inputs
    given = np.concatenate([feeds["x"][0] for feeds in inputs(lengths[:8])])
    np.testing.assert_allclose(stream.second_moments(x), moments_of(given), rtol=1e-4, atol=1e-6)
    stream.second_moments(next(node.outputs[0] for node in graph.model.graph if node.outputs[0].name == "n"))
    assert len(stream._live["n"]) == 8


def test_the_stream_sees_what_was_changed_behind_it(tmp_path: Path) -> None:
    graph = norms_and_layers()
    stream = ActivationStream(graph, Workbench(tmp_path, CPU).open, inputs)
    nodes = {str(node.outputs[0].name): node for node in graph.model.graph}
    n = nodes["n"].outputs[0]
    before = stream.second_moments(n)
    by = np.linspace(1, 2, 32, dtype=np.float32)
    stream.divide(n, by)
    np.testing.assert_allclose(stream.second_moments(n), before / np.outer(by, by), rtol=1e-5, atol=1e-6)
    for name in ("w1", "w2"):  # as a pass does: what is divided is multiplied behind it
        value = graph.model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * by[:, None], name=name)
    found = stream.second_moments(nodes["m"].outputs[0])
    plain = norms_and_layers()
    x = np.concatenate([answer["m"].reshape(-1, 64) for answer in answers(plain, tmp_path, "m")])
    np.testing.assert_allclose(found, moments_of(x), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq-gptq"])
def test_a_pass_that_calibrates_loses_less(method: str, tmp_path: Path) -> None:
    graph = norms_and_layers()
    context = PassContext(
        target=CPU, stream=partial(ActivationStream, open_session=Workbench(tmp_path / "work", CPU).open, inputs=inputs)
    )
    expected = answers(graph, tmp_path)
    error = {}
    for name in ("rtn", method):
        done = make_pass("int4-weights", {"method": name}).apply(graph.clone(), context)
        assert done.changes == 4
        found = answers(done.graph, tmp_path)
        error[name] = sum(
            float(np.square(one["y"] - other["y"]).sum()) for one, other in zip(expected, found, strict=True)
        )
    assert error[method] < 0.9 * error["rtn"]
    if "awq" in method:
        assert any("2 norms carry scales" in note for note in done.notes)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("n = LayerNormalization(x, g) a = MatMul(n, w) y = Add(n, a)", "float[batch,length,32] y"),
        (
            "n = LayerNormalization(x, g) y = MatMul(n, w)",
            "float[batch,length,32] y, float[batch,length,32] n",
        ),
        (
            "n = LayerNormalization(x, g) t = Transpose <perm = [1, 0]> (w) a = MatMul(n, t) b = MatMul(n, t) y = Mul(a, b)",
            "float[batch,length,32] y",
        ),
        (
            "n = LayerNormalization(x, g) a = MatMul(n, w) b = MatMul(x, w) y = Add(a, b)",
            "float[batch,length,32] y",
        ),
        (
            "n = LayerNormalization(x, g) a = MatMul(n, w) m = LayerNormalization(a, g) y = MatMul(m, w)",
            "float[batch,length,32] y",
        ),
    ],
    ids=[
        "read by a sum",
        "an output",
        "weight shared through a transpose",
        "weight shared with another input",
        "weight of two layers",
    ],
)
def test_a_norm_that_others_read_carries_no_scales(body: str, outputs: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {"g": random.lognormal(0, 1.5, 32), "w": random.standard_normal((32, 32))}
    graph = small_graph(
        body, outputs=outputs, weights={name: array.astype(np.float32) for name, array in weights.items()}
    )
    context = PassContext(
        target=CPU, stream=partial(ActivationStream, open_session=Workbench(tmp_path, CPU).open, inputs=inputs)
    )
    done = make_pass("int4-weights", {"method": "awq"}).apply(graph, context)
    assert any("0 norms carry scales" in note for note in done.notes)


def test_no_calibration_inputs_are_one_clear_error(tmp_path: Path) -> None:
    stream = partial(ActivationStream, open_session=Workbench(tmp_path, CPU).open, inputs=lambda: iter(()))
    with pytest.raises(RecipeError, match="No calibration inputs are left"):
        make_pass("int4-weights", {"method": "gptq"}).apply(norms_and_layers(), PassContext(target=CPU, stream=stream))


def test_methods_that_calibrate_need_inputs() -> None:
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        make_pass("int4-weights", {"method": "gptq"}).apply(norms_and_layers(), PassContext(target=CPU))
