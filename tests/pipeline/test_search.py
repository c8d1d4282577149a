"""The search: the places that cost most stay, and no more of them than needed."""

from __future__ import annotations

import dataclasses

from onnxpress.gate import Judgement
from onnxpress.search import search

PLACES = [f"layer{index}" for index in range(10)]
COSTS = dict.fromkeys(PLACES, 0.001) | {"layer3": 0.05, "layer7": 0.03}


def judge(kept: frozenset[str], *, limit: float) -> Judgement:
    value = 1 - sum(cost for name, cost in COSTS.items() if name not in kept)
    return Judgement(metrics={}, metric="cosine", value=value, batch_cosine=1, margin=value - limit)


def fewest(found: list[tuple[frozenset[str], Judgement]]) -> frozenset[str]:
    return next(kept for kept, judgement in found if judgement.holds)


def test_the_costliest_places_are_kept_and_no_more() -> None:
    assert fewest(search(PLACES, lambda kept: judge(kept, limit=0.95))) == {"layer3"}
    found = search(PLACES, lambda kept: judge(kept, limit=0.98))
    assert fewest(found) == {"layer3", "layer7"}
    assert [len(kept) for kept, _ in found] == sorted(len(kept) for kept, _ in found)


def test_where_limits_are_as_near_the_value_tells() -> None:
    def coarse(kept: frozenset[str]) -> Judgement:
        found = judge(kept, limit=0.95)
        return dataclasses.replace(found, margin=0.0 if found.holds or len(kept) > 8 else -1.0)

    assert fewest(search(PLACES, coarse)) == {"layer3"}


def test_no_more_than_the_share_that_may_stay_is_tried() -> None:
    found = search(PLACES, lambda kept: judge(kept, limit=0.9965), share=0.5)
    assert not any(judgement.holds for _, judgement in found)
    closest = found[-1][0]
    assert len(closest) == 5
    assert closest > {"layer3", "layer7"}
    assert len(fewest(search(PLACES, lambda kept: judge(kept, limit=0.9965)))) == 7


def test_what_cannot_be_split_is_not_searched() -> None:
    assert search(["layer3"], lambda kept: judge(kept, limit=0.98)) == []
    assert search(["layer3", "layer7"], lambda kept: judge(kept, limit=0.98), share=0.4) == []


def test_what_is_visited_is_what_was_tried_as_a_whole() -> None:
    visited: list[frozenset[str]] = []
    found = search(PLACES, lambda kept: judge(kept, limit=0.98), visit=visited.append)
    assert {kept for kept, _ in found} == set(visited)


def test_many_places_are_tried_in_groups() -> None:
    many = [f"layer{index}" for index in range(100)]
    tried: list[frozenset[str]] = []

    def count(kept: frozenset[str]) -> Judgement:
        tried.append(kept)
        good = "layer42" in kept
        return Judgement(metrics={}, metric="m", value=0, batch_cosine=1, margin=0 if good else -1)

    kept = fewest(search(many, count, share=0.5))
    assert "layer42" in kept
    assert len(kept) == 4
    assert len(tried) < 35
