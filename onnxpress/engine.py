"""Engine: fit, predict, evaluate and save in Python, for people with a checkpoint and a few labels.

It keeps no logic of its own: training is fit's, answers are the task runner's, an artifact is pipeline.build's. To answer by
an artifact it needs the runtime alone, to evaluate one scikit-learn or scipy too.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

from onnxpress.artifact import MANIFEST, Artifact
from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.loading import load
from onnxpress.runtime.text_classifier import TextClassifier
from onnxpress.runtime.token_classifier import TokenClassifier


class Engine:
    """A classifier that is to be fitted, was fitted, or was loaded. Make one with `Engine.load`."""

    def __init__(self, *, source: str | None = None, task: str | None = None, runner: Any = None) -> None:
        self._source, self._task, self._runner = source, task, runner
        self._checkpoint: Path | None = None
        self._remove: Callable[[], object] = lambda: None  # the folder of the last fit
        self.facts: dict[str, Json] = {}

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, task: str | None = None) -> Self:
        """An artifact, which answers at once and without torch; or a model folder or hub id, to `fit`.

        task: text-classification, multi-label-classification, regression or token-classification; told from the labels where None.
        Raises ArtifactError, InputError.
        """
        from onnxpress.labelled import check_kind

        check_kind(task)
        if not (Path(source) / MANIFEST).is_file():
            return cls(source=os.fspath(source), task=task)
        runner = load(Path(source))
        if not isinstance(runner, TextClassifier | TokenClassifier):
            raise InputError(f"{source} is an artifact that classifies nothing; open it with onnxpress.load.")
        if task not in (None, _kind(runner)):
            raise InputError(f"{source} is an artifact for {_kind(runner)}, not for {task}; leave task out.")
        return cls(runner=runner)

    def fit(
        self,
        texts: Collection[Any],
        labels: Collection[Json],
        *,
        evaluation: tuple[Collection[Any], Collection[Json]] | None = None,
        frozen_encoder: bool = False,
        balanced: bool = False,
        max_length: int | None = None,
        **training: Any,
    ) -> Self:
        """Train on texts, pairs of texts, or lists of tokens, with a label each.

        evaluation: texts and labels that tell the best epoch and judge the artifact; a tenth is held out where None. training: epochs,
        batch_size, learning_rate, seed and the others of TrainingOptions. `facts` says afterwards what happened.
        Raises InputError, SourceError, QualityError.
        """
        if self._source is None:
            raise InputError("An artifact cannot be trained; load the model folder or hub id that it was made from.")
        from onnxpress import fit
        from onnxpress.exporters.trainable import find_folder
        from onnxpress.labelled import labelled_samples

        kept = sorted({"resume", "checkpoint_every"} & set(training))
        if kept:
            raise InputError(
                f"An Engine keeps no checkpoints, so that there is no {kept[0]}; `onnxpress fit … --checkpoint FOLDER` keeps them."
            )
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise InputError(f"max_length is a positive whole number, not {max_length!r}.")
        if evaluation is not None and not (isinstance(evaluation, tuple | list) and len(evaluation) == 2):
            raise InputError("evaluation is a pair: a list of texts, and a list of their labels.")
        folder = tempfile.mkdtemp(prefix="onnxpress-engine-")
        remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        checkpoint = Path(folder) / "checkpoint"
        self.facts = fit.fit_samples(
            find_folder(self._source),
            labelled_samples(texts, labels),
            None if evaluation is None else labelled_samples(*evaluation),
            folder=checkpoint,
            kind=self._task,
            frozen_encoder=frozen_encoder,
            balanced=balanced,
            training=fit.training_options(training, None, frozen_encoder),
            max_length=max_length,
        )
        self._runner = fit.torch_runner(checkpoint, self.facts["task"], max_length=self.facts["max_length"])
        self._remove()
        self._checkpoint, self._remove = checkpoint, remove
        return self

    def predict(self, texts: Sequence[Any]) -> list[Json]:
        """For each text the probability of every label, {label: probability}; a regression's number; a text's entities.

        Raises InputError.
        """
        runner = self._ready()
        answers = runner.predict(texts)
        if runner.task == "token-classification":
            return list(answers)
        if runner.options["problem_type"] == "regression":
            return [answer["score"] for answer in answers]
        return [answer["scores"] for answer in answers]

    def evaluate(self, texts: Collection[Any], labels: Collection[Json]) -> dict[str, float]:
        """The task's metrics x 100: accuracy and macro F1, micro F1 of several labels, Spearman, entity F1.

        Raises InputError, for labels that the model does not know too.
        """
        from onnxpress.evaluation import score
        from onnxpress.labelled import labelled_samples, normalized

        runner = self._ready()
        samples = normalized(labelled_samples(texts, labels), _kind(runner))
        try:
            return score(runner.task, runner, samples)
        except ModuleNotFoundError as error:
            raise InputError(
                f"To evaluate, the package {error.name} is needed: pip install 'onnxpress[build]'."
            ) from error

    def save(self, path: str | os.PathLike[str], *, quiet: bool = True, **options: Any) -> Artifact:
        """Build the artifact, judged by the evaluation samples, and answer with it from now on. options: those of `build`.

        One for a card answers on the CPU where there is none.

        Raises what `build` raises.
        """
        if self._checkpoint is None:
            raise InputError("There is nothing to save: fit first. (An artifact is a folder; copy it.)")
        from onnxpress.pipeline import build

        folder = self._checkpoint
        facts = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
        given = {"task": facts["task"], "max_length": facts["max_length"], "name": Path(path).resolve().name}
        given |= {"file": str(folder / "evaluation.jsonl"), **options}
        artifact = build(folder, out=path, quiet=quiet, **given)
        self._runner = load(artifact.path, allow_fallback=True)  # saved for a card, it answers here as far as it can
        return artifact

    def _ready(self) -> Any:
        if self._runner is None:
            raise InputError("This model has no labels of its own yet: fit it first, or load an artifact.")
        return self._runner


def _kind(runner: Any) -> str:
    """What the labels of a runner's model are, as `fit` names it."""
    from onnxpress.labelled import KINDS

    return next(kind for kind, found in KINDS.items() if found == (runner.task, runner.options.get("problem_type")))
