"""Distillation: a student, cut out of its teacher, learns to answer like it again (arXiv 1503.02531, 1909.10351).

The loss is the divergence of the answers, as the task compares them (divergence.py), plus that of the hidden states, by which each
layer that was kept reads again what it read in the teacher, plus, where wanted, the task's own loss on labels.
What is cut, and how well the student then does, is not decided here. The training loop is training.py's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from onnxpress.errors import InputError, RecipeError
from onnxpress.optimizers import divergence
from onnxpress.optimizers.divergence import Divergence
from onnxpress.optimizers.training import TrainingOptions, TrainingSummary, digest_of_weights, train

Tensor = torch.Tensor
Example = Mapping[str, Any]
Batch = dict[str, Tensor]
Pooling = Callable[[Tensor, Tensor], Tensor]

# By task, or by problem_type of a classifier of texts: the divergence, and which answers it is of.
_DIVERGENCES: Mapping[str, tuple[Divergence, tuple[str, ...]]] = {
    "feature-extraction": (divergence.of_states, ("last_hidden_state",)),
    "single_label_classification": (divergence.of_classes, ("logits",)),
    "multi_label_classification": (divergence.of_labels, ("logits",)),
    "regression": (divergence.of_numbers, ("logits",)),
    "token-classification": (divergence.of_tokens, ("logits",)),
    "question-answering": (divergence.of_spans, ("start_logits", "end_logits")),
    "fill-mask": (divergence.of_tokens, ("logits",)),
    "text-generation": (divergence.of_tokens, ("logits",)),
}
TASKS = (
    *("feature-extraction", "text-classification", "token-classification", "question-answering", "fill-mask"),
    "text-generation",
)
_LABELS = ("labels", "start_positions", "end_positions")
_LABELS_A_TOKEN = ("token-classification", "fill-mask", "text-generation")
_NO_LABEL = -100  # what transformers' losses leave out
_MEASURED = 64  # examples whose divergence is told before and after


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """What a student learns from, and how it is trained. Raises RecipeError.

    temperature: of the distributions that are compared; above 1 the unlikely answers count more. hidden_weight, label_weight: of
    the losses on the hidden states (a mean over layers) and on the examples' labels, beside that on the answers; 0 leaves one out.
    """

    temperature: float = 2.0
    hidden_weight: float = 1.0
    label_weight: float = 0.0
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        for name in ("temperature", "hidden_weight", "label_weight"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "temperature" and value == 0):
                raise RecipeError(
                    f"{name} is {value!r}; it is a number {'above 0' if name == 'temperature' else 'of at least 0'}."
                )


@dataclass(frozen=True, kw_only=True)
class DistilSummary:
    """before, after: mean divergence of the answers (temperature included) on a few of the examples; training: the loop's own."""

    before: float
    after: float
    training: TrainingSummary


