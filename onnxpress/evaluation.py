"""Samples to judge a model by, what is compared for each task, and the default budgets.

The built-in texts are the project's own (data/README.md) and say themselves whether they calibrate or judge.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
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
from onnxpress.errors import RecipeError
from onnxpress.manifest import Json
from onnxpress.metrics import Answers
from onnxpress.runtime.tokenization import Tokenizer

_MOST_UNKNOWN = 0.1  # languages with a larger share of unknown tokens are left out


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text or pair of texts. label: a class, a number, several gold answers, or (tokens, tags)."""

    text: str
    text_pair: str | None = None
    label: Json = None


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
    if not given.endswith("%") and 0 <= number <= (100 if labelled else 1):
        return dataclasses.replace(default, limit=number, kind="at least")
    scale = "0 to 100" if labelled else "0 to 1"
    raise RecipeError(
        f'The budget {given!r} is not understood: "0.5%" is the share of {default.metric} that may be lost, a number from '
        f"{scale} the least that {default.metric} may be."
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
    """The task's own metrics on labelled samples, from the runner's answers. Raises RecipeError."""
    if task == "feature-extraction":
        texts = list(dict.fromkeys(text for sample in samples for text in (sample.text, sample.text_pair)))
        vectors = dict(zip(texts, runner.embed(texts), strict=True))
        first = np.stack([vectors[sample.text] for sample in samples])
        second = np.stack([vectors[sample.text_pair] for sample in samples])
        return metrics.similarity_scores(first, second, [_number(sample.label) for sample in samples])
    inputs = [sample.text if sample.text_pair is None else (sample.text, sample.text_pair) for sample in samples]
    if task == "text-classification":
        answers = runner.predict(inputs)
        if runner.options["problem_type"] == "regression":
            return metrics.regression_scores(
                [answer["score"] for answer in answers], [_number(sample.label) for sample in samples]
            )
        if runner.options["problem_type"] == "multi_label_classification":
            decided = [{label for label, value in answer["scores"].items() if value > 0.5} for answer in answers]
            return metrics.label_set_scores(decided, [_label_set(runner, sample.label) for sample in samples])
        chosen = [answer["label"] if math.isfinite(answer["score"]) else "" for answer in answers]
        return metrics.label_scores(chosen, [_label(runner, sample.label) for sample in samples])
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


_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "question", "premise", "text1", "query"),
    "text_pair": ("text_pair", "sentence2", "context", "hypothesis", "text2"),
    "label": ("label", "score", "answers", "answer", "target"),
}


def read_samples(path: Path, task: str, columns: Mapping[str, str | int] | None = None) -> list[Sample]:
    """Samples of a csv, tsv or jsonl file. columns: names (or, without a header, numbers from 0) by role.

    Roles: text, text_pair, label; for token-classification a jsonl file with tokens and BIO tags. Quotes are quotes in
    csv and plain characters in tsv, as in the field's data sets. Raises RecipeError naming file, line and column.
    """
    rows = _read_rows(path, numbered=any(isinstance(column, int) for column in (columns or {}).values()))
    if not rows:
        raise RecipeError(f"{path} holds no samples.")
    unknown = sorted(set(columns or {}) - set(_COLUMNS))
    if unknown:
        raise RecipeError(f"Columns were given for {unknown[0]!r}; the roles are: {', '.join(_COLUMNS)}.")
    samples = [_token_sample(path, row) if task == "token-classification" and "tokens" in row.values else
               _sample(path, row, task, columns or {}) for row in rows]  # fmt: skip
    labelled = [sample.label is not None for sample in samples]
    if any(labelled) and not all(labelled):
        line = rows[labelled.index(False)].line
        raise RecipeError(f"{path}, line {line} has no label and other lines do; label all of them, or none.")
    if task == "question-answering" and any(sample.text_pair is None for sample in samples):
        raise RecipeError(f"{path}: questions need a context each (columns question and context).")
    if task == "feature-extraction" and all(labelled) and any(sample.text_pair is None for sample in samples):
        raise RecipeError(f"{path}: scores of similarity need two texts a row (columns text and text_pair).")
    if task == "feature-extraction" and all(labelled) and len({sample.label for sample in samples}) == 1:
        raise RecipeError(
            f"{path}: all scores are {samples[0].label}; a correlation needs at least two different ones."
        )
    return samples


LONG = 30  # characters that calibration and evaluation do not share by chance


def overlap(calibration: Path, file: Path | None, count: int) -> str:
    """What to say where calibration texts are evaluation texts too."""
    return f"{count} texts of {calibration} are in {file} too: what a pass has calibrated on cannot judge it. Take them out."


@dataclass(frozen=True, kw_only=True)
class _Row:
    line: int
    values: Mapping[str | int, Any]


