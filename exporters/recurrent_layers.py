"""Lets torch.export trace LSTM and GRU layers as the operators that they are.

Its own rule for what they answer computes it step by step: the number of steps becomes a constant then, and a trace of hundreds takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DispatchKey

_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


@contextmanager
def whole_recurrent_layers() -> Iterator[None]:
    """While this lasts, the shapes of what these layers answer are known without their steps."""
    operators = [getattr(torch.ops.aten, name).input for name in ("lstm", "gru")]
    before = [(operator, key, operator.py_kernels[key]) for operator in operators for key in _KEYS]
    try:
        for operator, key, kernel in before:
            _set(operator, key, _unless_projected(kernel))
        yield
    finally:
        for operator, key, kernel in before:
            _set(operator, key, kernel)


def _set(operator: Any, key: DispatchKey, kernel: Any) -> None:
    operator.py_kernels[key] = kernel
    operator._dispatch_cache.clear()


def _unless_projected(kernel: Any) -> Any:
    def answer(given: torch.Tensor, past: Any, *others: Any) -> Any:
        """given: (batch, steps, …) or (steps, batch, …). past: one tensor (layers · directions, batch, size), or two of an LSTM. others: as
        torch's operators have them; the last two are bidirectional and batch_first.
        """
        states = (past,) if isinstance(past, torch.Tensor) else tuple(past)
        if states[0].shape[2] != states[-1].shape[2]:  # an LSTM with projections (proj_size), which ONNX does not have
            return kernel(given, past, *others)
        *_, bidirectional, _ = others
        size = states[0].shape[2] * (2 if bidirectional else 1)
        output = given.new_empty((*given.shape[:2], size))
        return output, *(torch.empty_like(state) for state in states)

    return answer
