"""Figures of quality: how far answers agree with the original's, and how good they are by labels."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import RecipeError
from onnxpress.masked import HALF_LARGEST, OF_A_MASK, masks_of

Array = npt.NDArray[Any]
Answers = Sequence[Mapping[str, Array]]
Entity = tuple[int, int, str]
_BLOCK = 2**15  # numbers of each answer that are compared at a time
_HALF_ROUNDS = 2.0**-8  # as a share, how far bfloat16 rounds at most
_FLOAT_ROUNDS = 2.0**-23
_OF_ONE = 2e-3  # how far from 1 a sum of probabilities may be, in float16 too
_AS_GOOD = 0.01  # probabilities that differ by no more, between which the original itself hardly chose
_CONSTANT = 1e-12  # numbers that vary by less than a millionth of their size: float32 has no more digits


def cosines(reference: Answers, candidate: Answers) -> list[float]:
    """Cosine of each sample's answers, all outputs as one vector; -1 where a candidate is not finite."""
    return [_cosine(_vector(one), _vector(other)) for one, other in zip(reference, candidate, strict=True)]


def cosine_metrics(reference: Answers, candidate: Answers) -> dict[str, float]:
    """Mean and smallest cosine over the samples, and the relative distance of all answers together."""
    values = cosines(reference, candidate)
    one = np.concatenate([_vector(answer) for answer in reference])
    other = np.concatenate([_vector(answer) for answer in candidate])
    distance = float(np.linalg.norm(one - other) / (np.linalg.norm(one) or 1.0))
    return {
        "cosine_mean": float(np.mean(values)),
        "cosine_min": float(np.min(values)),
        "relative_l2": distance if np.isfinite(distance) else float("inf"),
    }


def choice_metrics(reference: Answers, candidate: Answers, output: str) -> dict[str, float]:
    """Share of equal best choices, mean Kullback-Leibler divergence in nats over the last axis, largest difference.

    Every row of every sample counts once. A row that is not finite disagrees, and its divergence is infinite.
    """
    agreed, divergences, differences = [], [], []
    for one, other in zip(reference, candidate, strict=True):
        first, second = np.atleast_2d(one[output]).astype(np.float64), np.atleast_2d(other[output]).astype(np.float64)
        finite = np.isfinite(second).all(axis=-1)
        agreed.append((first.argmax(-1) == second.argmax(-1)) & finite)
        with np.errstate(all="ignore"):
            logs = log_softmax(first)
            shares = np.exp(logs)
            divergence = np.where(shares > 0, shares * (logs - log_softmax(second)), 0).sum(-1)
            differences.append(np.where(np.isfinite(second), np.abs(first - second), np.inf).max(initial=0.0))
        divergences.append(np.where(finite, divergence, np.inf))
    return {
        "top1_agreement": float(np.concatenate(agreed).mean()),
        "kl_mean": float(np.concatenate(divergences).mean()),
        "max_abs": float(max(differences)),
    }


def probability_metrics(reference: Answers, candidate: Answers) -> dict[str, float]:
    """The share of equal best choices, of the output where it is least, of those that are probabilities; empty where none are.

    They are where all of the original's answers have two axes, and rows of two numbers and more that add up to one. A choice between numbers
    that are as good as equal is no other one.
    """
    agreed = []
    for name, first in reference[0].items():
        if not np.issubdtype(first.dtype, np.floating) or not all(_are_probabilities(one[name]) for one in reference):
            continue
        same = []
        for one, other in zip(reference, candidate, strict=True):
            ours, theirs = one[name].astype(np.float64), other[name].astype(np.float64)
            if ours.shape != theirs.shape:
                same.append(np.zeros(len(ours), bool))
                continue
            chosen = np.take_along_axis(ours, theirs.argmax(-1)[:, None], -1)[:, 0]
            same.append((ours.max(-1) - chosen <= _AS_GOOD) & np.isfinite(theirs).all(-1))
        agreed.append(float(np.concatenate(same).mean()))
    return {"top1_agreement": min(agreed)} if agreed else {}


def _are_probabilities(array: Array) -> bool:
    if array.ndim != 2 or array.shape[1] < 2 or not array.size:
        return False
    return bool((array >= 0).all() and (np.abs(array.sum(-1, dtype=np.float64) - 1) <= _OF_ONE).all())


def number_metrics(reference: Answers, candidate: Answers) -> dict[str, float]:
    """For numbers: what is kept of the output that keeps least, and the largest difference.

    variance_kept: for floats the share of the original's variance over the samples, 1 - sum of squared differences / sum of squares
    around each number's mean over the samples, at least 0 (R²). A cosine would not do: numbers around 3 and the constant 3 are nearly
    parallel. Where the original answers the same to all samples, there is no variance to keep, and the share of the sum of squares itself
    is taken. For integers and booleans (classes, masks): the share of equal ones. Raises RecipeError where the original's floats differ
    in number from sample to sample.
    """
    kept, largest = [], []
    for name in sorted(reference[0]):
        compare = _variance_kept if np.issubdtype(reference[0][name].dtype, np.floating) else _equal_share
        share, difference = compare([answer[name] for answer in reference], [answer[name] for answer in candidate])
        kept.append(share)
        largest.append(difference)
    return {"variance_kept": min(kept), "max_abs": max(largest)}