def _read_rows(path: Path, *, numbered: bool) -> list[_Row]:
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise RecipeError(f"{path}: files of samples end in .csv, .tsv or .jsonl.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    # Lines end at \n alone: str.splitlines would also cut texts at characters such as U+2028.
    if path.suffix == ".jsonl":
        return [_json_row(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    lines = io.StringIO(content, newline="")
    if path.suffix == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)  # strict: a quote that is not closed is an error, not a long text
    rows: list[tuple[int, list[str]]] = []
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise RecipeError(
            f"{path}, line {reader.line_num}: {error}. A text with a quote stands in quotes, its own quotes doubled."
        ) from None
    if numbered:
        return [_Row(line=line, values=dict(enumerate(row))) for line, row in rows]
    if not rows:
        return []
    header = rows[0][1]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise RecipeError(f"{path}: the header names the column {twice[0]!r} twice.")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise RecipeError(f"{path}, line {line} has {len(row)} columns; the header has {len(header)}.")
    return [_Row(line=line, values=dict(zip(header, row, strict=True))) for line, row in rows[1:]]


def _json_row(path: Path, number: int, line: str) -> _Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{path}, line {number} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}, line {number} is a {type(values).__name__}; an object with named fields is expected."
        )
    return _Row(line=number, values=values)


def _sample(path: Path, row: _Row, task: str, columns: Mapping[str, str | int]) -> Sample:
    found: dict[str, Any] = {}
    for role, names in _COLUMNS.items():
        if role in columns:
            if columns[role] not in row.values:
                raise RecipeError(
                    f"{path}, line {row.line} has no column {columns[role]!r}; it has: {', '.join(map(str, row.values))}."
                )
            found[role] = row.values[columns[role]]
        else:
            free = [name for name in names if name in row.values and name not in columns.values()]
            found[role] = row.values[free[0]] if free else None
    if found["text"] is None:
        raise RecipeError(
            f"{path} has no column of texts; it has: {', '.join(map(str, row.values))}. Name it with --column text=NAME."
        )
    for role in ("text", "text_pair"):
        if found[role] is not None and (not isinstance(found[role], str) or not found[role].strip()):
            raise RecipeError(f"{path}, line {row.line}: the {role} is empty or no text.")
    return Sample(text=found["text"], text_pair=found["text_pair"], label=_checked_label(path, row, task, found))


def _checked_label(path: Path, row: _Row, task: str, found: Mapping[str, Any]) -> Json:
    label = found["label"]
    if label is None:
        return None
    if isinstance(label, str) and not label.strip():
        raise RecipeError(f"{path}, line {row.line}: the label is empty.")
    if task == "token-classification":
        raise RecipeError(f"{path}, line {row.line}: labels of tokens come as lists in jsonl, tokens and tags.")
    if task == "feature-extraction":
        try:
            return _number(label)
        except RecipeError as error:
            raise RecipeError(f"{path}, line {row.line}: {error}") from None
    if task == "question-answering":
        if isinstance(label, dict) and "text" in label:  # SQuAD's own form
            label = label["text"]
        answers = [label] if isinstance(label, str) else label
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise RecipeError(f"{path}, line {row.line}: answers are a text or a list of texts, not {label!r}.")
        return answers
    return label


def _token_sample(path: Path, row: _Row) -> Sample:
    tokens, tags = row.values.get("tokens"), row.values.get("tags")
    if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags) or not tokens:
        raise RecipeError(f"{path}, line {row.line}: tokens and tags are lists of the same length.")
    if not all(isinstance(token, str) and token for token in tokens):
        raise RecipeError(f"{path}, line {row.line}: tokens are texts that are not empty.")
    for tag in tags:
        if not isinstance(tag, str) or not re.fullmatch(r"O|[BI]-.+", tag):
            raise RecipeError(f"{path}, line {row.line}: the tag {tag!r} is not in BIO form: O, B-TYPE or I-TYPE.")
    return Sample(text=" ".join(tokens), label=(tokens, tags))


def _no_labels(task: str) -> str:
    return f"Labels do not go with the task {task}; give texts alone. They go with: {', '.join(LABELLED_BUDGETS)}."


def _number(label: Json) -> float:
    """A gold score. Raises RecipeError."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"The score {label!r} is no finite number.")
    return number


def _label(runner: Any, label: Json) -> str:
    """A gold label as the model names it: its name, or its number."""
    labels = runner.options["labels"]
    text = str(label)
    if text in labels:
        return text
    if text.lstrip("-").isdecimal() and 0 <= int(text) < len(labels):
        return str(labels[int(text)])
    raise RecipeError(f"The label {label!r} is not one of the model's: {', '.join(map(str, labels))}.")


def _label_set(runner: Any, labels: Json) -> set[str]:
    if not isinstance(labels, list):
        raise RecipeError(f"The model gives several labels a text; a list of labels is expected, not {labels!r}.")
    return {_label(runner, label) for label in labels}


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
