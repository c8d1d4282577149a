"""Fits a pretrained checkpoint to a user's labels, and builds the artifact: read, split, train, save, build.

Training sees texts through the same tokenizer as the artifact does. How labels are read is in labelled, how training runs
in optimizers.training, what a trained folder holds in exporters.trainable; the artifact is made by pipeline.build, judged
by the evaluation samples.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from onnxpress import preflight, terminal
from onnxpress.artifact import Artifact, ArtifactWriter, check_outside
from onnxpress.errors import InputError, OutputError
from onnxpress.evaluation import check_spread
from onnxpress.exporters import trainable
from onnxpress.exporters.json_files import read_object
from onnxpress.exporters.quiet import quiet as silenced
from onnxpress.exporters.reference import TorchReference
from onnxpress.exporters.tasks import find_task
from onnxpress.exporters.trainable import Head, Trainable
from onnxpress.exporters.transformers_encoder import open_encoder
from onnxpress.exporters.transformers_model import load_config
from onnxpress.labelled import (
    Labels,
    find_labels,
    imbalance,
    normalized,
    read_labelled,
    seen,
    split,
    told,
    without,
    write_samples,
)
from onnxpress.manifest import Json
from onnxpress.optimizers.linear_head import fit_linear_head
from onnxpress.optimizers.processes import check_alone
from onnxpress.optimizers.training import Batch, ComputeLoss, Item, TrainingOptions, is_barely_begun, train
from onnxpress.pipeline import build
from onnxpress.recipe import make_recipe, with_options
from onnxpress.runtime.embedder import Embedder
from onnxpress.runtime.loading import RUNNERS
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.runtime.tokenization import Encoding, Tokenizer, split_words
from onnxpress.samples import Sample
from onnxpress.trials import digest_of_files
from onnxpress.whole import part_of, put, remove, remove_leftovers

# A build has a precision of its own: what training computes in is called autocast here.
_TRAINING = {field.name for field in dataclasses.fields(TrainingOptions)} - {"checkpoints", "precision"} | {"autocast"}
_OF_FROZEN = {"seed"}  # the one of them that a frozen encoder reads
_PROGRESS = "training"  # in the checkpoint's folder, until training is done
_EVALUATION = "evaluation.jsonl"
_FACTS = "fit.json"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """An artifact, the folder of the trained checkpoint that it was built from, and what the training was (JSON)."""

    artifact: Artifact
    checkpoint: Path
    facts: Mapping[str, Json]


def fit(
    source: str | os.PathLike[str],
    train_file: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    evaluation: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    task: str | None = None,
    columns: Mapping[str, str | int] | None = None,
    frozen_encoder: bool = False,
    balanced: bool = False,
    quiet: bool = True,
    **options: Any,
) -> Fitted:
    """Train a checkpoint on labelled samples, and build an artifact that the evaluation samples judge.

    source: a folder or a hub id. train_file, evaluation: csv, tsv, jsonl, CoNLL, or lines of label and text; without evaluation a
    tenth of the training samples is held out, by the seed. checkpoint: the folder of the trained model (default OUT-checkpoint); with
    it the evaluation samples and fit.json. task: a key of labelled.KINDS. frozen_encoder: fit a linear head on the encoder's vectors
    alone. balanced: rare labels count as much as frequent ones. options: those of TrainingOptions (epochs, batch_size, learning_rate,
    seed, patience, resume, processes…), max_length, revision, and those of `build`.

    Raises InputError, SourceError, OutputError, QualityError, and what `build` raises.
    """
    artifact_folder = Path(out)
    folder = (
        Path(checkpoint) if checkpoint is not None else artifact_folder.with_name(f"{artifact_folder.name}-checkpoint")
    )
    if folder.resolve() == Path.cwd():
        raise InputError(
            "The checkpoint takes the place of its folder, which cannot be the working directory: name one in it."
        )
    if "file" in options:
        raise InputError("fit judges the artifact by its evaluation samples: give them as evaluation, and no file.")
    chosen = {name: options.pop(name) for name in list(options) if name in _TRAINING}
    training = training_options(chosen, folder / _PROGRESS, frozen_encoder)
    revision = options.pop("revision", None)  # of the source; the build's is the folder
    recipe = make_recipe({"model": {"source": str(folder)}, "build": {"name": artifact_folder.resolve().name}})
    recipe = with_options(recipe, options)
    with terminal.Progress(enabled=not quiet) as report:
        report.step("read the samples")
        with ArtifactWriter(artifact_folder):
            pass  # an --out that cannot be written is said now
        check_outside(folder, artifact_folder, "--checkpoint")
        facts = _check_checkpoint_folder(folder, resume=training.resume)
        samples = read_labelled(Path(train_file), task, columns)
        others = None if evaluation is None else read_labelled(Path(evaluation), task, columns)
        labels = find_labels(samples, task)
        answers = {"labels": list(labels.names), "problem_type": labels.problem_type}
        preflight.check(recipe, labels.task, answers, labelled=True)  # said before training what is wrong
        base = trainable.find_folder(os.fspath(source), revision)
        asked: dict[str, Json] = {  # what the training hangs on
            "model": digest_of_files([base / "config.json", *sorted(base.glob("*.safetensors"))]),
            "samples": [digest_of_files([Path(file)]) for file in (train_file, evaluation) if file is not None],
            "options": {
                "task": task,
                "columns": {} if columns is None else dict(columns),
                "frozen_encoder": frozen_encoder,
                "balanced": balanced,
            },
            "training": {key: value for key, value in dataclasses.asdict(training).items() if key not in _PLACES},
            "seed": training.seed,
            "max_length": options.get("max_length"),
        }
        if facts is not None and facts.get("asked") != json.loads(json.dumps(asked)):
            raise InputError(_trained_already(folder, facts, ", by another training" if "asked" in facts else ""))
        if facts is None:
            report.step("train the head" if frozen_encoder else "train")
            facts = fit_samples(
                base,
                samples,
                others,
                folder=folder,
                kind=task,
                frozen_encoder=frozen_encoder,
                balanced=balanced,
                training=training,
                max_length=options.get("max_length"),
                asked=asked,
                progress=report.detail,
            )
    judged_by = {"file": str(folder / _EVALUATION), "task": facts["task"], "max_length": facts["max_length"]}
    recipe = with_options(recipe, judged_by)
    return Fitted(artifact=build(recipe, out=artifact_folder, quiet=quiet), checkpoint=folder, facts=facts)


def fit_samples(
    source: Path,
    samples: Sequence[Sample],
    evaluation: Sequence[Sample] | None,
    *,
    folder: Path,
    kind: str | None = None,
    frozen_encoder: bool = False,
    balanced: bool = False,
    training: TrainingOptions,
    max_length: int | None = None,
    asked: Mapping[str, Json] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Json]:
    """Train on samples and write the checkpoint to a folder, whole or not at all; returns what fit.json says.

    asked: by what a later call knows that it asks for the same training. Raises InputError, SourceError, QualityError.
    """
    notes: list[str] = []
    if evaluation is not None:
        given, samples = len(samples), without(samples, evaluation)
        if not samples:
            raise InputError(
                "All training texts are evaluation texts too; what was learned cannot be judged by them. Give others."
            )
        if len(samples) < given:
            left = given - len(samples)
            notes.append(
                f"{left} training texts are evaluation texts too, and long enough to be left out of the training"
            )
    labels = find_labels(samples, kind, trainable.known_labels(source))
    learned = normalized(samples, labels.kind)
    notes += filter(None, [told(labels) if kind is None else None, None if balanced else imbalance(learned, labels)])
    if evaluation is None:
        learned, judged = split(learned, labels, training.seed)
        judged = without(judged, learned)
        if not judged:
            raise InputError("Too few different texts were given to hold some out for evaluation; give --eval FILE.")
        notes.append(f"{len(judged)} of {len(samples)} samples were held out for evaluation")
    else:
        judged = normalized(evaluation, labels.kind)
    notes += filter(None, [seen(judged, learned)])
    if balanced and labels.kind != "text-classification":
        raise InputError(f"balanced goes with one label a text (text-classification); the task is {labels.kind}.")
    for sample in judged:
        labels.target(sample)  # labels that are unknown are said before anything else happens
    check_spread(labels.task, {"labels": labels.names, "problem_type": labels.problem_type}, judged)
    head = Head(task=labels.task, labels=labels.names, problem_type=labels.problem_type)
    if frozen_encoder:
        model = trainable.load_frozen(source, max_length=max_length)
        save, figures = _fit_head(model, head, labels, learned, judged, balanced, progress)
    else:
        model = trainable.load_trainable(source, head, seed=training.seed, max_length=max_length)
        save, figures = _fine_tune(model, labels, learned, judged, balanced, training, progress)
    if max((entry.get("r2", 0.0) for entry in figures.get("evaluations", ())), default=0.0) < 0:
        notes.append(
            "predictions are worse than the mean of the numbers (r2 below 0): scale the numbers to a few units, or train longer"
        )
    cut = sum(
        encoding.truncated > 0 for encoding in _tokenizer(model).encode([sample.text_or_pair for sample in learned])
    )
    if cut:
        notes.append(f"{cut} of {len(learned)} training texts were cut at {model.max_length} tokens")
    facts: dict[str, Json] = {
        "source": source.name,
        "task": labels.task,
        "kind": labels.kind,
        "labels": list(labels.names),
        "frozen_encoder": frozen_encoder,
        "balanced": balanced,
        "max_length": model.max_length,
        "training_samples": len(learned),
        "evaluation_samples": len(judged),
        "seed": training.seed,
        **figures,
        "notes": notes,
    }
    if asked is not None:
        facts["asked"] = asked

    def write(part: Path) -> None:
        save(part)
        write_samples(judged, part / _EVALUATION)
        (part / _FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    _write_whole(folder, write)
    return facts


def torch_runner(folder: Path, task: str, *, max_length: int) -> TextRunner:
    """A trained checkpoint that answers as its artifact does, in PyTorch."""
    opened = open_encoder(folder, find_task(task), load_config(folder, trust_remote_code=False), max_length=max_length)
    tokenizer = Tokenizer.from_folder(
        folder, max_length=opened.options["max_length"], pad_token_id=opened.options["pad_token_id"]
    )
    return RUNNERS[task](TorchReference(opened.wrapped, opened.names, opened.outputs), tokenizer, opened.options)


Saver = Callable[[Path], None]


def _fit_head(
    model: Trainable,
    head: Head,
    labels: Labels,
    learned: Sequence[Sample],
    judged: Sequence[Sample],
    balanced: bool,
    progress: Callable[[str], None],
) -> tuple[Saver, dict[str, Json]]:
    if labels.task != "text-classification":
        raise InputError(f"frozen_encoder fits one head on a text's vector; {labels.kind} needs full training.")
    embedder = Embedder(model.features(), _tokenizer(model), {"pooled": True, "normalized": False, "dim": 0})

    def vectors(samples: Sequence[Sample]) -> np.ndarray[Any, Any]:
        found: list[np.ndarray[Any, Any]] = []
        for start in range(0, len(samples), 512):
            progress(f"{start} of {len(samples)} texts")
            encodings = embedder.tokenizer.encode([sample.text_or_pair for sample in samples[start : start + 512]])
            found += [answer["embeddings"] for answer in embedder.run_encodings(encodings)]
        return np.stack(found)  # float32 (samples, dim)

    kind = np.int64 if labels.kind == "text-classification" else np.float64
    best = fit_linear_head(
        vectors(learned),
        np.array([labels.target(sample) for sample in learned], kind),
        evaluation=(vectors(judged), np.array([labels.target(sample) for sample in judged], kind)),
        problem_type=str(labels.problem_type),
        labels=labels.names,
        balanced=balanced,
        progress=progress,
    )

    def save(part: Path) -> None:
        trainable.save_with_linear_head(model, head, best.weight, best.bias, part)

    return save, {"strength": best.strength, "evaluation_loss": round(best.loss, 6)}


def _fine_tune(
    model: Trainable,
    labels: Labels,
    learned: Sequence[Sample],
    judged: Sequence[Sample],
    balanced: bool,
    training: TrainingOptions,
    progress: Callable[[str], None],
) -> tuple[Saver, dict[str, Json]]:
    tokenizer = _tokenizer(model)
    name, metric = ("balanced_accuracy", _balanced_accuracy) if balanced else _METRICS[labels.kind]
    learned_items = _items(tokenizer, learned, labels)
    with silenced():
        summary = train(
            model.model,
            learned_items,
            options=training,
            collate=partial(_collate, names=model.names, tokenizer=tokenizer, kind=labels.kind),
            evaluation=_items(tokenizer, judged, labels),
            length=lambda item: len(item["encoding"].ids),
            compute_loss=_balanced_loss(learned_items, len(labels.names)) if balanced else None,
            metrics=partial(_figures, name=name, metric=metric),
            best=name,
            identity={
                "labels": labels.names,
                "kind": labels.kind,
                "balanced": balanced,
                "max_length": model.max_length,
            },
            progress=progress,
        )
    options = {key: value for key, value in dataclasses.asdict(training).items() if key not in _PLACES}
    return lambda part: trainable.save_trained(model, part), {
        "training": options,
        "steps": summary.steps,
        "best_step": summary.best_step,
        "stopped_early": summary.stopped_early,
        "loss": round(summary.loss, 6),
        "evaluations": [{key: round(float(value), 6) for key, value in entry.items()} for entry in summary.evaluations],
    }


_PLACES = ("checkpoints", "checkpoint_every", "resume", "seed")


def _items(tokenizer: Tokenizer, samples: Sequence[Sample], labels: Labels) -> list[Item]:
    encodings = tokenizer.encode([sample.text_or_pair for sample in samples])
    items: list[Item] = []
    for encoding, sample in zip(encodings, samples, strict=True):
        target = labels.target(sample)
        if labels.kind == "token-classification":
            target = _token_targets(encoding, sample, target, labels)
        items.append({"encoding": encoding, "labels": target})
    return items


def _token_targets(encoding: Encoding, sample: Sample, tags: Sequence[int], labels: Labels) -> list[int]:
    """One index a token: the first token of each of the tokenizer's words tells, the others are not asked (-100).

    The runner reads words the same way. Where the tokenizer cuts a given token into several words, those after the first are inside.
    """
    starts = [0]
    for token in sample.label[0]:
        starts.append(starts[-1] + len(token) + 1)
    targets: list[int] = []
    words = split_words(encoding, (sample.text,))
    for place, word in enumerate(words):
        if word is None or (place and words[place - 1] == word):
            targets.append(-100)
            continue
        start, end = encoding.offsets[place]
        start += len(sample.text[start:end]) - len(sample.text[start:end].lstrip())
        given = max(0, int(np.searchsorted(starts, start, side="right")) - 1)
        name = labels.names[tags[given]]
        if name.startswith("B-") and start > starts[given]:
            name = f"I-{name[2:]}"
        targets.append(labels.names.index(name) if name in labels.names else -100)
    return targets


def _collate(items: list[Item], *, names: Sequence[str], tokenizer: Tokenizer, kind: str) -> Batch:
    arrays = tokenizer.batch([item["encoding"] for item in items])
    batch = {name: torch.from_numpy(arrays[name]) for name in names}  # int64 (batch, length)
    targets = [item["labels"] for item in items]
    if kind == "token-classification":
        length = batch["input_ids"].shape[1]
        targets = [target + [-100] * (length - len(target)) for target in targets]
    whole = kind in ("text-classification", "token-classification")
    return {**batch, "labels": torch.tensor(targets, dtype=torch.int64 if whole else torch.float32)}


def _balanced_loss(items: Sequence[Item], num_labels: int) -> ComputeLoss:
    """Cross entropy in which a label weighs n / (labels · its count), as scikit-learn's "balanced" does."""
    counts = np.bincount([item["labels"] for item in items], minlength=num_labels)
    weights = torch.tensor(len(items) / (num_labels * np.maximum(counts, 1)), dtype=torch.float32)
    return partial(_weighted_loss, weights=weights)


