"""The PyTorch original, as something that answers named arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from onnxpress.manifest import Arrays


class TorchReference:
    """Runs a module on the CPU in evaluation mode, with its own attention. The module answers a tuple of tensors."""

    def __init__(self, module: torch.nn.Module, input_names: tuple[str, ...], output_names: tuple[str, ...]) -> None:
        self.module = module
        self.output_names = output_names
        self._input_names = input_names

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that `run` takes, in the order of the module's arguments."""
        return self._input_names

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch."""
        arguments = [torch.from_numpy(np.asarray(feeds[name], order="C")) for name in self._input_names]
        with torch.inference_mode(), evaluation_mode(self.module):
            answers = self.module(*arguments)
        return {name: answer.detach().numpy() for name, answer in zip(self.output_names, answers, strict=True)}


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Switch a module and all inside it to evaluation, and each of them back to what it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
