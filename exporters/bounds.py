"""Which integers a graph's inputs may hold, as far as the graph tells: the rows of the tables that they look up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_SAME_NUMBERS = frozenset({"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})


def index_bounds(value: ir.Value) -> tuple[int, int] | None:
    """(0, last row) of the smallest table that an input is an index into; None where it is no index."""
    if value.dtype is None or not np.issubdtype(value.dtype.numpy(), np.integer):
        return None
    rows: list[int] = []
    waiting = [value]
    while waiting:
        for use in waiting.pop().uses():
            node = use.node
            if node.domain != "":
                continue
            if node.op_type == "Gather" and use.idx == 1:
                rows += _rows(node)
            elif node.op_type in _SAME_NUMBERS and use.idx == 0:
                waiting.append(node.outputs[0])
    return (0, min(rows) - 1) if rows else None


def _rows(gather: ir.Node) -> list[int]:
    table, axis = gather.inputs[0], gather.attributes.get("axis")
    if table is None or table.shape is None:
        return []
    size = table.shape[0 if axis is None else axis.as_int()]
    return [size] if isinstance(size, int) else []
