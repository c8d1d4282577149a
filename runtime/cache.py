"""The keys and values that a language model has computed: one buffer a layer and kind, one row a sequence.

Holds which tokens each row's numbers belong to, and grows within a budget. Decides nothing about who gets a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import TensorSpec
from onnxpress.runtime.device import HostMemory, Memory

_GROWTH = 256  # tokens by which capacity grows at least
PAST = "past_key_values."  # how the names of past inputs begin


class KeyValueCache:
    """Rows of keys and values.

    specs: the graph's past inputs, (batch, kv_heads, capacity, head_dim) each. context: the most tokens of a row. budget: the
    most bytes of all rows together. memory: the computer's where None. tokens: of each row, the token ids whose keys and values it
    holds, in order.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, context: int, budget: int, memory: Memory | None = None) -> None:
        self.specs = tuple(spec for spec in specs if spec.name.startswith(PAST))
        self.context = context
        self.budget = budget
        self.tokens: list[list[int]] = []
        self.capacity = 0
        self.memory = memory or HostMemory()
        self.arrays: dict[str, Any] = {
            spec.name: self.memory.zeros(self._shape(spec, 0, 0), spec.dtype) for spec in self.specs
        }

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one row, all layers together."""
        return sum(int(np.prod(self._shape(spec, 1, 1))) * np.dtype(spec.dtype).itemsize for spec in self.specs)

    def fits(self, rows: int, capacity: int) -> bool:
        """Whether so many rows of so many tokens are within the budget."""
        return self.needed(rows, capacity) <= self.budget

    def needed(self, rows: int, capacity: int) -> int:
        """Bytes of so many rows of so many tokens, with the room that they are given beyond."""
        return rows * self._rounded(capacity) * self.bytes_per_token

    def reserve(self, rows: int, capacity: int) -> None:
        """Have at least so many rows of at least so many tokens; rows that then exceed the budget go, the last first.

        Raises InputError where the budget does not allow it.
        """
        if rows <= self.rows and capacity <= self.capacity:
            return
        if not self.fits(rows, capacity):
            raise InputError(
                f"{rows} sequences of {capacity} tokens need {self.needed(rows, capacity) / 2**20:.1f} MiB for keys "
                f"and values, and the budget is {self.budget / 2**20:.1f} MiB: allow more with cache_bytes, or ask for less."
            )
        new_capacity = self.capacity
        if not self.fits(rows, new_capacity):  # more rows than before, and room for one long one no more
            new_capacity = self._rounded(capacity)
        elif capacity > self.capacity:
            generous = max(capacity, min(self.capacity * 3 // 2, self.context))
            new_capacity = self._rounded(generous if self.fits(rows, generous) else capacity)
        kept = self.rows
        while kept > rows and not self.fits(kept, new_capacity):
            kept -= 1
        new_rows = max(rows, kept)
        tokens = [self.tokens[row][:new_capacity] if row < kept else [] for row in range(new_rows)]
        grown = {}
        for spec in self.specs:
            grown[spec.name] = new = self.memory.zeros(self._shape(spec, new_rows, new_capacity), spec.dtype)
            for row, held in enumerate(tokens[:kept]):
                self.memory.copy(self.arrays[spec.name], row, new, row, len(held))
        # All at once: an interrupt before leaves everything as it was.
        self.arrays, self.tokens, self.capacity = grown, tokens, new_capacity

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        if one == other:
            return
        first, second = self.tokens[one], self.tokens[other]
        length = max(len(first), len(second))
        self.tokens[one] = self.tokens[other] = []  # until all layers have changed places, neither row holds anything
        for array in self.arrays.values():
            kept = self.memory.zeros((1, array.shape[1], length, array.shape[3]), array.dtype)
            self.memory.copy(array, one, kept, 0, length)
            self.memory.copy(array, other, array, one, length)
            self.memory.copy(kept, 0, array, other, length)
        self.tokens[one], self.tokens[other] = second, first

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a row the first tokens of another."""
        tokens = self.tokens[source][:length]
        if source != target:
            self.tokens[target] = []
            for array in self.arrays.values():
                self.memory.copy(array, source, array, target, length)
        self.tokens[target] = tokens

    def truncate(self, row: int, length: int) -> None:
        """Let a row forget its tokens from `length` on."""
        del self.tokens[row][length:]

    def clear(self) -> None:
        """Forget everything; the memory stays reserved."""
        self.tokens = [[] for _ in self.tokens]

    def _rounded(self, capacity: int) -> int:
        """Up to the next step of growth, but not beyond the context without need: padding may reach a little further."""
        return max(capacity, min(-(-capacity // _GROWTH) * _GROWTH, self.context))

    @staticmethod
    def _shape(spec: TensorSpec, rows: int, capacity: int) -> tuple[int, ...]:
        sizes = {"batch": rows, "capacity": capacity}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    length = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(different[0]) if len(different) else length
