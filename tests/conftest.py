"""For all tests: no hub, and no progress bars or advice from transformers."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def _translations_read_once() -> Iterator[None]:
    """torch.onnx reads the sources of all of its translations anew for each export: half a second of a tiny model's two."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**options: int) -> ONNXRegistry:
        registry = copy.copy(read(**options))
        registry.functions = {name: list(functions) for name, functions in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other cost a tiny model far more than they bring."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
