"""The PyTorch original, as something that answers named arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from onnxpress.manifest import Arrays


class TorchReference:
    """Runs a module on the CPU in evaluation mode, with its own attention. The module answers a tuple of tensors.

    Each call begins with the same state, and neither module nor inputs are changed, whatever the module writes.
    """

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
        arguments = [torch.from_numpy(np.array(feeds[name], order="C")) for name in self._input_names]
        with torch.inference_mode(), evaluation_mode(self.module):
            answers = self.module(*arguments)
        return {name: answer.detach().numpy() for name, answer in zip(self.output_names, answers, strict=True)}


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[list[str]]:
    """Switch a module and all inside it to evaluation, and afterwards each of them back to what it was, its buffers included.

    Gives a list that holds the names of the buffers that were written, when it is left.
    """
    training = [part for part in module.modules() if part.training]
    buffers = [
        (f"{path}.{name}" if path else name, part, name, buffer, _version(buffer), buffer.clone())
        for path, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    written: list[str] = []
    module.eval()
    try:
        yield written
    finally:
        for part in training:
            part.training = True
        for path, part, name, buffer, version, content in buffers:
            if _version(buffer) != version:
                buffer.copy_(content)
            elif part._buffers[name] is buffer:
                continue
            part._buffers[name] = buffer
            written.append(path)


def _version(tensor: torch.Tensor) -> int:
    """Grows when a tensor is written; one made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
