"""Which language models of the installed transformers can be exported: each architecture, tiny and random, against PyTorch.

    python benchmarks/architectures.py [--only NAME …] [--json FILE]

For every architecture of AutoModelForCausalLM, and of AutoModelForMultimodalLM, whose text is exported: its default config with small
numbers in the place of large ones, random weights, the export, and prompts, chunks and steps compared with PyTorch as a build compares them.
Says of each that it answers like PyTorch, why it is refused, or that no small model of it could be made here. Takes ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import measure
import torch
import transformers
from rich.progress import track
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from onnxpress.errors import OnnxpressError
from onnxpress.exporters import DecoderParityCheck, Exported
from onnxpress.exporters.conventions import learn
from onnxpress.exporters.transformers_decoder import DecoderReference, export_causal_lm
from onnxpress.exporters.transformers_model import position_limit
from onnxpress.graph_files import save
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.model_step import ModelStep
from onnxpress.runtime.session import Session

LIKE_PYTORCH, REFUSED, NOT_MADE, FAILED = "answers like PyTorch", "refused", "no small model of it", "fails"
_LONGEST = 60.0  # seconds to look for a small model
CONTEXT = 128
NAMES = tuple(dict.fromkeys((*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)))
_LARGEST = 200_000_000  # parameters of what still is small; towers for images may be larger than the text's part

# Fields of configs, by the number that is small for them. A config gets those that it has.
_NUMBERS = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_lora_rank", "qk_nope_head_dim", "kv_channels"), 16),
    **dict.fromkeys(
        ("qk_rope_head_dim", "rotary_dim", "mamba_n_heads", "mamba_chunk_size", "hidden_size_per_layer_input"), 8
    ),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "state_size", "ssm_state_size", "mamba_head_dim"), 16),
    "q_lora_rank": 24,
    "index_topk": 64,
    "sliding_window": 6,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "is_decoder": True,
}
# The same of the parts that read images and sound.
_TOWERS = {
    **{field: number for field, number in _NUMBERS.items() if "token_id" not in field and field != "is_decoder"},
    **dict.fromkeys(("depth", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("embed_dim", "out_hidden_size", "output_hidden_size", "projector_hidden_size", "projection_dim", "text_dim"),
        64,
    ),
    **dict.fromkeys(("qformer_hidden_size", "output_dim", "text_hidden_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "mlp_dim"), 96),
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [1],
}
del _TOWERS["vocab_size"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What is tried in turn where a model cannot be made or run with these: other numbers, None for a field that is left as it is by default.
_OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"num_key_value_heads": None, "head_dim": 32},
    {"hidden_size": 128, "num_key_value_heads": 4},
    {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 8},
    {"attn_layer_indices": [1], "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_ssm": 128},
    {"num_experts_per_tok": 1},
    {"head_dim": 16, "sliding_window": 6},
    {"head_dim": 8, "num_key_value_heads": 4},
    {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 16},
    {"layer_types": ["conv", "full_attention"]},
    {"layer_types": ["linear_attention", "full_attention"], "head_dim": 64},
    {"layer_types": ["mamba", "attention"]},
    {"default_language": "en_XX"},
    {"head_dim": 128, "hidden_size": 256, "num_attention_heads": 2, "moe_intermediate_size": 32},  # positions in space
    {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2},
    {"head_dim": 128, "hidden_size": 256, "num_attention_heads": 2, "moe_intermediate_size": [32, 32]},
    {"qk_rope_head_dim": 64, "num_key_value_heads": 4},
    {"qk_rope_head_dim": 0, "num_key_value_heads": 4},
    {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    {"head_dim": 128, "num_attention_heads": 2, "rope_parameters": {**_ROPE, "xdrope_section": [16, 16, 16, 16]}},
    {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, tuple[str, str]] = {}
    with context.Pool(measure.THREADS, maxtasksperchild=10) as pool:
        outcomes = pool.imap(outcome, arguments.only)
        for name, (kind, reason) in zip(arguments.only, track(outcomes, total=len(arguments.only)), strict=True):
            found[name] = (kind, reason)
            print(f"{name}: {kind}{reason and ': '}{reason}", flush=True)
    counts = Counter(kind for kind, _ in found.values())
    print(f"\ntransformers {transformers.__version__}, {len(found)} architectures:", end=" ")
    print(", ".join(f"{counts[kind]} {kind}" for kind in (LIKE_PYTORCH, REFUSED, NOT_MADE, FAILED)))
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"transformers": transformers.__version__, "found": found}, indent=1) + "\n"
        )
    sys.exit(1 if counts[FAILED] else 0)


def outcome(name: str) -> tuple[str, str]:
    """What became of an architecture, and why."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model, reason = small_model(name)
    if model is None:
        return NOT_MADE, reason
    try:
        conventions = learn(model, positions=min(CONTEXT, position_limit(model) or CONTEXT))
        graph = export_causal_lm(model, conventions, context=conventions.positions)
        reference = DecoderReference(model, conventions.first_position)
        exported = Exported(name=name, graph=graph, reference=reference, options={})
        with tempfile.TemporaryDirectory() as folder:

            def opened() -> ModelStep:
                save(graph, Path(folder) / "model.onnx")
                session = Session(Path(folder) / "model.onnx", signature=graph.signature)
                return ModelStep(
                    session, KeyValueCache(graph.signature.inputs, context=conventions.positions, budget=2**28)
                )

            DecoderParityCheck(exported).check(opened)
    except OnnxpressError as error:
        return REFUSED, _line(error)
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {_line(error)}"
    return LIKE_PYTORCH, ""


