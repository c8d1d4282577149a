"""Every architecture that uses the attention interface exports without code of its own, and answers like PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_decoders import ARCHITECTURES, CONTEXT, make_model, step_on

from onnxpress.exporters import DecoderParityCheck, Exported
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import DecoderReference, export_causal_lm
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session
from onnxpress.workbench import save

pytestmark = pytest.mark.newest

# What is emitted for each: attentions, rotary embeddings (query and key), norms. Two layers each.
EMITTED = {
    "llama": (2, 4, 5),
    "qwen3": (2, 4, 9),  # norms of queries and keys too
    "gemma3": (2, 4, 13),
    "gemma4": (4, 6, 28),
    "smollm3-nope": (2, 2, 5),  # the second layer has no rotary embedding
    "phi4-partial-rotary": (2, 4, 5),
    "glm4": (2, 4, 9),
    "cohere": (2, 4, 0),  # norms that subtract the mean
    "gpt2": (2, 0, 0),
    "gpt-oss": (2, 4, 5),
    "deepseek-v2": (2, 4, 9),  # norms of what queries, and keys with values, are made of
    "deepseek-v3": (2, 0, 9),  # its rotary embeddings change the order of the numbers
}

# Attentions where they are not two; linear attentions.
ATTENTIONS = {"gemma4": 4, "qwen3.5": 1, "kimi-linear": 1, "lfm2": 1, "granite-hybrid": 1, "mamba2": 0}
LINEAR = {"qwen3.5": 1, "kimi-linear": 1, "granite-hybrid": 1, "falcon-h1": 2, "mamba2": 2}

EXPERTS = {
    "qwen3-moe": 2,
    "mixtral": 2,
    "olmoe": 2,
    "granite-moe": 2,
    "glm4-moe": 1,
    "qwen2-moe": 2,
    "gpt-oss": 2,
    "deepseek-v2": 1,
    "deepseek-v3": 1,
    "kimi-linear": 1,
    "granite-hybrid": 2,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_chunks_and_steps_answer_like_pytorch(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    ids = torch.arange(40).reshape(2, 20)
    before = model(input_ids=ids).logits
    conventions = learn(model, positions=CONTEXT)
    graph = export_causal_lm(model, conventions, context=CONTEXT)
    assert torch.equal(model(input_ids=ids).logits, before), "the export changed the model"

    exported = Exported(name=name, graph=graph, reference=DecoderReference(model), options={})
    rows = DecoderParityCheck(exported).check(lambda: step_on(graph, tmp_path))
    assert [row.case for row in rows] == [
        "prompt of 33 tokens, 18 steps",
        "prompt of 20 tokens, 19 steps",
        "prompt of 1 tokens, 19 steps",
        "prompt of 124 tokens, 3 steps",
    ]
    operators = graph.operators()
    assert operators.get("com.microsoft::MoE", 0) == EXPERTS.get(name, 0)
    kinds = ("com.microsoft::GroupQueryAttention", "com.microsoft::RotaryEmbedding", "SimplifiedLayerNormalization")
    assert tuple(operators.get(kind, 0) for kind in kinds) == EMITTED.get(
        name, tuple(operators.get(k, 0) for k in kinds)
    )
    assert operators.get("com.microsoft::GroupQueryAttention", 0) == ATTENTIONS.get(name, 2)
    assert operators.get("com.microsoft::LinearAttention", 0) == LINEAR.get(name, 0)
    if name in ("llama", "qwen2", "mistral"):  # nothing between the projections and the operators
        assert "Transpose" not in operators


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_hidden_states_are_those_of_the_last_layer(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT, hidden_states=True)
    save(graph, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", signature=graph.signature)
    cache = KeyValueCache(graph.signature.inputs, context=CONTEXT, budget=2**28)
    ids = list(range(2, 30))
    step = ModelStep(session, cache, output="hidden_states")
    found = np.concatenate([step.run(0, [part], [len(part)]).copy() for part in (ids[:20], ids[20:])])
    expected = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_tied_embeddings_are_stored_once() -> None:
    model = make_model("qwen3")
    graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    tables = 2 * CONTEXT * 32 // 2 * 4  # cosines and sines
    assert weights <= graph.weight_bytes() <= weights + tables + 1024
