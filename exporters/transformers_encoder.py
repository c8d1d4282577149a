"""Exports a transformers text model of any architecture: loads it, wraps head and pooling, traces, says what came out.

Knows no architecture by name. Attention is fused where the model lets itself (attention.py), else exported as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoConfig, PreTrainedModel

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.attention import fused_attention
from onnxpress.exporters.pooling import SentencePooling, read_json, read_pooling
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.reference import TorchReference
from onnxpress.exporters.tasks import Task, find_task, heads, infer_task
from onnxpress.exporters.tokenizer import Tokenizer, read_tokenizer
from onnxpress.exporters.trace import LARGEST_BATCH, tensor_spec, trace
from onnxpress.graph import Graph
from onnxpress.manifest import Json, Signature, TensorSpec

_LENGTH_WITHOUT_LIMIT = 512  # for models with relative positions whose tokenizer has no limit either


@dataclass(frozen=True, kw_only=True)
class EncoderExport:
    """What the export of a text model gives."""

    graph: Graph
    reference: TorchReference
    options: Mapping[str, Json]
    tokenizer: Tokenizer
    notes: tuple[str, ...]


def export_encoder(folder: Path, *, task: str | None, trust_remote_code: bool, max_length: int | None) -> EncoderExport:
    """Export the model in a folder. Raises SourceError and ConversionError."""
    config = _load_config(folder, trust_remote_code=trust_remote_code)
    architectures = tuple(config.architectures or ())
    wanted = infer_task(folder, architectures) if task is None else find_task(task)
    model = _load_model(folder, wanted, config, trust_remote_code=trust_remote_code)
    pooling = read_pooling(folder) if wanted.name == "feature-extraction" else None
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    limit = _position_limit(model, tokenizer)
    options: dict[str, Json] = {
        "max_length": _max_length(folder, tokenizer, limit=limit, wanted=max_length),
        "pad_token_id": tokenizer.pad_token_id,
    }
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if _takes_token_types(model) else ()))
    wrapped = TextModel(model, names, wanted, pooling).eval()
    axes = {"batch": (1, LARGEST_BATCH), "length": (1, limit)}
    outputs = ("embeddings",) if pooling is not None else wanted.outputs
    ir_model, notes = _trace(wrapped, model, names, axes, outputs)
    signature = Signature(
        task=wanted.name,
        inputs=tuple(_input_spec(name, model.config) for name in names),
        outputs=tuple(tensor_spec(value) for value in ir_model.graph.outputs),
        axes=axes,
    )
    options |= _task_options(wanted, model.config, tokenizer, pooling, signature)
    return EncoderExport(
        graph=Graph(model=ir_model, signature=signature),
        reference=TorchReference(wrapped, names, outputs),
        options=options,
        tokenizer=tokenizer,
        notes=(*notes, *tokenizer.notes, *_prompt_notes(folder)),
    )


class TextModel(torch.nn.Module):
    """A model with a plain call: int64 tensors (batch, length) in, a tuple of float32 tensors out."""

    def __init__(
        self, model: PreTrainedModel, names: tuple[str, ...], task: Task, pooling: SentencePooling | None
    ) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.outputs = task.outputs
        self.pooling = pooling
        # A decoder would return its cache, which nobody asked for.
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.options: dict[str, bool] = {"use_cache": False} if takes_cache else {}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """input_ids, attention_mask and, where the model has them, token_type_ids, in the order of `names`."""
        named = dict(zip(self.names, inputs, strict=True))
        answer = self.model(**named, **self.options, return_dict=True)
        outputs = tuple(answer[name] for name in self.outputs)
        return outputs if self.pooling is None else (self.pooling(outputs[0], named["attention_mask"]),)


def _load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises ValueError, OSError, KeyError, ImportError… for bad configs
        raise SourceError(
            f"{folder / 'config.json'} is not one that transformers understands: {_one_line(error)}"
            f"{_remote_code_hint(folder, trust_remote_code)}"
        ) from error


def _load_model(folder: Path, task: Task, config: Any, *, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with quiet():
            model, report = task.auto_class.from_pretrained(  # type: ignore[attr-defined]
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # corrupt files, shapes that do not fit, a config without such a head…
        raise SourceError(
            f"The weights in {folder} do not load as a model for {task.name}: {_one_line(error)} This model has heads "
            f"for {', '.join(heads(tuple(config.architectures or ())))}.{_remote_code_hint(folder, trust_remote_code)}"
        ) from error
    model.eval()
    missing = _used(model, task, report["missing_keys"])
    if missing:
        raise SourceError(
            f"The model in {folder} has no trained weights for {task.name}: {len(missing)} are missing, the first is "
            f"{missing[0]}. It has heads for {', '.join(heads(tuple(config.architectures or ())))}. Choose one of "
            f"these tasks, or a model that was trained for {task.name}."
        )
    return model


def _used(model: PreTrainedModel, task: Task, missing: Any) -> list[str]:
    """Which of the missing parameters the outputs depend on (a pooler that nobody reads may be missing)."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in set(missing)}
    if not parameters:
        return []
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.enable_grad():
        outputs = TextModel(model, ("input_ids", "attention_mask"), task, None)(ids, ids)
        total = torch.stack([output.sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return sorted(name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


def _trace(
    wrapped: TextModel,
    model: PreTrainedModel,
    names: tuple[str, ...],
    axes: Mapping[str, tuple[int, int]],
    outputs: tuple[str, ...],
) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph with fused attention, or without where that is not possible, and a note that says which."""

    def traced(attention: Any) -> ir.Model:
        length = min(7, axes["length"][1])
        # A tensor of its own for every input: torch.export takes one given twice for one input.
        example = {name: torch.full((2, length), name != "token_type_ids", dtype=torch.int64) for name in names}
        with quiet(), attention:
            shapes = dict.fromkeys(names, ("batch", "length"))
            name = type(model).__name__
            return trace(wrapped, example, shapes=shapes, axes=axes, outputs=outputs, prefix="model.", name=name)[0]

    try:
        result = traced(fused_attention(model))
        count = sum(node.op_type == "Attention" for node in result.graph)
        if count:
            return result, (f"attention: fused ({count} Attention operators)",)
        reason = f"{type(model).__name__} has no attention that goes through transformers' attention interface."
    except ConversionError as error:
        reason = str(error)
    return traced(nullcontext()), (f"attention: unfused ({reason})",)


def _takes_token_types(model: PreTrainedModel) -> bool:
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1


def _position_limit(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """The longest input that the positions of a model allow."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings"):
            # A table with a padding row (RoBERTa's and its kin's) counts positions from the row after it.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit or module.num_embeddings, module.num_embeddings - first)
    return int(limit or tokenizer.max_length or _LENGTH_WITHOUT_LIMIT)


def _max_length(folder: Path, tokenizer: Tokenizer, *, limit: int, wanted: int | None) -> int:
    if wanted is not None:
        if not 1 <= wanted <= limit:
            raise SourceError(
                f"A maximum length of {wanted} was asked for; the model in {folder} takes 1 to {limit} tokens."
            )
        return wanted
    declared = folder / "sentence_bert_config.json"
    sentence_length = read_json(declared).get("max_seq_length") if declared.is_file() else None
    return int(min(length for length in (limit, tokenizer.max_length, sentence_length) if length))


def _input_spec(name: str, config: Any) -> TensorSpec:
    highest = {
        "input_ids": int(config.get_text_config().vocab_size) - 1,
        "attention_mask": 1,
        "token_type_ids": int(getattr(config, "type_vocab_size", 0) or 0) - 1,
    }
    return TensorSpec(name=name, dtype="int64", shape=("batch", "length"), bounds=(0, highest[name]))


def _task_options(
    task: Task, config: Any, tokenizer: Tokenizer, pooling: SentencePooling | None, signature: Signature
) -> dict[str, Json]:
    if task.name == "feature-extraction":
        normalized = pooling is not None and pooling.normalized
        return {"dim": signature.outputs[0].shape[-1], "pooled": pooling is not None, "normalized": normalized}
    if task.name == "fill-mask":
        if tokenizer.mask_token is None:
            raise SourceError(
                "The tokenizer has no mask token, so that the model cannot fill masks. Choose another task."
            )
        return {"mask_token": tokenizer.mask_token}
    if task.name == "question-answering":
        return {}
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if task.name == "token-classification":
        return {"labels": labels}
    kind = config.problem_type or ("regression" if len(labels) == 1 else "single_label_classification")
    return {"labels": labels, "problem_type": kind}


def _prompt_notes(folder: Path) -> tuple[str, ...]:
    declared = folder / "config_sentence_transformers.json"
    config = read_json(declared) if declared.is_file() else {}
    prompt = (config.get("prompts") or {}).get(config.get("default_prompt_name"))
    if not prompt:
        return ()
    return (f"sentence-transformers puts {prompt!r} before every text by itself; here it is yours to put there",)


def _remote_code_hint(folder: Path, trust_remote_code: bool) -> str:
    if trust_remote_code or not any(folder.glob("*.py")):
        return ""
    return " The folder brings Python code of its own; if you have read and trust it, pass trust_remote_code."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
