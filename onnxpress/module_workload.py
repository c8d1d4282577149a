"""What a plain module or an .onnx file is tried on: the user's arrays, or random ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxpress import evaluation, metrics
from onnxpress.errors import RecipeError
from onnxpress.exporters.verify import drawn_like
from onnxpress.gate import BATCH_COSINE
from onnxpress.manifest import Arrays, Runnable, Signature, TensorSpec
from onnxpress.sample_arrays import SampleArrays, refuse_overlap
from onnxpress.samples import spread
from onnxpress.workload import Answers

_BATCH_TRIAL = 64  # samples for the comparison alone against batched; the runner does not cut batches
_ROWS_AT_ONCE = 32  # labelled samples in one call
# Of large images fewer: all answers of the original, and inputs and answers of one call (what is between them can be 30 times that).
_KEPT_BYTES, _CALL_BYTES = 2**29, 2**26
_LEAST_SAMPLES = 8
_MIXED_ROWS = 8  # in one call where answers move with their batch-mates


class ModuleWorkload:
    """Inputs for a plain module: the user's arrays, or such as are drawn from its signature, normal floats, integers within bounds.

    Random inputs say whether numbers survive, not whether the task does: the report says so.
    """

    rows_can_run_alone = False

    def __init__(
        self,
        *,
        signature: Signature,
        example: Arrays,
        evaluation: SampleArrays | None = None,
        calibration: SampleArrays | None = None,
        samples: int = 64,
        calibration_samples: int = 64,
    ) -> None:
        self.task = "module"
        self._signature = signature
        self._example = example
        self._samples = samples
        self._calibration_samples = calibration_samples
        self._given, self._calibrating = evaluation, calibration
        # In one input where the original mixes rows, 0 where not; None before it was asked.
        self._rows: int | None = None
        if evaluation is None:
            self.notes: tuple[str, ...] = (
                "evaluated on random inputs of the examples' shapes and spread: no quality on real data is claimed",
            )
        else:
            asked = len(evaluation) if self.labelled_samples else min(samples, evaluation.calls()) * evaluation.rows
            of = "" if asked == len(evaluation) else f"{asked} of "
            self.notes = (f"evaluated on {of}{len(evaluation)} samples of {evaluation.path.name}",)
            if calibration is None:
                self.notes += (
                    "a pass that calibrates sees random inputs of the examples' spread, as no file was given",
                )
            else:
                refuse_overlap(evaluation, calibration)
            if evaluation.labels is not None:
                self._check_classes(evaluation.labels)
            elif evaluation.calls() < 2:
                raise RecipeError(
                    f"{evaluation.path} has {len(evaluation)} samples and no labels: how much of the answers' variance is kept cannot be "
                    "told from one call. Give more samples, or labels."
                )

    @property
    def random(self) -> bool:
        """Whether no file of samples was given to judge by."""
        return self._given is None

    @property
    def labelled_samples(self) -> int:
        """How many samples the user gave with labels."""
        return len(self._given) if self._given is not None and self._given.labels is not None else 0

    def calibration(self) -> Iterator[Arrays]:
        """The calibration file's samples, mixed, or random inputs of seeds that evaluation does not use."""
        if self._calibrating is not None:
            calls = spread(self._calibrating.calls(), self._calibration_samples)
            for index in np.random.default_rng(0).permutation(calls):
                yield _call(self._calibrating, int(index), self._rows or 1)
            return
        for seed in range(self._calibration_samples):
            yield self._draw(1_000_000 + seed, self._rows or None)

    def answers(self, runnable: Runnable) -> Answers:
        """Outputs for the evaluation inputs, one call a sample. Where they are large, the first to be asked for says how many."""
        feeds = self._sample(0)
        size, rows = _bytes(runnable.run(feeds)), max(len(array) if array.ndim else 1 for array in feeds.values())
        most = max(2, math.ceil(_LEAST_SAMPLES / rows), _KEPT_BYTES // max(1, size))
        if most < len(self._indices(self._samples)):
            self._samples = most
            self.notes += (
                f"answers are compared with the original's on {most} calls of {rows} samples, as each gives {size / 1e6:.1f} MB",
            )
        found = [runnable.run(self._sample(index)) for index in self._indices(self._samples)]
        if self._rows is None:
            self._rows = 0
            alike = self.batch_dependence(runnable, found) if rows == 1 else None
            # A sample alone says little then: its share of the batch is 1.
            whole = self._given is not None and self._given.whole
            if (alike is not None and alike < BATCH_COSINE) or (rows == 1 and not whole and self._pairs_rows()):
                self._rows = min(_MIXED_ROWS, self._most_rows(runnable))
                if self._given is not None:  # so that calls differ
                    self._rows = min(self._rows, max(2, self._given.calls() // 2))
                self.notes += (f"evaluated on calls of {self._rows} samples: answers move with their batch-mates",)
                return self.answers(runnable)
        return found

    def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
        """Agreement with the original; of probabilities the share of equal choices too, but of random inputs, where choices are near ties."""
        found = evaluation.agreement("module", reference, answers)
        return found if self.random else found | metrics.probability_metrics(reference, answers)

    def score(self, runnable: Runnable) -> dict[str, float]:
        """Accuracy of the output of scores over the labelled samples; empty where there are none."""
        given = self._given
        if given is None or given.labels is None:
            return {}
        output = self._scores.name
        most = self._signature.axes.get(str(self._signature.inputs[0].shape[0]), (1, _ROWS_AT_ONCE))[1]
        at_once = min(_ROWS_AT_ONCE, most, self._rows_at_once(runnable)) if output in self._batched_outputs() else 1
        scores = np.concatenate(
            [runnable.run(given.call(index, at_once))[output] for index in range(0, given.calls(), at_once)]
        )
        # Minus infinity is a class that is masked.
        right = ~np.isnan(scores).any(axis=1) & np.isfinite(scores.max(axis=1))
        chosen = np.where(right, scores.argmax(axis=1), -1)
        return metrics.label_scores([str(label) for label in chosen], [str(label) for label in given.labels])

    def batch_dependence(self, runnable: Runnable, answers: Answers) -> float | None:
        """Variance kept between the rows of a batch alone and together, of outputs that have a batch axis; None where inputs have none, or all outputs."""
        outputs = self._batched_outputs()
        if not outputs:
            return None
        most = min(_BATCH_TRIAL, self._most_rows(runnable))
        known: dict[int, Arrays] = {}
        if all(len(array) == 1 for array in self._sample(0).values()):  # each of the answers is of one sample alone
            known = dict(zip(self._indices(self._samples), answers, strict=True))
        feeds = {index: self._sample(index, batch=1) for index in self._indices(most)}
        together = runnable.run({name: np.concatenate([item[name] for item in feeds.values()]) for name in feeds[0]})
        alone = [
            {name: array[0] for name, array in (known.get(index) or runnable.run(item)).items() if name in outputs}
            for index, item in feeds.items()
        ]
        batched = [{name: together[name][row] for name in outputs} for row in range(len(feeds))]
        return evaluation.batch_dependence(alone, batched, numbers=True)

    def timing(self, runnable: Runnable) -> dict[tuple[int, ...], Arrays]:
        """The example's own shape."""
        feeds = self._draw(0)
        return {next((array.shape for array in feeds.values() if array.ndim), (1,)): feeds}

    def golden(self, runnable: Runnable) -> dict[str, Arrays]:
        """Two inputs."""
        return {case: self._sample(index) for case, index in zip(("first", "second"), self._indices(2), strict=False)}

    def _indices(self, count: int) -> list[int]:
        return list(range(count)) if self._given is None else spread(self._given.calls(), count)

    def _sample(self, index: int, batch: int | None = None) -> Arrays:
        """One evaluation input. batch: other than as many rows as one has."""
        rows = batch or self._rows or None
        return self._draw(index, rows) if self._given is None else _call(self._given, index, rows or 1)

    def _most_rows(self, runnable: Runnable) -> int:
        """How many samples one call may have."""
        most = self._signature.axes[str(self._signature.inputs[0].shape[0])][1]
        return min(most, self._rows_at_once(runnable), most if self._given is None else self._given.calls())

    def _rows_at_once(self, runnable: Runnable) -> int:
        """How many samples share a call, where they can."""
        feeds = self._sample(0)
        rows = max(len(array) if array.ndim else 1 for array in feeds.values())
        return max(2, _CALL_BYTES * rows // max(1, _bytes(feeds) + _bytes(runnable.run(feeds))))

    def _batched_outputs(self) -> list[str]:
        """Outputs of a row a sample; none where the inputs do not share a batch axis, so that samples cannot share a call."""
        if self._given is not None and self._given.whole:
            return []
        inputs, batch = self._signature.inputs, self._first_axes()[0]
        if set(self._first_axes()) != {batch} or any(batch in spec.shape[1:] for spec in inputs):
            return []
        return [spec.name for spec in self._signature.outputs if batch and spec.shape[:1] == (batch,)]

    def _pairs_rows(self) -> bool:
        """Whether an output holds a number for each two rows, as the likeness of texts and images does."""
        batches = set(self._first_axes())
        return None not in batches and any(
            sum(axis in batches for axis in spec.shape) > 1 for spec in self._signature.outputs
        )

    def _first_axes(self) -> list[str | None]:
        """The name of each input's first axis; None where it has none, or one of a fixed size."""
        first = [spec.shape[0] if spec.shape else None for spec in self._signature.inputs]
        return [axis if isinstance(axis, str) else None for axis in first]

    @property
    def _scores(self) -> TensorSpec:
        """The output that labels are about: the first, but where another alone is of scores (skl2onnx puts the class itself before them)."""
        first, *others = self._signature.outputs
        batch = self._signature.inputs[0].shape[:1]
        of_scores = (spec for spec in (first, *others) if len(spec.shape) == 2 and spec.shape[:1] == batch)
        return next(of_scores, first)

    def _check_classes(self, labels: np.ndarray) -> None:
        name, shape = self._scores.name, self._scores.shape
        if len(shape) != 2 or shape[0] != self._signature.inputs[0].shape[0]:
            raise RecipeError(
                f"Labels go with an output of scores, (samples, classes); {name} has the shape ({', '.join(map(str, shape))}). Leave the "
                "labels out: outputs are then compared with the original's."
            )
        classes = shape[1]
        if classes in self._first_axes():
            raise RecipeError(
                f"Labels go with scores of classes; {name} has one for each sample of a call. Leave the labels out: outputs are then "
                "compared with the original's."
            )
        if labels.min() < 0 or (isinstance(classes, int) and labels.max() >= classes):
            raise RecipeError(
                f"The labels go from {labels.min()} to {labels.max()}; {name} has scores for the classes 0 to "
                f"{classes - 1 if isinstance(classes, int) else classes}."
            )
        if labels.min() == labels.max():
            raise RecipeError(
                f"All samples that judge have the label {labels[0]}, and a network that answers nothing else would be right each time; at "
                "least two different ones are needed."
            )

    def _draw(self, seed: int, batch: int | None = None) -> Arrays:
        random = np.random.default_rng(seed)
        feeds = {}
        for spec in self._signature.inputs:
            example = self._example[spec.name]
            shape = list(example.shape)
            if batch is not None and shape:
                shape[0] = batch
            feeds[spec.name] = drawn_like(example, shape, spec.bounds, random, name=spec.name)
        return feeds


def _call(given: SampleArrays, index: int, calls: int) -> Arrays:
    """So many calls in one, from an index on, or the last."""
    return given.call(max(0, min(index, given.calls() - calls)), calls)


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
