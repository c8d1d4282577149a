"""What is compared for each task, and how labelled samples are scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxpress import metrics
from onnxpress.budgets import no_labels
from onnxpress.errors import InputError, RecipeError
from onnxpress.manifest import Json
from onnxpress.metrics import Answers
from onnxpress.runtime.token_classifier import split_tag
from onnxpress.samples import Sample, finite_number


def agreement(
    task: str, reference: Answers, candidate: Answers, *, problem_type: str | None = None
) -> dict[str, float]:
    """How far raw outputs agree with the original's, by the task's measures.

    problem_type: the classifier's; several labels a text are compared label by label. A regression has no best choice:
    numbers are compared, as a module's are.
    """
    if task == "feature-extraction":
        return metrics.cosine_metrics(_pooled(reference), _pooled(candidate))
    if task == "module" or problem_type == "regression":
        return metrics.number_metrics(reference, candidate)
    if task == "question-answering":
        return metrics.span_metrics(reference, candidate)
    if problem_type == "multi_label_classification":
        return metrics.sign_metrics(reference, candidate)
    return metrics.choice_metrics(reference, candidate, "logits")


def batch_dependence(alone: Answers, batched: Answers, *, numbers: bool = False) -> float:
    """Mean cosine between answers alone and the same answers in a batch. numbers: the share of variance kept instead.

    The cosine of two single numbers is 1 whatever they are.
    """
    if numbers:
        return metrics.number_metrics(alone, batched)["variance_kept"]
    return float(np.mean(metrics.cosines(_pooled(alone), _pooled(batched))))


def score(task: str, runner: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """The task's own metrics on labelled samples, from the runner's answers. Raises RecipeError and InputError."""
    check_labels(task, runner.options, samples)
    _check_scores(task, runner.options, samples)
    if task == "feature-extraction":
        texts = list(dict.fromkeys(text for sample in samples for text in (sample.text, sample.text_pair)))
        vectors = dict(zip(texts, runner.embed(texts), strict=True))
        first = np.stack([vectors[sample.text] for sample in samples])
        second = np.stack([vectors[sample.text_pair] for sample in samples])
        return metrics.similarity_scores(first, second, [finite_number(sample.label) for sample in samples])
    inputs = [sample.text_or_pair for sample in samples]
    if task == "text-classification":
        answers = runner.predict(inputs)
        if runner.options["problem_type"] == "regression":
            return metrics.regression_scores(
                [answer["score"] for answer in answers], [finite_number(sample.label) for sample in samples]
            )
        names = runner.options["labels"]
        if runner.options["problem_type"] == "multi_label_classification":
            decided = [{label for label, value in answer["scores"].items() if value > 0.5} for answer in answers]
            named = [{str(label_name(label, names)) for label in sample.label} for sample in samples]
            return metrics.label_set_scores(decided, named)
        chosen = [answer["label"] if math.isfinite(answer["score"]) else "" for answer in answers]
        return metrics.label_scores(chosen, [str(label_name(sample.label, names)) for sample in samples])
    if task == "token-classification":
        found = [{(item["start"], item["end"], item["entity"]) for item in answer} for answer in runner.predict(inputs)]
        return metrics.entity_scores(found, [metrics.gold_entities(*sample.label) for sample in samples])
    if task == "question-answering":
        best = [
            answers[0]["answer"] if answers and math.isfinite(answers[0]["score"]) else ""
            for answers in runner.predict(inputs)
        ]
        return metrics.answer_scores(best, [sample.label for sample in samples])
    raise RecipeError(no_labels(task))


def check_labels(task: str, options: Mapping[str, Json], samples: Sequence[Sample]) -> None:
    """Hold gold labels against the model's own, which its options name. Raises InputError that names all it does not know."""
    gold: list[Json] = []
    if task == "token-classification":
        kinds = {"", *(split_tag(str(name))[1] for name in options["labels"])}
        gold = [tag for sample in samples for tag in sample.label[1] if split_tag(tag)[1] not in kinds]
    elif task == "text-classification" and options["problem_type"] != "regression":
        gold = [sample.label for sample in samples]
        if options["problem_type"] == "multi_label_classification":
            wrong = next((label for label in gold if not isinstance(label, list)), None)
            if wrong is not None:
                raise InputError(f"The model gives several labels a text; a list of labels is expected, not {wrong!r}.")
            gold = [label for labels in gold for label in labels]
        gold = [label for label in gold if label_name(label, options["labels"]) is None]
    if gold:
        unknown = ", ".join(sorted({repr(str(label)) for label in gold}))
        raise InputError(
            f"The model does not know the labels {unknown}; it knows: {', '.join(map(str, options['labels']))}."
        )


def check_spread(task: str, options: Mapping[str, Json], samples: Sequence[Sample]) -> None:
    """Raise InputError for gold labels that cannot judge what pressing costs: all of them are the same."""
    _check_scores(task, options, samples)
    if task != "text-classification" or options["problem_type"] == "regression":
        return
    several = options["problem_type"] == "multi_label_classification"
    found = {str(sample.label if several else label_name(sample.label, options["labels"])) for sample in samples}
    if len(found) < 2:
        raise InputError(
            f"All samples that judge have the label {found.pop()!r}, and a model that answers nothing else would be right each "
            "time; at least two different ones are needed."
        )


def _check_scores(task: str, options: Mapping[str, Json], samples: Sequence[Sample]) -> None:
    """Raise InputError for gold scores that nothing correlates with."""
    scored = task == "feature-extraction" or (task == "text-classification" and options["problem_type"] == "regression")
    if scored and len({finite_number(sample.label) for sample in samples}) < 2:
        raise InputError(
            "All samples that judge have the same score, and nothing correlates with that; at least two different ones are needed."
        )


def label_name(label: Json, names: Sequence[str]) -> str | None:
    """A gold label as the model names it: by its name, or by its number where names are no numbers; None where the model does not know it."""
    text = str(label)
    if text in names:
        return text
    if all(str(name).isdecimal() for name in names):
        return None
    return str(names[int(text)]) if text.isdecimal() and int(text) < len(names) else None


def _pooled(answers: Answers) -> Answers:
    """Outputs for each token are averaged: cosines are between texts."""
    return [
        {name: array.mean(axis=0) if name == "last_hidden_state" else array for name, array in answer.items()}
        for answer in answers
    ]
