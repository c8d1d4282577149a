"""One step of a language model over neighbouring rows of the cache, each with its own past and its own new tokens.

Prompts, parts of prompts and single tokens are all steps. Which rows take part, and when, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import InputError
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.session import Binding, Session


class ModelStep:
    """Runs a language model's graph with past and present in the cache's own buffers. Not for several threads at once.

    output: what `run` answers with, "logits" or "hidden_states".
    """

    def __init__(self, session: Session, cache: KeyValueCache, *, output: str = "logits") -> None:
        specs = {spec.name: spec for spec in session.signature.inputs}
        bounds = specs["input_ids"].bounds
        assert bounds is not None
        self.vocabulary = bounds[1] + 1
        self.cache = cache
        self._session = session
        self._key: tuple[Any, ...] = ()
        self._inputs: dict[str, npt.NDArray[Any]] = {}
        self._output = next(spec for spec in session.signature.outputs if spec.name == output)
        self._answers: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._binding: Binding | None = None

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
        needed = max(past) + length  # the kernel wants room for the padding of every row, too
        if needed > self.cache.capacity:
            self._key, self._binding = (), None  # a binding would keep the smaller buffers alive
        self.cache.reserve(first + rows, needed)
        counts = [1] * rows if answers is None else list(answers)
        self._bind(first, rows, length, sum(counts))
        inputs = self._inputs
        if length == 1:
            inputs["input_ids"][:, 0] = [new[0] for new in tokens]
        else:
            inputs["input_ids"][:] = 0
            for row, new in enumerate(tokens):
                inputs["input_ids"][row, : len(new)] = new
        if inputs["input_ids"].min() < 0 or inputs["input_ids"].max() >= self.vocabulary:
            raise InputError(
                f"Token ids from {inputs['input_ids'].min()} to {inputs['input_ids'].max()} were given; the model has 0 to "
                f"{self.vocabulary - 1}."
            )
        inputs["past_lengths"][:] = past
        inputs["lengths"][:] = [len(new) for new in tokens]
        inputs["logit_indices"][:] = [
            row * length + len(new) - count + index
            for row, (new, count) in enumerate(zip(tokens, counts, strict=True))
            for index in range(count)
        ]
        assert self._binding is not None
        self._binding.run(check=False)  # checked above, and the cache is our own
        for row, new in enumerate(tokens):
            self.cache.tokens[first + row].extend(new)
        return self._answers

    def _bind(self, first: int, rows: int, length: int, answers: int) -> None:
        """Buffers for a step of this shape; those of the step before are used again where they fit."""
        some = next(iter(self.cache.arrays.values()))
        key = (first, rows, length, answers, some.shape, some.ctypes.data)
        if key == self._key:
            return
        self._key = ()  # until everything is bound
        self._inputs = {
            "input_ids": np.zeros((rows, length), np.int64),
            "past_lengths": np.zeros(rows, np.int32),
            "lengths": np.zeros(rows, np.int32),
            "logit_indices": np.zeros(answers, np.int64),
        }
        self._answers = np.zeros((answers, int(self._output.shape[-1])), np.float32)
        self._binding = binding = self._session.binding()
        for name, array in self._inputs.items():
            binding.bind_input(name, array)
        binding.bind_output(self._output.name, self._answers)
        for name, array in self.cache.arrays.items():
            view = array[first : first + rows]
            binding.bind_input(name, view)
            binding.bind_output(name.replace("past_key_values", "present"), view)
        self._key = key