def small_model(name: str) -> tuple[Any, str]:
    """A model with weights that all count, which runs; or None and why there is none."""
    reason, begun = "", time.monotonic()
    multimodal = name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto_class = transformers.AutoModelForMultimodalLM if multimodal else transformers.AutoModelForCausalLM
    for otherwise in _OTHERWISE:
        if time.monotonic() - begun > _LONGEST:
            break
        try:
            default = transformers.AutoConfig.for_model(name)
            text = default.get_text_config(decoder=True)
            torch.manual_seed(0)
            config = _small(default if multimodal else text, text, otherwise)
            with torch.device("meta"):
                size = sum(one.numel() for one in auto_class.from_config(config).parameters())
            if size > _LARGEST:
                raise ValueError(f"{size / 1e6:.0f} million parameters, the smallest that its config allows here")
            model = auto_class.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0.0, 0.15)
                    elif "norm" not in parameter_name.lower():
                        parameter.normal_(0.0, 0.1)
                model(input_ids=torch.arange(2, 22)[None], use_cache=False)
        except Exception as error:  # configs and models refuse numbers in as many ways as there are models
            reason = reason or f"{type(error).__name__}: {_line(error)}"
        else:
            return model, ""
    return None, reason


def _small(config: Any, text: Any, otherwise: dict[str, Any]) -> Any:
    """A config with small numbers, and so the configs in it. text: which of these is the language model's."""
    fields = config.to_dict()
    numbers = {**_NUMBERS, **otherwise} if config is text else _TOWERS
    chosen: dict[str, Any] = {
        field: number
        for field, number in numbers.items()
        if number is not None
        and (
            fields.get(field) is not None
            or field in config.attribute_map
            or (config is text and field in fields.keys() & otherwise)
        )
    }
    layers = otherwise.get("num_hidden_layers", _NUMBERS["num_hidden_layers"])
    for field, value in fields.items():
        if isinstance(value, list) and len(value) == getattr(config, "num_hidden_layers", 0) and field not in chosen:
            kinds = list({str(item): item for item in value}.values())  # some layers of each
            chosen[field] = list(itertools.islice(itertools.cycle(kinds), layers))
        elif config is not text and isinstance(value, int) and field.endswith(("_token_id", "_token_index")):
            chosen[field] = _NUMBERS["vocab_size"] - 1 - len(chosen) % 16  # such as stand for images
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            chosen[part] = _small(getattr(config, part), text, otherwise).to_dict()
    return type(config)(**chosen)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    main()
