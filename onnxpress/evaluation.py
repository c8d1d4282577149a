"""Samples to judge a model by, what is compared for each task, and the default budgets.

The built-in texts are the project's own (data/README.md) and say themselves whether they calibrate or judge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress import metrics
from onnxpress.errors import InputError, RecipeError
from onnxpress.manifest import Json
from onnxpress.metrics import Answers
from onnxpress.runtime.token_classifier import split_tag
from onnxpress.runtime.tokenization import Tokenizer

_MOST_UNKNOWN = 0.1  # languages with a larger share of unknown tokens are left out


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text or pair of texts. label: a class, a number, several gold answers, or (tokens, tags)."""

    text: str
    text_pair: str | None = None
    label: Json = None

    @property
    def text_or_pair(self) -> str | tuple[str, str]:
        """What a tokenizer takes: a text, or a pair."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The least that a metric may be.

    kind "at least": the value itself. "drop": at most so many points below the original. "share": at most this share of
    the original's value lost. divergence: what kl_mean may be at most, in nats; the best choice alone does not see
    probabilities that collapse, or rare classes that vanish.
    """

    metric: str
    limit: float
    kind: str = "at least"
    divergence: float = math.inf

    def limit_value(self, reference: float) -> float:
        """The smallest value that holds, given the original's."""
        share = reference - abs(reference) * self.limit
        return {"at least": self.limit, "drop": reference - self.limit, "share": share}[self.kind]

    def margin(self, reference: float, value: float) -> float:
        """How much of what may be lost is left: 1 is all, 0 the limit, negative is over it."""
        limit = self.limit_value(reference)
        return (value - limit) / (abs(reference - limit) or 1e-9)


# Agreement with the original. Embeddings: 0.99 is where STS-B's Spearman moves by less than 0.3 points (MiniLM). Choices:
# of 100 answers two may differ, mostly those that were near a tie; long spans and vocabularies have more near ties. Language
# models: a perplexity that is 5 % higher.
BUDGETS: Mapping[str, Budget] = {
    "feature-extraction": Budget(metric="cosine_mean", limit=0.99),
    "text-classification": Budget(metric="top1_agreement", limit=0.98, divergence=0.05),
    "token-classification": Budget(metric="top1_agreement", limit=0.98, divergence=0.05),
    "question-answering": Budget(metric="span_agreement", limit=0.95, divergence=0.1),
    "fill-mask": Budget(metric="top1_agreement", limit=0.95, divergence=0.1),
    "text-generation": Budget(metric="likelihood_kept", limit=0.95, divergence=0.1),
    "module": Budget(metric="variance_kept", limit=0.99),
}
_REGRESSION = Budget(metric="variance_kept", limit=0.98)

# With labels, in points of the task's metric (x 100): what the field calls lossless.
LABELLED_BUDGETS: Mapping[str, Budget] = {
    "feature-extraction": Budget(metric="spearman", limit=0.3, kind="drop"),
    "text-classification": Budget(metric="accuracy", limit=1.0, kind="drop"),
    "token-classification": Budget(metric="entity_f1", limit=1.0, kind="drop"),
    "question-answering": Budget(metric="f1", limit=1.0, kind="drop"),
    "module": Budget(metric="accuracy", limit=1.0, kind="drop"),
}
_LABELLED_SETS = Budget(metric="f1", limit=1.0, kind="drop")  # several labels a text
_LABELLED_REGRESSION = Budget(metric="spearman", limit=0.3, kind="drop")  # numbers, as similarities of embeddings are


