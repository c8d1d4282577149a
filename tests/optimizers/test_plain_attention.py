"""Attention in matrix products: the answers of ONNX Runtime's operator, and of PyTorch on padded batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from small_graphs import assert_same_answers, change, small_graph
from tiny_models import save_model

from onnxpress.exporters import ParityCheck, export
from onnxpress.graph_files import save
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target
from onnxpress.runtime.session import Session

RANDOM = np.random.default_rng(0)
TOKENS = "float[batch,length,32] x"
HEADS = "float[batch,4,length,8] x"


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "inputs", "others"),
    [
        ("Attention<q_num_heads=4, kv_num_heads=4>(x, x, x)", TOKENS, {}),
        ("Attention<q_num_heads=4, kv_num_heads=4, scale=0.3>(x, x, x)", TOKENS, {}),
        ("Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(x, x, x)", TOKENS, {}),
        (
            "Attention<q_num_heads=4, kv_num_heads=4>(x, other, other)",
            f"{TOKENS}, float[batch,others,32] other",
            {"other": numbers(3, 7, 32)},
        ),
        (
            "Attention<q_num_heads=4, kv_num_heads=2>(x, shared, shared)",
            f"{TOKENS}, float[batch,length,16] shared",
            {"shared": numbers(3, 5, 16)},
        ),
        (
            "Attention<q_num_heads=4, kv_num_heads=4>(x, x, x, seen)",
            f"{TOKENS}, bool[batch,1,length,length] seen",
            {"seen": np.arange(5)[None, None, None] < np.array([5, 3, 1])[:, None, None, None]},
        ),
        (
            "Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(x, x, x, added)",
            f"{TOKENS}, float[batch,4,length,length] added",
            {"added": numbers(3, 4, 5, 5)},
        ),
    ],
)
def test_answers_are_those_of_the_operator(
    body: str, inputs: str, others: dict[str, np.ndarray], tmp_path: Path
) -> None:
    feeds = {"x": numbers(3, 5, 32), **others}
    if "seen" in feeds:
        feeds["seen"] = np.broadcast_to(feeds["seen"], (3, 1, 5, 5))
    graph = small_graph(f"y = {body}", inputs=inputs, opset=23, ir_version=10)
    result = change("plain-attention", graph, tmp_path)
    assert result.changes == 1
    assert "Attention" not in result.graph.operators()
    assert_same_answers(tmp_path, [feeds])


def test_heads_that_are_apart_already(tmp_path: Path) -> None:
    graph = small_graph(
        "y = Attention(x, x, x)", inputs=HEADS, outputs="float[batch,4,length,8] y", opset=23, ir_version=10
    )
    result = change("plain-attention", graph, tmp_path)
    assert result.changes == 1
    assert "Reshape" not in result.graph.operators()
    assert_same_answers(tmp_path, [{"x": numbers(2, 4, 6, 8)}])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Attention<q_num_heads=4, kv_num_heads=4, softcap=2.0>(x, x, x)", "bounds its scores"),
        ("y, key, value = Attention<q_num_heads=4, kv_num_heads=4>(x, x, x, , past, past)", "past keys"),
    ],
)
def test_what_is_more_than_that_stays(body: str, reason: str) -> None:
    inputs = f"{TOKENS}, float[batch,4,before,8] past"
    outputs = "float[batch,length,32] y" + (", float[batch,4,all,8] key" if "key" in body else "")
    graph = small_graph(body, inputs=inputs, outputs=outputs, opset=23, ir_version=10)
    result = make_pass("plain-attention").apply(graph, PassContext(target=target("openvino")))
    assert result.changes == 0
    assert result.graph.operators()["Attention"] == 1
    assert reason in result.notes[-1]


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_encoders_answer_like_pytorch(name: str, tmp_path: Path) -> None:
    exported = export(
        save_model(tmp_path / "model", name, tf.AutoModelForTokenClassification), task="token-classification"
    )
    layers = exported.graph.operators()["Attention"]
    result = make_pass("plain-attention").apply(exported.graph.clone(), PassContext(target=target("openvino")))
    assert result.changes == layers
    assert result.graph.operators()["Softmax"] == layers
    save(result.graph, tmp_path / "model.onnx")
    ParityCheck(exported).check(Session(tmp_path / "model.onnx", signature=result.graph.signature))
