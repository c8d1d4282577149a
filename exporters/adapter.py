"""Merges a LoRA adapter, as peft saves it, into a model's weights: W + scale · B A (arXiv 2106.09685).

Of a layer of its own rank or scale, one with magnitudes (DoRA, arXiv 2402.09353), an embedding, and whole weights beside them (biases,
modules_to_save) too; the rest is refused by name. Files are data: safetensors alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from onnxpress.errors import SourceError
from onnxpress.exporters.json_files import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens", "target_parameters", "lora_bias"),
    *(
        "use_qalora",
        "use_bdlora",
        "velora_config",
        "kasa_config",
        "monteclora_config",
        "arrow_config",
        "megatron_config",
    ),
)
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others train against a changed base
_PART = re.compile(
    r"(?P<layer>.+)\.lora_(?P<part>A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector)(\.weight)?"
)
# What stands before a language model's own names, here or there: with what sees beside it, in transformers 4 or 5, without.
_WITHIN = re.compile(r"^((model|language_model)\.)+")
_LITERAL = re.compile(r"\^?[\w.]+")


@dataclass
class _Content:
    """An adapter's tensors. layers: {layer: {"A": (rank, in), "B": (out, rank), "magnitude": (out,)}}; whole: {parameter: what takes its place}."""

    layers: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def merge_adapter(model: PreTrainedModel, folder: Path) -> str:
    """Add an adapter's weights to `model` in place; returns a remark. Raises SourceError, with the model unchanged."""
    check_adapter(folder)
    config = _read_config(folder)
    content = _read_content(folder)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    changed: dict[torch.Tensor, torch.Tensor] = {}
    for name, tensor in content.whole.items():
        before = _known_as(name, parameters)
        if before is None or before.shape != tensor.shape:
            there = "none" if before is None else f"one of {tuple(before.shape)}"
            raise SourceError(
                f"The adapter {folder} does not fit its base: it has a weight {name!r} of {tuple(tensor.shape)}, "
                f"{type(model).__name__} has {there}."
            )
        tensor = tensor.to(before.dtype)
        if not torch.equal(tensor, before):  # peft saves an embedding that was not trained, too
            _check_alone(folder, name, before, parameters)
            changed[before] = tensor
    whole = len(changed)
    ranks = set()
    for name, parts in content.layers.items():
        module = _known_as(name, modules)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise SourceError(
                f"The adapter {folder} does not fit its base: {type(model).__name__} has no layer {name!r}."
            )
        rank, scale = _rank_and_scale(config, name)
        if parts["A"].shape[0] != rank:
            raise SourceError(f"The adapter {folder} says that its rank is {rank}; {name!r} has {parts['A'].shape[0]}.")
        ranks.add(rank)
        _check_alone(folder, f"{name}.weight", weight, parameters)
        if "magnitude" in parts and isinstance(module, torch.nn.Embedding):
            raise SourceError(
                f"{folder / _CONFIG} asks for magnitudes of the embedding {name!r}: merge it with peft, and save."
            )
        turned = isinstance(module, Conv1D | torch.nn.Embedding)  # which store (in, out)
        base = changed.get(weight, weight.detach())
        merged = _merged(base.T if turned else base, parts, scale)
        if merged is None:
            added = (parts["B"].shape[0], parts["A"].shape[1])
            raise SourceError(
                f"The adapter {folder} does not fit its base: layer {name!r} has a weight of {tuple(weight.shape)}, the "
                f"adapter adds {added[::-1] if turned else added}."
            )
        changed[weight] = merged.T if turned else merged
    with torch.no_grad():
        for weight, merged in changed.items():
            weight.copy_(merged)
    said = f"LoRA adapter of rank {', '.join(map(str, sorted(ranks)))} merged into {len(content.layers)} layers"
    return said + (f", whole weights taken from it: {whole}" if whole else "")


def _known_as(name: str, found: Mapping[str, Any]) -> Any:
    """What is found by a name, or else by the one name that is the same but for where the language model lies in the whole."""
    if name in found:
        return found[name]
    within = _WITHIN.sub("", name)
    others = [other for other in found if _WITHIN.sub("", other) == within]
    return found[others[0]] if len(others) == 1 else None


def _merged(base: torch.Tensor, parts: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor | None:
    """W + scale · B A, (out, in); with magnitudes, each row scaled to the length that they say. None where shapes do not fit."""
    delta = scale * (parts["B"].float() @ parts["A"].float())
    if delta.shape != base.shape:
        return None
    merged = base + delta
    magnitude = parts.get("magnitude")
    if magnitude is None:
        return merged
    if magnitude.shape != merged.shape[:1]:
        return None
    scaled: torch.Tensor = merged * (magnitude.float() / merged.norm(dim=1))[:, None]
    return scaled


def _rank_and_scale(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """peft's: the first pattern that is the layer's name or its end overrules what is said for all."""
    rank, alpha = (
        next((value for pattern, value in (config.get(patterns) or {}).items() if _ends(layer, pattern)), config[name])
        for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    return rank, float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ends(layer: str, pattern: str) -> bool:
    if pattern.startswith("^"):
        return layer == pattern[1:]
    return layer == pattern or layer.endswith(f".{pattern}")


def _check_alone(folder: Path, name: str, weight: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise SourceError for a weight that another layer has too."""
    if sum(other is weight for other in parameters.values()) > 1:
        raise SourceError(
            f"The adapter {folder} changes {name.removesuffix('.weight')!r}, whose weight is tied to another layer's, which it would "
            "change too: untie them and save the merged model with peft."
        )


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
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        asked.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if asked:
        raise SourceError(
            f"{path} asks for {', '.join(asked)}, which is not merged here; merge it with peft, and save."
        )
    for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        several = config.get(patterns) or {}
        if not isinstance(several, dict) or not all(_LITERAL.fullmatch(pattern) for pattern in several):
            raise SourceError(
                f"{path}: {patterns} is {several!r}; numbers by names of layers, or by their ends, are expected."
            )
        for number in (config.get(name), *several.values()):
            if not isinstance(number, int | float) or isinstance(number, bool) or not number > 0:
                raise SourceError(f"{path}: {name} is {number!r}; a positive number is expected.")
    return config


def _read_content(folder: Path) -> _Content:
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None
    content = _Content()
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        part = _PART.fullmatch(name)
        if part is not None and tensor.dim() == (1 if part["part"] == "magnitude_vector" else 2):
            kind = {"A": "A", "B": "B", "r": "magnitude"}[part["part"].removesuffix(".weight")[-1]]
            content.layers.setdefault(part["layer"], {})[kind] = tensor
        elif "lora_" in name or not name.endswith((".weight", ".bias")):
            raise SourceError(f"{path} holds {key!r}, which is no LoRA weight of a linear layer.")
        else:
            content.whole[name.replace(".base_layer.", ".")] = tensor
    for layer, found in content.layers.items():
        if not {"A", "B"} <= set(found) or found["A"].shape[0] != found["B"].shape[1]:
            raise SourceError(f"{path}: layer {layer!r} lacks one of its two weights, or their ranks differ.")
    if not content.layers:
        raise SourceError(f"{path} holds no weights.")
    return content
