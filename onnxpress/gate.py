"""The gate: judges a graph against the original, and repairs a lossy pass that costs too much.

Repair follows what was measured: each changed place is tried alone, those that cost most stay in float, and the
smallest number of them that keeps the budget is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxpress.evaluation import Budget
from onnxpress.manifest import Runnable
from onnxpress.workload import Workload

BATCH_COSINE = 0.999  # smallest mean cosine between an answer alone and the answer in a batch
_GROUPS = 32  # sensitivity is measured for at most so many groups of neighbouring places


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the evaluation says of one graph.

    metrics: all figures; metric and value: the one that the budget is about; batch_cosine: how far an answer moves
    with its batch-mates (1 is not at all); margin: what is left of the tightest of the limits on value, divergence and
    batch_cosine, as a share of what it allows; holds: none of them is broken.
    """

    metrics: dict[str, float]
    metric: str
    value: float
    batch_cosine: float
    holds: bool
    margin: float

    def sentence(self) -> str:
        """The verdict in a few words."""
        divergence = f", divergence {self.metrics['kl_mean']:.2g} nats" if "kl_mean" in self.metrics else ""
        return f"{self.metric} {self.value:.5g}{divergence}, alone against batched {self.batch_cosine:.6f}"


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

    def judge(self, runnable: Runnable, *, rows_alone: bool = False) -> Judgement:
        """Judge a session. rows_alone: it will be run one row at a time, so that batch-mates cannot matter."""
        metrics = self.workload.metrics(self._answers, self.workload.answers(runnable))
        if self._score:
            metrics |= self.workload.score(runnable)
        value = metrics[self.budget.metric]
        batch_cosine = 1.0 if rows_alone else self.workload.batch_dependence(runnable)
        margins = [
            self.budget.margin(self.reference_value, value),
            (batch_cosine - BATCH_COSINE) / (1 - BATCH_COSINE),
        ]
        if math.isfinite(self.budget.divergence):
            margins.append(1 - metrics.get("kl_mean", 0.0) / self.budget.divergence)
        return Judgement(
            metrics=metrics,
            metric=self.budget.metric,
            value=value,
            batch_cosine=batch_cosine,
            holds=all(margin >= 0 for margin in margins),  # not min(): it passes over what is not a number
            margin=min(margins),
        )


def repair(
    places: Sequence[str], judge_keeping: Callable[[frozenset[str]], Judgement], progress: Callable[[str], None]
) -> tuple[frozenset[str], Judgement] | None:
    """The smallest set of places to keep in float so that the budget holds; None if half of them is not enough.

    places: names of all places that the pass changes. judge_keeping: applies the pass but for the given names, and
    judges the result.
    """
    size = -(-len(places) // _GROUPS)
    groups = [tuple(places[start : start + size]) for start in range(0, len(places), size)]
    margins: dict[tuple[str, ...], float] = {}
    for index, group in enumerate(groups):
        progress(f"sensitivity {index + 1} of {len(groups)}")
        margins[group] = judge_keeping(frozenset(places) - frozenset(group)).margin
    ranked = sorted(groups, key=lambda group: margins[group])
    low, high = 1, len(groups) // 2
    found: tuple[frozenset[str], Judgement] | None = None
    while low <= high:
        middle = (low + high) // 2
        kept = frozenset(name for group in ranked[:middle] for name in group)
        progress(f"keeping {len(kept)} of {len(places)} places in float")
        judgement = judge_keeping(kept)
        if judgement.holds:
            found, high = (kept, judgement), middle - 1
        else:
            low = middle + 1
    return found
