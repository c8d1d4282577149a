"""Tiny random models and tokenizers, saved as folders like those that people download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onnxpress.manifest import Arrays

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "house", "red", "blue")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB = 99
MAX_POSITIONS = 40

_COMMON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
_BERT: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **more: tf.BertConfig(**_BERT, **more),
    "roberta": lambda **more: tf.RobertaConfig(**{**_BERT, "pad_token_id": 1}, type_vocab_size=1, **more),
    "xlm-roberta": lambda **more: tf.XLMRobertaConfig(**{**_BERT, "pad_token_id": 1}, type_vocab_size=1, **more),
    "distilbert": lambda **more: tf.DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=VOCAB, max_position_embeddings=MAX_POSITIONS, **more
    ),
    "albert": lambda **more: tf.AlbertConfig(**_BERT, embedding_size=16, **more),
    "electra": lambda **more: tf.ElectraConfig(**_BERT, embedding_size=16, **more),
    "mpnet": lambda **more: tf.MPNetConfig(**{**_BERT, "pad_token_id": 1}, **more),
    "deberta-v2": lambda **more: tf.DebertaV2Config(
        **_BERT,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        position_buckets=8,
        type_vocab_size=0,
        **{"share_att_key": True, **more},
    ),
    "modernbert": lambda **more: tf.ModernBertConfig(**_MODERNBERT, **more),
    "nomic-bert": lambda **more: tf.NomicBertConfig(**_BERT, **more),
    "qwen3": lambda **more: tf.Qwen3Config(**_DECODER, **more),
    "gemma2": lambda **more: tf.Gemma2Config(**_DECODER, query_pre_attn_scalar=8, sliding_window=8, **more),
    "mistral": lambda **more: tf.MistralConfig(**_DECODER, sliding_window=8, **more),
    "bart": lambda **more: tf.BartConfig(**_BART, **more),
    "mbart": lambda **more: tf.MBartConfig(**_BART, **more),
    "t5": lambda **more: tf.T5Config(**_T5, **more),
    "granite-swa": lambda **more: tf.GraniteSWAConfig(**_DECODER, sliding_window=8, **more),
}
_MODERNBERT: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "local_attention": 8,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 3,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "decoder_start_token_id": 0,
}
_DECODER: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def save_model(folder: Path, name: str, auto_class: Any = tf.AutoModel, **more: Any) -> Path:
    """A folder with config, safetensors weights and a tokenizer."""
    torch.manual_seed(7)
    config = CONFIGS[name](**more)
    model = auto_class.from_config(config)
    spread_weights(model)
    model.save_pretrained(folder)
    save_tokenizer(folder, pad_token_id=config.pad_token_id or 0)
    return folder


def load_text_model(folder: Path, auto_class: Any = tf.AutoModel) -> Any:
    """The saved model, in transformers' own eager form."""
    return auto_class.from_pretrained(folder, attn_implementation="eager").eval()


class OnnxRunner:
    """An onnx_ir model on ONNX Runtime's CPU provider."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        path = folder / "model.onnx"
        ir.save(model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Arrays) -> dict[str, Any]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def spread_weights(model: torch.nn.Module) -> None:
    """Initial weights are so small that attention is nearly uniform, which hides mistakes; make all of them count."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
            elif "norm" not in name.lower():
                parameter.normal_(0.0, 0.1)


def save_tokenizer(folder: Path, *, pad_token_id: int = 0) -> None:
    special = list(SPECIAL)
    special.insert(pad_token_id, special.pop(0))
    vocabulary = {token: index for index, token in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)


def add_pooling(folder: Path, *steps: tuple[str, dict[str, Any] | None]) -> None:
    """modules.json and its steps, as sentence-transformers writes them."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, config) in enumerate(steps, 1):
        path = f"{index}_{kind}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"})
        if config is not None:
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(modules))
