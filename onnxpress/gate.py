"""The gate: measures a graph against the original, and says what the budget makes of it.

What is measured does not hang on the budget, so that one measurement can be judged under several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxpress.budgets import Budget
from onnxpress.manifest import Runnable
from onnxpress.masked import mask_size
from onnxpress.workload import Workload

# The least likeness of answers alone and in a batch: their mean cosine, of numbers the share of variance kept.
BATCH_COSINE = 0.999


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the evaluation says of one graph.

    metrics: all figures; metric and value: the one that the budget is about; batch_cosine: how far an answer moves
    with its batch-mates (1 is not at all, None where that is not asked); margin: what is left of the tightest of the limits on value, divergence and
    batch_cosine, as a share of what it allows; broken: limits that are, in words.
    """

    metrics: dict[str, float]
    metric: str
    value: float
    batch_cosine: float | None
    margin: float
    broken: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no limit is broken."""
        return self.margin >= 0

    def sentence(self) -> str:
        """The verdict in a few words."""
        divergence = f", divergence {self.metrics['kl_mean']:.2g} nats" if "kl_mean" in self.metrics else ""
        if self.metric == "variance_kept" and "top1_agreement" in self.metrics:
            divergence = f", top1_agreement {self.metrics['top1_agreement']:.5g}"
        limits = f" ({', '.join(self.broken)})" if self.broken else ""
        batched = "" if self.batch_cosine is None else f", alone against batched {self.batch_cosine:.6f}"
        return f"{self.metric} {self.value:.5g}{divergence}{batched}{limits}"


class Gate:
    """Compares graphs with the original's answers, which are computed once."""

    def __init__(self, workload: Workload, reference: Runnable, budget: Budget) -> None:
        self.workload = workload
        self.budget = budget
        self.notes: tuple[str, ...] = ()
        self._reference = reference
        self._answers = workload.answers(reference)
        if undefined := sum(map(_undefined, self._answers)):
            self.notes += (
                f"the original answers {undefined} of {len(self._answers)} evaluation samples with numbers that are none (NaN)",
            )
        self._score = workload.score(reference)
        self.reference_metrics = workload.metrics(self._answers, self._answers) | self._score
        count = workload.labelled_samples if budget.metric == "accuracy" else len(self._answers)
        one = (100 if budget.metric == "accuracy" else 1) / max(count, 1)
        allowed = self.reference_value - budget.limit_value(self.reference_value)
        of_samples = budget.metric == "accuracy" or (
            workload.task == "text-classification" and budget.metric == "top1_agreement"
        )
        if of_samples and allowed < one:
            self.notes += (
                f"the budget allows {max(allowed, 0):.3g} of {budget.metric}, and one of {count} evaluation samples is "
                f"{one:.3g}: not one may get worse. More samples would judge finer",
            )

    @property
    def reference_value(self) -> float:
        """The original's own figure in the budget's metric."""
        return self.reference_metrics[self.budget.metric]

    def measure(self, runnable: Runnable) -> tuple[dict[str, float], float | None]:
        """All figures of a session, and how far its answers move with their batch-mates (Judgement.batch_cosine)."""
        answers = self.workload.answers(runnable)
        metrics = self.workload.metrics(self._answers, answers)
        if self._score:
            metrics |= self.workload.score(runnable)
        batch_cosine = self.workload.batch_dependence(runnable, answers)
        moves = batch_cosine is not None and batch_cosine < BATCH_COSINE
        if moves and not self.workload.rows_can_run_alone and self._original_mixes_rows:
            return metrics, None
        return metrics, batch_cosine

    @cached_property
    def _original_mixes_rows(self) -> bool:
        """Whether the original's own answers move with their batch-mates: the likeness of all texts and all images."""
        try:
            own = self.workload.batch_dependence(self._reference, self._answers)
        except Exception:  # a module that wants several samples, and raises whatever it likes for one
            own = 0.0
        mixes = own is not None and own < BATCH_COSINE
        if mixes:
            self.notes += (
                "the original's answers move with their batch-mates: alone against batched is asked of no pass",
            )
        return mixes

    def mask_sizes(self) -> dict[str, float] | None:
        """From which size on a module's answers are masks, by output of floats."""
        if self.workload.task != "module":
            return None
        return {
            name: mask_size([answer[name] for answer in self._answers])
            for name, first in self._answers[0].items()
            if np.issubdtype(first.dtype, np.floating)
        }

    def verdict(self, metrics: Mapping[str, float], batch_cosine: float | None) -> Judgement:
        """What the budget makes of figures. batch_cosine is None where batch-mates do not matter: rows will run alone."""
        value = metrics[self.budget.metric]
        limit = self.budget.limit_value(self.reference_value)
        limits = {
            f"{self.budget.metric} of at least {limit:.5g} is allowed": self.budget.margin(self.reference_value, value),
        }
        if batch_cosine is not None:
            limits[f"at least {BATCH_COSINE} in a batch is allowed"] = (batch_cosine - BATCH_COSINE) / (
                1 - BATCH_COSINE
            )
        if math.isfinite(self.budget.divergence):
            limits[f"at most {self.budget.divergence:g} nats are allowed, whatever the budget"] = (
                1 - metrics.get("kl_mean", 0.0) / self.budget.divergence
            )
        if self.budget.choices and "top1_agreement" in metrics:
            least = min(self.budget.choices, self.budget.limit, 1 - 1 / len(self._answers))  # one may be another
            limits[f"top1_agreement of at least {least:.5g} is allowed"] = (metrics["top1_agreement"] - least) / (
                1 - least or 1e-9
            )
        margins = list(limits.values())
        return Judgement(
            metrics=dict(metrics),
            metric=self.budget.metric,
            value=value,
            batch_cosine=batch_cosine,
            # What is not a number is as bad as can be; min() would pass over it.
            margin=-math.inf if any(map(math.isnan, margins)) else min(margins),
            broken=tuple(text for text, margin in limits.items() if not margin >= 0),
        )


def _undefined(answer: Mapping[str, np.ndarray]) -> bool:
    return any(np.issubdtype(array.dtype, np.floating) and bool(np.isnan(array).any()) for array in answer.values())