def distil(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    examples: Sequence[Example],
    *,
    task: str,
    options: DistilOptions | None = None,
    layers: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    problem_type: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> DistilSummary:
    """Train the student in place to answer like its teacher, which does not change; both end in evaluation mode.

    teacher, student: transformers models with the task's head; they share no weights and answer in the same shapes. examples: input_ids
    and, where the model has them, token_type_ids, lists of token ids without padding; with labels (a number, or a list)
    where label_weight is above 0. layers: the teacher's layers that the student kept, in order from 0; None is all. pooling: the
    module behind the token states of an encoder without a head, (B, L, H) and mask (B, L) -> (B, D): embeddings, or a classifier's
    logits; it is not trained. problem_type: of a classifier; None is what the teacher's config says.

    Raises RecipeError and InputError, with the student unchanged; what training raises, with the student half trained.
    """
    options = options or DistilOptions()
    lesson = _Lesson(teacher, student, task, options, pooling, problem_type)
    lesson.check(examples, layers)
    measured = [examples[index] for index in range(min(_MEASURED, len(examples)))]
    with lesson.teacher_at_work(), _frozen(student):
        before = lesson.mean_divergence(student, measured)
        summary = train(
            student,
            examples,
            options=options.training,
            collate=lesson.collate,
            compute_loss=lesson.loss,
            length=lambda example: len(example["input_ids"]),
            identity=lesson.identity(),
            progress=progress,
        )
        after = lesson.mean_divergence(student, measured)
    return DistilSummary(before=before, after=after, training=summary)


class _Lesson:
    """One teacher, one student, one task: how examples become a batch, and a batch a loss."""

    def __init__(
        self,
        teacher: torch.nn.Module,
        student: torch.nn.Module,
        task: str,
        options: DistilOptions,
        pooling: Pooling | None,
        problem_type: str | None = None,
    ) -> None:
        if task not in TASKS:
            raise RecipeError(f"There is no distillation for the task {task!r}; there is for {', '.join(TASKS)}.")
        if pooling is not None and task not in ("feature-extraction", "text-classification"):
            raise RecipeError(
                f"A pooling was given for the task {task}; it goes with feature-extraction and text-classification."
            )
        if pooling is not None and options.label_weight:
            raise RecipeError(
                "label_weight needs a model with a head of its own; this one is an encoder and a pooling."
            )
        config: Any = teacher.config
        kind = task
        if task == "text-classification":
            kind = (
                problem_type
                or config.problem_type
                or ("regression" if config.num_labels == 1 else "single_label_classification")
            )
        self._divergence, self._names = _DIVERGENCES[kind]
        if pooling is not None and task == "feature-extraction":
            self._divergence, self._names = divergence.of_embeddings, ("embeddings",)
        self._teacher, self._student = teacher, student
        self._task, self._options, self._pooling = task, options, pooling
        parameters = inspect.signature(teacher.forward).parameters
        self._extra = {"use_cache": False} if "use_cache" in parameters else {}
        takes_types = "token_type_ids" in parameters and (getattr(config, "type_vocab_size", None) or 0) > 1
        self._inputs = ("input_ids", *(("token_type_ids",) if takes_types else ()))
        self._labels = _LABELS if options.label_weight else ()
        self._pad = int(config.pad_token_id or 0)
        self._pairs: tuple[tuple[int, int], ...] = ()  # of hidden states: the student's, the teacher's

    def check(self, examples: Sequence[Example], layers: Sequence[int] | None) -> None:
        """Look at all examples, and let both answer the longest and the shortest. Raises InputError."""
        if not len(examples):
            raise InputError("There are no examples to distil on; at least one text is needed.")
        embeddings: Any = self._teacher.get_input_embeddings()  # type: ignore[operator]
        for index in range(len(examples)):
            self._check_example(index, examples[index], set(examples[0]), embeddings.num_embeddings)
        places = {parameter.data_ptr() for parameter in self._teacher.parameters()} - {0}
        if any(parameter.data_ptr() in places for parameter in self._student.parameters()):
            raise InputError(
                "Teacher and student share weights, so that the teacher would change too: make the student from a copy "
                "(copy.deepcopy)."
            )
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
        batch = self.collate([examples[order[-1]], examples[order[0]]])
        with torch.no_grad(), self.teacher_at_work(), _evaluation(self._student):
            theirs, their_hidden = self._trial("teacher", self._teacher, batch)
            ours, our_hidden = self._trial("student", self._student, batch)
        for name in self._names:
            if ours[name].shape != theirs[name].shape:
                raise InputError(
                    f"The student answers {name} of shape {list(ours[name].shape)} where its teacher answers "
                    f"{list(theirs[name].shape)}; heads and vocabularies are not cut."
                )
        if self._options.hidden_weight:
            self._pair(our_hidden, their_hidden, layers)

    @contextmanager
    def teacher_at_work(self) -> Iterator[None]:
        """The teacher in evaluation mode; back on its own device afterwards."""
        home = next(self._teacher.parameters()).device
        self._teacher.eval()
        try:
            yield
        finally:
            self._move(home)

    def collate(self, items: Sequence[Example]) -> Batch:
        """A batch padded on the right to its longest example: int64 (batch, length), attention_mask among them."""
        length = max(len(item["input_ids"]) for item in items)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([[*item[name], *([value] * (length - len(item[name])))] for item in items])

        batch = {
            name: padded(name, self._pad if name == "input_ids" else 0) for name in self._inputs if name in items[0]
        }
        batch["attention_mask"] = torch.tensor(
            [[int(place < len(item["input_ids"])) for place in range(length)] for item in items]
        )
        for name in self._labels:
            if name in items[0]:
                a_token = self._task in _LABELS_A_TOKEN
                batch[name] = padded(name, _NO_LABEL) if a_token else torch.tensor([item[name] for item in items])
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The weighted sum of the losses, a scalar, and the student's answers. model: the student, as the training wraps it."""
        options = self._options
        inputs = {name: tensor for name, tensor in batch.items() if name not in self._labels}
        real = batch["attention_mask"].bool()
        model.eval()  # no dropout: it is one function that has to be learned, and the teacher answers without it too
        with torch.no_grad():
            self._move(real.device)
            wanted, their_hidden = self._answers(self._teacher, inputs)
        answers, our_hidden = self._answers(model, batch)
        loss = self._divergence(answers, wanted, real, options.temperature)
        if self._pairs:
            apart = [divergence.of_hidden(our_hidden[ours], their_hidden[theirs], real) for ours, theirs in self._pairs]
            loss = loss + options.hidden_weight * torch.stack(apart).mean()
        if options.label_weight:
            loss = loss + options.label_weight * answers["loss"].float()
        return loss, answers

    def mean_divergence(self, model: torch.nn.Module, examples: Sequence[Example]) -> float:
        """How far the student's answers are from its teacher's, in evaluation mode."""
        size = self._options.training.batch_size
        total = 0.0
        device = next(model.parameters()).device
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            batch = {name: tensor.to(device) for name, tensor in self.collate(part).items() if name not in self._labels}
            with torch.no_grad(), _evaluation(model):
                self._move(device)
                wanted, ours = self._answers(self._teacher, batch)[0], self._answers(model, batch)[0]
                real = batch["attention_mask"].bool()
                total += len(part) * float(self._divergence(ours, wanted, real, self._options.temperature))
        return total / len(examples)

    def identity(self) -> dict[str, Any]:
        """What decides the result beside the training's own options and data; a resume compares it."""
        options = {name: value for name, value in asdict(self._options).items() if name != "training"}
        return {**options, "task": self._task, "pairs": self._pairs, "teacher": digest_of_weights(self._teacher)}

    def _answers(self, model: torch.nn.Module, inputs: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The answers that the task compares (with the loss where there are labels), and the hidden states where wanted."""
        answer = model(**inputs, **self._extra, output_hidden_states=self._options.hidden_weight > 0, return_dict=True)
        if self._pooling is not None:
            found = {self._names[0]: self._pooling(answer["last_hidden_state"], inputs["attention_mask"])}
        else:
            found = {name: answer[name] for name in self._names}
        if "loss" in answer and answer["loss"] is not None:
            found["loss"] = answer["loss"]
        return found, answer.get("hidden_states") or ()

    def _trial(self, who: str, model: torch.nn.Module, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        device = next(model.parameters()).device
        try:
            return self._answers(
                model, {name: tensor.to(device) for name, tensor in batch.items() if name not in self._labels}
            )
        # Shapes that do not fit, another task's head…
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            length = batch["input_ids"].shape[1]
            raise InputError(
                f"The {who} ({type(model).__name__}) does not answer as a model for {self._task} on a batch of {length} "
                f"tokens: {type(error).__name__}: {error}"
            ) from error

    def _check_example(self, index: int, example: Example, names: set[str], vocabulary: int) -> None:
        if set(example) != names:
            raise InputError(
                f"Example {index} has {', '.join(sorted(example))}; the first one has {', '.join(sorted(names))}."
            )
        ids = example.get("input_ids")
        if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
            raise InputError(
                f"Example {index} has the input_ids {ids!r}; a list of token ids from 0 to {vocabulary - 1} is needed."
            )
        if self._labels and not names & set(self._labels):
            raise InputError(
                f"label_weight is {self._options.label_weight} and the examples have no labels; add them, or leave it 0."
            )

    def _pair(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], layers: Sequence[int] | None) -> None:
        """Which hidden states belong together: what each kept layer reads, and what comes out at the end."""
        if not ours or not theirs or ours[0].shape != theirs[0].shape:
            raise InputError(
                f"Hidden states cannot be compared: the teacher gives {_states(theirs)}, the student {_states(ours)}. Give "
                f"hidden_weight=0 to learn from the answers alone."
            )
        kept, total = len(ours) - 1, len(theirs) - 1
        chosen = list(range(total) if layers is None else layers)
        if len(chosen) != kept or chosen != sorted({index for index in chosen if 0 <= index < total}):
            raise InputError(
                f"layers is {chosen}; the student has {kept} layers, so it names the {kept} of the teacher's layers 0 to "
                f"{total - 1} that were kept, each once and in order."
            )
        self._pairs = (*enumerate(chosen), (kept, total))

    def _move(self, device: torch.device) -> None:
        if next(self._teacher.parameters()).device != device:
            self._teacher.to(device)
        if isinstance(self._pooling, torch.nn.Module):
            self._pooling.to(device)


@contextmanager
def _frozen(student: torch.nn.Module) -> Iterator[None]:
    """The embeddings are the teacher's, and whole: texts of a few thousand words would only pull them away from the other words.

    An output table that is the same one stays too.
    """
    table: torch.nn.Module = student.get_input_embeddings()  # type: ignore[operator]
    parameters = [parameter for parameter in table.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; each part back to what it was afterwards."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _states(states: Sequence[Tensor]) -> str:
    return f"{len(states)} of width {states[0].shape[-1]}" if states else "none"
