"""Where a build tries its graphs: saves each to the build's own folder, opens it, and times it.

A target whose provider this machine lacks (cuda on a laptop) is tried on the CPU provider, and not timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from onnxpress.errors import OutputError, ProviderError
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays
from onnxpress.optimizers.targets import Target
from onnxpress.runtime.session import Session
from onnxpress.timing import alternate

_EXTERNAL_FROM = 1_000_000_000  # bytes of weights; protobuf ends at 2 GB


class Workbench:
    """Opens graphs as sessions on the target's provider, or on the CPU with `note` saying why."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._count = 0
        self._providers: tuple[str, ...] = target.providers
        self.note = ""

    @property
    def on_target(self) -> bool:
        """Whether sessions run on the target's own provider, so that times mean something."""
        return self._providers == self._target.providers

    def open(self, graph: Graph) -> Session:
        """A session of the graph."""
        self._count += 1
        path = self._folder / f"{self._count:03}" / "model.onnx"
        path.parent.mkdir(parents=True)
        save(graph, path)
        try:
            return self._session(path, graph)
        except ProviderError as error:
            if self._providers == ("cpu",):
                raise
            self._providers = ("cpu",)
            self.note = f"tried on the CPU provider and not timed: {error}"
            return self._session(path, graph)

    def compare(
        self, before: Session, after: Session, inputs: Mapping[tuple[int, ...], Arrays]
    ) -> dict[tuple[int, ...], tuple[float, float]]:
        """Median milliseconds (before, after) of each input, the two taking turns."""
        rows = {}
        for shape, feeds in inputs.items():
            tasks = {"before": _timed(before, feeds), "after": _timed(after, feeds)}
            times = alternate(tasks)
            rows[shape] = (times["before"], times["after"])
        return rows

    def _session(self, path: Path, graph: Graph) -> Session:
        return Session(
            path,
            signature=graph.signature,
            providers=self._providers,
            disabled_optimizers=self._target.disabled_optimizers if self.on_target else (),
        )


def save(graph: Graph, path: Path) -> None:
    """Write model.onnx, and model.onnx.data beside it when the weights are large. Raises OutputError."""
    external = f"{path.name}.data" if graph.weight_bytes() >= _EXTERNAL_FROM else None
    try:
        ir.save(graph.model, path, external_data=external)
    except OSError as error:
        raise OutputError(
            f"Writing {path} failed: {error.strerror or error}. Free space or choose another --out."
        ) from None


def _timed(session: Session, feeds: Arrays):  # type: ignore[no-untyped-def]
    return lambda: session.run(feeds)
