"""Loads a transformers model of any architecture from a folder: its config, its weights with the task's head, its limits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.half_weights import stored_half, widen_buffers, without_parameters
from onnxpress.exporters.pooling import SentencePooling
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.sentence_transformers import declared_length
from onnxpress.exporters.stored_weights import is_unfolded, left_out, refuse_other_shapes, unfold
from onnxpress.exporters.tasks import Task, heads
from onnxpress.exporters.tokenizer import Tokenizer
from onnxpress.graph import Graph
from onnxpress.manifest import Json, Runnable

_MOST_UNFOLDED = 8  # bytes in float32 for each that is stored: of weights of 4 bits
_LOADING_TAKES = 1.1  # of the weights in float32
_PROCESS_TAKES = 1.25 * 2**30  # bytes beside them: 7.5 GiB were taken by 1.5 billion weights, 13.6 by 3.1
_SMALLEST_STACK = 2**20  # numbers of several experts
_LENGTH_WITHOUT_LIMIT = 512  # for models whose positions have no limit and whose tokenizer has none either


@dataclass(frozen=True, kw_only=True)
class TextExport:
    """What the export of a text model gives."""

    graph: Graph
    reference: Runnable
    options: Mapping[str, Json]
    tokenizer: Tokenizer
    notes: tuple[str, ...]


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
        self.options: dict[str, bool] = {"use_cache": False} if _takes(model, "use_cache") else {}

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """input_ids, attention_mask and, where the model has them, token_type_ids, in the order of `names`."""
        named = dict(zip(self.names, inputs, strict=True))
        answer = self.model(**named, **self.options, return_dict=True)
        outputs = tuple(answer[name] for name in self.outputs)
        return outputs if self.pooling is None else (self.pooling(outputs[0], named["attention_mask"]),)


def is_transformers_own(model: PreTrainedModel) -> bool:
    """Whether its code is transformers', and not what a folder brings or a caller wrote."""
    return type(model).__module__.startswith("transformers.")


def _takes(model: PreTrainedModel, option: str) -> bool:
    """Whether its forward has this parameter, or passes on to the model in it what it does not know, as transformers' own do."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    passes_on = open_ended and is_transformers_own(model)
    return option in parameters or (passes_on and option in inspect.signature(model.base_model.forward).parameters)


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """config.json as transformers reads it. Raises SourceError, also for weights in a form that is not read."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises ValueError, OSError, KeyError, ImportError… for bad configs
        raise SourceError(
            f"{folder / 'config.json'} is not one that transformers understands: {_one_line(error)}"
            f"{_remote_code_hint(folder, trust_remote_code)}"
        ) from error
    unfold(folder, config)
    return config