def _weighted_loss(
    model: torch.nn.Module, batch: Batch, *, weights: torch.Tensor
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    weight = weights.to(outputs["logits"].device)
    return torch.nn.functional.cross_entropy(outputs["logits"].float(), batch["labels"], weight), outputs


def _figures(
    logits: np.ndarray[Any, Any], gold: np.ndarray[Any, Any], *, name: str, metric: Callable[..., float]
) -> dict[str, float]:
    return {name: metric(logits, gold)}


def _accuracy(logits: np.ndarray[Any, Any], gold: np.ndarray[Any, Any]) -> float:
    return float((logits.argmax(-1) == gold).mean())


def _balanced_accuracy(logits: np.ndarray[Any, Any], gold: np.ndarray[Any, Any]) -> float:
    """The mean of the labels' own accuracies: what --balanced learns, and a rare label counts in."""
    right = logits.argmax(-1) == gold
    return float(np.mean([right[gold == label].mean() for label in np.unique(gold)]))


def _micro_f1(logits: np.ndarray[Any, Any], gold: np.ndarray[Any, Any]) -> float:
    chosen, right = logits > 0, gold > 0.5
    return float(2 * (chosen & right).sum() / max(1, chosen.sum() + right.sum()))


def _explained(logits: np.ndarray[Any, Any], gold: np.ndarray[Any, Any]) -> float:
    """The share of the variance of the numbers that predictions explain (R²)."""
    return float(1 - np.mean((logits.reshape(gold.shape) - gold) ** 2) / max(float(np.var(gold)), 1e-12))


def _tag_f1(logits: np.ndarray[Any, Any], gold: np.ndarray[Any, Any]) -> float:
    """F1 over single words with a tag other than the first label, O."""
    asked = gold != -100
    chosen, right = logits.argmax(-1)[asked], gold[asked]
    hits = ((chosen == right) & (right > 0)).sum()
    return float(2 * hits / max(1, (chosen > 0).sum() + (right > 0).sum()))


# By what the best epoch is told; higher is better.
_METRICS: Mapping[str, tuple[str, Callable[..., float]]] = {
    "text-classification": ("accuracy", _accuracy),
    "multi-label-classification": ("f1", _micro_f1),
    "regression": ("r2", _explained),
    "token-classification": ("tag_f1", _tag_f1),
}


def training_options(chosen: Mapping[str, Any], folder: Path | None, frozen_encoder: bool) -> TrainingOptions:
    """Options by name, None for a default; folder: of checkpoints for a resume. Raises InputError."""
    check_alone()
    unknown = sorted(set(chosen) - _TRAINING)
    if unknown:
        raise InputError(f"Unknown option {unknown[0]!r} of training; the options are: {', '.join(sorted(_TRAINING))}.")
    given = {name: value for name, value in chosen.items() if value is not None}
    unread = sorted(name for name, value in given.items() if name not in _OF_FROZEN and value is not False)
    if frozen_encoder and unread:
        raise InputError(f"A frozen encoder is not trained: {', '.join(unread)} would change nothing; leave it out.")
    if "autocast" in given:
        given["precision"] = given.pop("autocast")
    training = TrainingOptions(**given, checkpoints=None if frozen_encoder else folder)
    training.check_machine()
    return training


def _trained_already(folder: Path, facts: Mapping[str, Json], how: str = "") -> str:
    length = f" --max-length {facts['max_length']}" if facts.get("max_length") else ""
    return (
        f"{folder} holds a trained model{how}: onnxpress build {folder} --eval {folder / _EVALUATION}{length} makes its artifact. To "
        "train anew, remove the folder, or name another with --checkpoint."
    )


def _check_checkpoint_folder(folder: Path, *, resume: bool) -> dict[str, Json] | None:
    """What fit.json says where a resume finds a training that is done; None where it is to be done. Raises InputError and OutputError."""
    remove_leftovers(Path(os.path.abspath(folder)))  # noqa: PTH100  resolve() would follow a link
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held == {_PROGRESS} and is_barely_begun(folder / _PROGRESS):  # nothing was learned by what was killed so early
        held = set()
    if _FACTS in held:
        facts = read_object(folder / _FACTS)
        if resume:
            return facts
        raise OutputError(_trained_already(folder, facts))
    if resume and held != {_PROGRESS}:
        raise InputError(
            f"There is no interrupted training in {folder}; begin without --resume, or name its --checkpoint."
        )
    if not resume and (held or (os.path.lexists(folder) and not folder.is_dir())):
        resumable = "A training was begun in it: go on with --resume, remove it" if held == {_PROGRESS} else "Remove it"
        raise OutputError(
            f"The folder for the checkpoint, {folder}, is there already. {resumable}, or name another with --checkpoint."
        )
    return None


def _tokenizer(model: Trainable) -> Tokenizer:
    folder = model.tokenizer.files[0].parent
    return Tokenizer.from_folder(folder, max_length=model.max_length, pad_token_id=model.tokenizer.pad_token_id)


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its place and put it there; what a resume would need goes once it is there."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  resolve() would follow a link
    part = part_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            write(part)
            put(part, folder)
        finally:
            remove(part)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        then = "and go on with --resume" if (folder / _PROGRESS).is_dir() else "or choose another --checkpoint"
        raise OutputError(f"The checkpoint {folder} cannot be written: {said}. Free space, {then}.") from None
