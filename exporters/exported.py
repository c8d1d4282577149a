"""What an export gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Json, Runnable


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported model.

    reference: the original, answering the same signature. options: the manifest's (labels, max_length…).
    example: for plain modules, the inputs that it was exported with; sizes: of their axes, others to compare with the original. files: to copy into the artifact: tokenizer.json
    and what belongs to it for text tasks, the model's licence. notes: for the ledger.
    """

    name: str
    graph: Graph
    reference: Runnable
    options: Mapping[str, Json]
    example: Arrays = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