def budget_for(task: str, given: str | float | None, *, labelled: bool, problem_type: str | None = None) -> Budget:
    """The budget of a task, or the user's: "0.5%" is a share that may be lost, "0.99" a value. Raises RecipeError.

    problem_type: the classifier's (options of the manifest); regression with labels is judged by Spearman.
    """
    if labelled and task not in LABELLED_BUDGETS:
        raise RecipeError(_no_labels(task))
    default = (LABELLED_BUDGETS if labelled else BUDGETS)[task]
    if problem_type == "regression":
        default = _LABELLED_REGRESSION if labelled else _REGRESSION
    if problem_type == "multi_label_classification" and labelled:
        default = _LABELLED_SETS
    if given is None:
        return default
    given = str(given)
    try:
        number = float(given.removesuffix("%"))
    except ValueError:
        number = -1.0
    if given.endswith("%") and 0 <= number <= 100:
        if labelled:
            return dataclasses.replace(default, limit=number / 100, kind="share")
        return dataclasses.replace(default, limit=1 - number / 100)
    if labelled and not given.endswith("%") and 0 < number <= 1:
        raise RecipeError(
            f"The budget {given!r} is a value of {default.metric}, which goes from 0 to 100 with labels: give "
            f'"{100 * number:g}" for that value, or "{100 * (1 - number):.4g}%" for the share that may be lost.'
        )
    if not given.endswith("%") and 0 < number <= (100 if labelled else 1):  # at least 0 would be anything
        return dataclasses.replace(default, limit=number, kind="at least")
    scale = "0 to 100" if labelled else "0 to 1"
    example = "0%" if number == 0 else "0.5%"
    raise RecipeError(
        f'The budget {given!r} is not understood: "{example}" is the share of {default.metric} that may be lost, at most '
        f"100%; a number from {scale} is the least that {default.metric} may be."
    )


def builtin_samples(
    task: str, tokenizer: Tokenizer, *, mask_token: str | None = None
) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Calibration samples, evaluation samples, and remarks (which languages the tokenizer does not know)."""
    rows = _rows("questions.jsonl" if task == "question-answering" else "sentences.jsonl")
    unknown = _unknown_shares(rows, tokenizer)
    known = [language for language, share in unknown.items() if share <= _MOST_UNKNOWN]
    notes = tuple(
        f"built-in texts in {language} left out: {share:.0%} of their tokens are unknown to this tokenizer"
        for language, share in unknown.items()
        if language not in known
    )
    samples = {"calibration": list[Sample](), "evaluation": list[Sample]()}
    for row in sorted(rows, key=_digest):  # mixes kinds and lengths, so that the first few are like all
        if row["language"] in known or not known:
            samples[row["split"]].append(_builtin_sample(row, mask_token))
    return samples["calibration"], samples["evaluation"], notes


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
        return metrics.sign_metrics(reference, candidate, "logits")
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
    raise RecipeError(_no_labels(task))


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
    """A gold label as the model names it: by its name, or by its number; None where the model does not know it."""
    text = str(label)
    if text in names:
        return text
    return str(names[int(text)]) if text.isdecimal() and int(text) < len(names) else None


def finite_number(label: Json) -> float:
    """A gold score. Raises RecipeError."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"The score {label!r} is no finite number.")
    return number


LONG = 30  # characters that calibration and evaluation do not share by chance


def overlap(calibration: Path, file: Path | None, count: int) -> str:
    """What to say where calibration texts are evaluation texts too."""
    return f"{count} texts of {calibration} are in {file} too: what a pass has calibrated on cannot judge it. Take them out."


def _no_labels(task: str) -> str:
    return f"Labels do not go with the task {task}; give texts alone. They go with: {', '.join(LABELLED_BUDGETS)}."


def _rows(name: str) -> list[dict[str, Any]]:
    content = resources.files("onnxpress").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def _builtin_sample(row: Mapping[str, Any], mask_token: str | None) -> Sample:
    if "question" in row:
        return Sample(text=row["question"], text_pair=row["context"])
    if mask_token is None:
        return Sample(text=row["text"])
    text: str = row["text"]
    words = list(re.finditer(r"\w" if row["language"] == "zh" else r"\w+", text))  # Chinese has no spaces between words
    word = words[int(hashlib.sha256(text.encode()).hexdigest(), 16) % len(words)]
    return Sample(text=text[: word.start()] + mask_token + text[word.end() :])


def _unknown_shares(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> dict[str, float]:
    """Share of unknown tokens for each language; 0 for tokenizers without such a token."""
    unknown = getattr(tokenizer.inner.model, "unk_token", None)
    identifier = None if unknown is None else tokenizer.inner.token_to_id(unknown)
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        ids = tokenizer.inner.encode(row.get("text") or row["context"], add_special_tokens=False).ids
        seen, missing = counts.get(row["language"], (0, 0))
        counts[row["language"]] = (seen + len(ids), missing + ids.count(identifier))
    return {language: missing / max(1, seen) for language, (seen, missing) in counts.items()}


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _pooled(answers: Answers) -> Answers:
    """Outputs for each token are averaged: cosines are between texts."""
    return [
        {name: array.mean(axis=0) if name == "last_hidden_state" else array for name, array in answer.items()}
        for answer in answers
    ]
