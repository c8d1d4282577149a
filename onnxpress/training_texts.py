"""Texts to train on, from a file or the built-in ones, as token ids: what a student is asked beside its teacher.

No labels are needed: the teacher's answers are the gold. Those of texts to classify can be had beside them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxpress.errors import RecipeError
from onnxpress.evaluation import check_labels, label_name
from onnxpress.manifest import Json
from onnxpress.optimizers.targets import GENERATION
from onnxpress.runtime.tokenization import Tokenizer
from onnxpress.sample_files import read_samples
from onnxpress.samples import Sample, builtin_samples, finite_number

Example = dict[str, Any]

WINDOW = 256  # tokens of a language model's examples
_MASKED = 0.15  # share of tokens that are masked, as BERT was trained (arXiv 1810.04805)


def training_examples(
    task: str,
    tokenizer: Tokenizer,
    options: Mapping[str, Json],
    *,
    file: Path | None = None,
    columns: Mapping[str, str | int] | None = None,
    pieces: int = 0,
    labels: bool = False,
    seed: int = 0,
) -> tuple[list[Example], tuple[str, ...]]:
    """Examples {input_ids, token_type_ids, labels where asked for}, lists of numbers without padding; and remarks.

    task, options: the model's, as its manifest has them. file: csv, tsv, jsonl or txt (a text a line; for language models one long
    text); None is the built-in calibration texts. A language model's texts are put one after the other, with its end token
    between, and cut into windows. pieces: of each text, drawn by the seed, as texts of their own beside it. Masks are put at random, by the seed, where a text to fill has none. Raises RecipeError.
    """
    notes: tuple[str, ...] = ()
    if file is None:
        samples, _, notes = builtin_samples(task, tokenizer)
        notes += (
            f"trained on the {len(samples)} built-in texts alone: give a file of the texts that the model is for",
        )
    else:
        samples = read_samples(file, task, columns, labels=labels)
    if task == GENERATION:
        return _windows(samples, tokenizer, options, file), notes
    if task == "question-answering":
        pairs = [(sample.text, str(sample.text_pair)) for sample in samples]
        encodings = [part for pair in pairs for part in tokenizer.windows(pair, stride=tokenizer.max_length // 4)]
    else:
        texts = _texts(samples, task)
        encodings = tokenizer.encode(_with_pieces(texts, pieces, seed) if pieces else texts)
    examples: list[Example] = [{"input_ids": part.ids, "token_type_ids": part.type_ids} for part in encodings]
    cut = sum(part.truncated > 0 for part in encodings)
    if cut:
        notes += (f"{cut} of {len(encodings)} training texts are cut at {tokenizer.max_length} tokens",)
    if task == "fill-mask":
        mask = tokenizer.inner.token_to_id(options["mask_token"])
        for number, (example, part) in enumerate(zip(examples, encodings, strict=True)):
            words = [place for place, sequence in enumerate(part.sequences) if sequence is not None]
            example["input_ids"] = _masked(part.ids, words, mask, random.Random(f"{seed} {number}"))
    if labels:
        for example, label in zip(examples, gold_labels(samples, task, options, file), strict=True):
            example["labels"] = label
    return examples, notes


def gold_labels(
    samples: Sequence[Sample], task: str, options: Mapping[str, Json], file: Path | None
) -> list[int | float]:
    """The samples' labels as a model learns them: numbers of classes, or a regression's. Raises RecipeError and InputError."""
    if task != "text-classification" or not samples or samples[0].label is None:
        raise RecipeError(
            f"{file or 'The built-in texts'}: labels were asked for; texts to classify have them, from a file with labels."
        )
    if options["problem_type"] == "multi_label_classification":
        raise RecipeError("Labels of models that give several a text are not trained on: leave label_weight out.")
    if options["problem_type"] == "regression":
        return [finite_number(sample.label) for sample in samples]
    check_labels(task, options, samples)
    names = [str(name) for name in options["labels"]]
    return [names.index(str(label_name(sample.label, names))) for sample in samples]


def _windows(
    samples: Sequence[Sample], tokenizer: Tokenizer, options: Mapping[str, Json], file: Path | None
) -> list[Example]:
    """All texts one after the other, in pieces of equal length; labels are the tokens themselves, which the model shifts."""
    ends: list[int] = list(options.get("eos_token_ids") or ())[:1]
    ids: list[int] = []
    for sample in samples:
        ids += [*tokenizer.inner.encode(sample.text).ids, *ends]
    size = min(WINDOW, tokenizer.max_length)
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise RecipeError(f"{file or 'The built-in texts'}: no text has two tokens, so there is nothing to predict.")
    return [{"input_ids": window, "labels": window} for window in windows]


def _texts(samples: Sequence[Sample], task: str) -> list[str | tuple[str, str]]:
    """What the tokenizer takes. Two texts of one sample are a pair, but for embeddings, where each has its own."""
    if task == "feature-extraction":
        return list(dict.fromkeys(text for item in samples for text in (item.text, item.text_pair) if text is not None))
    return [sample.text_or_pair for sample in samples]


def _with_pieces(texts: Sequence[str | tuple[str, str]], count: int, seed: int) -> list[str | tuple[str, str]]:
    """Texts, and neighbouring words of each, from one to all (arXiv 1903.12136); of those without spaces, characters. Pairs stay whole."""
    found = list(texts)
    for number, text in enumerate(texts):
        if isinstance(text, tuple):
            continue
        draw, between = random.Random(f"{seed} {number}"), " "
        words = text.split()
        if len(words) == 1:
            words, between = list(text), ""
        for _ in range(count):
            size = draw.randint(1, len(words))
            start = draw.randint(0, len(words) - size)
            found.append(between.join(words[start : start + size]))
    return list(dict.fromkeys(found))


def _masked(ids: list[int], words: list[int], mask: int, draw: random.Random) -> list[int]:
    """Token ids with some of the words' places masked, at least one; those that have a mask already stay as they are."""
    if mask in ids or not words:
        return ids
    chosen = set(draw.sample(words, max(1, round(_MASKED * len(words)))))
    return [mask if place in chosen else token for place, token in enumerate(ids)]
