"""Repair: the places that cost most stay in float, and no more of them than needed."""

from __future__ import annotations

import math

import numpy as np

from onnxpress.evaluation import BUDGETS, agreement
from onnxpress.gate import Gate, Judgement, repair
from onnxpress.manifest import Arrays, Runnable
from onnxpress.workload import Answers

PLACES = [f"layer{index}" for index in range(10)]
COSTS = dict.fromkeys(PLACES, 0.001) | {"layer3": 0.05, "layer7": 0.03}


def judge(kept: frozenset[str], *, limit: float) -> Judgement:
    value = 1 - sum(cost for name, cost in COSTS.items() if name not in kept)
    return Judgement(
        metrics={}, metric="cosine", value=value, batch_cosine=1, holds=value >= limit, margin=value - limit
    )


def test_the_costliest_places_are_kept_and_no_more() -> None:
    found = repair(PLACES, lambda kept: judge(kept, limit=0.95), lambda _: None)
    assert found is not None
    assert found[0] == {"layer3"}
    found = repair(PLACES, lambda kept: judge(kept, limit=0.98), lambda _: None)
    assert found is not None
    assert found[0] == {"layer3", "layer7"}
    assert found[1].holds


def test_gives_up_when_half_is_not_enough() -> None:
    assert repair(PLACES, lambda kept: judge(kept, limit=0.9999), lambda _: None) is None


def test_a_pass_of_one_place_is_not_repaired_into_nothing() -> None:
    assert repair(["layer3"], lambda kept: judge(kept, limit=0.98), lambda _: None) is None


class OneAnswer:
    """A workload whose candidate has the same best choices as the original, and other probabilities."""

    task, notes, rows_can_run_alone = "text-classification", (), True

    def answers(self, runnable: Runnable) -> Answers:
        return [{"logits": runnable.run({})["logits"]}]

    def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
        return agreement(self.task, reference, answers)

    def score(self, runnable: Runnable) -> dict[str, float]:
        return {}

    def batch_dependence(self, runnable: Runnable) -> float:
        return 1.0


class Constant:
    input_names: tuple[str, ...] = ()

    def __init__(self, *logits: float) -> None:
        self.logits = np.array(logits)

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return {"logits": self.logits}


def test_probabilities_that_collapse_break_the_budget() -> None:
    gate = Gate(OneAnswer(), Constant(4.0, -4.0), BUDGETS["text-classification"])  # type: ignore[arg-type]
    assert gate.judge(Constant(3.9, -4.0)).holds
    collapsed = gate.judge(Constant(0.1, 0.0))
    assert collapsed.value == 1
    assert not collapsed.holds
    assert collapsed.margin < 0
    assert "nats" in collapsed.sentence()


def test_what_is_not_a_number_breaks_the_budget() -> None:
    class Undefined(OneAnswer):
        def metrics(self, reference: Answers, answers: Answers) -> dict[str, float]:
            return super().metrics(reference, answers) | {"kl_mean": math.nan}

    gate = Gate(Undefined(), Constant(4.0, -4.0), BUDGETS["text-classification"])  # type: ignore[arg-type]
    assert not gate.judge(Constant(4.0, -4.0)).holds


def test_many_places_are_tried_in_groups() -> None:
    many = [f"layer{index}" for index in range(100)]
    tried: list[frozenset[str]] = []

    def count(kept: frozenset[str]) -> Judgement:
        tried.append(kept)
        good = "layer42" in kept
        return Judgement(metrics={}, metric="m", value=0, batch_cosine=1, holds=good, margin=0 if good else -1)

    found = repair(many, count, lambda _: None)
    assert found is not None
    assert "layer42" in found[0]
    assert len(found[0]) == 4
    assert len(tried) < 35
