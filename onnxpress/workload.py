"""What a model is tried on: calibration inputs, evaluation inputs, shapes to time, and cases to keep as golden.

Calibration and evaluation inputs never overlap. Here for models that read text; module_workload.py and
decoder_workload.py have the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from onnxpress import evaluation
from onnxpress.errors import RecipeError
from onnxpress.manifest import Arrays, Json, Runnable, Signature
from onnxpress.runtime.loading import RUNNERS
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.runtime.tokenization import Tokenizer, TruncationWarning
from onnxpress.sample_files import read_samples
from onnxpress.samples import Sample, builtin_samples, spread
from onnxpress.timing import random_tokens

Answers = list[dict[str, np.ndarray]]

_SHAPES = ((1, 32), (1, 128), (8, 128))  # (batch, length) at which passes are timed
_BATCH_TRIAL = 32  # samples for the comparison alone against batched
_MASKS_AT_ONCE = 16


class Workload(Protocol):
    """What the pipeline asks for."""

    task: str
    notes: tuple[str, ...]
    rows_can_run_alone: bool

    @property
    def labelled_samples(self) -> int:
        """How many samples the user gave with labels."""
        ...

    def calibration(self) -> Iterator[Arrays]:
        """Calibration inputs, one sample at a time."""
        ...

    def answers(self, runnable: Runnable) -> Answers:
        """The raw outputs for the evaluation samples, one dict a sample, no padding."""
        ...

    def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
        """How far answers agree with the original's."""
        ...

    def score(self, runnable: Runnable) -> dict[str, float]:
        """The task's own metrics on the user's labelled samples; empty where there are none."""
        ...

    def batch_dependence(self, runnable: Runnable, answers: Answers) -> float | None:
        """Mean cosine between answers alone and in batches; of numbers, the share of variance kept; None where no batch is possible.

        answers: what `answers` gave.
        """
        ...

    def timing(self, runnable: Runnable) -> dict[tuple[int, ...], Arrays]:
        """Inputs to time a runnable with, by (batch, length) or another shape that tells them apart."""
        ...

    def golden(self, runnable: Runnable) -> dict[str, Arrays]:
        """Inputs that the artifact keeps with the runnable's outputs."""
        ...


