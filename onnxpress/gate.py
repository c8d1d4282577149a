"""The gate: measures a graph against the original, and says what the budget makes of it.

What is measured does not hang on the budget, so that one measurement can be judged under several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxpress.budgets import Budget
from onnxpress.manifest import Runnable
from onnxpress.workload import Workload

BATCH_COSINE = (
    0.999  # least likeness of answers alone and in a batch: their mean cosine, of numbers the share of variance kept
)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the evaluation says of one graph.

    metrics: all figures; metric and value: the one that the budget is about; batch_cosine: how far an answer moves
    with its batch-mates (1 is not at all); margin: what is left of the tightest of the limits on value, divergence and
    batch_cosine, as a share of what it allows; holds: none of them is broken; broken: those that are, in words.
    """

    metrics: dict[str, float]
    metric: str
    value: float
    batch_cosine: float
    holds: bool
    margin: float
    broken: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The verdict in a few words."""
        divergence = f", divergence {self.metrics['kl_mean']:.2g} nats" if "kl_mean" in self.metrics else ""
        limits = f" ({', '.join(self.broken)})" if self.broken else ""
        return f"{self.metric} {self.value:.5g}{divergence}, alone against batched {self.batch_cosine:.6f}{limits}"


class Gate:
    """Compares graphs with the original's answers, which are computed once."""

    def __init__(self, workload: Workload, reference: Runnable, budget: Budget) -> None:
        self.workload = workload
        self.budget = budget
        self._answers = workload.answers(reference)
        self._score = workload.score(reference)
        self.reference_metrics = workload.metrics(self._answers, self._answers) | self._score

    @property
    def reference_value(self) -> float:
        """The original's own figure in the budget's metric."""
        return self.reference_metrics[self.budget.metric]

    def measure(self, runnable: Runnable) -> tuple[dict[str, float], float]:
        """All figures of a session, and how far its answers move with their batch-mates (Judgement.batch_cosine)."""
        answers = self.workload.answers(runnable)
        metrics = self.workload.metrics(self._answers, answers)
        if self._score:
            metrics |= self.workload.score(runnable)
        return metrics, self.workload.batch_dependence(runnable, answers)

    def verdict(self, metrics: Mapping[str, float], batch_cosine: float) -> Judgement:
        """What the budget makes of figures. batch_cosine is 1 where rows will run alone: batch-mates cannot matter then."""
        value = metrics[self.budget.metric]
        limit = self.budget.limit_value(self.reference_value)
        limits = {
            f"{self.budget.metric} of at least {limit:.5g} is allowed": self.budget.margin(self.reference_value, value),
            f"at least {BATCH_COSINE} in a batch is allowed": (batch_cosine - BATCH_COSINE) / (1 - BATCH_COSINE),
        }
        if math.isfinite(self.budget.divergence):
            limits[f"at most {self.budget.divergence:g} nats are allowed, whatever the budget"] = (
                1 - metrics.get("kl_mean", 0.0) / self.budget.divergence
            )
        margins = list(limits.values())
        return Judgement(
            metrics=dict(metrics),
            metric=self.budget.metric,
            value=value,
            batch_cosine=batch_cosine,
            holds=all(margin >= 0 for margin in margins),
            # What is not a number is as bad as can be; min() would pass over it.
            margin=-math.inf if any(map(math.isnan, margins)) else min(margins),
            broken=tuple(text for text, margin in limits.items() if not margin >= 0),
        )
