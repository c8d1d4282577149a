"""The search for the places of a lossy plan that have to stay: as few of them as keep the budget.

It follows what was measured: each group of neighbouring places is changed alone, all others staying (its sensitivity);
those that cost most stay first, and the smallest number of them that keeps the budget is found by bisection. What it
does not see is how places act on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxpress.gate import Judgement

_GROUPS = 32  # sensitivity is measured for at most so many groups of neighbouring places


def search(
    places: Sequence[str],
    judge: Callable[[frozenset[str]], Judgement],
    progress: Callable[[str], None] = lambda _: None,
    *,
    share: float = 1.0,
    visit: Callable[[frozenset[str]], None] = lambda _: None,
) -> list[tuple[frozenset[str], Judgement]]:
    """The plans of the bisection for the fewest places to keep, by the places that stay, fewest first, each with its judgement.

    None are tried where nothing can be kept and something changed.

    places: the names of all places that the plan changes, in order. judge: judges the plan when the given places stay.
    share: at most this share of the groups may stay. visit: is called with each plan of the bisection, right after its
    judgement.
    """
    size = -(-len(places) // _GROUPS)
    groups = [tuple(places[start : start + size]) for start in range(0, len(places), size)]
    low, high = 1, min(len(groups) - 1, int(len(groups) * share))
    if high < low:
        return []
    costs: dict[tuple[str, ...], tuple[float, float]] = {}  # shares of few equal choices are often the same
    for index, group in enumerate(groups, 1):
        progress(f"sensitivity {index} of {len(groups)}")
        alone = judge(frozenset(places) - frozenset(group))
        costs[group] = alone.margin, alone.value
    ranked = sorted(groups, key=costs.__getitem__)
    tried: list[tuple[frozenset[str], Judgement]] = []
    while low <= high:
        middle = (low + high) // 2
        kept = frozenset(name for group in ranked[:middle] for name in group)
        progress(f"{len(kept)} of {len(places)} places stay")
        judgement = judge(kept)
        visit(kept)
        tried.append((kept, judgement))
        if judgement.holds:
            high = middle - 1
        else:
            low = middle + 1
    return sorted(tried, key=lambda item: len(item[0]))
