"""Labelled samples to train from: reads them, finds out what their labels are, splits some off for evaluation.

Files: csv, tsv, jsonl and CoNLL columns as sample_files.py reads them; lines of a label and a text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.tokenization import ONE_COLUMN
from onnxpress.sample_files import CONLL, TABLES, TAG, read_conll, read_label_and_text, read_samples, read_text, suffix
from onnxpress.samples import LONG, Sample

# What can be fitted → the task of the artifact, and transformers' problem_type.
KINDS: Mapping[str, tuple[str, str | None]] = {
    "text-classification": ("text-classification", "single_label_classification"),
    "multi-label-classification": ("text-classification", "multi_label_classification"),
    "regression": ("text-classification", "regression"),
    "token-classification": ("token-classification", None),
}
_SEPARATOR = "|"  # between several labels in one column
_SHARE = 0.1  # of the samples that are split off
_FEWEST = 8  # samples that can be split


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the labels of samples are. names: in the order of the model's outputs; of a regression, one for its number."""

    kind: str
    names: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task of the artifact."""
        return KINDS[self.kind][0]

    @property
    def problem_type(self) -> str | None:
        """As transformers' configs name it; None for tags of tokens."""
        return KINDS[self.kind][1]

    def target(self, sample: Sample) -> Any:
        """An index, 0 or 1 for each label, a number, or an index for each word. Raises InputError for an unknown label."""
        if self.kind == "regression":
            return float(sample.label)
        if self.kind == "token-classification":
            return [self._index(tag) for tag in sample.label[1]]
        if self.kind == "multi-label-classification":
            chosen = {self._index(label) for label in sample.label}
            return [float(index in chosen) for index in range(len(self.names))]
        return self._index(sample.label)

    def _index(self, label: str) -> int:
        if label not in self.names:
            shown = ", ".join(self.names[:20]) + (", …" if len(self.names) > 20 else "")
            raise InputError(f"The label {label!r} is in none of the training samples; their labels are: {shown}.")
        return self.names.index(label)


def read_labelled(path: Path, kind: str | None, columns: Mapping[str, str | int] | None = None) -> list[Sample]:
    """The samples of a file, all with labels. kind: a key of KINDS, None where it is to be told from the file.

    Raises RecipeError and InputError, which name the file and the line.
    """
    check_kind(kind)
    if not path.is_file():
        raise InputError(
            f"The file {path} does not exist; give a csv, tsv, jsonl or CoNLL file, or lines of label and text."
        )
    if suffix(path) in TABLES:
        task = KINDS[kind or "text-classification"][0]
        if kind is None and _has_tags(path):
            task = "token-classification"
        samples = read_samples(path, task, columns)
    elif columns:
        raise InputError(f"--column goes with csv, tsv and jsonl files; {path} is none.")
    else:
        by_columns = kind == "token-classification" or (kind is None and suffix(path) in CONLL)
        samples = read_conll(path) if by_columns else read_label_and_text(path)
    if not samples:
        raise InputError(f"{path} holds no samples.")
    if samples[0].label is None:
        raise InputError(
            f"{path} has no labels: no column is called label, score or target. Name it with --column label=NAME."
        )
    return samples


def check_kind(kind: str | None) -> None:
    """Raises InputError where there is no such key of KINDS; None is for what the labels tell."""
    if kind not in (None, *KINDS):
        raise InputError(f"There is no task {kind!r} to fit; there are: {', '.join(KINDS)}.")


def labelled_samples(texts: Collection[Any], labels: Collection[Json]) -> list[Sample]:
    """Samples of texts (or pairs) and labels given in Python; of lists of tokens and lists of tags. Raises InputError."""
    for given, what in ((texts, "texts"), (labels, "labels")):  # arrays and columns of tables will do too
        if isinstance(given, str | bytes | Mapping | set) or not isinstance(given, Collection):
            raise InputError(f"A list of {what} is expected, not a {type(given).__name__}.")
        if (axes := getattr(given, "ndim", 1)) != 1:  # a table's items are the names of its columns
            raise InputError(
                f"A list of {what} is expected, not a {type(given).__name__} of {axes} axes: {ONE_COLUMN}."
            )
    if len(texts) != len(labels):
        raise InputError(f"{len(texts)} texts and {len(labels)} labels were given; each text needs one label.")
    if not len(texts):
        raise InputError("No texts were given; at least one with its label is needed.")
    samples = []
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        label = label.item() if isinstance(label, np.generic) else label
        if label is None or (isinstance(label, float) and label != label):  # tables say NaN where nothing stands
            raise InputError(f"Text {index} has no label.")
        if not isinstance(label, str | int | float | list):
            raise InputError(
                f"The label of text {index} is {label!r}; a text or a number is expected, or a list of texts where there are several."
            )
        # Two texts with one label are a pair, as JSON has it.
        if isinstance(text, list) and not (len(text) == 2 and not isinstance(label, list)):
            if not isinstance(label, list) or len(label) != len(text):
                raise InputError(f"Item {index}: a list of tokens needs a list of as many tags.")
            if not all(isinstance(token, str) and token.strip() for token in text):
                raise InputError(f"Item {index}: tokens are texts that are not empty.")
            samples.append(Sample(text=" ".join(text), label=(text, label)))
            continue
        first, second = text if isinstance(text, tuple | list) and len(text) == 2 else (text, None)
        if not isinstance(first, str) or not first.strip() or not isinstance(second or "", str):
            raise InputError(f"Item {index} is no text, no pair of texts, or empty.")
        samples.append(Sample(text=first, text_pair=second, label=label))
    return samples


