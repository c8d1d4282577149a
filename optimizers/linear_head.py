"""Fits a linear head on fixed vectors with scikit-learn: logistic regression, or ridge regression for numbers.

Vectors are scaled to unit variance before, and the scaling is folded into the head, which takes the vectors as they are.
How strongly weights are held small is chosen by the loss on the evaluation vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from onnxpress.errors import InputError

Array = np.ndarray[Any, Any]

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of scikit-learn: the inverse of the penalty
_ITERATIONS = 3000


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """logits = vectors @ weight.T + bias; weight float32 (labels, dim), bias float32 (labels,). loss: on the evaluation vectors."""

    weight: Array
    bias: Array
    strength: float
    loss: float

    def logits(self, vectors: Array) -> Array:
        """(n, dim) → (n, labels)."""
        answers: Array = vectors @ self.weight.T + self.bias
        return answers


def fit_linear_head(
    vectors: Array,
    targets: Array,
    *,
    evaluation: tuple[Array, Array],
    problem_type: str,
    labels: Sequence[str],
    balanced: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> LinearHead:
    """The best head over all strengths.

    vectors: float32 (n, dim). targets: int (n,) of one label a text, 0 or 1 (n, labels) of several, float (n,) of numbers.
    labels: their names. evaluation: the same of other texts. balanced: rare labels count as much as frequent ones. The solver is deterministic.

    Raises InputError where a label is in all texts or in none.
    """
    scaler = StandardScaler().fit(vectors)
    scaled = scaler.transform(vectors)
    heads = []
    for strength in _STRENGTHS:
        progress(f"strength {strength:g}")
        weight, bias = _fit(scaled, targets, problem_type, labels, strength, balanced)  # (labels, dim), (labels,)
        weight = weight / scaler.scale_
        bias = bias - weight @ scaler.mean_
        head = LinearHead(
            weight=weight.astype(np.float32), bias=bias.astype(np.float32), strength=strength, loss=np.inf
        )
        loss = _loss(head.logits(evaluation[0]), evaluation[1], problem_type)
        heads.append(LinearHead(weight=head.weight, bias=head.bias, strength=strength, loss=loss))
    return min(heads, key=lambda head: head.loss)


def _fit(
    vectors: Array, targets: Array, problem_type: str, labels: Sequence[str], strength: float, balanced: bool
) -> tuple[Array, Array]:
    if problem_type == "regression":
        ridge = Ridge(alpha=1 / strength).fit(vectors, targets)
        return ridge.coef_[None], np.array([ridge.intercept_])
    model = LogisticRegression(C=strength, max_iter=_ITERATIONS, class_weight="balanced" if balanced else None)
    if problem_type == "multi_label_classification":
        rows = []
        for index, label in enumerate(labels):
            if len(np.unique(targets[:, index])) < 2:
                raise InputError(
                    f"The label {label!r} is in all training texts or in none, so that there is nothing to tell."
                )
            model.fit(vectors, targets[:, index])
            rows.append((model.coef_[0], model.intercept_[0]))
        return np.stack([weight for weight, _ in rows]), np.array([bias for _, bias in rows])
    model.fit(vectors, targets)
    if len(labels) == 2:  # scikit-learn has one row, whose number is the difference of our two
        return np.concatenate([-model.coef_, model.coef_]) / 2, np.concatenate(
            [-model.intercept_, model.intercept_]
        ) / 2
    return model.coef_, model.intercept_


def _loss(logits: Array, targets: Array, problem_type: str) -> float:
    logits = logits.astype(np.float64)
    if problem_type == "regression":
        return float(np.mean((logits[:, 0] - targets) ** 2))
    if problem_type == "multi_label_classification":
        return float(np.mean(np.logaddexp(0, np.where(targets > 0, -logits, logits))))
    normalizer = np.logaddexp.reduce(logits, axis=1)
    return float(np.mean(normalizer - logits[np.arange(len(targets)), targets]))
