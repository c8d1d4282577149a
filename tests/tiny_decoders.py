"""Tiny random language models of many architectures, and folders of them with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tiny_models import spread_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from onnxpress.graph import Graph
from onnxpress.graph_files import save
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session

VOCABULARY = 320
CONTEXT = 128
EOS = "<|end|>"

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
_MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LATENT: dict[str, Any] = {  # keys of 24 numbers a head, values of 16
    **BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_INDEXED: dict[str, Any] = {**LATENT, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16}
_ENCODER: dict[str, Any] = {  # an encoder's layers as a decoder; positions begin after the padding token
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT + 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
_LINEAR: dict[str, Any] = {  # every second layer attends; the others keep a state
    **BASE,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA: dict[str, Any] = {
    **BASE,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_LEARNED: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
_FALCON: dict[str, Any] = {
    **_LEARNED,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: tf.LlamaConfig(**{**BASE, **more}),
    "llama-heads-of-12": lambda **more: tf.LlamaConfig(**{**BASE, "head_dim": 12, **more}),  # OpenLLaMA has 100
    "llama3-rope": lambda **more: tf.LlamaConfig(
        **BASE,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "linear-rope": lambda **more: tf.LlamaConfig(**BASE, **_rope("linear", factor=4.0)),
    "yarn-rope": lambda **more: tf.Qwen2Config(
        **BASE, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "qwen2": lambda **more: tf.Qwen2Config(**BASE),
    "qwen3": lambda **more: tf.Qwen3Config(**BASE, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": lambda **more: tf.Qwen3MoeConfig(
        **BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
    "mistral": lambda **more: tf.MistralConfig(**BASE, sliding_window=6),
    "mixtral": lambda **more: tf.MixtralConfig(**BASE, num_local_experts=4),
    "olmoe": lambda **more: tf.OlmoeConfig(**{**BASE, **more}, num_experts=8, num_experts_per_tok=3),
    "granite-moe": lambda **more: tf.GraniteMoeConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
    "glm4-moe": lambda **more: (
        tf.Glm4MoeConfig(  # chosen by groups and biases, weighed without; the first layer has no experts
            **BASE,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=1,
            head_dim=16,
        )
    ),
    "qwen2-moe": lambda **more: tf.Qwen2MoeConfig(  # makes a mask that no layer looks at
        **BASE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "gpt-oss": lambda **more: tf.GptOssConfig(  # sinks; gates with a limit, low enough that they meet it
        **BASE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, swiglu_limit=0.5, **_MIXED
    ),
    "deepseek-v2": lambda **more: tf.DeepseekV2Config(**LATENT),  # rotary embeddings as complex numbers
    "deepseek-v3": lambda **more: tf.DeepseekV3Config(**LATENT, n_group=2, topk_group=1),
    "deepseek-v3.2": lambda **more: tf.DeepseekV32Config(**_INDEXED, n_group=2, topk_group=1),
    "glm-5": lambda **more: tf.GlmMoeDsaConfig(  # the second layer looks at what the first one's indexer chose
        **_INDEXED, indexer_types=["full", "shared"]
    ),
    "minimax-m3": lambda **more: tf.MiniMaxM3VLTextConfig(  # an indexer that chooses blocks
        **BASE,
        head_dim=16,
        rotary_dim=8,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=9,
        index_local_blocks=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4": lambda **more: tf.Llama4TextConfig(  # the first layer attends to chunks
        **BASE,
        head_dim=16,
        attention_chunk_size=64,
        layer_types=["chunked_attention", "full_attention"],
        num_local_experts=4,
    ),
    "gemma2": lambda **more: tf.Gemma2Config(**BASE, head_dim=16, query_pre_attn_scalar=24, **_MIXED),
    "gemma3": lambda **more: tf.Gemma3TextConfig(**BASE, head_dim=16, query_pre_attn_scalar=24, **_MIXED),
    "gemma4": lambda **more: (
        tf.Gemma4TextConfig(  # heads of two sizes, turned before they come first; the last layers' keys are others'
            **{**BASE, "num_hidden_layers": 4},
            head_dim=16,
            global_head_dim=32,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=320,
            num_kv_shared_layers=2,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    "gemma3n": lambda **more: (
        tf.Gemma3nTextConfig(  # several streams side by side; activations of which the largest stay, some of them
            **{**BASE, "num_hidden_layers": 4},
            head_dim=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=320,
            laurel_rank=8,
            activation_sparsity_pattern=[0.95, 0.9, 0.0, 0.0],
            num_kv_shared_layers=2,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    "phi3": lambda **more: tf.Phi3Config(**{**BASE, **more}),
    "phi4-partial-rotary": lambda **more: tf.Phi3Config(**BASE, partial_rotary_factor=0.5),
    "smollm3-nope": lambda **more: tf.SmolLM3Config(**BASE, no_rope_layers=[1, 0]),
    "olmo2": lambda **more: tf.Olmo2Config(**BASE),
    "granite": lambda **more: tf.GraniteConfig(**BASE, embedding_multiplier=3.0, logits_scaling=2.0),
    "glm4": lambda **more: tf.Glm4Config(**BASE, head_dim=16),
    "starcoder2": lambda **more: tf.Starcoder2Config(**BASE),
    "stablelm": lambda **more: tf.StableLmConfig(**{**BASE, "hidden_size": 128}),  # a quarter of each head is turned
    "gpt2": lambda **more: tf.GPT2Config(**_LEARNED, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT),
    "gptj": lambda **more: tf.GPTJConfig(**_LEARNED, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, rotary_dim=8),
    "codegen": lambda **more: tf.CodeGenConfig(  # heads in four groups, each with its values before its keys
        **_LEARNED, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, n_ctx=CONTEXT, rotary_dim=8
    ),
    "opt": lambda **more: tf.OPTConfig(
        **_LEARNED,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    "roberta": lambda **more: tf.RobertaConfig(**_ENCODER),
    "xmod": lambda **more: tf.XmodConfig(**_ENCODER, languages=["en_XX", "de_DE"], default_language="de_DE"),
    "falcon": lambda **more: tf.FalconConfig(
        **_FALCON
    ),  # one head of keys; computes attention by itself, as the next three do
    "falcon-40b": lambda **more: tf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "gpt-neo": lambda **more: tf.GPTNeoConfig(  # a window that it keeps as a table
        **_LEARNED,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 1]],
        window_size=more.get("window_size", 6),
    ),
    "xglm": lambda **more: tf.XGLMConfig(
        **_LEARNED, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, max_position_embeddings=CONTEXT
    ),
    "gpt-neox": lambda **more: tf.GPTNeoXConfig(**{**BASE, "hidden_size": 128, "num_key_value_heads": 4}),
    "cohere": lambda **more: tf.CohereConfig(**BASE),
    "phi": lambda **more: tf.PhiConfig(**BASE),
    "qwen3.5": lambda **more: tf.Qwen3_5TextConfig(**_LINEAR, head_dim=64),
    "kimi-linear": lambda **more: tf.KimiLinearConfig(  # a decay for every number of a key
        **{**LATENT, "head_dim": 24},
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_token=2,
    ),
    "qwen3-next": lambda **more: tf.Qwen3NextConfig(
        **_LINEAR,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "olmo-hybrid": lambda **more: tf.OlmoHybridConfig(**_LINEAR),
    "lfm2": lambda **more: tf.Lfm2Config(**BASE, layer_types=["conv", "full_attention"]),
    "granite-hybrid": lambda **more: tf.GraniteMoeHybridConfig(  # state spaces; a norm with a gate
        **_MAMBA,
        mamba_n_groups=1,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "bamba": lambda **more: tf.BambaConfig(**_MAMBA, mamba_n_groups=2, attn_layer_indices=[1]),
    "nemotron-h": lambda **more: tf.NemotronHConfig(
        **BASE,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        layers_block_type=["mamba", "attention", "mlp"],
    ),
    "falcon-h1": lambda **more: tf.FalconH1Config(  # attention and a state space side by side
        **_MAMBA, mamba_n_groups=2, mamba_d_ssm=128
    ),
    "mamba2": lambda **more: tf.Mamba2Config(  # no attention at all
        **_LEARNED,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=2,
        chunk_size=8,
    ),
}


def make_model(name: str, **more: Any) -> Any:
    """A model with weights large enough that all of them count; `more` changes Llama's and Phi-3's config, and GPT-Neo's window."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(ARCHITECTURES[name](**more), attn_implementation="eager").eval()
    spread_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 0.5
    return model


def save_decoder(folder: Path, name: str = "llama", *, template: str | None = None, **more: Any) -> Path:
    """A model folder with a byte-level tokenizer (every text has tokens) and, where given, a chat template."""
    make_model(name, **more).save_pretrained(folder)
    save_byte_tokenizer(folder, template)
    return folder


def save_byte_tokenizer(folder: Path, template: str | None = None) -> None:
    """Tokens 0 and 1 are special, the next 256 are bytes, then come a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n")]
    tokens = [EOS, "<|begin|>", *alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|begin|>", eos_token=EOS, pad_token=EOS)
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)


def step_on(graph: Graph, folder: Path) -> ModelStep:
    """The graph with an empty cache, opened from a file in the folder."""
    save(graph, folder / "model.onnx")
    session = Session(folder / "model.onnx", signature=graph.signature)
    cache = KeyValueCache(graph.signature.inputs, context=graph.signature.axes["length"][1], budget=2**28)
    return ModelStep(session, cache)
