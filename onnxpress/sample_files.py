"""Reads a user's samples: csv, tsv and jsonl with or without labels, a text a line (.txt), CoNLL columns of tokens and tags.

Classes may come as lines of a label and a text. Arrays of a module are sample_arrays.py's.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxpress.errors import RecipeError
from onnxpress.manifest import Json
from onnxpress.samples import Sample, finite_number

TABLES = (".csv", ".tsv", ".jsonl")  # what has columns with names
CONLL = (".conll", ".conllu", ".bio", ".iob", ".iob2")  # what has columns without
TAG = r"O|[BI]-.+"
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "question", "premise", "text1", "query"),
    "text_pair": ("text_pair", "sentence2", "context", "hypothesis", "text2"),
    "label": ("label", "labels", "score", "answers", "answer", "target"),
}
_DOCUMENT = "-DOCSTART-"  # CoNLL-2003's line between documents


def read_samples(
    path: Path, task: str, columns: Mapping[str, str | int] | None = None, *, labels: bool = True
) -> list[Sample]:
    """Samples of a csv, tsv or jsonl file, of a .txt (a text a line; for language models one text), or of CoNLL columns.

    columns: of a csv, tsv or jsonl file, names (or, without a header, numbers from 0) by role; other files have none. Roles: text,
    text_pair, label; for token-classification a jsonl file with tokens and BIO tags. Quotes are quotes in csv and plain characters in
    tsv, as in the field's data sets. For text-classification a file of another suffix has lines of a label and a text. CoNLL files are for token-classification, whatever their suffix; a .txt is one where its first line
    is a token and a tag. labels: without them those of a table are not looked at, nor are a language model's. Raises RecipeError
    naming file, line and column.
    """
    kind = suffix(path)
    if kind in TABLES:
        samples = _table(path, task, columns or {}, labels=labels and task != "text-generation")
    elif task == "token-classification" and (kind != ".txt" or _begins_with_a_tag(path)):
        samples = read_conll(path)
    elif kind == ".txt":
        texts = [read_text(path)] if task == "text-generation" else read_text(path).split("\n")
        samples = [Sample(text=text.removesuffix("\r")) for text in texts if text.strip()]
    elif task == "text-classification" and kind not in CONLL:
        samples = read_label_and_text(path)
    else:
        more = {"text-generation": ", or .npy to calibrate", "token-classification": f", or {', '.join(CONLL)}"}.get(
            task, ""
        )
        raise RecipeError(f"{path}: files of samples end in {', '.join(TABLES)} or .txt{more}.")
    if not samples:
        raise RecipeError(f"{path} holds no samples.")
    labelled = samples[0].label is not None
    if task == "question-answering" and any(sample.text_pair is None for sample in samples):
        raise RecipeError(f"{path}: questions need a context each (columns question and context).")
    if task == "feature-extraction" and labelled and any(sample.text_pair is None for sample in samples):
        raise RecipeError(f"{path}: scores of similarity need two texts a row (columns text and text_pair).")
    return samples


def suffix(path: Path) -> str:
    """How a file's name ends, which says what it holds: in small letters, for Windows writes TRAIN.CSV too."""
    return path.suffix.lower()


def read_conll(path: Path) -> list[Sample]:
    """Lines of columns, the token first and its tag last, an empty line between sentences (as CoNLL-2003 and WNUT).

    Raises RecipeError naming file and line.
    """
    samples: list[Sample] = []
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
        columns = line.split()
        if not columns or columns[0] == _DOCUMENT:
            if tokens:
                samples.append(Sample(text=" ".join(tokens), label=(tokens, tags)))
                tokens, tags = [], []
            continue
        if not _is_tagged(columns):
            raise RecipeError(f"{path}, line {number}: a token and, last, its tag (O, B-TYPE or I-TYPE) are expected.")
        tokens.append(columns[0])
        tags.append(columns[-1])
    return samples


def read_label_and_text(path: Path) -> list[Sample]:
    """Lines of a label, a space or tab, and a text (as the Stanford Sentiment Treebank's). Raises RecipeError naming file and line."""
    if suffix(path) == ".json":
        raise RecipeError(f"{path}: of JSON, .jsonl is read, an object a line; write each sample on a line of its own.")
    samples = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        label, *rest = line.split(None, 1)
        text = rest[0] if rest else ""
        if not text.strip():
            raise RecipeError(
                f"{path}, line {number} has a label and no text. A file that does not end in {', '.join(TABLES)} has "
                f'lines of a label, a space and a text: "1 a fine film".'
            )
        samples.append(Sample(text=text.strip(), label=label))
    return samples


