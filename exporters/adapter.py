"""Merges a LoRA adapter, as peft saves it, into a model's weights: W + scale · B A (arXiv 2106.09685).

Does what plain LoRA of linear layers needs, and refuses the rest by name. Files are data: safetensors alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onnxpress.errors import SourceError
from onnxpress.exporters.pooling import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    *("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "layer_replication"),
    *("alora_invocation_tokens", "target_parameters"),
)
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others train against a changed base


def merge_adapter(model: PreTrainedModel, folder: Path) -> str:
    """Add an adapter's weights to `model` in place; returns a remark. Raises SourceError, with the model unchanged."""
    check_adapter(folder)
    config = _read_config(folder)
    pairs = _read_pairs(folder)
    modules = dict(model.named_modules())
    scale = float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    merged: dict[torch.nn.Module, torch.Tensor] = {}
    for name, (down, up) in pairs.items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise SourceError(
                f"The adapter {folder} does not fit its base: {type(model).__name__} has no layer {name!r}."
            )
        delta = scale * (up.float() @ down.float())
        if isinstance(module, Conv1D):  # stores (in, out)
            delta = delta.T
        if any(other is not module and getattr(other, "weight", None) is weight for other in modules.values()):
            raise SourceError(
                f"The adapter {folder} changes {name!r}, whose weight is tied to another layer's, which it would change too: "
                "untie them and save the merged model with peft."
            )
        if down.shape[0] != config["r"]:
            raise SourceError(
                f"The adapter {folder} says that its rank is {config['r']}; {name!r} has {down.shape[0]}."
            )
        if delta.shape != weight.shape:
            raise SourceError(
                f"The adapter {folder} does not fit its base: layer {name!r} has a weight of {tuple(weight.shape)}, the "
                f"adapter adds {tuple(delta.shape)}."
            )
        merged[module] = delta
    with torch.no_grad():
        for module, delta in merged.items():
            module.weight += delta  # type: ignore[operator]
    return f"LoRA adapter of rank {config['r']} merged into {len(merged)} layers"


def check_adapter(folder: Path) -> None:
    """Raises SourceError where a folder is no adapter's, before its base is loaded."""
    _read_config(folder)
    if not (folder / _WEIGHTS).is_file():
        raise SourceError(f"{folder} has no {_WEIGHTS}; adapters are read from safetensors alone.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise SourceError(f"{folder} is no adapter folder: it has no {_CONFIG}.")
    config: dict[str, Any] = read_json(path)
    if config.get("peft_type") != "LORA":
        raise SourceError(f"{path} describes an adapter of type {config.get('peft_type')!r}; LORA is merged.")
    asked = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        asked.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if asked:
        raise SourceError(
            f"{path} asks for {', '.join(asked)}, which is not merged here; merge it with peft, and save."
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or isinstance(config[name], bool) or not config[name] > 0:
            raise SourceError(f"{path}: {name} is {config.get(name)!r}; a positive number is expected.")
    return config


def _read_pairs(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (A, B)}, A (rank, in), B (out, rank)."""
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, half = key.removeprefix(_PREFIX).rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise SourceError(f"{path} holds {key!r}, which is no LoRA weight of a linear layer.")
        halves.setdefault(layer, {})[half[0]] = tensor
    for layer, found in halves.items():
        if set(found) != {"A", "B"} or found["A"].shape[0] != found["B"].shape[1]:
            raise SourceError(f"{path}: layer {layer!r} lacks one of its two weights, or their ranks differ.")
    if not halves:
        raise SourceError(f"{path} holds no weights.")
    return {layer: (found["A"], found["B"]) for layer, found in halves.items()}
