"""What structured pruning did to a graph, for others to follow: which constants changed, which heads and layers are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from onnxpress.graph import Graph


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one attention operator: `groups` key-value heads, each with `queries` query heads of `size` channels."""

    groups: int
    queries: int
    size: int
    value_size: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """A constant before and after, as the graph holds it. kept: of a weight, which positions stay, by the axes that lost some."""

    before: npt.NDArray[np.generic]
    after: npt.NDArray[np.generic]
    kept: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LostHeads:
    """One attention that lost heads: the constants of its projections by name, its heads before, its key-value heads now."""

    constants: frozenset[str]
    before: Heads
    groups: int


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A smaller graph, and what was done, for others to follow.

    changes: constants that are others now, by name; heads: one for each attention that lost some; layers: the names that each lost
    layer read; kept_layers: numbers of the layers that stay.
    """

    graph: Graph
    changes: Mapping[str, Change]
    heads: tuple[LostHeads, ...]
    layers: tuple[frozenset[str], ...]
    kept_layers: tuple[int, ...]
    notes: tuple[str, ...]
