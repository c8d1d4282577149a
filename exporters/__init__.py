"""PyTorch → graph: exports a transformers text model or any module, beside the original to compare it with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.adapter import check_adapter
from onnxpress.exporters.exported import Exported
from onnxpress.exporters.license import license_files, stated_license
from onnxpress.exporters.module import export_module
from onnxpress.exporters.resized import original, resized
from onnxpress.exporters.shared_weights import share_weights
from onnxpress.exporters.source import FolderSource, ModuleSource, resolve
from onnxpress.exporters.tasks import find_task, infer_task
from onnxpress.exporters.transformers_decoder import DecoderReference, export_decoder
from onnxpress.exporters.transformers_encoder import export_encoder, label_options
from onnxpress.exporters.transformers_model import TextExport, check_length, fitting_dtype, load_config
from onnxpress.exporters.verify import ParityCheck, ParityRow
from onnxpress.exporters.verify_decoder import DecoderParityCheck
from onnxpress.manifest import Json

__all__ = [
    "DecoderParityCheck",
    "DecoderReference",
    "Exported",
    "Found",
    "ParityCheck",
    "ParityRow",
    "export",
    "find",
    "in_half",
    "original",
    "resized",
    "share_weights",
]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model before anything of it is loaded. config: transformers', None of a plain module.

    options: of a model with labels, what its manifest says of them. dtype: in which precision its large weights fit into memory.
    """

    source: FolderSource | ModuleSource
    task: str
    config: Any = None
    options: Mapping[str, Json] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def in_half(found: Found | None) -> str:
    """Advice where a model fails whose weights stayed in half precision; nothing elsewhere."""
    if found is None or found.dtype == torch.float32:
        return ""
    return (
        " Its weights stayed in half precision, since memory does not hold them in float32, which not every model takes: build it on a "
        "machine with more memory."
    )


def find(
    source: object,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    max_length: int | None = None,
    example_inputs: object = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    free_memory: int | None = None,
    half: bool = False,
) -> Found:
    """Find a model and its task; the arguments are those of `export`. Raises SourceError, for a length that it cannot have too.

    free_memory: bytes, which the weights have to fit into, where it is known. half: whether large weights of a language model may stay in
    the half precision that they are stored in, where those of float32 do not fit.
    """
    found = resolve(source, revision=revision, example_inputs=example_inputs, dynamic_axes=dynamic_axes)
    if isinstance(found, ModuleSource):
        if task not in (None, "module"):
            raise SourceError(f"The task {task!r} was given for a plain module, whose only task is 'module'.")
        return Found(source=found, task="module")
    config = load_config(found.folder, trust_remote_code=trust_remote_code)
    wanted = infer_task(found.folder, tuple(config.architectures or ()), config) if task is None else find_task(task)
    check_length(found.folder, wanted, config, max_length, trust_remote_code=trust_remote_code)
    dtype = torch.float32
    if free_memory is not None:
        dtype = fitting_dtype(found.folder, wanted, config, free_memory, half=half, trust_remote_code=trust_remote_code)
    options = label_options(found.folder, wanted, config)
    return Found(source=found, task=wanted.name, config=config, options=options, dtype=dtype)


def export(
    source: object,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    max_length: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
    hidden_states: bool = False,
    uniform_steps: bool = False,
    emit_experts: bool = True,
    example_inputs: object = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    instead: torch.nn.Module | None = None,
) -> Exported:
    """Export a model; the original is left exactly as it was.

    source: a folder, a hub id, "package.module:factory", a torch.nn.Module, or what `find` found of one, with its task. task: e.g. text-classification; told
    from the model where None. max_length: the longest text in tokens. Of language models: adapter, a folder with a LoRA adapter to
    merge; hidden_states, whether the states that the logits come from are a second output; uniform_steps, the form for kernels that
    take as many new tokens of every row that has a past (CUDA's). Of other text models: emit_experts, whether mixtures of experts become
    ONNX Runtime's operator, which CPUs have, where they can. For a module: example_inputs, a tuple of
    tensors in the order of forward's parameters or a dict by their names, and dynamic_axes, {input: {axis: name}}
    (without them axis 0 is taken for the batch, and tried). instead: a module of the same call to export in the place of the one
    that the source gives, whose tokenizer, options and example stay: a pruned one (`resized`).

    Raises SourceError where the model cannot be had, ConversionError where it does not convert. Whether the graph
    answers like the original is not checked here, but by `ParityCheck`.
    """
    if not isinstance(source, Found):
        source = find(
            source,
            task=task,
            trust_remote_code=trust_remote_code,
            revision=revision,
            max_length=max_length,
            example_inputs=example_inputs,
            dynamic_axes=dynamic_axes,
        )
    found, config = source.source, source.config
    if isinstance(found, ModuleSource):
        return export_module(found if instead is None else dataclasses.replace(found, module=instead))
    wanted = find_task(source.task)
    if wanted.name == "text-generation":
        if adapter is not None:
            check_adapter(Path(adapter))
        exporter: Callable[..., TextExport] = partial(
            export_decoder,
            adapter=adapter,
            hidden_states=hidden_states,
            uniform_steps=uniform_steps,
            dtype=source.dtype,
        )
    elif adapter is not None:
        raise SourceError(f"An adapter was given for the task {wanted.name}; adapters go with text-generation.")
    elif hidden_states:
        raise SourceError(f"hidden_states goes with text-generation; the task {wanted.name} was asked for.")
    else:
        exporter = partial(export_encoder, emit_experts=emit_experts)
    try:
        result = exporter(
            found.folder,
            wanted,
            config,
            trust_remote_code=trust_remote_code,
            max_length=max_length,
            instead=instead,
        )
    except ConversionError as error:
        if source.dtype == torch.float32:
            raise
        raise ConversionError(f"{error}{in_half(source)}") from error
    return Exported(
        name=found.name,
        graph=result.graph,
        reference=result.reference,
        options={**result.options, **stated_license(found.folder)},
        files=(*result.tokenizer.files, *license_files(found.folder)),
        notes=result.notes,
    )
