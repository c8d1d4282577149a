"""What a budget allows, and how a user's is read."""

from __future__ import annotations

import math

import pytest

from onnxpress.budgets import BUDGETS, LABELLED_BUDGETS, Budget, budget_for
from onnxpress.errors import RecipeError


def test_every_task_has_a_budget() -> None:
    assert {task: (budget.metric, budget.limit) for task, budget in BUDGETS.items()} == {
        "feature-extraction": ("cosine_mean", 0.99),
        "text-classification": ("top1_agreement", 0.98),
        "token-classification": ("top1_agreement", 0.98),
        "question-answering": ("span_agreement", 0.95),
        "fill-mask": ("top1_agreement", 0.95),
        "text-generation": ("likelihood_kept", 0.95),
        "module": ("variance_kept", 0.99),
    }
    assert budget_for("text-classification", None, labelled=False, problem_type="regression").metric == "variance_kept"
    judged_by_choice = {
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
        "text-generation",
    }
    assert {task for task, budget in BUDGETS.items() if math.isfinite(budget.divergence)} == judged_by_choice
    assert {budget.kind for budget in LABELLED_BUDGETS.values()} == {"drop"}


def test_budgets_hold_up_to_their_limit() -> None:
    drop = LABELLED_BUDGETS["text-classification"]
    assert drop.margin(91.0, 90.0) >= 0
    assert not drop.margin(91.0, 89.99) >= 0
    assert not drop.margin(91.0, math.nan) >= 0
    share = Budget(metric="f1", limit=0.005, kind="share")
    assert share.margin(80.0, 79.6) >= 0
    assert not share.margin(80.0, 79.59) >= 0
    assert share.margin(-10.0, -10.05) >= 0  # a loss is a loss below zero too
    assert not share.margin(-10.0, -10.06) >= 0
    assert drop.margin(91.0, 90.5) == pytest.approx(0.5)
    assert drop.margin(91.0, 89.0) < 0


def test_budgets_of_the_user() -> None:
    assert budget_for("feature-extraction", "0.5%", labelled=False).limit == pytest.approx(0.995)
    with pytest.raises(RecipeError, match=r"goes from 0 to 100 with labels: give \"99\" for that value, or \"1%\""):
        budget_for("text-classification", "0.99", labelled=True)
    assert budget_for("feature-extraction", "0.97", labelled=False) == Budget(metric="cosine_mean", limit=0.97)
    labelled = budget_for("question-answering", "0.5%", labelled=True)
    assert labelled == Budget(metric="f1", limit=0.005, kind="share")
    assert budget_for("question-answering", "80", labelled=True) == Budget(metric="f1", limit=80)
    assert budget_for("text-classification", None, labelled=True, problem_type="regression").metric == "spearman"


@pytest.mark.parametrize("given", ["", "%", "half", "nan", "-1%", "101%", "1.5", "-0.1", "0.5 %%", "0"])
def test_budgets_that_are_not_understood(given: str) -> None:
    with pytest.raises(RecipeError, match=r"is not understood: .*share of cosine_mean.*0 to 1"):
        budget_for("feature-extraction", given, labelled=False)
