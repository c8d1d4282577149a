"""Heads that read the last end token of each text (BART's, T5's), traced for texts with any number of end tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class LastOfEachRow(TorchFunctionMode):
    """hidden[is_end], whose rows are then counted off as a batch, gives the last of each text alone.

    transformers' classifiers of encoder-decoder models choose so, and refuse batches whose texts have different numbers of end tokens,
    as single texts and pairs do. A graph refuses nothing: it would mix the texts up. What is behind it reads the last of each text.

    found: whether there was such a choice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """As func, but for that choice: (batch, width) of hidden states (batch, length, width)."""
        if func is torch.Tensor.__getitem__ and _chooses_tokens(*args):
            self.found = True
            hidden, (is_end, _) = args
            places = torch.where(is_end, torch.arange(is_end.shape[1], device=is_end.device), 0)
            return hidden[torch.arange(is_end.shape[0], device=is_end.device), places.amax(dim=1)]
        return func(*args, **(kwargs or {}))


def _chooses_tokens(tensor: Any, index: Any) -> bool:
    """Whether tokens (batch, length) of hidden states are chosen by a mask."""
    return (
        isinstance(index, tuple)
        and len(index) == 2
        and isinstance(index[0], torch.Tensor)
        and index[0].dtype is torch.bool
        and index[0].dim() == 2
        and index[1] == slice(None)
        and tensor.dim() == 3
    )