def find_labels(samples: Sequence[Sample], kind: str | None, known: Sequence[str] = ()) -> Labels:
    """What the labels of the training samples are. known: a model's own, whose order is kept where they are the same.

    Raises InputError where there is nothing to learn, or labels do not go with the kind.
    """
    kind = kind or _kind_of(samples)
    if kind == "regression":
        if len({sample.label for sample in normalized(samples, kind)}) < 2:
            raise InputError("All training numbers are the same; there is nothing to learn.")
        return Labels(kind=kind, names=("value",))
    counts = Counter(name for sample in normalized(samples, kind) for name in _names(sample, kind))
    names = found = sorted(counts, key=_order)
    if kind == "token-classification":
        # A token that the tokenizer cuts goes on inside, also where no entity of the samples has two tokens.
        inside = {f"I-{name[2:]}" for name in names if name.startswith("B-")}
        names = ["O", *sorted((set(names) | inside) - {"O"}, key=_order)]
    if len(names) < 2:
        which = f"the label {names[0]!r}" if names else "no label"
        raise InputError(f"All training samples have {which}; at least two are needed.")
    if kind == "text-classification" and len(samples) >= 20 and len(names) > len(samples) / 2:
        raise InputError(
            f"{len(samples)} samples have {len(names)} different labels. Is this the column of labels (--column label=NAME), "
            f"or are they numbers to predict (--task regression)?"
        )
    if set(known) in (set(names), set(found)):  # a trained head is kept, also one without inner tags
        names = list(known)
    return Labels(kind=kind, names=tuple(names))


def normalized(samples: Sequence[Sample], kind: str) -> list[Sample]:
    """Samples whose labels have one form a kind: text, list of texts, number, (tokens, tags). Raises InputError.

    The number 1, the number 1.0 and the text "1" are one label.
    """
    return [dataclasses.replace(sample, label=_normal(sample.label, kind)) for sample in samples]


