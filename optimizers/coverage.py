"""What a fusion tells its user: how many of the places that look right were fused, and why the nearest was not.

fused 5 of 6 Softmax as Attention
nearest miss: node_softmax_3: the scores are used elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A place that a fusion left alone. steps: how many of its checks passed, so that the nearest can be told."""

    node: ir.Node
    reason: str
    steps: int = 0


def coverage(fused: int, misses: Sequence[Miss], *, what: str, into: str) -> tuple[str, ...]:
    """Notes for a `PassResult`; none where nothing looked right."""
    if not fused and not misses:
        return ()
    notes = [f"fused {fused} of {fused + len(misses)} {what} as {into}"]
    if misses:
        nearest = max(misses, key=lambda miss: miss.steps)
        notes.append(f"nearest miss: {nearest.node.name or nearest.node.outputs[0].name}: {nearest.reason}")
    return tuple(notes)
