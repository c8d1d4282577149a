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
        self.input_names = input_names

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Answer one batch."""
        arguments = [torch.from_numpy(np.array(feeds[name], order="C")) for name in self.input_names]
        # Not in inference mode: what a module keeps from its first call (tables of positions) could not be trained with any more.
        with torch.no_grad(), evaluation_mode(self.module):
            # Copies: buffers among the answers are about to be as they were.
            answers = [answer.clone() for answer in self.module(*arguments)]
        return {name: answer.numpy() for name, answer in zip(self.output_names, answers, strict=True)}


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[list[str]]:
    """Switch a module and all inside it to evaluation, and afterwards each of them back to what it was, its buffers included.

    torch's fast path of nn.TransformerEncoder is off meanwhile: it answers zeros at padding, where all other paths, a trace's too, do not.
    Gives a list that holds the names of the buffers that were written, when it is left.
    """
    training = [part for part in module.modules() if part.training]
    held = [(path, part, dict(part._buffers)) for path, part in module.named_modules()]
    kept = [one for *_, buffers in held for one in buffers.values() if one is not None]
    tables = (part for part in module.modules() if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag))
    kept += [table.weight for table in tables if table.max_norm is not None]  # which are scaled when they are read
    contents = [(one, version_of(one), one.detach().clone()) for one in kept]
    written: list[str] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for part in training:  # and not eval(), by which some modules merge weights
        part.training = False
    try:
        yield written
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part in training:
            part.training = True
        overwritten = {id(buffer) for buffer, version, _ in contents if version_of(buffer) != version}
        for buffer, _, content in contents:
            if id(buffer) in overwritten:
                buffer.detach().copy_(content)
        for path, part, buffers in held:
            for name, now in {**buffers, **part._buffers}.items():
                if id(now) in overwritten or now is not buffers.get(name):
                    written.append(f"{path}.{name}" if path else name)
            part._buffers.clear()
            part._buffers.update(buffers)


def version_of(tensor: torch.Tensor) -> int:
    """Grows when a tensor is written; one made in inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version
