"""Traces what models with a decoder (BART, T5) do to a batch so that each row is answered by itself, whatever is beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class RowByRow(TorchFunctionMode):
    """While it lasts, two operations treat each row of a batch alike.

    hidden[is_end], which transformers' classifiers count off as a batch to read the last end token of each text, gives that alone. They
    refuse batches whose texts have different numbers of end tokens, as single texts and pairs do; a graph refuses nothing, and would mix the texts up.
    squeeze() keeps the first axis, which in a batch of one it would take too (mBART's).

    reads_last_end: whether there was such a choice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads_last_end = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """As func, but for those two."""
        if func is torch.Tensor.squeeze and len(args) == 1 and not kwargs:
            sizes = args[0].shape
            return args[0].squeeze(
                [axis for axis in range(1, len(sizes)) if isinstance(sizes[axis], int) and sizes[axis] == 1]
            )
        if func is torch.Tensor.__getitem__ and _chooses_tokens(*args):
            self.reads_last_end = True
            hidden, (is_end, _) = args
            places = torch.where(is_end, torch.arange(is_end.shape[1], device=is_end.device), 0)
            return hidden[torch.arange(is_end.shape[0], device=is_end.device), places.amax(dim=1)]
        return func(*args, **(kwargs or {}))


def _chooses_tokens(tensor: Any, index: Any) -> bool:
    """Whether tokens (batch, length) of hidden states (batch, length, width) are chosen by a mask."""
    return (
        isinstance(index, tuple)
        and len(index) == 2
        and isinstance(index[0], torch.Tensor)
        and index[0].dtype is torch.bool
        and index[0].dim() == 2
        and index[1] == slice(None)
        and tensor.dim() == 3
    )