def _variance_kept(reference: list[Array], candidate: list[Array]) -> tuple[float, float]:
    """Of one output, and the largest difference."""
    sizes = {array.size for array in reference}
    if len(sizes) > 1:
        raise RecipeError(
            f"The model answers with {min(sizes)} to {max(sizes)} numbers, which hangs on what is in its inputs, so that answers cannot be "
            "compared number by number: end the graph before its outputs are selected (NonMaxSuppression, NonZero), or give samples alike."
        )
    if any(other.size != one.size for one, other in zip(reference, candidate, strict=True)):
        return 0.0, math.inf
    reference, candidate = ([array.ravel() for array in given] for given in (reference, candidate))
    masks = masks_of(reference)
    lost, whole, squares, largest = np.zeros(3), np.zeros(3), np.zeros(3), 0.0  # masked, large quantities, others
    for start in range(0, max(sizes), _BLOCK):  # a part of all answers at a time: they may be images
        part = slice(start, start + _BLOCK)
        ours, theirs = (
            np.stack([array[part] for array in given]).astype(np.float64) for given in (reference, candidate)
        )
        masked = masks.among(ours, part)
        if not np.array_equal(_infinite(ours, but=masked), _infinite(theirs, but=masked), equal_nan=True):
            return 0.0, math.inf
        if not (np.sign(ours) * theirs >= OF_A_MASK * min(masks.size, HALF_LARGEST))[masked].all():  # less than masked
            return 0.0, math.inf
        held, rounds = _held(theirs[masked])
        ours, theirs = (
            np.where(masked, np.clip(array, -held, held), np.where(np.isfinite(array), array, 0))
            for array in (ours, theirs)
        )
        large = masks.quantities(part) & ~masked
        for group, chosen in enumerate((masked, large, ~masked & ~large)):
            count = chosen.sum(0)
            mean = ours.sum(0, where=chosen) / np.maximum(count, 1)
            difference = np.abs(ours - theirs)
            if group == 0:  # what is added to a mask is rounded
                difference = np.maximum(difference - rounds * np.abs(ours), 0)
            else:
                largest = max(largest, float(difference.max(initial=0.0, where=chosen)))
            lost[group] += (difference**2).sum(where=chosen)
            whole[group] += ((ours - mean) ** 2).sum(where=chosen)
            squares[group] += (ours**2).sum(where=chosen)
    whole = np.where(whole <= _CONSTANT * squares, squares, whole)
    shares = (
        1.0 if gone == 0 else max(0.0, 1 - gone / all_of_it) if all_of_it > 0 else 0.0
        for gone, all_of_it in zip(lost.tolist(), whole.tolist(), strict=True)
    )
    return min(shares), largest


def _held(masks: Array) -> tuple[float, float]:
    """The largest number that the precision of these holds, or whose square float64 does, and how far it rounds, as a share."""
    finite = masks[np.isfinite(masks)]
    if (np.abs(finite) <= HALF_LARGEST).all() and (finite.astype(np.float16) == finite).all():
        return HALF_LARGEST, _HALF_ROUNDS
    with np.errstate(over="ignore"):
        single = finite.astype(np.float32)
    bfloat16 = (single == finite) & (single.view(np.uint32) & 0xFFFF == 0)  # the upper half of a float32
    return 1e100, _HALF_ROUNDS if bfloat16.all() else _FLOAT_ROUNDS


def _infinite(array: Array, *, but: Array) -> Array:
    """With zeros for what is finite, and at some places."""
    return np.where(np.isfinite(array) | but, 0, array)


def _equal_share(reference: list[Array], candidate: list[Array]) -> tuple[float, float]:
    """Of one output of integers or booleans, and the largest difference."""
    equal = total = largest = 0.0
    for one, other in zip(reference, candidate, strict=True):
        total += max(one.size, other.size)
        if one.shape != other.shape:
            largest = math.inf
            continue
        equal += float((one == other).sum())
        largest = max(largest, float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0)))
    return equal / total if total else 1.0, largest


def sign_metrics(reference: Answers, candidate: Answers) -> dict[str, float]:
    """For several labels a text: share of equal decisions at probability 0.5; what is not finite disagrees."""
    same = [
        ((one["logits"] > 0) == (other["logits"] > 0)) & np.isfinite(other["logits"])
        for one, other in zip(reference, candidate, strict=True)
    ]
    return {"top1_agreement": float(np.concatenate(same).mean())}