def load_model(
    folder: Path, task: Task, config: Any, *, trust_remote_code: bool, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model in evaluation mode, with its own attention, and remarks on its weights; its buffers are of float32. Raises SourceError."""
    unfolded = is_unfolded(config)
    try:
        with quiet():
            model, report = task.auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # corrupt files, a config without such a head…
        found = heads(tuple(config.architectures or ()))
        trained = "" if task.name in found else f" This model has heads for {', '.join(found)}."
        raise SourceError(
            f"The weights in {folder} do not load as a model for {task.name}: {_one_line(error)}{trained}"
            f"{_remote_code_hint(folder, trust_remote_code, config)}"
        ) from error
    model.eval()
    notes = left_out(folder, report["unexpected_keys"], unfolded=unfolded)
    if getattr(config, "auto_map", None) and not trust_remote_code:
        name = type(model).__name__
        notes += (f"config.json names code of its own (auto_map), which is not run: this is transformers' own {name}",)
    refuse_other_shapes(folder, report["mismatched_keys"])
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise SourceError(f"The weights in {folder} are damaged: {name} holds numbers that are not finite.")
    try:
        missing = _used(model, task, report["missing_keys"])
    except Exception as error:  # whatever a model asks for beside a text
        raise SourceError(
            f"The model in {folder} does not answer a text alone ({type(model).__name__}: {_one_line(error)})."
        ) from error
    if missing:
        raise SourceError(
            f"The model in {folder} has no trained weights for {task.name}: {len(missing)} are missing, the first is "
            f"{missing[0]}. It has heads for {', '.join(heads(tuple(config.architectures or ())))}. Choose one of "
            f"these tasks, or a model that was trained for {task.name}.{_remote_code_hint(folder, trust_remote_code, config)}"
        )
    if dtype != torch.float32:
        made = task.auto_class(config)
        try:
            with quiet(), without_parameters():
                skeleton = made.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        except Exception as error:  # code that computes with its weights when it is made
            raise ConversionError(
                f"{type(model).__name__} is not made without its weights: {_one_line(error)}."
            ) from error
        widen_buffers(model, skeleton)
    return model, notes


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input that the positions of a model allow; None where they allow any, or there are none (Mamba 2)."""
    limit = max(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0, 0)  # XLNet's is -1
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings"):
            # A table with a padding row (RoBERTa's and its kin's) counts positions from the row after it.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit or module.num_embeddings, module.num_embeddings - first)
    return int(limit) or None


def may_be_longer(model: PreTrainedModel) -> bool:
    """Whether an encoder takes longer texts than its config says: its positions are angles, and in no table."""
    tables = any(name.endswith("position_embeddings") for name, _ in model.named_modules())
    return not tables and any("RotaryEmbedding" in type(module).__name__ for module in model.modules())


def input_limit(model: PreTrainedModel, tokenizer: Tokenizer, wanted: int | None) -> int:
    """The longest input: what positions allow; where they allow any, the wanted length, or the tokenizer's, or 512."""
    return position_limit(model) or wanted or tokenizer.max_length or _LENGTH_WITHOUT_LIMIT


def check_length(folder: Path, task: Task, config: Any, wanted: int | None, *, trust_remote_code: bool = False) -> None:
    """Raise SourceError for a length that a model has no positions for. It is laid out without weights, and none are read."""
    if wanted is None:
        return
    model = _without_weights(task, config, trust_remote_code=trust_remote_code)
    if model is None:
        return
    longer = task.name != "text-generation" and may_be_longer(model)
    refuse_longer(folder, wanted, wanted if longer else position_limit(model) or wanted)


def fitting_dtype(
    folder: Path, task: Task, config: Any, free: int, *, half: bool, trust_remote_code: bool = False
) -> torch.dtype:
    """In which precision a model's large weights fit into the free bytes of memory: float32, or that of the files, if it is a half one.

    half: whether the rest of the build can do with half precision. Raises SourceError where the model is too large, before its weights are read.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if _MOST_UNFOLDED * stored < free:
        return torch.float32
    model = _without_weights(task, config, trust_remote_code=trust_remote_code)
    if model is None:
        return torch.float32
    weights = sum(weight.numel() for weight in model.parameters())
    needed = 4 * weights * _LOADING_TAKES + _PROCESS_TAKES
    if needed <= free:
        return torch.float32
    halves = (
        None if is_unfolded(config) or _has_experts(model) or task.name != "text-generation" else stored_half(folder)
    )
    needed_half = 2 * weights * _LOADING_TAKES + _PROCESS_TAKES
    if half and halves is not None and needed_half <= free:
        return halves
    also = instead = ""
    if halves is not None and half:
        also = f", and {needed_half / 2**30:.1f} in {str(halves).rpartition('.')[2]}, as it is stored"
    elif halves is not None:
        instead = (
            " A build for a CPU in 4 or 8 bits (--precision int4-weights or int8-weights, without pruning or an adapter) keeps them in "
            f"{str(halves).rpartition('.')[2]}, and takes {needed_half / 2**30:.1f} GiB."
        )
    raise SourceError(
        f"The model in {folder} has {weights / 1e9:.1f} billion weights: to load it in float32, as it is compared, takes "
        f"{needed / 2**30:.1f} GiB of memory{also}, and {free / 2**30:.1f} GiB are free.{instead} Build it on a machine with more; the "
        "artifact itself takes as much as its own files."
    )


def _has_experts(model: PreTrainedModel) -> bool:
    """Whether weights are stacked, which the graph has in another form; those of convolutions over tokens are small."""
    return any(weight.dim() == 3 and weight.numel() >= _SMALLEST_STACK for weight in model.parameters())


def _without_weights(task: Task, config: Any, *, trust_remote_code: bool) -> PreTrainedModel | None:
    """The model, laid out. None for a config without such a head, or code that computes with its weights: said where it is loaded."""
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = task.auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception:
        return None
    return model


def refuse_longer(folder: Path, wanted: int, limit: int) -> None:
    """Raise SourceError for a length above the limit."""
    if not 1 <= wanted <= limit:
        raise SourceError(
            f"A maximum length of {wanted} was asked for; the model in {folder} takes 1 to {limit} tokens."
        )


def longest_input(folder: Path, tokenizer: Tokenizer, *, limit: int, wanted: int | None) -> int:
    """How many tokens a text may have: the wanted number, or what the folder declares. Raises SourceError."""
    if wanted is not None:
        refuse_longer(folder, wanted, limit)
        if wanted <= tokenizer.special_tokens:
            raise SourceError(
                f"A maximum length of {wanted} was asked for, and the tokenizer puts {tokenizer.special_tokens} special tokens around a text: "
                "nothing of it would be left."
            )
        return wanted
    # sentence-transformers' own number counts before the tokenizer's.
    return int(min(limit, declared_length(folder) or tokenizer.max_length or limit))


def _used(model: PreTrainedModel, task: Task, missing: Any) -> list[str]:
    """Which of the missing parameters the outputs depend on (a pooler that nobody reads may be missing)."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in set(missing)}
    if not parameters:
        return []
    ids = torch.ones(1, 4, dtype=torch.int64)
    if model.config.is_encoder_decoder and isinstance(model.config.eos_token_id, int):
        ids[:, -1] = model.config.eos_token_id  # without which their classifiers refuse a text
    with torch.enable_grad():
        outputs = TextModel(model, ("input_ids", "attention_mask"), task, None)(ids, torch.ones_like(ids))
        total = torch.stack([output.sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return sorted(name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


def _remote_code_hint(folder: Path, trust_remote_code: bool, config: Any = None) -> str:
    if trust_remote_code or not (getattr(config, "auto_map", None) or any(folder.glob("*.py"))):
        return ""
    return " The folder brings or names Python code of its own; if you have read and trust it, pass trust_remote_code."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
