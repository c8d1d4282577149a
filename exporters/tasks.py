"""The tasks: which head a task needs, what its graph puts out, and how to tell the task of a model.

optimum's TasksManager has a table like this, but importing it fails in a clean installation of this package's
requirements (optimum 2.3 imports `requests` without asking for it), and it takes heads that we do not export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers

from onnxpress.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of text models.

    auto_class: loads the head. architecture: how the class of such a model ends, as its config.json says. outputs:
    for each output, which field of the model's answer it is, and its shape ("labels" stands for the head's width).
    """

    name: str
    auto_class: type
    architecture: str
    outputs: tuple[str, ...]
    synonyms: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="feature-extraction",
            auto_class=transformers.AutoModel,
            architecture="Model",
            outputs=("last_hidden_state",),
            synonyms=("sentence-similarity", "embeddings", "default"),
        ),
        Task(
            name="text-classification",
            auto_class=transformers.AutoModelForSequenceClassification,
            architecture="ForSequenceClassification",
            outputs=("logits",),
            synonyms=("sentiment-analysis", "sequence-classification", "zero-shot-classification", "text-ranking"),
        ),
        Task(
            name="token-classification",
            auto_class=transformers.AutoModelForTokenClassification,
            architecture="ForTokenClassification",
            outputs=("logits",),
            synonyms=("ner",),
        ),
        Task(
            name="question-answering",
            auto_class=transformers.AutoModelForQuestionAnswering,
            architecture="ForQuestionAnswering",
            outputs=("start_logits", "end_logits"),
        ),
        Task(
            name="fill-mask",
            auto_class=transformers.AutoModelForMaskedLM,
            architecture="ForMaskedLM",
            outputs=("logits",),
            synonyms=("masked-lm",),
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of that name or synonym. Raises SourceError."""
    for task in TASKS.values():
        if name == task.name or name in task.synonyms:
            return task
    raise SourceError(f"There is no task {name!r}. onnxpress exports {', '.join(TASKS)}, and plain modules.")


def infer_task(folder: Path, architectures: tuple[str, ...]) -> Task:
    """The task of a folder, from modules.json and the class that was saved. Raises SourceError."""
    if (folder / "modules.json").is_file():
        return TASKS["feature-extraction"]
    for task in reversed(TASKS.values()):  # heads first: feature-extraction's ending is the least specific
        if any(name.endswith(task.architecture) for name in architectures):
            return task
    if any(name.endswith("ForPreTraining") for name in architectures):
        return TASKS["feature-extraction"]
    found = f"was saved as {', '.join(architectures)}" if architectures else "does not say what it was saved as"
    raise SourceError(
        f"The model in {folder} {found}, from which onnxpress cannot tell the task. Say which it is with --task: "
        f"{', '.join(TASKS)}."
    )


def heads(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks that a model saved as these classes has trained weights for."""
    found = [task.name for task in TASKS.values() if any(name.endswith(task.architecture) for name in architectures)]
    return tuple(dict.fromkeys(["feature-extraction", *found]))
