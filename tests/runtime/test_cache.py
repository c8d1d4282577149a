"""Rows of keys and values: growth within a budget, rows that change places, and nothing lost on the way."""

from __future__ import annotations

import numpy as np
import pytest

from onnxpress.errors import InputError
from onnxpress.manifest import TensorSpec
from onnxpress.runtime.cache import KeyValueCache, common_prefix

SPECS = tuple(
    TensorSpec(name=f"past_key_values.0.{kind}", dtype="float32", shape=("batch", 2, "capacity", 3))
    for kind in ("key", "value")
)
TOKEN = 2 * 2 * 3 * 4  # bytes


def filled(cache: KeyValueCache, row: int, tokens: list[int]) -> None:
    cache.tokens[row] = tokens
    for array in cache.arrays.values():
        array[row, :, : len(tokens)] = np.array(tokens)[None, :, None]


def holds(cache: KeyValueCache, row: int, tokens: list[int]) -> bool:
    expected = np.broadcast_to(np.array(tokens)[None, :, None], (2, len(tokens), 3))
    return cache.tokens[row] == tokens and all(
        np.array_equal(array[row, :, : len(tokens)], expected) for array in cache.arrays.values()
    )


def test_growing_keeps_what_is_there() -> None:
    cache = KeyValueCache(SPECS, context=1000, budget=10**6)
    assert cache.bytes_per_token == TOKEN
    cache.reserve(2, 3)
    filled(cache, 1, [5, 6, 7])
    cache.reserve(3, 400)
    assert (cache.rows, cache.capacity) == (3, 512)
    assert holds(cache, 1, [5, 6, 7])
    cache.reserve(1, 900)
    assert cache.capacity == 1000  # the context, not a multiple of the growth
    assert holds(cache, 1, [5, 6, 7])


def test_rows_that_nobody_asked_for_go_when_the_budget_is_short() -> None:
    cache = KeyValueCache(SPECS, context=1000, budget=768 * TOKEN)
    cache.reserve(3, 100)
    filled(cache, 0, [1])
    filled(cache, 2, [3])
    cache.reserve(1, 500)
    assert (cache.rows, cache.capacity) == (1, 512)
    assert holds(cache, 0, [1])


def test_many_short_rows_after_a_long_one_stay_within_the_budget() -> None:
    cache = KeyValueCache(SPECS, context=5000, budget=4096 * TOKEN)
    cache.reserve(1, 4096)
    filled(cache, 0, [*range(300)])
    cache.reserve(16, 256)
    assert sum(array.nbytes for array in cache.arrays.values()) <= cache.budget
    assert holds(cache, 0, [*range(256)])


def test_over_the_budget_is_refused_and_changes_nothing() -> None:
    cache = KeyValueCache(SPECS, context=1000, budget=600 * TOKEN)
    cache.reserve(2, 10)
    filled(cache, 0, [4, 5])
    with pytest.raises(InputError, match=r"2 sequences of 400 tokens need .* and the budget is"):
        cache.reserve(2, 400)
    assert holds(cache, 0, [4, 5])


def test_rows_change_places_and_are_copied() -> None:
    cache = KeyValueCache(SPECS, context=100, budget=10**6)
    cache.reserve(3, 10)
    filled(cache, 0, [1, 2, 3])
    filled(cache, 2, [9])
    cache.swap(0, 2)
    assert holds(cache, 0, [9])
    assert holds(cache, 2, [1, 2, 3])
    cache.copy(2, 1, 2)
    assert holds(cache, 1, [1, 2])
    cache.clear()
    assert cache.tokens == [[], [], []]


@pytest.mark.parametrize(
    ("one", "other", "length"), [([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1, 2], [1, 2, 3], 2), ([5], [6], 0)]
)
def test_common_prefix(one: list[int], other: list[int], length: int) -> None:
    assert common_prefix(one, other) == length
