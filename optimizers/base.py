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


class Stream(Protocol):
    """Walks a graph with calibration inputs while a pass changes what is ahead; see onnxpress.calibration."""

    def second_moments(self, value: ir.Value) -> npt.NDArray[np.float32]:
        """Mean of x xᵀ over all vectors x along the last axis of a value, float32 (width, width)."""
        ...

    def divide(self, value: ir.Value, by: npt.NDArray[np.float32]) -> None:
        """Say that `value`, whose second moments were asked for, is now divided by `by` along its last axis."""
        ...


Observe = Callable[[Graph, Sequence[str]], Mapping[str, ChannelRange]]


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass may ask for.

    target: facts about the machine the graph is for. observe: runs the calibration inputs through a graph and
    returns the ranges of the named values; stream: begins to walk a graph with them (both None where no calibration data is at
    hand). keep: names of nodes that stay in floating point; lossy passes leave them alone. progress: says what a long pass is at.
    """

    target: Target
    observe: Observe | None = None
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