def split(samples: Sequence[Sample], labels: Labels, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and evaluation samples: a tenth, drawn by the seed, in the proportions of the labels. Raises InputError."""
    from sklearn.model_selection import train_test_split

    if len(samples) < _FEWEST:
        raise InputError(
            f"{len(samples)} samples are too few to split some off for evaluation ({_FEWEST} are needed); give --eval FILE."
        )
    held = max(round(_SHARE * len(samples)), 2)
    if labels.kind != "text-classification":
        train, evaluation = train_test_split(samples, test_size=held, random_state=seed)
        if labels.kind == "multi-label-classification":  # a label that is only held out could not be learned
            known = {name for sample in train for name in _names(sample, labels.kind)}
            alone = [sample for sample in evaluation if not set(_names(sample, labels.kind)) <= known]
            train, evaluation = [*train, *alone], [sample for sample in evaluation if sample not in alone]
            if not evaluation:
                raise InputError(
                    "There are too few samples of most labels to split some off for evaluation; give --eval FILE."
                )
            if all(sample.label == evaluation[0].label for sample in evaluation):  # they would judge nothing
                counts = Counter(name for sample in train for name in _names(sample, labels.kind))
                spare = (
                    sample
                    for sample in train
                    if sample.label != evaluation[0].label
                    and all(counts[name] > 1 for name in _names(sample, labels.kind))
                )
                if (one := next(spare, None)) is not None:
                    train.remove(one)
                    evaluation.append(one)
        return train, evaluation
    counts = Counter(sample.label for sample in samples)
    alone = [sample for sample in samples if counts[sample.label] == 1]  # they can only be learned from
    others = [sample for sample in samples if counts[sample.label] > 1]
    groups = len(labels.names) - len(alone)
    if len(others) < 2 * groups or not groups:
        raise InputError("There are too few samples of most labels to split some off for evaluation; give --eval FILE.")
    held = max(min(held, len(others) - groups), groups)
    train, evaluation = train_test_split(
        others, test_size=held, random_state=seed, stratify=[sample.label for sample in others]
    )
    for label in sorted(
        counts.keys() - {sample.label for sample in (*evaluation, *alone)}
    ):  # so rare that none was drawn
        evaluation.append(train.pop(next(index for index, sample in enumerate(train) if sample.label == label)))
    return [*train, *alone], evaluation


def told(labels: Labels) -> str | None:
    """What to say where classes were told from labels that could be numbers to predict."""
    if (
        labels.kind != "text-classification"
        or len(labels.names) < 3
        or any(_number(name) is None for name in labels.names)
    ):
        return None
    return f"the labels are {len(labels.names)} whole numbers, taken as classes; --task regression predicts numbers"


def without(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """The samples whose texts are not among those of others, unless they are short ("thanks")."""
    texts = {(other.text, other.text_pair) for other in others if len(other.text + (other.text_pair or "")) >= LONG}
    return [sample for sample in samples if (sample.text, sample.text_pair) not in texts]


def seen(judged: Sequence[Sample], learned: Sequence[Sample]) -> str | None:
    """What to say of texts that judge and were learned from, being short; None where there are none."""
    texts = {(sample.text, sample.text_pair) for sample in learned}
    both = sum((sample.text, sample.text_pair) in texts for sample in judged)
    return (
        f"{both} of {len(judged)} evaluation texts, of less than {LONG} characters, were learned from too: they prove little"
        if both
        else None
    )


def imbalance(samples: Sequence[Sample], labels: Labels) -> str | None:
    """What to say where labels are uneven; None where they are not."""
    if labels.kind != "text-classification":
        return None
    (frequent, most), *_, (rare, fewest) = Counter(sample.label for sample in samples).most_common()
    if most < 4 * fewest:
        return None
    return f"labels are uneven: {most} of {frequent!r}, {fewest} of {rare!r}; --balanced makes them count alike"


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """A jsonl file that `read_samples` reads back."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row: dict[str, Json]
            if isinstance(sample.label, tuple):
                row = {"tokens": sample.label[0], "tags": sample.label[1]}
            else:
                row = {"text": sample.text, "label": sample.label}
                if sample.text_pair is not None:
                    row["text_pair"] = sample.text_pair
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _kind_of(samples: Sequence[Sample]) -> str:
    labels = [sample.label for sample in samples]
    if isinstance(labels[0], tuple):
        return "token-classification"
    if any(isinstance(label, list) for label in labels):
        return "multi-label-classification"
    if all(_float(label) is not None for label in labels):
        numbers = [_normal(label, "regression") for label in labels]  # which says what is not finite
        return "regression" if any(number % 1 for number in numbers) else "text-classification"
    return "text-classification"


def _normal(label: Json, kind: str) -> Json:
    if kind == "token-classification":
        if not isinstance(label, tuple):
            raise InputError(f"The task {kind} needs tokens and tags, two lists a sample; a label is {label!r}.")
        wrong = next((tag for tag in label[1] if not re.fullmatch(TAG, str(tag))), None)
        if wrong is not None:
            raise InputError(
                f"The tag {wrong!r} is not understood: O, B-TYPE and I-TYPE are, B for the first token of an entity."
            )
        return label
    if isinstance(label, tuple):
        raise InputError(f"Samples of tokens and tags go with the task token-classification, not with {kind}.")
    if kind == "multi-label-classification":
        items = label if isinstance(label, list) else str(label).split(_SEPARATOR)
        numbers = isinstance(label, list) and not any(isinstance(item, str) for item in label)
        if numbers and (len(set(map(str, label))) < len(label) or any(isinstance(item, bool) for item in label)):
            raise InputError(
                f"The labels {label!r} are no names, or one is there twice: the names of a text's labels are needed, not a 0 or 1 for each "
                "label."
            )
        return [_name(item) for item in items if not isinstance(item, str) or item.strip()]  # a lone | is none
    if isinstance(label, list):
        raise InputError(
            f"A label is the list {label!r}, and {kind} has one label a text; several go with multi-label-classification."
        )
    if kind == "regression":
        number = _number(label)
        if number is None:
            raise InputError(f"The label {label!r} is no finite number; the task regression needs one for each text.")
        return number
    return _name(label)


def _name(label: Json) -> str:
    if isinstance(label, float) and not np.isfinite(label):
        raise InputError(f"The label {label!r} is no finite number.")
    if isinstance(label, dict | list) or label is None:
        raise InputError(f"A label is a text or a number, not {label!r}.")
    text = str(label).strip()
    if not text:
        raise InputError("A label is empty.")
    whole = re.fullmatch(r"(0|-?[1-9]\d*)(\.0+)?", text)
    return whole.group(1) if whole else text


def _names(sample: Sample, kind: str) -> Sequence[str]:
    if kind == "token-classification":
        return list(sample.label[1])
    return sample.label if isinstance(sample.label, list) else [sample.label]


def _number(label: Json) -> float | None:
    number = _float(label)
    return number if number is not None and np.isfinite(number) else None


def _float(label: Json) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def _order(name: str) -> tuple[float, str]:
    """Numbers by their value, before texts."""
    number = _number(name)
    return (np.inf if number is None else number, name)


def _has_tags(path: Path) -> bool:
    if suffix(path) != ".jsonl":
        return False
    first = next((line for line in read_text(path).split("\n") if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return False  # read_samples says what is wrong with it
    return isinstance(row, dict) and "tokens" in row and "tags" in row
