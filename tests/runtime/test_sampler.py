"""Choosing tokens: each rule against its definition, and random numbers that belong to a sequence alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from onnxpress.errors import ArtifactError, InputError
from onnxpress.runtime.sampler import Sampler, Sampling, top_logprobs

LOGITS = np.array([1.0, 3.0, 2.0, -1.0, 0.5], np.float32)


def drawn(count: int = 4000, logits: np.ndarray = LOGITS, prompt: tuple[int, ...] = (), **options: Any) -> Counter[int]:
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0, **options}), prompt, vocabulary=len(logits))
    return Counter(sampler.pick(logits) for _ in range(count))


def shares(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits.astype(np.float64) - logits.max())
    return values / values.sum()


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone() -> None:
    before = LOGITS.copy()
    assert Sampler(Sampling(), [], vocabulary=5).pick(LOGITS) == 1
    assert Sampler(Sampling(presence_penalty=5.0), [], vocabulary=5).pick(LOGITS) == 1
    np.testing.assert_array_equal(LOGITS, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    counts = drawn(temperature=temperature)
    found = np.array([counts[token] for token in range(5)]) / 4000
    np.testing.assert_allclose(found, shares(LOGITS / temperature), atol=0.025)  # 3 standard deviations


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.5}, {1}),  # the likeliest has 0.62
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.3}, {1, 2}),  # shares of the likeliest's: 0.135, 1, 0.37, 0.018, 0.08
        ({"min_p": 0.1}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.75}, {1, 2}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 5, "top_p": 0.7}, {1, 2}),
    ],
)
def test_cuts_keep_exactly_what_they_say(options: dict[str, Any], allowed: set[int]) -> None:
    assert set(drawn(**options)) == allowed


def test_a_large_vocabulary_is_cut_where_a_small_one_would_be() -> None:
    """Beyond the first candidates the sampler sorts everything; a flat distribution needs it."""
    flat = np.linspace(0.001, 0.0, 50_000).astype(np.float32)
    tokens = set(drawn(300, flat, top_p=0.5))
    assert max(tokens) < 25_100
    assert len({token // 5000 for token in tokens}) == 5
    tokens = set(drawn(300, flat, top_k=40_000, top_p=0.9))  # of the 40,000 likeliest
    assert 30_000 < max(tokens) < 36_100
    peaked = np.zeros(50_000, np.float32)
    peaked[[7, 40_000]] = 30.0
    assert set(drawn(100, peaked, top_p=0.9)) == {7, 40_000}


def test_penalties_and_bias() -> None:
    def first(prompt: tuple[int, ...] = (), **options: Any) -> int:
        return Sampler(Sampling(**options), prompt, vocabulary=5).pick(LOGITS)

    assert first(logit_bias={3: 10.0}) == 3
    assert first(logit_bias={1: -10.0}) == 2
    assert first((1,), repetition_penalty=2.0) == 2  # 3 / 2 < 2
    assert first((1,), repetition_penalty=1.4) == 1
    assert first((1,), presence_penalty=9.0) == 1  # the prompt does not count

    sampler = Sampler(Sampling(presence_penalty=1.5), [], vocabulary=5)
    assert [sampler.pick(LOGITS) for _ in range(3)] == [1, 2, 1]  # once each: 1.5, then 0.5
    sampler = Sampler(Sampling(frequency_penalty=0.6), [], vocabulary=5)
    assert [sampler.pick(LOGITS) for _ in range(4)] == [1, 1, 2, 1]  # 3, 2.4, 1.8 < 2, then 1.4 < 1.8


def test_a_seed_gives_the_same_tokens_and_samples_differ() -> None:
    def tokens(seed: int | None, sample: int = 0) -> list[int]:
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), [], vocabulary=5, sample=sample)
        return [sampler.pick(LOGITS) for _ in range(40)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(3) != tokens(3, sample=1)
    assert tokens(None) != tokens(None)


def test_logprobs_are_the_models_own() -> None:
    own, top = top_logprobs(LOGITS, 2, 2)
    assert own == pytest.approx(np.log(shares(LOGITS)[2]))
    assert [token for token, _ in top] == [1, 2]
    assert top[1][1] == pytest.approx(own)


def test_logits_that_are_no_numbers_are_refused() -> None:
    broken = LOGITS.copy()
    broken[3] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ArtifactError, match="not numbers"):
            Sampler(Sampling(temperature=temperature), [], vocabulary=5).pick(broken)


def test_a_temperature_of_next_to_nothing_is_greedy() -> None:
    logits = np.array([1.0, 5.0, 3.0, -np.inf], np.float32)
    assert {Sampler(Sampling(temperature=1e-310, seed=seed), [], vocabulary=4).pick(logits) for seed in range(5)} == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "warm"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-45},
        {"presence_penalty": -1e308},
        {"presence_penalty": float("inf")},
        {"seed": -1},
        {"seed": True},
        {"logit_bias": {3: float("nan")}},
        {"logit_bias": {3: 1e39}},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": [3]},
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))}.* it takes "):
        Sampling(**options)


def test_bias_of_a_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="the token 5; the model has 0 to 4"):
        Sampler(Sampling(logit_bias={5: 1.0}), [], vocabulary=5)
