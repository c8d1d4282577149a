"""Builds the one mask that an Attention operator adds to its scores, out of everything that masked them before.

    Where(allowed, scores, -inf),  scores + mask,  scores + bias + mask   →   (batch or 1, heads or 1, queries, keys)

A row whose every key is hidden by the lowest float32 is given equal weights by Softmax, and zeros by ONNX Runtime's
Attention, which takes just that number (and -inf) for "hidden". So it becomes -1e30 here: weight 0 beside any other
score, and equal weights among its like. -inf stays: without any key the answer is zeros, as PyTorch's
scaled_dot_product_attention gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.edits import add_constant, insert
from onnxpress.optimizers.matching import constant, dimension, produced_by, rank, scalar
from onnxpress.optimizers.shapes import Size, size

_LOWEST = float(np.finfo(np.float32).min)
_HIDDEN = -1e30


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Something that masks scores.

    value: float, added to the scores; or bool, where fill is given, and hides with `fill` where it is False (where it
    is True, if inverted). exact: add the numbers as they are, the lowest too.
    """

    value: ir.Value
    fill: float | None = None
    inverted: bool = False
    exact: bool = False


class MaskBuilder:
    """Makes masks for the attentions of one graph, each once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants: dict[tuple[str, bytes], ir.Value] = {}
        self._terms: dict[Mask, ir.Value] = {}
        self._built: dict[tuple[tuple[Mask, ...], Size, Size], ir.Value] = {}

    def build(self, masks: tuple[Mask, ...], query: ir.Value, key: ir.Value, *, before: ir.Node) -> ir.Value:
        """The sum of masks as float32 (batch or 1, heads or 1, queries, keys).

        query, key: (batch, length, width). before: where new nodes go in.
        """
        lengths = size(query, 1), size(key, 1)
        wanted = (masks, *lengths)
        if wanted not in self._built:
            total, *others = [self._term(mask, before) for mask in masks]
            for other in others:
                total = insert(
                    before,
                    "Add",
                    [total, other],
                    name=f"{total.name}_sum",
                    dtype=ir.DataType.FLOAT,
                    shape=_broadcast(total, other),
                )
            self._built[wanted] = self._expanded(total, query, key, lengths, before)
        return self._built[wanted]

    def constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """A new initializer; one for equal calls."""
        wanted = (name, array.tobytes())
        if wanted not in self._constants:
            self._constants[wanted] = add_constant(self._graph, name, array)
        return self._constants[wanted]

    def _term(self, mask: Mask, before: ir.Node) -> ir.Value:
        """One mask as float32 to be added."""
        if mask not in self._terms:
            self._terms[mask] = self._additive(mask, before)
        return self._terms[mask]

    def _additive(self, mask: Mask, before: ir.Node) -> ir.Value:
        value = mask.value
        if mask.fill is not None:
            return self._where(value, mask.fill, mask.inverted, f"{value.name}_additive", before)
        if mask.exact:
            return value
        array = constant(value)
        if array is not None:
            if not np.any(array == _LOWEST):
                return value
            numbers = np.where(array == _LOWEST, _HIDDEN, array).astype(np.float32)
            return self.constant(f"{value.name}_hidden", numbers)
        where = produced_by(value, "Where")
        if where is not None:
            condition, choices = where.inputs[0], [scalar(where.inputs[1]), scalar(where.inputs[2])]
            for inverted, (kept, fill) in ((False, choices), (True, reversed(choices))):
                if condition is not None and kept == 0.0 and fill is not None:
                    return (
                        value
                        if fill != _LOWEST
                        else self._where(condition, fill, inverted, f"{value.name}_hidden", before)
                    )
        name = str(value.name)
        lowest = self._scalar("mask_lowest", _LOWEST)
        is_lowest = insert(
            before, "Equal", [value, lowest], name=f"{name}_is_lowest", dtype=ir.DataType.BOOL, shape=value.shape
        )
        hidden = self._scalar("mask_hidden", _HIDDEN)
        return insert(
            before,
            "Where",
            [is_lowest, hidden, value],
            name=f"{name}_hidden",
            dtype=ir.DataType.FLOAT,
            shape=value.shape,
        )

    def _where(self, condition: ir.Value, fill: float, inverted: bool, name: str, before: ir.Node) -> ir.Value:
        kept = self._scalar("mask_kept", 0.0)
        hidden = (
            self._scalar("mask_hidden_infinitely", fill) if math.isinf(fill) else self._scalar("mask_hidden", _HIDDEN)
        )
        choices = [hidden, kept] if inverted else [kept, hidden]
        return insert(before, "Where", [condition, *choices], name=name, dtype=ir.DataType.FLOAT, shape=condition.shape)

    def _scalar(self, name: str, number: float) -> ir.Value:
        return self.constant(name, np.array(number, dtype=np.float32))

    def _expanded(
        self, mask: ir.Value, query: ir.Value, key: ir.Value, lengths: tuple[Size, Size], before: ir.Node
    ) -> ir.Value:
        """The mask with four axes, the last two of them in full."""
        if rank(mask) == 4 and (size(mask, 2), size(mask, 3)) == lengths:
            return mask
        name = f"{mask.name}_expanded"
        if isinstance(lengths[0], int) and isinstance(lengths[1], int):
            target = self.constant(f"{name}_shape", np.array([1, 1, *lengths], dtype=np.int64))
        else:
            ones = self.constant(f"{name}_ones", np.array([1, 1], dtype=np.int64))
            parts = [
                insert(
                    before,
                    "Shape",
                    [value],
                    {"start": 1, "end": 2},
                    name=f"{name}_{what}",
                    dtype=ir.DataType.INT64,
                    shape=[1],
                )
                for value, what in ((query, "queries"), (key, "keys"))
            ]
            target = insert(
                before, "Concat", [ones, *parts], {"axis": 0}, name=f"{name}_shape", dtype=ir.DataType.INT64, shape=[4]
            )
        ends = [dimension(query, 1), dimension(key, 1)]
        shape = [*(dimension(mask, axis) if rank(mask) == 4 else 1 for axis in range(2)), *ends]
        known = shape if rank(mask) in (2, 4) else None
        return insert(before, "Expand", [mask, target], name=name, dtype=ir.DataType.FLOAT, shape=known)


def _broadcast(first: ir.Value, second: ir.Value) -> list[int | str | None] | None:
    """The shape of a sum, as far as it is known."""
    if rank(first) is None or rank(first) != rank(second):
        return None
    pairs = [(dimension(first, axis), dimension(second, axis)) for axis in range(rank(first) or 0)]
    return [one if other == 1 or one == other else other if one == 1 else None for one, other in pairs]