def span_metrics(reference: Answers, candidate: Answers) -> dict[str, float]:
    """Share of samples with the same best start and end, and the divergence of both."""
    starts = choice_metrics(reference, candidate, "start_logits")
    ends = choice_metrics(reference, candidate, "end_logits")
    same = [
        all(
            one[name].argmax() == other[name].argmax() and np.isfinite(other[name]).all()
            for name in ("start_logits", "end_logits")
        )
        for one, other in zip(reference, candidate, strict=True)
    ]
    return {"span_agreement": float(np.mean(same)), "kl_mean": (starts["kl_mean"] + ends["kl_mean"]) / 2}


def similarity_scores(first: Array, second: Array, gold: Sequence[float]) -> dict[str, float]:
    """Spearman and Pearson correlation x 100 of the cosines of embeddings (pairs, dim) with gold scores."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return regression_scores((first * second).sum(axis=1) / np.where(norms > 0, norms, 1), gold)


def regression_scores(predicted: Sequence[float] | Array, gold: Sequence[float]) -> dict[str, float]:
    """Spearman (ties share their rank) and Pearson correlation x 100.

    Constant predictions correlate with nothing (0); predictions that are not finite have the worst value (-100).
    """
    if not np.isfinite(predicted).all():
        return {"spearman": -100.0, "pearson": -100.0}
    if np.ptp(predicted) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    from scipy.stats import pearsonr, spearmanr  # only here: it takes a second that most builds do not need

    return {
        "spearman": 100 * float(spearmanr(predicted, gold).statistic),
        "pearson": 100 * float(pearsonr(predicted, gold).statistic),
    }


def label_scores(predicted: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Accuracy and macro F1 x 100."""
    from sklearn.metrics import accuracy_score, f1_score  # only here, as above

    return {
        "accuracy": 100 * float(accuracy_score(gold, predicted)),
        "f1_macro": 100 * float(f1_score(gold, predicted, average="macro", zero_division=0)),
    }


def label_set_scores(predicted: Sequence[set[str]], gold: Sequence[set[str]]) -> dict[str, float]:
    """For several labels a text: micro F1 over all decisions, and the share of texts with exactly their labels, x 100."""
    right = sum(len(one & other) for one, other in zip(predicted, gold, strict=True))
    all_labels = sum(map(len, predicted)) + sum(map(len, gold))
    exact = sum(one == other for one, other in zip(predicted, gold, strict=True)) / len(gold)
    return {"f1": 100 * 2 * right / all_labels if all_labels else 100.0, "exact": 100 * exact}


def entity_scores(predicted: Iterable[set[Entity]], gold: Iterable[set[Entity]]) -> dict[str, float]:
    """Micro precision, recall and F1 x 100 over exact spans with their types (as the CoNLL-2003 evaluation)."""
    right = found = expected = 0
    for one, other in zip(predicted, gold, strict=True):
        right, found, expected = right + len(one & other), found + len(one), expected + len(other)
    precision, recall = right / found if found else 0.0, right / expected if expected else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"entity_f1": 100 * f1, "precision": 100 * precision, "recall": 100 * recall}


def gold_entities(tokens: Sequence[str], tags: Sequence[str]) -> set[Entity]:
    """Spans (start, end, type) in the tokens joined by spaces, from BIO tags; an I- without a start begins a span."""
    entities: set[Entity] = set()
    start, kind, position = 0, "", 0
    for token, tag in zip([*tokens, ""], [*tags, "O"], strict=True):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            entities.add((start, position - 1, kind))
            kind = ""
        if name and not kind:
            start, kind = position, name
        position += len(token) + 1
    return entities


def answer_scores(predicted: Sequence[str], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and token F1 x 100, the best over the gold answers (as the SQuAD 1.1 evaluation)."""
    exact = [
        max(float(_normal(answer) == _normal(item)) for item in items)
        for answer, items in zip(predicted, gold, strict=True)
    ]
    f1 = [max(_token_f1(answer, item) for item in items) for answer, items in zip(predicted, gold, strict=True)]
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


def _vector(answer: Mapping[str, Array]) -> Array:
    return np.concatenate([np.asarray(array, np.float64).ravel() for _, array in sorted(answer.items())])


def _cosine(one: Array, other: Array) -> float:
    if not np.isfinite(other).all():
        return -1.0
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    if norms == 0:
        return 1.0 if np.array_equal(one, other) else 0.0
    return float(one @ other) / norms


def log_softmax(logits: Array) -> Array:
    """Logarithms of the probabilities, over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(answer: str, gold: str) -> float:
    one, other = _normal(answer).split(), _normal(gold).split()
    common = sum((Counter(one) & Counter(other)).values())
    if not one or not other:
        return float(one == other)
    return 2 * common / (len(one) + len(other))
