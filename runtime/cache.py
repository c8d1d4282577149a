"""The keys and values that a language model has computed: one buffer a layer and kind, one row a sequence.

Holds which tokens each row's numbers belong to, and grows within a budget. Decides nothing about who gets a row. Layers with linear
attention keep a state of one size instead, in which all tokens of a row are mixed: it can be copied, but not cut back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import TensorSpec
from onnxpress.runtime.device import HostMemory, Memory, item_bytes

_TOKENS = "capacity"  # the axis along which keys and values grow
_GROWTH = 256  # tokens by which capacity grows at least
PAST = "past_key_values."  # how the names of keys' and values' inputs begin
_PRESENT = {PAST: "present.", "past_states.": "present_states."}


class KeyValueCache:
    """Rows of keys and values.

    specs: the graph's past inputs, (batch, kv_heads, capacity, head_dim) each, states (batch, …). context: the most tokens of a row. budget: the
    most bytes of all rows together. memory: the computer's where None. tokens: of each row, the token ids whose keys and values it
    holds, in order. begun: of each row, a number that the caller gives it, which moves with it.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, context: int, budget: int, memory: Memory | None = None) -> None:
        self.specs = tuple(spec for spec in specs if is_past(spec.name))
        self._states = tuple(spec.name for spec in self.specs if is_state(spec))
        self.context = context
        self.budget = budget
        self.tokens: list[list[int]] = []
        self.begun: list[int] = []
        self.capacity = 0
        self.memory = memory or HostMemory()
        self.arrays: dict[str, Any] = {spec.name: self._zeros(spec, 0, 0) for spec in self.specs}

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.tokens)

    @property
    def keeps_states(self) -> bool:
        """Whether tokens are mixed in states, so that a row can be forgotten as a whole alone."""
        return bool(self._states)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one row, all layers together, states not counted."""
        return self._bytes(states=False)

    def fits(self, rows: int, capacity: int) -> bool:
        """Whether so many rows of so many tokens are within the budget."""
        return self.needed(rows, capacity) <= self.budget

    def needed(self, rows: int, capacity: int) -> int:
        """Bytes of so many rows of so many tokens, with the room that they are given beyond."""
        return rows * (self._rounded(capacity) * self.bytes_per_token + self._bytes(states=True))

    def reserve(self, rows: int, capacity: int) -> None:
        """Have at least so many rows of at least so many tokens; rows that then exceed the budget go, the last first.

        Raises InputError where the budget does not allow it.
        """
        if rows <= self.rows and capacity <= self.capacity:
            return
        if not self.fits(rows, capacity):
            raise InputError(
                f"{rows} sequences of {capacity} tokens need {self.needed(rows, capacity) / 2**20:.1f} MiB of "
                f"cache, and the budget is {self.budget / 2**20:.1f} MiB: allow more with cache_bytes, or ask for less."
            )
        new_capacity = self.capacity
        if not self.fits(rows, new_capacity):  # more rows than before, and room for one long one no more
            new_capacity = self._rounded(capacity)
        elif capacity > self.capacity:
            generous = max(capacity, min(self.capacity * 3 // 2, self.context))
            new_capacity = self._rounded(generous if self.fits(max(rows, self.rows), generous) else capacity)
        kept = self.rows
        while kept > rows and not self.fits(kept, new_capacity):
            kept -= 1
        new_rows = max(rows, kept)
        tokens = [self._prefix(row, new_capacity) if row < kept else [] for row in range(new_rows)]
        grown = {}
        for spec in self.specs:
            grown[spec.name] = new = self._zeros(spec, new_rows, new_capacity)
            for row, held in enumerate(tokens[:kept]):
                self._copy(spec.name, self.arrays[spec.name], row, new, row, len(held))
        begun = [*self.begun[:kept], *[0] * (new_rows - kept)]
        # All at once: an interrupt before leaves everything as it was.
        self.arrays, self.tokens, self.begun, self.capacity = grown, tokens, begun, new_capacity

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        if one == other:
            return
        first, second = self.tokens[one], self.tokens[other]
        self.tokens[one] = self.tokens[other] = []  # until all layers have changed places, neither row holds anything
        for spec, array in zip(self.specs, self.arrays.values(), strict=True):
            kept = self._zeros(spec, 1, len(first))
            self._copy(spec.name, array, one, kept, 0, len(first))
            self._copy(spec.name, array, other, array, one, len(second))
            self._copy(spec.name, kept, 0, array, other, len(first))
        self.tokens[one], self.tokens[other] = second, first
        self.begun[one], self.begun[other] = self.begun[other], self.begun[one]

    def usable(self, row: int, tokens: Sequence[int]) -> int:
        """How many first tokens of a text need not be read again, because this row holds them."""
        return len(self._prefix(row, common_prefix(self.tokens[row], tokens)))

    def _prefix(self, row: int, length: int) -> list[int]:
        """The tokens that a row still holds when it is cut to a length: where there are states, all of them or none."""
        tokens = self.tokens[row]
        return [] if self._states and length < len(tokens) else tokens[:length]  # a list of its own

    def copy(self, source: int, target: int, length: int) -> None:
        """Give a row the first tokens of another."""
        if source == target:
            self.truncate(target, length)
            return
        tokens = self._prefix(source, length)
        self.truncate(target, 0)
        if tokens:
            for name, array in self.arrays.items():
                self._copy(name, array, source, array, target, len(tokens))
        self.tokens[target] = tokens

    def truncate(self, row: int, length: int) -> None:
        """Let a row forget its tokens from `length` on; where there are states, all of them if any."""
        if 0 < len(self.tokens[row]) <= length:
            return
        tokens = self._prefix(row, length)
        if not tokens:
            self.tokens[row] = []  # first, so that an interrupt leaves nothing wrong
            for name in self._states:
                self.arrays[name][row] = 0
        self.tokens[row] = tokens

    def clear(self) -> None:
        """Forget everything; the memory stays reserved."""
        for row in range(self.rows):
            self.truncate(row, 0)

    def _bytes(self, *, states: bool) -> int:
        """Of the states of one row, or of the keys and values of one token."""
        return sum(
            int(np.prod(self._shape(spec, 1, 1))) * item_bytes(spec.dtype)
            for spec in self.specs
            if (spec.name in self._states) == states
        )

    def _zeros(self, spec: TensorSpec, rows: int, capacity: int) -> Any:
        shape = self._shape(spec, rows, capacity)
        if spec.name in self._states:  # no graph for a card has them
            return np.zeros(shape, spec.dtype)
        return self.memory.zeros(shape, spec.dtype)

    def _copy(self, name: str, source: Any, row: int, target: Any, to_row: int, length: int) -> None:
        if name in self._states:
            target[to_row] = source[row]
        else:
            self.memory.copy(source, row, target, to_row, length)

    def _rounded(self, capacity: int) -> int:
        """Up to the next step of growth, but not beyond the context without need: padding may reach a little further."""
        return max(capacity, min(-(-capacity // _GROWTH) * _GROWTH, self.context))

    @staticmethod
    def _shape(spec: TensorSpec, rows: int, capacity: int) -> tuple[int, ...]:
        sizes = {"batch": rows, _TOKENS: capacity}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape)


def is_past(name: str) -> bool:
    """Whether an input of this name is part of the cache."""
    return name.startswith(tuple(_PRESENT))


def is_state(spec: TensorSpec) -> bool:
    """Whether an input of the cache is a state of one size, in which all tokens of a row are mixed."""
    return is_past(spec.name) and _TOKENS not in spec.shape


def present_name(name: str) -> str:
    """The output that belongs to an input of the cache."""
    past = next(past for past in _PRESENT if name.startswith(past))
    return _PRESENT[past] + name.removeprefix(past)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    length = min(len(one), len(other))
    different = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(different[0]) if len(different) else length
