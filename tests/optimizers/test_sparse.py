"""2:4 sparsity: the pattern, how much better than by size alone, and where it is refused."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_graphs import small_graph

from onnxpress.calibration import ActivationStream
from onnxpress.errors import RecipeError
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.sparse import is_two_of_four, two_of_four
from onnxpress.optimizers.targets import target
from onnxpress.recipe import make_recipe
from onnxpress.workbench import Workbench

RANDOM = np.random.default_rng(0)
MIX = RANDOM.standard_normal((32, 32)).astype(np.float32) / 6
SIGNATURE = Signature(
    task="module",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", "length", 32)),),
    outputs=(),
    axes={"batch": (1, 4), "length": (1, 99)},
)
INPUTS = [{"x": RANDOM.standard_normal((1, 50, 32)).astype(np.float32) @ MIX} for _ in range(8)]


def with_inputs(folder: Path) -> PassContext:
    stream = partial(ActivationStream, open_session=Workbench(folder, target("cpu")).open, inputs=lambda: INPUTS)
    return PassContext(target=target("tensorrt"), stream=stream)


def test_what_stays_makes_up_for_what_goes() -> None:
    x = np.concatenate([feeds["x"][0] for feeds in INPUTS])
    weight = RANDOM.standard_normal((24, 32)).astype(np.float32)
    sparse = two_of_four(weight, x.T @ x / len(x))
    assert is_two_of_four(sparse)
    assert not is_two_of_four(weight)
    groups = np.abs(weight).reshape(24, 8, 4)
    by_size = np.where(np.argsort(np.argsort(groups, axis=2), axis=2) >= 2, weight.reshape(24, 8, 4), 0).reshape(24, 32)
    assert is_two_of_four(by_size)
    ours, crude = (float(np.square(x @ (found - weight).T).sum()) for found in (sparse, by_size))
    assert ours < 0.7 * crude


def test_layers_of_a_graph(tmp_path: Path) -> None:
    graph = small_graph(
        "h = MatMul (x, up) g = Relu (h) m = MatMul (g, down) y = MatMul (m, odd)",
        weights={
            "up": RANDOM.standard_normal((32, 64)).astype(np.float32),
            "down": RANDOM.standard_normal((64, 30)).astype(np.float32),
            "odd": RANDOM.standard_normal((30, 32)).astype(np.float32),
        },
    )
    graph.signature = SIGNATURE
    context = with_inputs(tmp_path)
    first = next(node.name for node in graph.model.graph if node.inputs[1] is graph.model.graph.initializers["up"])
    kept = make_pass("sparse-2-4", {"minimum_elements": 0}).apply(
        graph.clone(), dataclasses.replace(context, keep=frozenset((str(first),)))
    )
    assert kept.changes == 1
    result = make_pass("sparse-2-4", {"minimum_elements": 0}).apply(graph, context)
    weights = {name: value.const_value.numpy() for name, value in graph.model.graph.initializers.items()}
    assert result.changes == 2, "no four divide 30"
    assert is_two_of_four(weights["up"].T)
    assert is_two_of_four(weights["down"].T)
    assert (weights["odd"] != 0).all()


@pytest.mark.parametrize("readers", [1, 2])
def test_weights_behind_a_transpose(tmp_path: Path, readers: int) -> None:
    """As files of other exporters have them; what two layers read stays as it is."""
    graph = small_graph(
        "t = Transpose <perm = [1, 0]> (w) h = MatMul (x, t) "
        + ("y = MatMul (h, t)" if readers == 2 else "y = Relu (h)"),
        weights={"w": RANDOM.standard_normal((32, 32)).astype(np.float32)},
    )
    graph.signature = SIGNATURE
    result = make_pass("sparse-2-4", {"minimum_elements": 0}).apply(graph, with_inputs(tmp_path))
    assert result.changes == 2 - readers
    assert result.graph.operators() == ({"MatMul": 1, "Relu": 1} if readers == 1 else {"MatMul": 2, "Transpose": 1})
    [weight] = [value.const_value for value in result.graph.model.graph.initializers.values()]
    assert weight is not None
    assert is_two_of_four(weight.numpy().T) == (readers == 1)


def test_refused_where_it_brings_nothing() -> None:
    graph = small_graph("y = MatMul (x, w)", weights={"w": np.eye(32, dtype=np.float32)})
    for name in ("cpu", "cpu-avx2", "cuda"):
        with pytest.raises(RecipeError, match=f"brings nothing on the target {name}.*--prune"):
            make_pass("sparse-2-4").apply(graph, PassContext(target=target(name)))
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        make_pass("sparse-2-4").apply(graph, PassContext(target=target("tensorrt")))
    recipe = make_recipe({"model": {"source": "x"}, "build": {"target": "tensorrt", "precision": "fp16-sparse"}})
    assert recipe.pass_names("module")[-2:] == ("sparse-2-4", "fp16")
