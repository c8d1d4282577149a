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


def test_growth_beyond_need_takes_no_rows() -> None:
    """Three rows of 1,000 tokens fit; half as much room again would leave two."""
    cache = KeyValueCache(SPECS, context=5000, budget=3 * 1024 * TOKEN)
    cache.reserve(3, 700)
    filled(cache, 2, [3])
    cache.reserve(1, 1000)
    assert (cache.rows, cache.capacity) == (3, 1024)
    assert holds(cache, 2, [3])


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


def test_states_are_copied_whole_and_never_cut() -> None:
    state = TensorSpec(name="past_states.0.recurrent", dtype="float32", shape=("batch", 2, 5))
    cache = KeyValueCache((*SPECS, state), context=1000, budget=256 * TOKEN * 2 + 2 * 40)
    assert (cache.keeps_states, cache.bytes_per_token, cache.needed(2, 1)) == (True, TOKEN, 2 * (256 * TOKEN + 40))
    cache.reserve(2, 10)
    array = cache.arrays[state.name]
    cache.tokens[0], array[0] = [1, 2, 3], 7
    assert [cache.usable(0, tokens) for tokens in ([1, 2, 3, 4], [1, 2, 4], [])] == [3, 0, 0]
    cache.copy(0, 1, 2)  # half of what is mixed in it cannot be had
    assert (cache.tokens[1], array[1].any()) == ([], False)
    cache.copy(0, 1, 3)
    assert (cache.tokens[1], (array[1] == 7).all()) == ([1, 2, 3], True)
    array[1] = 8
    cache.swap(0, 1)
    assert (array[0, 0, 0], array[1, 0, 0]) == (8, 7)
    cache.truncate(0, 3)
    assert (cache.tokens[0], array[0, 0, 0]) == ([1, 2, 3], 8)
    cache.truncate(0, 2)
    assert (cache.tokens[0], array[0].any()) == ([], False)
    with pytest.raises(InputError, match="and the budget is"):
        cache.reserve(3, 10)


@pytest.mark.parametrize(
    ("one", "other", "length"), [([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1, 2], [1, 2, 3], 2), ([5], [6], 0)]
)
def test_common_prefix(one: list[int], other: list[int], length: int) -> None:
    assert common_prefix(one, other) == length
