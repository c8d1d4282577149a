"""What a pass is: one named change of a graph, lossless or lossy, with a frozen config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.targets import Target


@dataclass(frozen=True, kw_only=True)
class ChannelRange:
    """Observed minimum and maximum of one tensor, for each position of its last axis (float32, shape (channels,))."""

    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """All numbers that one tensor held on the calibration inputs, whatever its shape.

    low, high: the exact extremes. limit and counts: how many numbers fell into each of the equal bins that divide [-limit, limit]
    (int64, (bins,)); no bins where counts were not asked for.
    """

    low: float
    high: float
    limit: float
    counts: npt.NDArray[np.int64]


class Stream(Protocol):
    """Walks a graph with calibration inputs while a pass changes what is ahead; see onnxpress.calibration."""

    def second_moments(self, value: ir.Value) -> npt.NDArray[np.float32]:
        """Mean of x xᵀ over all vectors x along the last axis of a value, float32 (width, width)."""
        ...

    def divide(self, value: ir.Value, by: npt.NDArray[np.float32]) -> None:
        """Say that `value`, whose second moments were asked for, is now divided by `by` along its last axis."""
        ...

    def means(self, value: ir.Value, axis: int) -> npt.NDArray[np.float64]:
        """Mean of a value at each position of an axis, over everything else, float64 (channels,)."""
        ...

    def add(self, value: ir.Value, by: npt.NDArray[np.float32], axis: int) -> None:
        """Say that to `value`, whose means were asked for, `by` (channels,) is now added along an axis."""
        ...


class Distributions(Protocol):
    """Runs the calibration inputs through a graph and gives the distribution of each named value."""

    def __call__(self, graph: Graph, names: Sequence[str], *, counted: bool) -> Mapping[str, Distribution]:
        """counted: whether histograms are wanted, or the extremes alone, which are cheaper."""
        ...


Observe = Callable[[Graph, Sequence[str]], Mapping[str, ChannelRange]]


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass may ask for.

    target: facts about the machine the graph is for. observe: runs the calibration inputs through a graph and
    returns the ranges of the named values, for each channel of the last axis; distributions: of whole values of any shape; stream:
    begins to walk a graph with them (all None where no calibration data is at hand). keep: names of nodes that stay in floating point; lossy passes leave them alone. progress: says what a long pass is at.
    """

    target: Target
    observe: Observe | None = None
    distributions: Distributions | None = None
    stream: Callable[[Graph], Stream] | None = None
    keep: frozenset[str] = frozenset()
    progress: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """The graph after a pass, how many places changed, remarks for the ledger, and the changed nodes' names.

    touched lists, for lossy passes, the names by which each changed place can be put in `PassContext.keep`; kept_as says what
    becomes of places that are put there.
    """

    graph: Graph
    changes: int
    notes: tuple[str, ...] = ()
    touched: tuple[str, ...] = field(default=())
    kept_as: str = "in float"


class Pass(Protocol):
    """A change of a graph. Its config is the fields of the (frozen, keyword-only) dataclass that implements it."""

    name: ClassVar[str]
    lossless: ClassVar[bool]

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Change a graph. May change `graph` in place: the caller keeps a clone when it wants the old one back."""
        ...
