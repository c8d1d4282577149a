"""Finds the modules that choose which tokens are attended to: DeepSeek-V3.2's sparse attention and its kin.

    indices = indexer(hidden states, …)   →   attention to the tokens, or blocks of tokens, at `indices` alone

An indexer keeps so many of the best; of a text that has no more it keeps all, and attention is what it is without one. How long such
texts are is told by the shapes of what it answers. Within them its answer is not needed: it does not come into a graph, nor its weights.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map

from onnxpress.exporters.replaced import replaced_forwards

CHOICES = ("indices", "block_indices")  # what attention functions are told was chosen
_BEYOND = 2**20  # tokens, of which no indexer keeps all


@dataclass
class IndexerCalls:
    """What modules answered with whole numbers, and to what, in a forward pass of `length` tokens. found: the indexers among them."""

    length: int
    found: dict[torch.nn.Module, tuple[Any, Any]] = field(default_factory=dict)
    _answers: list[tuple[torch.Tensor, torch.nn.Module, tuple[Any, Any]]] = field(default_factory=list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note the answers while this lasts."""

        def note(module: torch.nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
            if isinstance(answer, torch.Tensor) and not answer.is_floating_point():
                self._answers.append((answer, module, (args, kwargs)))

        handle = register_module_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def chose(self, indices: torch.Tensor) -> bool:
        """Whether it was a module that answered with these; it is an indexer then."""
        for answer, module, given in self._answers:
            if answer is indices:
                self.found[module] = given
                return True
        return False

    def longest(self, positions: int) -> int:
        """How many tokens, up to so many, all indexers keep all of."""
        return min((self._kept(module, positions) for module in self.found), default=positions)

    def _kept(self, module: torch.nn.Module, positions: int) -> int:
        """The first length of a text at which no more is chosen than of any longer one."""
        shapes = copy.deepcopy(module).to("meta")  # computes shapes and no numbers

        def chosen(length: int) -> int:
            longer = partial(_longer, self.length, length)
            args, kwargs = tree_map(longer, self.found[module])
            return int(shapes(*args, **kwargs).shape[-1])

        most = chosen(positions + _BEYOND)
        return min(positions, 1 + bisect_left(range(1, positions + 1), most, key=chosen))


@contextmanager
def silent_indexers(indexers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let indexers choose nothing while this lasts; attention has to look at all tokens."""
    with replaced_forwards(dict.fromkeys(indexers, lambda *_, **__: torch.zeros(1, dtype=torch.int64))):
        yield


def _longer(old: int, new: int, given: Any) -> Any:
    """The shape of a tensor with axes of a new size in the place of those of an old one."""
    if not isinstance(given, torch.Tensor):
        return given
    return torch.empty([new if size == old else size for size in given.shape], dtype=given.dtype, device="meta")
