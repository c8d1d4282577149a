"""The search: the places that cost most stay, and no more of them than needed."""

from __future__ import annotations

from onnxpress.gate import Judgement
from onnxpress.search import search

PLACES = [f"layer{index}" for index in range(10)]
COSTS = dict.fromkeys(PLACES, 0.001) | {"layer3": 0.05, "layer7": 0.03}


def judge(kept: frozenset[str], *, limit: float) -> Judgement:
    value = 1 - sum(cost for name, cost in COSTS.items() if name not in kept)
    return Judgement(
        metrics={}, metric="cosine", value=value, batch_cosine=1, holds=value >= limit, margin=value - limit
    )


def test_the_costliest_places_are_kept_and_no_more() -> None:
    found = search(PLACES, lambda kept: judge(kept, limit=0.95))
    assert found is not None
    assert found.kept == {"layer3"}
    found = search(PLACES, lambda kept: judge(kept, limit=0.98))
    assert found is not None
    assert found.kept == {"layer3", "layer7"}
    assert found.judgement.holds
    assert [len(kept) for kept, _ in found.tried] == sorted(len(kept) for kept, _ in found.tried)


def test_gives_up_at_the_share_that_may_stay_and_says_what_came_closest() -> None:
    found = search(PLACES, lambda kept: judge(kept, limit=0.9965), share=0.5)
    assert found is not None
    assert not found.judgement.holds
    assert len(found.kept) == 5
    assert found.kept > {"layer3", "layer7"}
    found = search(PLACES, lambda kept: judge(kept, limit=0.9965))
    assert found is not None
    assert (found.judgement.holds, len(found.kept)) == (True, 7)


def test_what_cannot_be_split_is_not_searched() -> None:
    assert search(["layer3"], lambda kept: judge(kept, limit=0.98)) is None
    assert search(["layer3", "layer7"], lambda kept: judge(kept, limit=0.98), share=0.4) is None


def test_what_is_visited_is_what_was_tried_as_a_whole() -> None:
    visited: list[frozenset[str]] = []
    found = search(PLACES, lambda kept: judge(kept, limit=0.98), visit=visited.append)
    assert found is not None
    assert {kept for kept, _ in found.tried} == set(visited)


def test_many_places_are_tried_in_groups() -> None:
    many = [f"layer{index}" for index in range(100)]
    tried: list[frozenset[str]] = []

    def count(kept: frozenset[str]) -> Judgement:
        tried.append(kept)
        good = "layer42" in kept
        return Judgement(metrics={}, metric="m", value=0, batch_cosine=1, holds=good, margin=0 if good else -1)

    found = search(many, count, share=0.5)
    assert found is not None
    assert "layer42" in found.kept
    assert len(found.kept) == 4
    assert len(tried) < 35
