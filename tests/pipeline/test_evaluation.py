"""Metrics and scores: figures against hand-computed ones, scipy and scikit-learn."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from onnxpress import metrics
from onnxpress.budgets import budget_for
from onnxpress.errors import InputError, RecipeError
from onnxpress.evaluation import agreement, batch_dependence, score
from onnxpress.samples import Sample


def logits(*values: Any) -> list[dict[str, Any]]:
    return [{"logits": np.array(value, np.float32)} for value in values]


# Agreement with the original


def test_cosines_of_embeddings() -> None:
    reference = [{"embeddings": np.array([1.0, 0.0])}, {"embeddings": np.array([3.0, 4.0])}]
    candidate = [{"embeddings": np.array([1.0, 1.0])}, {"embeddings": np.array([6.0, 8.0])}]
    found = agreement("feature-extraction", reference, candidate)
    assert found["cosine_mean"] == pytest.approx((1 / math.sqrt(2) + 1) / 2, abs=1e-12)
    assert found["cosine_min"] == pytest.approx(1 / math.sqrt(2), abs=1e-12)
    assert found["relative_l2"] == pytest.approx(math.sqrt((0 + 1 + 9 + 16) / (1 + 25)), abs=1e-12)


def test_token_outputs_are_averaged_before_the_cosine() -> None:
    one = [{"last_hidden_state": np.array([[1.0, 0.0], [0.0, 1.0]])}]
    swapped = [{"last_hidden_state": np.array([[0.0, 1.0], [1.0, 0.0]])}]
    assert agreement("feature-extraction", one, swapped)["cosine_mean"] == pytest.approx(1, abs=1e-12)
    assert agreement("feature-extraction", [{"y": np.eye(2)}], [{"y": np.eye(2)[::-1]}])["cosine_mean"] == 0


def test_choices_and_divergence_by_hand() -> None:
    found = agreement("text-classification", logits([0, math.log(3)], [1, 0]), logits([0, 0.5], [0, 1]))
    assert found["top1_agreement"] == 0.5
    first = scipy.stats.entropy([0.25, 0.75], np.exp([0, 0.5]) / np.exp([0, 0.5]).sum())
    second = scipy.stats.entropy(np.exp([1, 0]) / np.exp([1, 0]).sum(), np.exp([0, 1]) / np.exp([0, 1]).sum())
    assert found["kl_mean"] == pytest.approx((first + second) / 2, abs=1e-7)
    assert found["max_abs"] == pytest.approx(1, abs=1e-7)


def test_tokens_count_once_each() -> None:
    reference = logits([[1, 0], [1, 0], [1, 0]], [[0, 1]])
    candidate = logits([[1, 0], [1, 0], [0, 1]], [[0, 1]])
    assert agreement("token-classification", reference, candidate)["top1_agreement"] == 0.75


def test_a_choice_that_the_original_excludes_costs_nothing() -> None:
    found = agreement("text-classification", logits([0, 0, -math.inf]), logits([0, 0, -50]))
    assert found["kl_mean"] == pytest.approx(0, abs=1e-9)


def test_spans_need_start_and_end() -> None:
    def spans(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
        return [{"start_logits": np.eye(4)[start], "end_logits": np.eye(4)[end]} for start, end in pairs]

    found = agreement("question-answering", spans((0, 1), (1, 2), (2, 3)), spans((0, 1), (1, 3), (2, 3)))
    assert found["span_agreement"] == pytest.approx(2 / 3)
    assert found["kl_mean"] > 0


def test_numbers_are_not_judged_by_their_cosine() -> None:
    gold = np.random.default_rng(0).normal(3, 0.4, 100)
    near = gold + 0.01
    column = [{"logits": np.array([value])} for value in gold]

    def kept(candidate: Any) -> dict[str, float]:
        return agreement("text-classification", column, candidate, problem_type="regression")

    assert kept([{"logits": np.array([3.0])}] * 100)["variance_kept"] == 0
    found = kept([{"logits": np.array([value])} for value in near])
    assert found["variance_kept"] == pytest.approx(sklearn.metrics.r2_score(gold, near), abs=1e-12)
    assert kept(column) == {"variance_kept": 1.0, "max_abs": 0.0}


def test_a_module_that_answers_a_constant_keeps_nothing() -> None:
    """Each number has a mean of its own, so that outputs far from zero, or of several scales, hide nothing."""
    answers = [{"y": np.array([10.0, -300.0]) + row} for row in np.random.default_rng(0).normal(size=(50, 2))]
    assert agreement("module", answers, [{"y": np.array([10.0, -300.0])}] * 50)["variance_kept"] < 0.05
    assert agreement("module", answers, answers)["variance_kept"] == 1


def test_where_the_original_answers_a_constant_its_size_is_the_measure() -> None:
    """There is no variance to keep then; float32 leaves a little noise of its own."""
    noise = np.random.default_rng(0).normal(scale=1e-7, size=50)
    original = [{"y": np.array([2.0, -3.0]) * (1 + one)} for one in noise]

    def kept(y: list[float]) -> float:
        return agreement("module", original, [{"y": np.array(y)}] * 50)["variance_kept"]

    assert kept([2.0, -3.0]) == pytest.approx(1)
    assert kept([2.02, -3.03]) == pytest.approx(0.9999)
    assert kept([3.0, -2.0]) < 0.9
    assert agreement("module", [{"y": np.zeros(2)}] * 5, [{"y": np.ones(2)}] * 5)["variance_kept"] == 0


def test_answers_of_unequal_sizes() -> None:
    """Of the original there is no mean then; a candidate that answers in another size is wrong."""
    two, three = {"y": np.arange(2.0)}, {"y": np.arange(3.0)}
    with pytest.raises(RecipeError, match="answers with 2 to 3 numbers"):
        agreement("module", [two, three], [two, three])
    assert agreement("module", [two, two], [two, three])["variance_kept"] == 0


def test_each_output_counts() -> None:
    """Boxes in pixels do not hide what became of the scores; masks are equal or not, and masked logits are the same infinity."""
    random = np.random.default_rng(0)
    answers = [{"boxes": 500 * random.random(8), "scores": random.random(4)} for _ in range(50)]
    spoiled = [{**answer, "scores": np.full(4, 0.5)} for answer in answers]
    assert agreement("module", answers, spoiled)["variance_kept"] < 0.05
    masks = [{"mask": np.array([0, 9, 9, 1])}] * 5
    assert agreement("module", masks, [{"mask": np.array([0, 9, 1, 1])}] * 5) == {"variance_kept": 0.75, "max_abs": 8}
    masked = [{"logits": np.array([number, -np.inf])} for number in (1.0, 2.0, 3.0)]
    assert agreement("module", masked, masked)["variance_kept"] == 1
    swapped = [{"logits": answer["logits"][::-1]} for answer in masked]
    assert agreement("module", masked, swapped)["variance_kept"] == 0
    for fill in (-1e9, float(np.finfo(np.float32).min)):  # which stand for minus infinity, and hide nothing
        one, other = (
            [{"logits": np.array([*row, fill], np.float32)} for row in rows] for rows in (np.eye(3), np.ones((3, 3)))
        )
        assert agreement("module", one, one)["variance_kept"] == 1
        assert agreement("module", one, other)["variance_kept"] == 0
        assert agreement("module", one, [{"logits": 0.001 * answer["logits"]} for answer in one])["variance_kept"] == 0
        half = [{"logits": np.maximum(answer["logits"], np.float32(-65504))} for answer in one]
        assert agreement("module", one, half)["variance_kept"] == 1
    assert (
        agreement("module", masked, [{"logits": np.array([number, 0.0])} for number in (1, 2, 3)])["variance_kept"] == 0
    )


@pytest.mark.parametrize(
    "mask",
    [
        lambda scores, hidden: np.where(hidden, -1000, scores),
        lambda scores, hidden: np.where(hidden, 1e9, scores),  # of distances
        lambda scores, hidden: scores + np.where(hidden, -1e4, 0),
        lambda scores, hidden: 200 * scores + np.where(hidden, -1e4, 0),
        lambda scores, hidden: np.where(hidden, np.where(np.arange(6) % 2, -1e4, -1e9), scores),
        lambda scores, hidden: scores + np.where(hidden, np.where(np.arange(6) % 2, -2e9, -1e9), 0),
        lambda scores, hidden: (
            scores - 1e4 * hidden * np.where(np.arange(240).reshape(40, 6) == hidden.argmax(), 2, 1)
        ),  # one is there once
    ],
)
def test_masks_hide_nothing(mask: Any) -> None:
    random = np.random.default_rng(0)
    scores, hidden = random.normal(0, 3, (40, 6)).astype(np.float32), random.random((40, 6)) < 0.4

    def kept(candidate: Any) -> float:
        given = [{"logits": row} for row in mask(scores, hidden).astype(np.float32)]
        return agreement("module", given, [{"logits": row} for row in candidate.astype(np.float32)])["variance_kept"]

    assert kept(mask(scores, hidden)) == 1
    assert kept(mask(scores + random.normal(0, 0.1, scores.shape), hidden)) == pytest.approx(0.999, abs=2e-3)
    assert kept(mask(random.normal(0, 3, scores.shape), hidden)) < 0.2, "other scores"
    assert kept(mask(scores, np.roll(hidden, 1, axis=0))) == 0, "other places"
    with np.errstate(over="ignore"):
        assert kept(mask(scores, hidden).astype(np.float16)) > 0.999


@pytest.mark.parametrize("mean", [101_325.0, 1013.25, -40_000.0])
def test_what_is_added_to_masks_counts_but_for_its_rounding(mean: float) -> None:
    """Half precision rounds it by as much as it is there."""
    random = np.random.default_rng(0)
    there = random.random((40, 6)) < 0.6

    def kept(scores: Any, dtype: Any) -> float:
        added = [
            {"y": ((mean + score) * row).astype(dtype).astype(np.float32)}
            for score, row in zip(scores, there, strict=True)
        ]
        return agreement("module", given, added)["variance_kept"]

    scores = random.normal(0, 1e-4 * abs(mean), (40, 6))
    given = [{"y": ((mean + score) * row).astype(np.float32)} for score, row in zip(scores, there, strict=True)]
    assert kept(scores * 1.05, np.float32) == pytest.approx(1, abs=5e-3)
    assert kept(random.normal(0.3, 1e-4 * abs(mean), (40, 6)), np.float32) < 0.2, "others"
    with np.errstate(over="ignore"):
        assert kept(scores, np.float16) == 1


@pytest.mark.parametrize("mask", [-7e4, -1e6, -1e9])
def test_bfloat16_rounds_what_is_added_to_masks(mask: float) -> None:
    random = np.random.default_rng(0)
    scores, hidden = random.normal(0, 3, (40, 6)), random.random((40, 6)) < 0.4
    given = [{"logits": row} for row in (scores + mask * hidden).astype(np.float32)]
    rounded = [{"logits": row} for row in (scores + mask * hidden).astype(ml_dtypes.bfloat16).astype(np.float32)]
    assert agreement("module", given, rounded)["variance_kept"] > 0.999


def test_boxes_do_not_hide_scores() -> None:
    random = np.random.default_rng(0)
    given = [{"y": np.append(random.uniform(520, 4000, 4), random.random(2)).astype(np.float32)} for _ in range(50)]
    other = [{"y": np.append(answer["y"][:4], [0.5, 0.5])} for answer in given]
    assert agreement("module", given, other)["variance_kept"] < 0.1


def test_large_quantities_do_not_hide_small_ones() -> None:
    """Masks of two sizes, of which one is always there: what is added to it varies as a quantity does."""
    random = np.random.default_rng(0)
    scores, hidden = random.normal(0, 3, (40, 6)).astype(np.float32), random.random((40, 6)) < 0.4

    def answers(scores: Any) -> Any:
        return [{"logits": row} for row in (scores - 1e4 * hidden - np.array([1e9, 0, 0, 0, 0, 0])).astype(np.float32)]

    assert agreement("module", answers(scores), answers(1.01 * scores))["variance_kept"] > 0.99
    assert agreement("module", answers(scores), answers(random.normal(0, 3, (40, 6))))["variance_kept"] < 0.2


@pytest.mark.parametrize("mean", [-40_000.0, 40_000.0, -1e6])
def test_quantities_that_are_always_large_are_no_masks(mean: float) -> None:
    energies = np.random.default_rng(0).normal(mean, 5, (50, 1)).astype(np.float32)
    beside = [{"y": np.array([1.0, energy[0]], np.float32)} for energy in energies]
    given = [{"y": energy} for energy in energies]
    assert agreement("module", given, [{"y": np.array([mean])}] * 50)["variance_kept"] < 0.1
    assert agreement("module", beside, [{"y": np.array([1.0, mean])}] * 50)["variance_kept"] < 0.1


def test_large_numbers_are_no_masks() -> None:
    """Of quantities as large as masks the lowest may be there twice; they lie among others of their size."""
    rows = [[-2e6, -1e5, 3.0], [-2e6, 9e5, 4.0], [-3e5, 2e6, 5.0]]
    one = [{"y": np.array(row, np.float32)} for row in rows]
    lower = [{"y": np.where(answer["y"] < -7e4, np.float32(-7e4), answer["y"])} for answer in one]
    assert agreement("module", one, one)["variance_kept"] == 1
    assert agreement("module", one, lower)["variance_kept"] < 0.9


def test_several_labels_are_compared_label_by_label() -> None:
    one, other = logits([5, 1, -1]), logits([4, -1, -2])
    assert agreement("text-classification", one, other)["top1_agreement"] == 1
    found = agreement("text-classification", one, other, problem_type="multi_label_classification")
    assert found == {"top1_agreement": pytest.approx(2 / 3)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_the_worst_value(bad: float) -> None:
    good, broken = logits([1, 2]), logits([bad, 2])
    assert agreement("feature-extraction", good, broken) == {
        "cosine_mean": -1.0,
        "cosine_min": -1.0,
        "relative_l2": math.inf,
    }
    worst = {"top1_agreement": 0.0, "kl_mean": math.inf, "max_abs": math.inf}
    assert agreement("text-classification", good, broken) == worst
    found = agreement("text-classification", logits([1]), logits([bad]), problem_type="regression")
    assert found["variance_kept"] == 0
    assert metrics.sign_metrics(good, broken) == {"top1_agreement": 0.5}
    spans = [{"start_logits": np.array([0.0, 1.0]), "end_logits": np.array([0.0, 1.0])}]
    broken_spans = [{"start_logits": np.array([bad, 1.0]), "end_logits": np.array([0.0, 1.0])}]
    assert agreement("question-answering", spans, broken_spans)["span_agreement"] == 0
    assert metrics.regression_scores([bad, 1.0], [0.0, 1.0]) == {"spearman": -100.0, "pearson": -100.0}


def test_batch_dependence_is_the_mean_cosine() -> None:
    alone = [{"embeddings": np.array([1.0, 0.0])}, {"embeddings": np.array([0.0, 2.0])}]
    batched = [{"embeddings": np.array([1.0, 0.0])}, {"embeddings": np.array([2.0, 2.0])}]
    assert batch_dependence(alone, batched) == pytest.approx((1 + 1 / math.sqrt(2)) / 2, abs=1e-12)
    numbers, others = (
        [{"y": np.array([value])} for value in (1.0, 3.0)],
        [{"y": np.array([value])} for value in (2.0, 3.0)],
    )
    assert batch_dependence(numbers, others) == 1  # which says nothing of single numbers
    assert batch_dependence(numbers, others, numbers=True) == pytest.approx(0.5)


# Scores with labels


class Runner:
    """Gives answers that are written down."""

    def __init__(self, answers: Any, **options: Any) -> None:
        self.answers = answers
        self.options = options

    def embed(self, texts: list[str]) -> Any:
        return np.array([self.answers[text] for text in texts], np.float32)

    def predict(self, samples: list[Any]) -> list[Any]:
        assert len(samples) == len(self.answers)
        return list(self.answers)


def test_similarity_is_spearman_with_ties() -> None:
    random = np.random.default_rng(1)
    vectors = {f"text {index}": random.normal(size=8) for index in range(40)}
    gold = random.integers(0, 4, 20).astype(float)  # many ties
    samples = [Sample(text=f"text {2 * i}", text_pair=f"text {2 * i + 1}", label=gold[i]) for i in range(20)]
    cosines = [
        1 - scipy.spatial.distance.cosine(vectors[sample.text], vectors[str(sample.text_pair)]) for sample in samples
    ]
    ranks, other = scipy.stats.rankdata(cosines), scipy.stats.rankdata(gold)  # ties share their mean rank
    found = score("feature-extraction", Runner(vectors), samples)
    assert found["spearman"] == pytest.approx(100 * np.corrcoef(ranks, other)[0, 1], abs=1e-4)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(cosines, gold)[0, 1], abs=1e-4)
    with pytest.raises(InputError, match="All samples that judge have the same score"):
        score("feature-extraction", Runner(vectors), [dataclasses.replace(sample, label=1.0) for sample in samples])


def test_predictions_that_are_all_the_same_correlate_with_nothing() -> None:
    assert metrics.regression_scores([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == {"spearman": 0.0, "pearson": 0.0}


def test_labels_by_name_and_by_number() -> None:
    predicted, gold = ["a", "b", "b", "c", "a"], ["a", "b", "c", "2", 1]
    names = ["a", "b", "c", "c", "b"]
    runner = Runner([{"label": label, "score": 1.0} for label in predicted], labels=["a", "b", "c"],
                    problem_type="single_label_classification")  # fmt: skip
    found = score("text-classification", runner, [Sample(text="x", label=label) for label in gold])
    assert found["accuracy"] == pytest.approx(60)
    assert found["f1_macro"] == pytest.approx(100 * sklearn.metrics.f1_score(names, predicted, average="macro"))
    with pytest.raises(InputError, match=r"does not know the labels '3', 'd'; it knows: a, b, c\."):
        score("text-classification", runner, [Sample(text="x", label=label) for label in ("d", "a", 3, "b", "d")])


def test_numbers_that_are_names_are_no_places() -> None:
    """A model of the labels 1, 2 and 3 knows no 0."""
    runner = Runner(
        [{"label": "1", "score": 1.0}] * 2, labels=["1", "2", "3"], problem_type="single_label_classification"
    )
    assert (
        score("text-classification", runner, [Sample(text="x", label=1), Sample(text="x", label="2")])["accuracy"] == 50
    )
    with pytest.raises(InputError, match=r"does not know the labels '0'; it knows: 1, 2, 3\."):
        score("text-classification", runner, [Sample(text="x", label=0), Sample(text="x", label=1)])


def test_a_prediction_that_is_not_finite_is_wrong() -> None:
    runner = Runner(
        [{"label": "a", "score": math.nan}] * 2, labels=["a", "b"], problem_type="single_label_classification"
    )
    assert score("text-classification", runner, [Sample(text="x", label="a")] * 2)["accuracy"] == 0
    runner = Runner([[{"answer": "Paris", "score": math.nan}]])
    assert score("question-answering", runner, [Sample(text="q", text_pair="Paris", label=["Paris"])])["f1"] == 0


def test_regression_is_scored_by_correlation() -> None:
    runner = Runner([{"label": "score", "score": value} for value in (1.0, 2.0, 4.0)], problem_type="regression")
    found = score("text-classification", runner, [Sample(text="x", label=label) for label in ("1", "3", "2")])
    assert found["spearman"] == pytest.approx(50)
    with pytest.raises(RecipeError, match="'good' is no finite number"):
        score("text-classification", runner, [Sample(text="x", label="good")] * 3)


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["O", "B-PER", "I-PER", "O"], {(3, 11, "PER")}),
        (["B-PER", "B-PER", "O", "O"], {(0, 2, "PER"), (3, 6, "PER")}),
        (["O", "I-LOC", "I-LOC", "I-LOC"], {(3, 14, "LOC")}),
        (["B-PER", "I-LOC", "O", "O"], {(0, 2, "PER"), (3, 6, "LOC")}),
        (["O", "O", "O", "O"], set()),
    ],
)
def test_gold_entities(tags: list[str], entities: set[Any]) -> None:
    assert metrics.gold_entities(["Dr", "Ada", "Byro", "in"], tags) == entities


def test_entities_need_the_exact_span_and_type() -> None:
    def entity(start: int, end: int, kind: str) -> dict[str, Any]:
        return {"entity": kind, "start": start, "end": end, "score": 0.9}

    samples = [
        Sample(text="Ada Byron in Rome", label=(["Ada", "Byron", "in", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"]))
    ]
    labels = ["O", "B-PER", "LOC"]
    right = [entity(0, 9, "PER"), entity(13, 17, "LOC")]
    assert score("token-classification", Runner([right], labels=labels), samples)["entity_f1"] == pytest.approx(100)
    half = [entity(0, 9, "PER"), entity(13, 17, "ORG"), entity(10, 12, "LOC")]
    found = score("token-classification", Runner([half], labels=labels), samples)
    assert found["precision"] == pytest.approx(100 / 3)
    assert found["recall"] == pytest.approx(50)
    assert found["entity_f1"] == pytest.approx(40)
    assert score("token-classification", Runner([[]], labels=labels), samples)["entity_f1"] == 0


def test_tags_that_the_model_does_not_know_are_named_and_score_nothing() -> None:
    samples = [Sample(text="Ada in Rome", label=(["Ada", "in", "Rome"], ["B-PER", "O", "I-LOC"]))]
    runner = Runner(
        [[]], labels=["O", "B-PERSON", "I-PERSON", "B-LOC"]
    )  # B-LOC knows of places, so I-LOC is understood
    with pytest.raises(InputError, match=r"does not know the labels 'B-PER'; it knows: O, B-PERSON, I-PERSON, B-LOC\."):
        score("token-classification", runner, samples)


def test_sets_of_labels_are_lists_of_known_ones() -> None:
    runner = Runner([{"scores": {"a": 0.9, "b": 0.2}}], labels=["a", "b"], problem_type="multi_label_classification")
    assert score("text-classification", runner, [Sample(text="x", label=["a"])])["f1"] == pytest.approx(100)
    for label, message in (("a", "a list of labels is expected"), (["a", "c"], "does not know the labels 'c'")):
        with pytest.raises(InputError, match=message):
            score("text-classification", runner, [Sample(text="x", label=label)])


def test_answers_as_squad_scores_them() -> None:
    found = metrics.answer_scores(
        ["The  Eiffel Tower!", "in the year 1871", "", "red blue blue"],
        [["an  eiffel tower", "a tower"], ["1871"], ["Rome"], ["a blue red red"]],
    )
    assert found["exact_match"] == pytest.approx(25)
    # 1; precision 1/3 and recall 1; nothing; two common words of three each
    assert found["f1"] == pytest.approx(100 * (1 + 0.5 + 0 + 2 / 3) / 4)


def test_masks_have_no_labels() -> None:
    with pytest.raises(RecipeError, match="do not go with the task fill-mask"):
        score("fill-mask", Runner([1]), [Sample(text="x", label="y")])
    with pytest.raises(RecipeError, match=r"do not go with the task text-generation; .* text-classification"):
        budget_for("text-generation", None, labelled=True)
