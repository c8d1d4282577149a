"""Samples to judge or calibrate a model by, and the built-in ones.

The built-in texts are the project's own (data/README.md) and say themselves whether they calibrate or judge.
"""

from __future__ import annotations

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

from onnxpress.errors import RecipeError
from onnxpress.manifest import Json
from onnxpress.runtime.tokenization import Tokenizer

LONG = 30  # characters that calibration and evaluation do not share by chance
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


def spread(count: int, wanted: int) -> list[int]:
    """Indices of at most `wanted` of `count` things, evenly over a file, which may be sorted."""
    return [int(index) for index in np.linspace(0, count - 1, min(wanted, count))]


def finite_number(label: Json) -> float:
    """A gold score. Raises RecipeError."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"The score {label!r} is no finite number.")
    return number


def overlap(calibration: Path, file: Path | None, count: int) -> str:
    """What to say where calibration texts are evaluation texts too."""
    return f"{count} texts of {calibration} are in {file} too: what a pass has calibrated on cannot judge it. Take them out."


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
        try:
            ids = tokenizer.inner.encode(row.get("text") or row["context"], add_special_tokens=False).ids
        except Exception:  # nothing stands for what is unknown: none of it can be read
            ids = [identifier]
        seen, missing = counts.get(row["language"], (0, 0))
        counts[row["language"]] = (seen + len(ids), missing + ids.count(identifier))
    return {language: missing / max(1, seen) for language, (seen, missing) in counts.items()}


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
