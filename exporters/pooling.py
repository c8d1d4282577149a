"""Reads the pooling that a sentence-transformers folder declares, as a module that goes into the graph.

modules.json lists the steps after the encoder: Pooling, Dense, Normalize. Padding is on the right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.json_files import read_json, read_object
from onnxpress.exporters.sentence_transformers import OWN, declared_steps, has_classifier

Tensor = torch.Tensor


def read_pooling(folder: Path) -> SentencePooling | None:
    """The pooling of a folder, None where it declares none.

    Raises ConversionError for a step that is not known, SourceError for files that are missing or garbled.
    """
    if not (folder / "modules.json").is_file():
        return None
    steps: list[torch.nn.Module] = []
    for name, path in declared_steps(folder)[1:]:
        kind = name.rpartition(".")[2]
        if kind not in _STEPS or not name.startswith(OWN):
            raise ConversionError(
                f"{folder / 'modules.json'} has a step of type {name}, which onnxpress cannot put into the "
                f"graph. It knows Pooling, Dense and Normalize. Remove the step, or export the encoder alone "
                f"(a copy of the folder without modules.json)."
            )
        steps.append(_STEPS[kind](folder / path))
    declared = folder / "config_sentence_transformers.json"
    dim = read_object(declared).get("truncate_dim") if declared.is_file() else None
    if isinstance(dim, int) and steps and not has_classifier(folder):
        steps.append(Truncate(dim))
    return SentencePooling(steps) if steps else None


class SentencePooling(torch.nn.Module):
    """The steps after the encoder: (batch, length, hidden) and the mask (batch, length) → (batch, dim)."""

    def __init__(self, steps: list[torch.nn.Module]) -> None:
        super().__init__()
        if not isinstance(steps[0], Pooling) or any(isinstance(step, Pooling) for step in steps[1:]):
            raise ConversionError(
                "The steps in modules.json begin with something else than one Pooling. onnxpress takes an encoder, "
                "one Pooling, and then Dense and Normalize steps."
            )
        self.pooling = steps[0]
        self.after = torch.nn.Sequential(*steps[1:])

    @property
    def normalized(self) -> bool:
        """Whether the embeddings have length 1."""
        return len(self.after) > 0 and isinstance(self.after[-1], Normalize)

    @property
    def truncated(self) -> bool:
        """Whether the embeddings are the first numbers of longer ones."""
        return len(self.after) > 0 and isinstance(self.after[-1], Truncate)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length, hidden), (batch, length) → (batch, dim)."""
        embeddings: Tensor = self.after(self.pooling(hidden, attention_mask))
        return embeddings


class Pooling(torch.nn.Module):
    """One vector a text from one a token; several modes are concatenated in the given order."""

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length, hidden), (batch, length) → (batch, modes · hidden)."""
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (batch, length, 1)
        pooled = [_MODES[mode](hidden, weights) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


class Dense(torch.nn.Module):
    """A linear layer and its activation."""

    def __init__(self, linear: torch.nn.Linear, activation: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, in) → (batch, out)."""
        result: Tensor = self.activation(self.linear(embeddings))
        return result


class Normalize(torch.nn.Module):
    """Scales every embedding to length 1."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, dim) → (batch, dim)."""
        return torch.nn.functional.normalize(embeddings, p=2.0, dim=-1)


class Truncate(torch.nn.Module):
    """The first numbers of an embedding (arXiv 2205.13147), as they are: sentence-transformers does not scale them again."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, dim) → (batch, at most self.dim)."""
        return embeddings[:, : self.dim]


def _mean(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _mean_sqrt_length(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()


def _weighted_mean(hidden: Tensor, weights: Tensor) -> Tensor:
    positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).to(hidden.dtype)
    return _mean(hidden, weights * positions[None, :, None])


def _first(hidden: Tensor, weights: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, weights: Tensor) -> Tensor:
    last = (weights.sum(1, keepdim=True).to(torch.int64) - 1).clamp(min=0)  # (batch, 1, 1)
    return hidden.gather(1, last.expand(-1, -1, hidden.shape[2])).squeeze(1)


def _max(hidden: Tensor, weights: Tensor) -> Tensor:
    return hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1)


_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}

# How folders written before sentence-transformers 5.5 spell the modes; several can be set, in this order.
_OLDER_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _read_pooling_step(folder: Path) -> torch.nn.Module:
    config = read_json(folder / "config.json")
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for name, mode in _OLDER_NAMES.items() if config.get(name)] or ["mean"]
    modes = (given,) if isinstance(given, str) else tuple(given)
    unknown = [mode for mode in modes if mode not in _MODES]
    if unknown:
        raise ConversionError(
            f"{folder / 'config.json'} asks for the pooling {unknown[0]}; known are {', '.join(_MODES)}."
        )
    if config.get("include_prompt", True) is False:
        raise ConversionError(
            f"{folder / 'config.json'} leaves the prompt's tokens out of the pooling (include_prompt is false), which "
            f"a graph cannot know. Set include_prompt to true if you use the model without prompts."
        )
    return Pooling(modes)


_DENSE_DEFAULT = "torch.nn.modules.activation.Tanh"  # where a Dense step's file names none


def _read_dense_step(folder: Path) -> torch.nn.Module:
    config = read_json(folder / "config.json")
    if config.get("use_residual") or not _on_the_embedding(config):
        raise ConversionError(
            f"{folder / 'config.json'} is a Dense step with a residual or on single tokens, which onnxpress does not "
            f"put into the graph; it takes Dense steps on the pooled embedding."
        )
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"The weights of {folder} cannot be read: {error}. onnxpress reads model.safetensors; convert "
            f"pytorch_model.bin with safetensors.torch.save_file, or save the model with a newer sentence-transformers."
        ) from None
    try:
        linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        linear.load_state_dict({name.removeprefix("linear."): weight.float() for name, weight in weights.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise SourceError(
            f"The weights in {folder} are not those that its config.json describes: {' '.join(str(error).split())}. "
            f"Download the model again."
        ) from None
    return Dense(linear, _activation(folder, config.get("activation_function", _DENSE_DEFAULT)))


def _on_the_embedding(config: dict[str, Any]) -> bool:
    """Whether a step reads and writes the pooled embedding."""
    names = (config.get("module_input_name"), config.get("module_output_name"))
    return all(name in (None, "sentence_embedding") for name in names)


def _read_normalize_step(folder: Path) -> torch.nn.Module:
    path = folder / "config.json"
    if path.is_file() and not _on_the_embedding(read_object(path)):
        raise ConversionError(
            f"{path} is a Normalize step on something else than the pooled embedding, which onnxpress does not put into the graph."
        )
    return Normalize()


def _activation(folder: Path, name: str | None) -> torch.nn.Module:
    """Activations are stored as a class of torch.nn ("torch.nn.modules.activation.Tanh"); nothing else is imported."""
    if name is None:
        return torch.nn.Identity()
    kind = getattr(torch.nn, name.rpartition(".")[2], None)
    if name.startswith("torch.nn.") and isinstance(kind, type) and issubclass(kind, torch.nn.Module):
        with contextlib.suppress(TypeError):  # one that needs arguments
            return kind()
    raise ConversionError(
        f"{folder / 'config.json'} has the activation {name}; onnxpress takes activations that "
        f"are classes of torch.nn and need no arguments."
    )


_STEPS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "Pooling": _read_pooling_step,
    "Dense": _read_dense_step,
    "Normalize": _read_normalize_step,
}
