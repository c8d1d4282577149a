"""One step of a language model over neighbouring rows of the cache, each with its own past and its own new tokens.

Prompts, parts of prompts and single tokens are all steps. Which rows take part, and when, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import InputError
from onnxpress.runtime.cache import KeyValueCache, present_name
from onnxpress.runtime.device import DeviceArray, DeviceMemory
from onnxpress.runtime.session import Session

TOTAL_LENGTH = "total_length"  # an input of graphs for CUDA: the longest row's tokens, the new ones too


class ModelStep:
    """Runs a language model's graph with past and present in the cache's own buffers. Not for several threads at once.

    output: what `run` answers with, "logits" or "hidden_states". captures: whether single tokens are worth a CUDA graph. Raises
    InputError where the cache lies elsewhere than where the session runs.
    """

    def __init__(
        self, session: Session, cache: KeyValueCache, *, output: str = "logits", captures: bool = True
    ) -> None:
        if type(cache.memory) is not type(session.memory):
            raise InputError("The cache is not where the session runs: KeyValueCache(…, memory=session.memory).")
        specs = {spec.name: spec for spec in session.signature.inputs}
        bounds = specs["input_ids"].bounds
        assert bounds is not None
        self.vocabulary = bounds[1] + 1
        self.cache = cache
        self._session = session
        self._output = next(spec for spec in session.signature.outputs if spec.name == output)
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._place: Any = None  # an array of the cache as it was when those were bound
        self._captures = captures
        self._uniform = TOTAL_LENGTH in specs  # such a kernel is not told how many new tokens each row has

    def run(
        self, first: int, tokens: Sequence[Sequence[int]], answers: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits (answers, vocabulary), or hidden states, after new tokens of the rows first, first + 1, …, whose cache they join.

        answers: after how many of each row's last tokens to answer; one where None. The array is valid until the next
        step. Raises InputError for tokens that the model does not have, and beyond its context.
        """
        rows, length = len(tokens), max(map(len, tokens))
        self.cache.reserve(first + rows, length)
        past = [len(self.cache.tokens[first + row]) for row in range(rows)]
        longest = max(before + len(new) for before, new in zip(past, tokens, strict=True))
        if longest > self.cache.context:
            raise InputError(f"{longest} tokens were given; the model's context is {self.cache.context}.")
        if self._uniform and any(past) and rows > 1 and length > 1:
            # The kernel takes one row then, or one token of each.
            self._check_ids([token for new in tokens for token in new])
            counts = [1] * rows if answers is None else answers
            alone = [
                self.run(first + row, [new], [count]).copy()
                for row, (new, count) in enumerate(zip(tokens, counts, strict=True))
            ]
            return np.concatenate(alone)
        needed = max(past) + length  # the kernel wants room for the padding of every row, too
        if needed > self.cache.capacity:
            self._bound.clear()  # a binding would keep the smaller buffers alive
        self.cache.reserve(first + rows, needed)
        counts = [1] * rows if answers is None else list(answers)
        bound = self._bind(first, rows, length, sum(counts))
        inputs = bound.inputs
        if length == 1:
            inputs["input_ids"][:, 0] = [new[0] for new in tokens]
        else:
            inputs["input_ids"][:] = 0
            for row, new in enumerate(tokens):
                inputs["input_ids"][row, : len(new)] = new
        self._check_ids(inputs["input_ids"])
        inputs["past_lengths"][:] = past
        inputs["lengths"][:] = [len(new) for new in tokens]
        inputs["logit_indices"][:] = [
            row * length + len(new) - count + index
            for row, (new, count) in enumerate(zip(tokens, counts, strict=True))
            for index in range(count)
        ]
        if self._uniform and bound.graph is None:
            inputs[TOTAL_LENGTH][...] = max(past) + length
        held = self.cache.tokens[first : first + rows]
        if self.cache.keeps_states:  # until the step is over nobody can say what is in them
            self.cache.tokens[first : first + rows] = [[] for _ in held]
        found = bound.run()  # checked above, and the cache is our own
        self.cache.tokens[first : first + rows] = [before + list(new) for before, new in zip(held, tokens, strict=True)]
        return found

    def _check_ids(self, ids: npt.ArrayLike) -> None:
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= self.vocabulary:
            raise InputError(f"Token ids from {low} to {high} were given; the model has 0 to {self.vocabulary - 1}.")

    def _bind(self, first: int, rows: int, length: int, answers: int) -> _Bound:
        """Buffers for a step of this shape; those of steps before are used again where they fit."""
        some = next(iter(self.cache.arrays.values()))
        key = (first, rows, length, answers)
        if self._place is not some:
            self._bound.clear()
            self._place = some
        if key in self._bound:
            return self._bound[key]
        # Of steps that are taken again and again: all rows together, one token each.
        graph = self._session.next_graph() if length == 1 and first == 0 and self._captures else None
        if graph is None:  # not worth keeping but for the next step
            self._bound = {other: bound for other, bound in self._bound.items() if bound.graph is not None}
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.zeros((rows, length), np.int64),
            "past_lengths": np.zeros(rows, np.int32),
            "lengths": np.zeros(rows, np.int32),
            "logit_indices": np.zeros(answers, np.int64),
        }
        if self._uniform:
            # A graph holds this number as it was captured with: the largest there can be suits every step.
            inputs[TOTAL_LENGTH] = np.array(self.cache.capacity, np.int32)
        shape = (answers, int(self._output.shape[-1]))
        bound = _Bound(self._session, inputs, self._output.name, shape, self._output.dtype, graph)
        for name, array in self.cache.arrays.items():
            view = array[first : first + rows]
            bound.binding.bind_input(name, view)
            bound.binding.bind_output(present_name(name), view)
        self._bound[key] = bound
        return bound


class _Bound:
    """A binding of one shape of step with the arrays that it reads and writes. graph: the number of its CUDA graph."""

    def __init__(
        self,
        session: Session,
        inputs: dict[str, npt.NDArray[Any]],
        output: str,
        shape: tuple[int, ...],
        dtype: str,
        graph: int | None,
    ) -> None:
        self.inputs = inputs
        self.graph = graph
        self.binding = session.binding(graph)
        memory = session.memory
        self._on_card: dict[str, DeviceArray] = {}
        self._written: dict[str, npt.NDArray[Any]] = {}
        for name, array in inputs.items():
            if isinstance(memory, DeviceMemory) and name != TOTAL_LENGTH:  # which the kernel reads on the CPU
                self._on_card[name] = memory.empty(array.shape, array.dtype)
                self._written[name] = np.empty(0, array.dtype)
                self.binding.bind_input(name, self._on_card[name])
            else:
                self.binding.bind_input(name, array)
        self._answers = memory.zeros(shape, dtype)
        self.binding.bind_output(output, self._answers)

    def run(self) -> npt.NDArray[np.float32]:
        """The answers of one step."""
        for name, array in self._on_card.items():
            given = self.inputs[name]
            if not np.array_equal(given, self._written[name]):  # most of a step's inputs are those of the step before
                array.write(given)
                self._written[name] = given.copy()
        self.binding.run(check=False)
        found: npt.NDArray[np.float32] = (
            self._answers.numpy() if isinstance(self._answers, DeviceArray) else self._answers
        )
        return found
