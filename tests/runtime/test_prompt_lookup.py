"""Guesses from the text so far: the latest place, the longest match, and when to stop guessing."""

from __future__ import annotations

from onnxpress.runtime.prompt_lookup import PromptLookup


def test_the_longest_match_and_its_latest_place() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 3, 4, 6, 2, 3, 4], most=2)
    assert lookup.guess() == [5, 9]  # after 2 3 4, though 3 4 was followed by 6 more lately
    lookup.push(6)
    assert lookup.guess() == [2, 3]


def test_nothing_where_the_end_is_new() -> None:
    assert PromptLookup([1, 2, 3, 4], most=4).guess() == []
    assert PromptLookup([7], most=4).guess() == []
    assert PromptLookup([], most=4).guess() == []


def test_a_text_that_ends_in_a_repetition() -> None:
    assert PromptLookup([5, 5, 5], most=4).guess() == [5, 5, 5, 5]
    assert PromptLookup([9, 1, 2, 1, 2], most=5).guess() == [1, 2, 1, 2, 1]


def test_guesses_pause_where_they_do_not_come_true() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2], most=8)
    for _ in range(4):
        assert lookup.guess() == [3, 1, 2, 3, 1, 2, 3, 1]
        lookup.judge(8, 3)
    assert lookup.guess() == []
    for _ in range(32):
        lookup.push(1)
        lookup.push(2)
    assert lookup.guess() != []


def test_guesses_go_on_where_they_come_true() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2], most=8)
    for _ in range(40):
        lookup.judge(8, 5)
    assert lookup.guess() == [3, 1, 2, 3, 1, 2, 3, 1]
