"""The card that is measured, or the CPU in its place for a try of the scripts: what differs between the two."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Card:
    """name: "cuda" or "cpu", as torch and ONNX Runtime's values call it."""

    name: str

    @property
    def real(self) -> bool:
        """Whether it is a card."""
        return self.name == "cuda"

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.real:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what torch holds without using it."""
        gc.collect()
        if self.real:
            torch.cuda.empty_cache()

    def providers(self) -> list[Any]:
        """For onnxpress, with CUDA graphs."""
        if not self.real:
            return ["cpu"]
        from onnxpress.runtime import CUDA

        return [CUDA(graphs=True)]

    def captured(self, step: Step) -> Step:
        """A step whose launches are one CUDA graph: its inputs stay where they are, its output too. The CPU has none."""
        if not self.real:
            return step
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()

        def replay(kept: Step = step) -> torch.Tensor:  # whose inputs the graph reads: they must not be freed
            graph.replay()
            return output

        return replay

    def compile_module(self, module: Any, **options: Any) -> None:
        """In place. On the CPU only tracing is tried: what is traced then runs as it is."""
        if self.real:
            module.compile(dynamic=False, **options)
        else:
            module.compile(dynamic=False, backend="eager")

    def about(self) -> dict[str, str]:
        """The card and its driver."""
        if not self.real:
            return {"card": "none: the CPU in its place, no figure means anything"}
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            answer = ""
        return {"card": answer or torch.cuda.get_device_name(0)}
