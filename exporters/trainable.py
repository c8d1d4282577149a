"""Model folders to train from and to write: a transformers model with a fresh head, or an encoder for a linear head.

A model with a head is saved as transformers saves it. An encoder with a linear head is saved as sentence-transformers
does: modules.json names the pooling, and the head as its last step, a Dense one. Both are folders that `export` reads.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from onnxpress.errors import SourceError
from onnxpress.exporters.pooling import Dense, Pooling, SentencePooling, read_pooling
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.reference import TorchReference
from onnxpress.exporters.sentence_transformers import has_classifier
from onnxpress.exporters.source import FolderSource, resolve
from onnxpress.exporters.stored_weights import is_unfolded, left_out, refuse_other_shapes
from onnxpress.exporters.tasks import TASKS
from onnxpress.exporters.tokenizer import Tokenizer, read_tokenizer
from onnxpress.exporters.transformers_encoder import open_encoder, token_inputs
from onnxpress.exporters.transformers_model import (
    TextModel,
    check_length,
    input_limit,
    load_config,
    longest_input,
)

_PREFIX = "sentence_transformers.models."


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a model is to tell: names of the labels (one for a regression), and transformers' problem_type."""

    task: str
    labels: tuple[str, ...]
    problem_type: str | None


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A model whose weights can change, and how texts become its inputs.

    names: of its inputs. pooling: of an encoder without a head, else None.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    names: tuple[str, ...]
    max_length: int
    pooling: SentencePooling | None = None

    def features(self) -> TorchReference:
        """What answers one vector a text: output "embeddings", float32 (batch, dim)."""
        wrapped = TextModel(self.model, self.names, TASKS["feature-extraction"], self.pooling)
        return TorchReference(wrapped, self.names, ("embeddings",))


def find_folder(source: object, revision: str | None = None) -> Path:
    """The folder of a model that is named. Raises SourceError."""
    found = resolve(source, revision=revision)
    if not isinstance(found, FolderSource):
        raise SourceError(f"{source} is a plain module; a model folder or a hub id can be trained here.")
    return found.folder


def known_labels(folder: Path) -> tuple[str, ...]:
    """The labels of a model that has a head already, in their order."""
    names = load_config(folder, trust_remote_code=False).id2label or {}
    return tuple(str(names[index]) for index in sorted(names))


def load_trainable(folder: Path, head: Head, *, seed: int, max_length: int | None = None) -> Trainable:
    """A model with a head for these labels; a head that has other ones, or none, begins with random weights.

    Raises SourceError.
    """
    if has_classifier(folder):
        raise SourceError(
            f"{folder} is an encoder with a linear head, which transformers has no class for; train the encoder that it was "
            f"made of, or a head on it alone (frozen_encoder)."
        )
    config = load_config(folder, trust_remote_code=False)
    _declare(config, head)
    task = TASKS[head.task]
    check_length(folder, task, config, max_length)
    unfolded = is_unfolded(config)
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model, report = task.auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # corrupt files, an architecture without such a head…
        raise SourceError(
            f"The model in {folder} cannot be trained for {head.task}: {' '.join(str(error).split())[:300]}"
        ) from error
    inside = f"{model.base_model_prefix}."
    left_out(folder, report["unexpected_keys"], unfolded=unfolded)
    refuse_other_shapes(folder, (found for found in report["mismatched_keys"] if found[0].startswith(inside)))
    missing = sorted(name for name in report["missing_keys"] if name.startswith(inside) and "pooler" not in name)
    if missing:
        raise SourceError(
            f"The model in {folder} lacks weights of its encoder: {len(missing)} are missing, the first is {missing[0]}. "
            f"Download the model again."
        )
    return _trainable(folder, model, None, max_length)


def load_frozen(folder: Path, *, max_length: int | None = None) -> Trainable:
    """An encoder and its pooling: what modules.json says, whole and without a last scaling to length 1; else the mean of all tokens.

    Raises SourceError, ConversionError.
    """
    config = load_config(folder, trust_remote_code=False)
    check_length(folder, TASKS["feature-extraction"], config, max_length)
    pooling = read_pooling(folder) or SentencePooling([Pooling(("mean",))])
    if has_classifier(folder) or pooling.truncated:
        pooling = _without_last(pooling)
    if pooling.normalized:
        pooling = _without_last(pooling)
    opened = open_encoder(folder, TASKS["feature-extraction"], config)
    return _trainable(folder, opened.model, pooling, max_length)


def save_trained(trained: Trainable, out: Path) -> None:
    """Write a model with transformers' head, and its tokenizer."""
    with quiet():
        trained.model.save_pretrained(out)
    _copy_tokenizer(trained, out)


def save_with_linear_head(
    encoder: Trainable, head: Head, weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any], out: Path
) -> None:
    """Write an encoder, its pooling, and weight (labels, dim) and bias (labels,) as the last step."""
    assert encoder.pooling is not None
    _declare(encoder.model.config, head)
    with quiet():
        encoder.model.save_pretrained(out)
    _copy_tokenizer(encoder, out)
    steps: list[dict[str, Any]] = [{"idx": 0, "name": "0", "path": "", "type": f"{_PREFIX}Transformer"}]

    def add(kind: str) -> Path:
        path = f"{len(steps)}_{kind}"
        steps.append({"idx": len(steps), "name": str(len(steps)), "path": path, "type": f"{_PREFIX}{kind}"})
        (out / path).mkdir()
        return out / path

    width = int(encoder.model.config.hidden_size)
    pooling = {"word_embedding_dimension": width, "pooling_mode": list(encoder.pooling.pooling.modes)}
    _write_json(add("Pooling") / "config.json", pooling)
    for step in encoder.pooling.after:
        if isinstance(step, Dense):
            _save_dense(add("Dense"), step.linear, step.activation)
        else:
            add("Normalize")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()})
    _save_dense(add("Dense"), linear, torch.nn.Identity())
    _write_json(out / "modules.json", steps)
    _write_json(out / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})


def _trainable(
    folder: Path, model: PreTrainedModel, pooling: SentencePooling | None, max_length: int | None
) -> Trainable:
    tokenizer = read_tokenizer(folder, trust_remote_code=False)
    limit = input_limit(model, tokenizer, max_length)
    return Trainable(
        model=model,
        tokenizer=tokenizer,
        names=token_inputs(model, tokenizer),
        max_length=longest_input(folder, tokenizer, limit=limit, wanted=max_length),
        pooling=pooling,
    )


def _without_last(pooling: SentencePooling) -> SentencePooling:
    return SentencePooling([pooling.pooling, *list(pooling.after)[:-1]])


def _declare(config: Any, head: Head) -> None:
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: index for index, label in enumerate(head.labels)}
    config.problem_type = head.problem_type
    for name in ("sentence_transformers", "sbert_ce_default_activation_function"):  # of the head that goes
        if hasattr(config, name):
            delattr(config, name)


def _copy_tokenizer(trained: Trainable, out: Path) -> None:
    for path in trained.tokenizer.files:
        shutil.copyfile(path, out / path.name)


def _save_dense(folder: Path, linear: torch.nn.Linear, activation: torch.nn.Module) -> None:
    kind = type(activation)
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__qualname__}",
    }
    _write_json(folder / "config.json", config)
    save_file(
        {f"linear.{name}": tensor.contiguous() for name, tensor in linear.state_dict().items()},
        folder / "model.safetensors",
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