class TextWorkload:
    """Samples of text, the project's own or the user's. A runner cuts its batches, to single rows if need be."""

    rows_can_run_alone = True

    def __init__(
        self,
        *,
        task: str,
        signature: Signature,
        options: Mapping[str, Json],
        tokenizer_folder: Path,
        file: Path | None = None,
        calibration: Path | None = None,
        columns: Mapping[str, str | int] | None = None,
        samples: int = 200,
        calibration_samples: int = 128,
    ) -> None:
        self.task = task
        self._signature = signature
        self._options = options
        self._tokenizer = Tokenizer.from_folder(
            tokenizer_folder, max_length=options["max_length"], pad_token_id=options["pad_token_id"]
        )
        self._calibration, self._evaluation, self.notes = builtin_samples(
            task, self._tokenizer, mask_token=options.get("mask_token")
        )
        self._evaluation = self._evaluation[:samples]
        if calibration is not None:
            found = read_samples(calibration, task, columns, labels=False)
            self._calibration = [found[index] for index in spread(len(found), calibration_samples)]
        self._calibration = self._calibration[:calibration_samples]
        self._labelled: list[Sample] = []
        if file is not None:
            given = read_samples(file, task, columns)
            seen = {text for sample in given for text in (sample.text, sample.text_pair)}
            if any(sample.label is not None for sample in given):
                self._labelled = given
            else:
                self._evaluation = [given[index] for index in spread(len(given), samples)]
            self._calibration = [
                item for item in self._calibration if not {item.text, item.text_pair} & (seen - {None})
            ]
            mask = options.get("mask_token")
            if mask is not None and any(mask not in sample.text for sample in given):
                raise RecipeError(f"{file}: texts for fill-mask need a mask each: write {mask} in the place of a word.")
        judged = self._labelled or self._evaluation
        encodings = self._tokenizer.encode([sample.text_or_pair for sample in judged])
        if task == "fill-mask" and not any(self._mask_id in encoding.ids for encoding in encodings):
            where = file or "The built-in texts"
            raise RecipeError(f"{where}: no text has a mask among its first {options['max_length']} tokens.")
        if cut := sum(encoding.truncated > 0 for encoding in encodings):
            self.notes += (f"{cut} of {len(judged)} evaluation texts are cut at {options['max_length']} tokens",)

    @property
    def labelled_samples(self) -> int:
        """How many samples the user gave with labels."""
        return len(self._labelled)

    @property
    def _mask_id(self) -> int | None:
        found: int | None = self._tokenizer.inner.token_to_id(self._options["mask_token"])
        return found

    def calibration(self) -> Iterator[Arrays]:
        """Token ids of one calibration sample at a time."""
        for sample in self._calibration:
            yield self._feeds([sample])

    def answers(self, runnable: Runnable) -> Answers:
        """Raw outputs for the evaluation samples: the user's, where they have no labels, or the built-in ones.

        Of a fill-mask model only those at the masks: a vocabulary for each token of each sample would be gigabytes.
        """
        if self.task != "fill-mask":
            return self._outputs(runnable, self._evaluation)
        found: Answers = []
        for start in range(0, len(self._evaluation), _MASKS_AT_ONCE):
            samples = self._evaluation[start : start + _MASKS_AT_ONCE]
            encodings = self._tokenizer.encode([sample.text_or_pair for sample in samples])
            for encoding, answer in zip(encodings, self._outputs(runnable, samples), strict=True):
                masks = np.array(encoding.ids) == self._mask_id
                found.append({name: array[masks] for name, array in answer.items()})
        return found

    def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
        """Agreement with the original."""
        return evaluation.agreement(self.task, reference, answers, problem_type=self._options.get("problem_type"))

    def score(self, runnable: Runnable) -> dict[str, float]:
        """The task's metric on the labelled samples."""
        with _cuts_are_noted():
            return evaluation.score(self.task, self._runner(runnable), self._labelled) if self._labelled else {}

    def batch_dependence(self, runnable: Runnable, answers: Answers) -> float:
        """How far answers alone and answers in batches of mixed lengths agree: mean cosine, or variance kept."""
        samples = self._evaluation[:_BATCH_TRIAL]
        alone = self._outputs(runnable, samples, tokens_per_chunk=1)
        batched = self._outputs(runnable, samples, tokens_per_chunk=4096)
        regression = self._options.get("problem_type") == "regression"
        return evaluation.batch_dependence(alone, batched, numbers=regression)

    def timing(self, runnable: Runnable) -> dict[tuple[int, ...], Arrays]:
        """Token ids of a few batches and lengths, no padding, as far as the model's maximum allows."""
        longest = min(int(self._options["max_length"]), self._signature.axes["length"][1])
        shapes = dict.fromkeys((batch, min(length, longest)) for batch, length in _SHAPES)
        closing = self._options.get("closing_token_id")
        return {shape: random_tokens(self._signature, *shape, closing_token_id=closing) for shape in shapes}

    def golden(self, runnable: Runnable) -> dict[str, Arrays]:
        """One sample alone, and the next four, of unequal lengths, in a padded batch."""
        first, others = self._evaluation[:1], self._evaluation[1:5]
        return {"single": self._feeds(first)} | ({"batch": self._feeds(others)} if others else {})

    def throughput(self, runnable: Runnable, tokens_per_chunk: int) -> Callable[[], object]:
        """A call that answers 32 samples through the runner in chunks of a given size."""
        return lambda: self._outputs(runnable, self._evaluation[:32], tokens_per_chunk)

    def _outputs(self, runnable: Runnable, samples: Sequence[Sample], tokens_per_chunk: int = 256) -> Answers:
        with _cuts_are_noted():
            return self._runner(runnable, tokens_per_chunk).outputs([sample.text_or_pair for sample in samples])

    def _runner(self, runnable: Runnable, tokens_per_chunk: int = 256) -> TextRunner:
        return RUNNERS[self.task](runnable, self._tokenizer, self._options, tokens_per_chunk=tokens_per_chunk)

    def _feeds(self, samples: list[Sample]) -> Arrays:
        encodings = self._tokenizer.encode([sample.text_or_pair for sample in samples])
        return {
            name: array
            for name, array in self._tokenizer.batch(encodings).items()
            if name in {spec.name for spec in self._signature.inputs}
        }


@contextmanager
def _cuts_are_noted() -> Iterator[None]:
    """Long evaluation texts are counted in the notes; no further warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        yield


def workload_file(path: str | None, purpose: str) -> Path | None:
    """The evaluation or calibration file, which has to exist. Raises RecipeError."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise RecipeError(
            f"The {purpose} file {path!r} is no file that exists; give a csv, tsv, jsonl or txt file; for a module, arrays as "
            ".npz or .safetensors."
        )
    return Path(path)