def read_text(path: Path) -> str:
    """A file's content, whose lines end at \\n alone. Raises RecipeError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{path} cannot be read as UTF-8 text: line {line} holds the byte 0x{error.object[error.start]:02x} where none like it "
            "may be. Save the file in UTF-8."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text: {error}.") from None


def _begins_with_a_tag(path: Path) -> bool:
    columns = (line.split() for line in read_text(path).split("\n"))
    return _is_tagged(next((found for found in columns if found and found[0] != _DOCUMENT), []))


def _is_tagged(columns: Sequence[str]) -> bool:
    return len(columns) > 1 and re.fullmatch(TAG, columns[-1]) is not None


def _table(path: Path, task: str, columns: Mapping[str, str | int], *, labels: bool) -> list[Sample]:
    rows = _read_rows(path, numbered=any(isinstance(column, int) for column in columns.values()))
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown:
        raise RecipeError(f"Columns were given for {unknown[0]!r}; the roles are: {', '.join(_COLUMNS)}.")
    samples = [_token_sample(path, row) if task == "token-classification" and "tokens" in row.values else
               _sample(path, row, task, columns, labels=labels) for row in rows]  # fmt: skip
    labelled = [sample.label is not None for sample in samples]
    if any(labelled) and not all(labelled):
        line = rows[labelled.index(False)].line
        raise RecipeError(f"{path}, line {line} has no label and other lines do; label all of them, or none.")
    return samples


@dataclass(frozen=True, kw_only=True)
class _Row:
    line: int
    values: Mapping[str | int, Any]


def _read_rows(path: Path, *, numbered: bool) -> list[_Row]:
    content = read_text(path)
    # Lines end at \n alone: str.splitlines would also cut texts at characters such as U+2028.
    if suffix(path) == ".jsonl":
        return [_json_row(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    lines = io.StringIO(content, newline="")
    if suffix(path) == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)  # strict: a quote that is not closed is an error, not a long text
    rows: list[tuple[int, list[str]]] = []
    longest = csv.field_size_limit(len(content) + 1)  # whole documents are longer than its 131,072 characters
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise RecipeError(
            f"{path}, line {reader.line_num}: {error}. A text with a quote stands in quotes, its own quotes doubled."
        ) from None
    finally:
        csv.field_size_limit(longest)
    if numbered:
        return [_Row(line=line, values=dict(enumerate(row))) for line, row in rows]
    if not rows:
        return []
    header = [name.strip() for name in rows[0][1]]
    if len(header) == 1 and re.search("[;\t|]", header[0]):
        raise RecipeError(
            f"{path} has the header {header[0]!r}: columns of .csv are parted by commas, of .tsv by tabs."
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise RecipeError(f"{path}: the header names the column {twice[0]!r} twice.")
    for line, row in rows[1:]:
        if len(row) != len(header):
            parted = "tabs" if suffix(path) == ".tsv" else "commas, and a text with a comma stands in quotes"
            raise RecipeError(
                f"{path}, line {line} has {len(row)} columns; the header has {len(header)}. Columns are parted by {parted}."
            )
    return [_Row(line=line, values=dict(zip(header, row, strict=True))) for line, row in rows[1:]]


def _json_row(path: Path, number: int, line: str) -> _Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}, line {number} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}, line {number} is a {type(values).__name__}; an object with named fields is expected."
        )
    return _Row(line=number, values=values)


def _sample(path: Path, row: _Row, task: str, columns: Mapping[str, str | int], *, labels: bool) -> Sample:
    found: dict[str, Any] = {}
    for role, names in _COLUMNS.items():
        if role == "label" and not labels:
            found[role] = None
        elif role in columns:
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
            f"{path} has no column of texts; it has: {', '.join(map(str, row.values))}. Name it with --column text=NAME; "
            "where the first line is no header, by its number from 0, and others too: --column text=0 --column label=1."
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
            return finite_number(label)
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
        if not isinstance(tag, str) or not re.fullmatch(TAG, tag):
            raise RecipeError(f"{path}, line {row.line}: the tag {tag!r} is not in BIO form: O, B-TYPE or I-TYPE.")
    return Sample(text=" ".join(tokens), label=(tokens, tags))
