"""Every architecture that uses the attention interface exports without code of its own, and answers like PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_decoders import ARCHITECTURES, CONTEXT, make_model, save_byte_tokenizer, save_decoder, step_on
from tiny_models import spread_weights

from onnxpress.errors import SourceError
from onnxpress.exporters import DecoderParityCheck, Exported, export
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import DecoderReference, export_causal_lm
from onnxpress.graph_files import save
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session

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
_HALF_LINEAR = ("qwen3.5", "qwen3-next", "kimi-linear", "olmo-hybrid", "granite-hybrid", "bamba", "nemotron-h")
ATTENTIONS = {**dict.fromkeys(_HALF_LINEAR, 1), "gemma3n": 4, "gemma4": 4, "lfm2": 1, "mamba2": 0}
LINEAR = {**dict.fromkeys(_HALF_LINEAR, 1), "falcon-h1": 2, "mamba2": 2}

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
    "deepseek-v3.2": 1,
    "glm-5": 1,
    "minimax-m3": 2,
    "qwen3-next": 2,
    "kimi-linear": 1,
    "granite-hybrid": 2,
}

# The longest context where it is not CONTEXT: beyond, an indexer chooses what is attended to, or attention sees chunks. Of the blocks of
# 8 tokens that MiniMax-M3's keeps, the last has one token.
LIMITS = {"deepseek-v3.2": 64, "glm-5": 64, "minimax-m3": 65, "llama4": 64}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_chunks_and_steps_answer_like_pytorch(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    ids = torch.arange(40).reshape(2, 20)
    before = model(input_ids=ids).logits
    conventions = learn(model, positions=CONTEXT)
    context = conventions.positions
    assert context == LIMITS.get(name, CONTEXT)
    graph = export_causal_lm(model, conventions, context=context)
    assert torch.equal(model(input_ids=ids).logits, before), "the export changed the model"

    reference = DecoderReference(model, conventions.first_position)
    exported = Exported(name=name, graph=graph, reference=reference, options={})
    rows = DecoderParityCheck(exported).check(lambda: step_on(graph, tmp_path))
    assert [row.case for row in rows] == [
        "prompt of 33 tokens, 18 steps",
        "prompt of 20 tokens, 19 steps",
        "prompt of 1 tokens, 19 steps",
        f"prompt of {context - 4} tokens, 3 steps",
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
    assert not any("indexer" in str(weight) for weight in graph.model.graph.initializers)


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


def test_a_model_without_positions_takes_any_context(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "tiny", "mamba2")
    exported = export(folder, max_length=2000)
    assert (exported.options["max_length"], exported.graph.signature.axes["length"]) == (2000, (1, 2000))
    assert "context: 512 tokens; the model itself has no limit" in " ".join(export(folder).notes)


def test_a_context_beyond_what_an_indexer_keeps_is_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "tiny", "deepseek-v3.2")
    exported = export(folder)
    assert exported.options["max_length"] == 64
    assert "context: 64 of 128 tokens; beyond, an indexer chooses which tokens are attended to" in exported.notes
    with pytest.raises(SourceError, match=r"beyond 64 tokens, an indexer chooses .* Ask for at most 64"):
        export(folder, max_length=65)


def test_longrope_has_the_long_factors_on_demand(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    short = {"original_max_position_embeddings": 64}
    folder = save_decoder(tmp_path / "tiny", "phi3", rope_parameters={**rope, **short}, **short)
    plain = export(folder)
    assert plain.options["max_length"] == 64
    assert any("of the text; --max-length takes more" in note for note in plain.notes)
    exported = export(folder, max_length=CONTEXT)
    assert "rotary embeddings of texts over 64 tokens in all texts, as 128 were asked for" in exported.notes
    DecoderParityCheck(exported).check(lambda: step_on(exported.graph, tmp_path))
    assert isinstance(exported.reference, DecoderReference)
    model = exported.reference.module
    ids = np.random.default_rng(0).integers(2, 250, CONTEXT)
    step = step_on(exported.graph, tmp_path)

    def alone(count: int) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            answer: np.ndarray[Any, Any] = model(input_ids=torch.tensor(ids[:count])[None]).logits[0, -1].numpy()
        return answer

    for count in [100, *range(101, CONTEXT + 1)]:
        found = step.run(0, [ids[:100].tolist() if count == 100 else [int(ids[count - 1])]])[0]
        expected = alone(count)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
    step = step_on(exported.graph, tmp_path)
    assert np.abs(step.run(0, [ids[:40].tolist()])[0] - alone(40)).max() > 1e-3


def test_positions_that_begin_after_the_padding_token_are_learned(tmp_path: Path) -> None:
    exported = export(save_decoder(tmp_path / "tiny", "roberta"))
    assert exported.options["max_length"] == CONTEXT
    assert "positions begin at 2, and padding tokens inside of a text count" in exported.notes
    assert isinstance(exported.reference, DecoderReference)
    ids = np.arange(2, 22)
    with torch.no_grad():
        alone = exported.reference.module(input_ids=torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(exported.reference.logits(ids, list(range(20))), alone, rtol=0, atol=1e-5)


def test_tied_embeddings_are_stored_once() -> None:
    model = make_model("qwen3")
    graph = export_causal_lm(model, learn(model, positions=CONTEXT), context=CONTEXT)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    tables = 2 * CONTEXT * 32 // 2 * 4  # cosines and sines
    assert weights <= graph.weight_bytes() <= weights + tables + 1024


_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGHT = _TOWER | {"image_size": 28, "patch_size": 14}
_ROOM = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
# A language model, what makes its config whole, and the part of the config that sees or hears.
SEEING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3_5": ("qwen3.5", "vision_config", _TOWER | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}),
    "Gemma3": ("gemma3", "vision_config", _SIGHT),
    "Qwen3VL": ("qwen3", "vision_config", _TOWER | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}),  # whose text's config names no ends
    "Mistral3": ("mistral", "vision_config", _SIGHT | {"model_type": "pixtral"}),
    "SmolVLM": ("llama", "vision_config", _SIGHT),
    "LlavaOnevision": ("qwen2", "vision_config", _SIGHT | {"model_type": "siglip_vision_model"}),  # which tells attention more
    "Qwen2_5_VL": ("qwen2", "vision_config", _TOWER | {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]}),
    "Kimi_K25": ("deepseek-v3", "vision_config", _TOWER),  # experts of the model within
    "Qwen2Audio": ("qwen2", "audio_config", {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}),  # always answers all tokens
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_of_a_model_that_sees_or_hears_too_the_text_is_taken(name: str, tmp_path: Path) -> None:
    kind, part, sees = SEEING[name]
    text = ARCHITECTURES[kind]().to_dict() | (_ROOM if "_VL" in name else {})
    if name == "Qwen3VL":
        del text["bos_token_id"], text["eos_token_id"]
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(text_config=text, **{part: sees})
    model: Any = getattr(tf, f"{name}ForConditionalGeneration")(config).eval()
    spread_weights(model)
    model.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    saved["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}  # code of its own, which is not run
    (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
    exported = export(tmp_path / "model")
    assert exported.graph.signature.task == "text-generation"
    assert exported.options["max_length"] == CONTEXT
    assert any("the text of the model alone" in note for note in exported.notes)
    assert sum(node.op_type == "MoE" for node in exported.graph.model.graph) == EXPERTS.get(kind, 0)
    DecoderParityCheck(exported).check(lambda: step_on(exported.graph, tmp_path))
    assert isinstance(exported.reference, DecoderReference)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        original = model(input_ids=ids).logits[0].numpy()
    found = exported.reference.logits(ids[0].numpy(), list(range(18)))
    np.testing.assert_allclose(found, original, rtol=0, atol=1e-5 * np.abs(original).max())
