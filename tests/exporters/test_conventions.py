"""What is found out by numbers: norms, rotary embeddings, windows; and what is refused because it fits no operator."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_decoders import BASE, CONTEXT, LATENT, VOCABULARY, make_model

from onnxpress.errors import ConversionError
from onnxpress.exporters import conventions as conventions_module
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import export_causal_lm


def from_config(config: Any) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_windows_and_softcaps_are_those_of_each_layer() -> None:
    first, second = learn(make_model("gemma2"), positions=CONTEXT).attentions
    assert (first.window, second.window) == (6, None)
    assert (first.softcap, second.softcap) == (50.0, 50.0)
    assert first.scale == pytest.approx(24**-0.5)
    assert (first.kv_num_heads, first.head_dim) == (2, 16)


def test_a_window_that_holds_the_whole_context_is_none() -> None:
    assert learn(make_model("mistral"), positions=6).attentions[0].window is None
    assert learn(make_model("mistral"), positions=7).attentions[0].window == 6


@pytest.mark.parametrize(
    ("name", "width", "interleaved"),
    [("llama", 16, False), ("phi4-partial-rotary", 8, False), ("glm4", 8, True), ("cohere", 16, True), ("stablelm", 8, False)],
)  # fmt: skip
def test_rotary_embeddings_are_told_apart(name: str, width: int, interleaved: bool) -> None:
    for call in learn(make_model(name), positions=CONTEXT).rotaries:
        assert call is not None
        assert (call.width, call.interleaved) == (width, interleaved)


def test_layers_with_frequencies_of_their_own_have_tables_of_their_own() -> None:
    assert len(learn(make_model("gemma3"), positions=CONTEXT).tables) == 2
    assert len(learn(make_model("llama"), positions=CONTEXT).tables) == 1


def test_nothing_holds_a_model_that_was_asked() -> None:
    for name in ("llama", "qwen3-moe"):
        model = make_model(name)
        learn(model, positions=CONTEXT)
        held = weakref.ref(model)
        del model
        gc.collect()
        assert held() is None, name


def test_norms_are_told_by_their_offset() -> None:
    def offsets(name: str) -> set[int]:
        return {norm.offset for norm in learn(make_model(name), positions=CONTEXT).norms.values()}

    assert offsets("gemma2") == {1}
    assert offsets("llama") == {0}


def test_frequencies_that_change_with_the_length_limit_the_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = tf.Phi3Config(
        **BASE, original_max_position_embeddings=64, rope_parameters={**rope, "original_max_position_embeddings": 64}
    )
    found = learn(from_config(config), positions=CONTEXT)
    assert found.positions == 64
    assert found.tables[0][0].shape == (64, 8)


@pytest.mark.parametrize("kept", [4, 100, 200])
def test_what_an_indexer_keeps_limits_the_context(kept: int) -> None:
    config = tf.DeepseekV32Config(
        **LATENT, n_group=2, topk_group=1, index_topk=kept, index_n_heads=2, index_head_dim=16
    )
    model = from_config(config)
    found = learn(model, positions=CONTEXT)
    assert found.positions == min(kept, CONTEXT)
    assert found.limited_by == ("an indexer chooses which tokens are attended to" if kept < CONTEXT else "")
    assert found.indexers == tuple(layer.self_attn.indexer for layer in model.model.layers)


def test_the_size_of_a_chunk_limits_the_context() -> None:
    found = learn(from_config(tf.Llama4TextConfig(**BASE, head_dim=16, attention_chunk_size=50)), positions=CONTEXT)
    assert (found.positions, found.limited_by) == (50, "attention sees chunks of the text")
    assert {len(table) for pair in found.tables for table in pair} == {50}


def test_a_choice_of_tokens_that_no_module_answers_with_is_refused() -> None:
    model = make_model("deepseek-v3.2")
    model.model.layers[1].self_attn.indexer.register_forward_hook(lambda _, __, answer: answer + 0)
    with pytest.raises(ConversionError, match=r"DeepseekV32Attention chooses which tokens .* cannot be told"):
        learn(model, positions=CONTEXT)


@pytest.mark.parametrize(("padding", "first"), [(1, 2), (5, 6)])
def test_the_first_position_is_learned(padding: int, first: int) -> None:
    sizes = {**BASE, "max_position_embeddings": CONTEXT + first, "pad_token_id": padding}
    model = from_config(tf.RobertaConfig(**sizes, is_decoder=True))
    assert learn(model, positions=CONTEXT).first_position == first
    assert learn(make_model("gpt2"), positions=CONTEXT).first_position == 0


def test_a_model_that_wants_other_positions_is_refused() -> None:
    model = make_model("roberta")
    model.config.pad_token_id = 7  # its embeddings count from the one that they were made with
    with pytest.raises(ConversionError, match=r"answers otherwise when it is told that its tokens are at 0, 1, 2…"):
        learn(model, positions=CONTEXT)


@pytest.mark.parametrize("window", [6, 100, 300])
def test_a_window_shows_where_attention_is_computed_without_the_interface(window: int) -> None:
    first, second = learn(make_model("gpt-neo", window_size=window), positions=CONTEXT).attentions
    assert (first.window, second.window) == (None, window if window < CONTEXT else None)
    assert first.scale == pytest.approx(1.0)
    falcon = learn(make_model("falcon"), positions=CONTEXT).attentions[0]
    assert (falcon.kv_num_heads, falcon.head_dim) == (1, 16)
    assert falcon.scale == pytest.approx(0.25)


def test_a_head_too_narrow_for_the_operator_keeps_the_models_own_rotary_embedding() -> None:
    assert learn(from_config(tf.StableLmConfig(**BASE)), positions=CONTEXT).rotaries == (None, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
            r"by itself, .* and otherwise than as softmax",
        ),
        (
            tf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64),
            "by itself",
        ),
        (tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2), r"first kind \(Mamba 1\)"),
        (
            tf.MiniMaxConfig(**BASE, layer_types=["full_attention", "linear_attention"], num_local_experts=4),
            r"earlier tokens, at model\.layers\.1\.self_attn\.",
        ),
    ],
    ids=["bloom", "rwkv", "mamba", "minimax"],
)
def test_what_fits_no_operator_is_named(config: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        learn(from_config(config), positions=CONTEXT)


def test_a_vocabulary_of_ten_tokens_is_enough() -> None:
    """The second recorded text begins with the last of them."""
    assert len(learn(from_config(tf.LlamaConfig(**{**BASE, "vocab_size": 10})), positions=CONTEXT).attentions) == 2


def test_a_mask_that_looks_ahead_is_refused() -> None:
    config = tf.LlamaConfig(**BASE)
    config.is_causal = False
    with pytest.raises(
        ConversionError, match=f"up to the present one alone: at position 0 it sees {CONTEXT} tokens from 0 on"
    ):
        learn(from_config(config), positions=CONTEXT)


@pytest.mark.parametrize("name", ["gemma3", "deepseek-v3.2"])
def test_the_model_is_as_before_when_the_export_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    found = learn(model, positions=CONTEXT)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("in the middle of a trace")

    monkeypatch.setattr("onnxpress.exporters.decoder_operators.symbolic", broken)
    with pytest.raises(ConversionError, match="in the middle of a trace"):
        export_causal_lm(model, found, context=CONTEXT)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks
    assert model.config._attn_implementation == "eager"
    names = vars(__import__(type(model).__module__, fromlist=["x"]))
    assert names["apply_rotary_pos_emb"].__module__ != conventions_module.__name__
