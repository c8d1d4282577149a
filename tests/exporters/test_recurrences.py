"""Layers that keep a state: what padding leaves in it, and which functions are taken for which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_decoders import CONTEXT, make_model
from transformers.models.falcon_h1 import modeling_falcon_h1

from onnxpress.errors import ConversionError
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.recurrences import State
from onnxpress.exporters.transformers_decoder import export_causal_lm
from onnxpress.graph_files import save
from onnxpress.runtime.session import Session

pytestmark = pytest.mark.newest


def test_padding_that_is_no_number_comes_into_no_state(tmp_path: Path) -> None:
    """GroupQueryAttention leaves at padding what was in memory; the second layer's states are behind the first one's attention."""
    model = make_model("falcon-h1")
    graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)
    counts = np.array([12, 1, 5], np.int32)
    ids = np.arange(36).reshape(3, 12) % 60 + 20
    feeds: dict[str, Any] = {
        spec.name: np.zeros((3, *(64 if axis == "capacity" else int(axis) for axis in spec.shape[1:])), np.float32)
        for spec in graph.signature.inputs
        if spec.name.startswith("past_") and spec.name != "past_lengths"
    }
    every = np.concatenate([row * 12 + np.arange(count) for row, count in enumerate(counts)])
    feeds |= {"input_ids": ids, "past_lengths": np.zeros(3, np.int32), "lengths": counts, "logit_indices": every}
    answers = []
    for poisoned in (False, True):
        if poisoned:
            cleaned = [node for node in graph.model.graph if node.op_type == "Where" and _attends(node.inputs[1])]
            assert len(cleaned) == 2
            for node in cleaned:
                bad = ir.node("Constant", [], {"value": ir.tensor(np.array(np.nan, np.float32))})
                spoiled = ir.node("Where", [node.inputs[0], node.inputs[1], bad.outputs[0]])
                graph.model.graph.insert_before(node, [bad, spoiled])
                node.replace_input_with(1, spoiled.outputs[0])
        save(graph, tmp_path / "model.onnx")
        found = Session(tmp_path / "model.onnx", signature=graph.signature).run(feeds)
        answers.append({name: found[name].copy() for name in found if "state" in name or name == "logits"})
    assert len(answers[0]) == 1 + 2 * 2
    for name, clean in answers[0].items():
        np.testing.assert_array_equal(answers[1][name], clean, err_msg=name)


def _attends(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "GroupQueryAttention"


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen3.5", ["conv", "recurrent"]),
        ("lfm2", ["conv"]),
        ("falcon-h1", ["conv", "recurrent", "conv", "recurrent"]),
        ("llama", []),
    ],
)
def test_states_are_found_in_the_order_of_the_layers(name: str, kinds: list[str]) -> None:
    states = learn(make_model(name), positions=CONTEXT).states
    assert [state.kind for state in states] == kinds
    if name == "qwen3.5":
        assert states == (State(kind="conv", shape=(3, 96)), State(kind="recurrent", shape=(4, 16, 8)))


def test_a_function_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = modeling_falcon_h1.mamba2_chunk_scan

    # The parameters by which such a function is known.
    def mamba2_chunk_scan(hidden_states: Any, dt: Any, A: Any, B: Any, C: Any, **more: Any) -> torch.Tensor:  # noqa: N803
        answer: torch.Tensor = scan(hidden_states, dt, A, B, C, **more)
        return 1.01 * answer

    monkeypatch.setattr(modeling_falcon_h1, "mamba2_chunk_scan", mamba2_chunk_scan)
    with pytest.raises(ConversionError, match="computes in mamba2_chunk_scan something else"):
        learn(make_model("falcon-h1"), positions=CONTEXT)
