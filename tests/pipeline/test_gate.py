"""The gate: what breaks a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxpress.budgets import BUDGETS, budget_for
from onnxpress.evaluation import agreement
from onnxpress.gate import Gate
from onnxpress.manifest import Arrays, Runnable
from onnxpress.metrics import probability_metrics
from onnxpress.workload import Answers


class OneAnswer:
    """A workload whose candidate has the same best choices as the original, and other probabilities."""

    task, notes, rows_can_run_alone = "text-classification", (), True
    labelled_samples = 0

    def answers(self, runnable: Runnable) -> Answers:
        return [{"logits": runnable.run({})["logits"]}]

    def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
        return agreement(self.task, reference, answers)

    def score(self, runnable: Runnable) -> dict[str, float]:
        return {}

    def batch_dependence(self, runnable: Runnable, answers: Answers) -> float:
        return 1.0


class Constant:
    input_names: tuple[str, ...] = ()

    def __init__(self, *logits: float) -> None:
        self.logits = np.array(logits)

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return {"logits": self.logits}


def test_probabilities_that_collapse_break_the_budget() -> None:
    gate = Gate(OneAnswer(), Constant(4.0, -4.0), BUDGETS["text-classification"])  # type: ignore[arg-type]
    assert gate.verdict(*gate.measure(Constant(3.9, -4.0))).holds
    collapsed = gate.verdict(*gate.measure(Constant(0.1, 0.0)))
    assert collapsed.value == 1
    assert not collapsed.holds
    assert collapsed.margin < 0
    assert len(collapsed.broken) == 1, "the limit that breaks is named, and no other"
    assert "nats are allowed, whatever the budget)" in collapsed.sentence()


def test_classes_that_change_places_break_a_modules_budget() -> None:
    """Of a hundred probabilities that hardly differ, three swaps are next to nothing of the variance."""
    rows = np.random.default_rng(0).dirichlet([0.05] * 4, 100).astype(np.float32)
    rows[:6] = [0.27, 0.25, 0.25, 0.23]
    swapped = rows.copy()
    swapped[:3] = [0.25, 0.27, 0.25, 0.23]
    swapped[3:6] = [0.2601, 0.26, 0.25, 0.2299]  # as good as equal in the original already
    rows[3:6] = [0.26, 0.2601, 0.25, 0.2299]
    reference, candidate = ([{"y": row[None]} for row in array] for array in (rows, swapped))
    found = probability_metrics(reference, candidate)
    assert found == {"top1_agreement": 0.97}
    kept = agreement("module", reference, candidate)
    assert kept["variance_kept"] > 0.999

    class Rows(OneAnswer):
        task = "module"

        def answers(self, runnable: Runnable) -> Answers:
            return reference

    gate = Gate(Rows(), Constant(1.0), BUDGETS["module"])  # type: ignore[arg-type]
    judged = gate.verdict(kept | found, None)
    assert not judged.holds
    assert judged.broken == ("top1_agreement of at least 0.98 is allowed",)
    assert gate.verdict(kept | {"top1_agreement": 0.985}, None).holds
    few = Gate(Rows(), Constant(1.0), BUDGETS["module"])  # type: ignore[arg-type]
    few._answers = reference[:20]
    assert few.verdict(kept | {"top1_agreement": 0.95}, None).holds, "one of twenty"
    assert not few.verdict(kept | {"top1_agreement": 0.9}, None).holds
    looser = Gate(Rows(), Constant(1.0), budget_for("module", "0.9", labelled=False))  # type: ignore[arg-type]
    assert looser.verdict(kept | found, None).holds
    assert "top1_agreement 0.97" in judged.sentence()


def test_what_is_no_probability_has_no_choices() -> None:
    logits = [{"y": np.random.default_rng(seed).standard_normal((2, 4))} for seed in range(3)]
    assert probability_metrics(logits, logits) == {}
    ones = [{"y": np.ones((2, 1), np.float32)}, {"y": np.ones((2, 1), np.float32)}]
    assert probability_metrics(ones, ones) == {}
    weights = [{"y": np.full((1, 4, 4), 0.25)}]  # of attention
    assert probability_metrics(weights, weights) == {}
    halves = [{"y": np.array([[0.5, 0.5]]), "z": np.array([[3.0, 1.0]])}]
    assert probability_metrics(halves, [{"y": np.array([[np.nan, 0.5]]), "z": halves[0]["z"]}]) == {"top1_agreement": 0}


@pytest.mark.parametrize("task", ["text-classification", "module"])
def test_of_labelled_samples_one_is_a_share_of_these(task: str) -> None:
    class Labelled(OneAnswer):
        def __init__(self, count: int) -> None:
            self.labelled_samples, self.task = count, task

        def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
            return agreement("text-classification", reference, answers)

        def score(self, runnable: Runnable) -> dict[str, float]:
            return {"accuracy": 80.0}

    budget = budget_for("text-classification", "0.3%", labelled=True)
    few, enough = (
        Gate(Labelled(count), Constant(4.0, -4.0), budget)  # type: ignore[arg-type]
        for count in (40, 872)
    )
    assert few.notes[0].startswith(
        "the budget allows 0.24 of accuracy, and one of 40 evaluation samples is 2.5: not one"
    )
    assert enough.notes == ()


def test_a_budget_that_is_less_than_one_sample_is_noted() -> None:
    class Many(OneAnswer):
        def __init__(self, count: int) -> None:
            self.count = count

        def answers(self, runnable: Runnable) -> Answers:
            return self.count * super().answers(runnable)

    few, enough = (
        Gate(Many(count), Constant(4.0, -4.0), BUDGETS["text-classification"])  # type: ignore[arg-type]
        for count in (49, 50)
    )
    assert few.notes == (
        "the budget allows 0.02 of top1_agreement, and one of 49 evaluation samples is 0.0204: not one may get worse. "
        "More samples would judge finer",
    )
    assert enough.notes == ()


def test_answers_of_the_original_that_are_no_numbers_are_noted() -> None:
    """A graph that answers so in the same places is as good as the original."""

    class Numbers(OneAnswer):
        def answers(self, runnable: Runnable) -> Answers:
            return [*super().answers(runnable), {"logits": np.zeros(2)}]

        def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
            return agreement("module", reference, answers)

    gate = Gate(Numbers(), Constant(4.0, math.nan), BUDGETS["module"])  # type: ignore[arg-type]
    assert gate.notes == ("the original answers 1 of 2 evaluation samples with numbers that are none (NaN)",)
    assert gate.reference_value == 1
    assert not gate.verdict(*gate.measure(Constant(4.0, 1.0))).holds


def test_what_is_not_a_number_breaks_the_budget() -> None:
    class Undefined(OneAnswer):
        def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
            return super().metrics(reference, answers) | {"kl_mean": math.nan}

    gate = Gate(Undefined(), Constant(4.0, -4.0), BUDGETS["text-classification"])  # type: ignore[arg-type]
    judgement = gate.verdict(*gate.measure(Constant(4.0, -4.0)))
    assert not judgement.holds
    assert judgement.margin == -math.inf
