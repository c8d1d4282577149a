"""How much a model may lose: the default budgets, and what a user's means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxpress.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The least that a metric may be.

    kind "at least": the value itself. "drop": at most so many points below the original. "share": at most this share of
    the original's value lost. divergence: what kl_mean may be at most, in nats; the best choice alone does not see
    probabilities that collapse, or rare classes that vanish. choices: what top1_agreement may be at least where the metric is another
    one, or the limit, if that is less (of few samples one may be another): variance does not see classes that change places.
    """

    metric: str
    limit: float
    kind: str = "at least"
    divergence: float = math.inf
    choices: float = 0.0

    def limit_value(self, reference: float) -> float:
        """The smallest value that holds, given the original's."""
        share = reference - abs(reference) * self.limit
        return {"at least": self.limit, "drop": reference - self.limit, "share": share}[self.kind]

    def margin(self, reference: float, value: float) -> float:
        """How much of what may be lost is left: 1 is all, 0 the limit, negative is over it."""
        limit = self.limit_value(reference)
        return (value - limit) / (abs(reference - limit) or 1e-9)


# Agreement with the original. Embeddings: 0.99 is where STS-B's Spearman moves by less than 0.3 points (MiniLM). Choices:
# of 100 answers two may differ, mostly those that were near a tie; long spans and vocabularies have more near ties. Language
# models: a perplexity that is 5 % higher.
BUDGETS: Mapping[str, Budget] = {
    "feature-extraction": Budget(metric="cosine_mean", limit=0.99),
    "text-classification": Budget(metric="top1_agreement", limit=0.98, divergence=0.05),
    "token-classification": Budget(metric="top1_agreement", limit=0.98, divergence=0.05),
    "question-answering": Budget(metric="span_agreement", limit=0.95, divergence=0.1),
    "fill-mask": Budget(metric="top1_agreement", limit=0.95, divergence=0.1),
    "text-generation": Budget(metric="likelihood_kept", limit=0.95, divergence=0.1),
    "module": Budget(metric="variance_kept", limit=0.99, choices=0.98),
}
_REGRESSION = Budget(metric="variance_kept", limit=0.98)

# With labels, in points of the task's metric (x 100): what the field calls lossless.
LABELLED_BUDGETS: Mapping[str, Budget] = {
    "feature-extraction": Budget(metric="spearman", limit=0.3, kind="drop"),
    "text-classification": Budget(metric="accuracy", limit=1.0, kind="drop"),
    "token-classification": Budget(metric="entity_f1", limit=1.0, kind="drop"),
    "question-answering": Budget(metric="f1", limit=1.0, kind="drop"),
    "module": Budget(metric="accuracy", limit=1.0, kind="drop"),
}
_LABELLED_SETS = Budget(metric="f1", limit=1.0, kind="drop")  # several labels a text
_LABELLED_REGRESSION = Budget(metric="spearman", limit=0.3, kind="drop")  # numbers, as similarities of embeddings are


def budget_for(task: str, given: str | float | None, *, labelled: bool, problem_type: str | None = None) -> Budget:
    """The budget of a task, or the user's: "0.5%" is a share that may be lost, "0.99" a value. Raises RecipeError.

    problem_type: the classifier's (options of the manifest); regression with labels is judged by Spearman.
    """
    if labelled and task not in LABELLED_BUDGETS:
        raise RecipeError(no_labels(task))
    default = (LABELLED_BUDGETS if labelled else BUDGETS)[task]
    if problem_type == "regression":
        default = _LABELLED_REGRESSION if labelled else _REGRESSION
    if problem_type == "multi_label_classification" and labelled:
        default = _LABELLED_SETS
    if given is None:
        return default
    given = str(given)
    try:
        number = float(given.removesuffix("%"))
    except ValueError:
        number = -1.0
    if given.endswith("%") and 0 <= number <= 100:
        if labelled:
            return dataclasses.replace(default, limit=number / 100, kind="share")
        return dataclasses.replace(default, limit=1 - number / 100)
    if labelled and not given.endswith("%") and 0 < number <= 1:
        raise RecipeError(
            f"The budget {given!r} is a value of {default.metric}, which goes from 0 to 100 with labels: give "
            f'"{100 * number:g}" for that value, or "{100 * (1 - number):.4g}%" for the share that may be lost.'
        )
    if not given.endswith("%") and 0 < number <= (100 if labelled else 1):  # at least 0 would be anything
        return dataclasses.replace(default, limit=number, kind="at least")
    scale = "0 to 100" if labelled else "0 to 1"
    example = "0%" if number == 0 else "0.5%"
    raise RecipeError(
        f'The budget {given!r} is not understood: "{example}" is the share of {default.metric} that may be lost, at most '
        f"100%; a number from {scale} is the least that {default.metric} may be."
    )


def no_labels(task: str) -> str:
    """What to say where labels were given with a task that has none."""
    return f"Labels do not go with the task {task}; give texts alone. They go with: {', '.join(LABELLED_BUDGETS)}."
