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
from transformers import PreTrainedModel

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.attention import fused_attention
from onnxpress.exporters.experts import (
    ExpertsForm,
    arrange_experts,
    emitted_experts,
    experts_notes,
    has_experts,
    recorded_experts,
)
from onnxpress.exporters.pooling import SentencePooling, read_pooling
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.reference import TorchReference
from onnxpress.exporters.row_by_row import RowByRow
from onnxpress.exporters.sentence_transformers import (
    check_first_step,
    declared_activation,
    declared_length,
    declared_prompts,
    has_classifier,
)
from onnxpress.exporters.tasks import TASKS, Task
from onnxpress.exporters.tokenizer import Tokenizer, read_tokenizer
from onnxpress.exporters.trace import LARGEST_BATCH, tensor_spec, trace
from onnxpress.exporters.transformers_model import (
    TextExport,
    TextModel,
    input_limit,
    is_transformers_own,
    load_model,
    longest_input,
    may_be_longer,
)
from onnxpress.graph import Graph
from onnxpress.manifest import Json, Signature, TensorSpec


def export_encoder(
    folder: Path,
    wanted: Task,
    config: Any,
    *,
    trust_remote_code: bool,
    max_length: int | None,
    instead: torch.nn.Module | None = None,
    emit_experts: bool = True,
) -> TextExport:
    """Export the model in a folder, whose config is given, or one `instead` of it. Raises SourceError and ConversionError.

    emit_experts: mixtures of experts become ONNX Runtime's operator where they can.
    """
    opened = open_encoder(
        folder, wanted, config, trust_remote_code=trust_remote_code, max_length=max_length, instead=instead
    )
    model, wrapped, names, tokenizer = opened.model, opened.wrapped, opened.names, opened.tokenizer
    axes = {"batch": (1, LARGEST_BATCH), "length": (1, opened.limit)}
    row_by_row = RowByRow()
    with row_by_row if model.config.is_encoder_decoder and is_transformers_own(model) else nullcontext():
        ir_model, notes = _trace(wrapped, model, names, axes, opened.outputs, emit_experts=emit_experts)
    signature = Signature(
        task=wanted.name,
        inputs=tuple(_input_spec(name, model.config) for name in names),
        outputs=tuple(tensor_spec(value) for value in ir_model.graph.outputs),
        axes=axes,
    )
    options = opened.options
    if row_by_row.reads_last_end:  # random tokens have to end with it, for the original to answer them
        options |= {"closing_token_id": model.config.eos_token_id}
    if wanted.name == "feature-extraction":
        options |= {"dim": signature.outputs[0].shape[-1], **declared_prompts(folder)}
    return TextExport(
        graph=Graph(model=ir_model, signature=signature),
        reference=TorchReference(wrapped, names, opened.outputs),
        options=options,
        tokenizer=tokenizer,
        notes=(
            *opened.notes,
            *notes,
            *tokenizer.notes,
            *_prompt_notes(options),
            *_activation_notes(folder, wanted.name, config),
            *_template_notes(folder, wanted.name, opened),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class OpenedEncoder:
    """A text model with head and pooling, ready to answer; what its runner needs to know of it is in options."""

    model: PreTrainedModel
    wrapped: TextModel
    names: tuple[str, ...]
    outputs: tuple[str, ...]
    limit: int
    options: dict[str, Json]
    tokenizer: Tokenizer
    notes: tuple[str, ...]


def open_encoder(
    folder: Path,
    wanted: Task,
    config: Any,
    *,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    instead: torch.nn.Module | None = None,
) -> OpenedEncoder:
    """Load the model in a folder, whose config is given, for a task; `instead` takes its place. Raises SourceError, ConversionError.

    A text classifier is a model with transformers' own head, or an encoder whose last step in modules.json is the head.
    """
    check_first_step(folder)
    pooled_head = wanted.name == "text-classification" and has_classifier(folder)
    loaded = TASKS["feature-extraction"] if pooled_head else wanted
    model: Any = instead
    notes: tuple[str, ...] = ()
    if instead is None:
        model, notes = load_model(folder, loaded, config, trust_remote_code=trust_remote_code)
    pooling = read_pooling(folder) if loaded.name == "feature-extraction" else None
    tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
    text = model.config.get_text_config()
    if wanted.name == "text-classification" and tokenizer.pads and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id  # decoders answer at the last token that is another
    limit = input_limit(model, tokenizer, max_length)
    if may_be_longer(model):
        limit = max(limit, max_length or 0, declared_length(folder) or 0)
    names = token_inputs(model, tokenizer)
    return OpenedEncoder(
        model=model,
        wrapped=TextModel(model, names, loaded, pooling).eval(),
        names=names,
        outputs=("embeddings",) if pooling is not None and not pooled_head else wanted.outputs,
        limit=limit,
        options={
            "max_length": longest_input(folder, tokenizer, limit=limit, wanted=max_length),
            "pad_token_id": tokenizer.pad_token_id,
            **_task_options(folder, wanted, model.config, tokenizer, pooling),
        },
        tokenizer=tokenizer,
        notes=notes,
    )


def _trace(
    wrapped: TextModel,
    model: PreTrainedModel,
    names: tuple[str, ...],
    axes: Mapping[str, tuple[int, int]],
    outputs: tuple[str, ...],
    *,
    emit_experts: bool,
) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph with fused attention, or without where that is not possible, and a note that says which."""
    longest = axes["length"][1]
    length = min(7, longest)
    # The tracer does not believe that what is one shorter may be 1; texts of 1 and 2 tokens are compared with the original.
    traced_axes = {**axes, "length": (3 if longest > 3 else 1, longest)}
    # A tensor of its own for every input: torch.export takes one given twice for one input.
    example = {name: torch.full((2, length), name != "token_type_ids", dtype=torch.int64) for name in names}
    experts: dict[torch.nn.Module, ExpertsForm | None] = {}
    if has_experts(model):
        with torch.no_grad(), recorded_experts(model, experts):
            wrapped(*example.values())
    if not emit_experts:
        experts = dict.fromkeys(experts)

    def traced(attention: Any) -> ir.Model:
        with quiet(), attention, emitted_experts(model, experts):
            shapes = dict.fromkeys(names, ("batch", "length"))
            name = type(model).__name__
            result, *_ = trace(
                wrapped, example, shapes=shapes, axes=traced_axes, outputs=outputs, prefix="model.", name=name
            )
        arrange_experts(result)
        return result

    try:
        result = traced(fused_attention(model))
        count = sum(node.op_type == "Attention" for node in result.graph)
        if count:
            return result, (f"attention: fused ({count} Attention operators)", *experts_notes(experts))
        reason = f"{type(model).__name__} has no attention that goes through transformers' attention interface."
    except ConversionError as error:
        reason = str(error)
    return traced(nullcontext()), (f"attention: unfused ({reason})", *experts_notes(experts))


def token_inputs(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The names of a text model's inputs."""
    takes = tokenizer.token_types and "token_type_ids" in inspect.signature(model.forward).parameters
    types = takes and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def _input_spec(name: str, config: Any) -> TensorSpec:
    highest = {
        "input_ids": int(config.get_text_config().vocab_size) - 1,
        "attention_mask": 1,
        "token_type_ids": int(getattr(config, "type_vocab_size", 0) or 0) - 1,
    }
    return TensorSpec(name=name, dtype="int64", shape=("batch", "length"), bounds=(0, highest[name]))


def _task_options(
    folder: Path, task: Task, config: Any, tokenizer: Tokenizer, pooling: SentencePooling | None
) -> dict[str, Json]:
    if task.name == "feature-extraction":
        normalized = pooling is not None and pooling.normalized
        return {"pooled": pooling is not None, "normalized": normalized}
    if task.name == "fill-mask":
        if tokenizer.mask_token is None:
            raise SourceError(
                "The tokenizer has no mask token, so that the model cannot fill masks. Choose another task."
            )
        return {"mask_token": tokenizer.mask_token}
    return label_options(folder, task, config)


def label_options(folder: Path, task: Task, config: Any) -> dict[str, Json]:
    """The labels of a model that has some, and, of a classifier of texts, what kind of labels they are.

    One label that is not said to be a regression's gets a sigmoid, as in transformers' pipeline and in sentence-transformers'
    CrossEncoder, which may declare that it gets none; others are left to the user.
    """
    if task.name not in ("text-classification", "token-classification"):
        return {}
    if set(config.id2label) != set(range(config.num_labels)):
        raise SourceError(
            f"id2label in config.json of {folder} counts {', '.join(map(str, config.id2label))}; the model's labels are 0 to {config.num_labels - 1}."
        )
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if task.name == "token-classification":
        return {"labels": labels}
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise SourceError(
            f"id2label in config.json of {folder} names {twice!r} twice; scores are given by name: each label needs its own."
        )
    kind = config.problem_type or ("regression" if len(labels) == 1 else "single_label_classification")
    options: dict[str, Json] = {"labels": labels, "problem_type": kind}
    if kind == "regression":
        activation = declared_activation(folder, config) or ("Identity" if config.problem_type else "Sigmoid")
        if activation == "Sigmoid":
            options["activation"] = "sigmoid"
    return options


def _activation_notes(folder: Path, task: str, config: Any) -> tuple[str, ...]:
    declared = declared_activation(folder, config) if task == "text-classification" else None
    if declared == "Identity" and config.num_labels > 1:
        return ("sentence-transformers' CrossEncoder gives logits; predict gives probabilities, by a softmax",)
    if declared in (None, "Identity", "Sigmoid"):
        return ()
    return (f"sentence-transformers applies {declared} to the scores; here it is yours to apply",)


def _template_notes(folder: Path, task: str, opened: OpenedEncoder) -> tuple[str, ...]:
    """A remark on rerankers that were language models."""
    scores = task == "text-classification" and opened.model.config.num_labels == 1
    if not scores or not opened.tokenizer.chats or (folder / "modules.json").is_file():
        return ()
    return (
        "sentence-transformers' CrossEncoder reads pairs through the tokenizer's chat template; here one text follows the other, as in "
        "transformers' pipeline",
    )


def _prompt_notes(prompts: Mapping[str, Json]) -> tuple[str, ...]:
    if "prompts" not in prompts:
        return ()
    default = prompts.get("default_prompt")
    always = f"; {default} is there where none is named" if default else ""
    named = ", ".join(name for name, text in prompts["prompts"].items() if text)
    return (f"prompts of the model, put before texts where they are named: {named}{always}",) if named else ()
