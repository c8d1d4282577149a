"""The gate: what breaks a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxpress.budgets import BUDGETS, budget_for
from onnxpress.evaluation import agreement
from onnxpress.gate import Gate
from onnxpress.manifest import Arrays, Runnable
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
