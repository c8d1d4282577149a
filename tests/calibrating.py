"""A pass context that calibrates on given inputs, with ONNX Runtime as it is, and the operators that a session really runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from onnxpress.calibration import ActivationStream, Calibration
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target
from onnxpress.runtime.saturation import products_saturate


class PlainSession:
    """Runs a graph; no signature is needed."""

    def __init__(self, graph: Graph, folder: Path, *, disabled: Sequence[str] = (), exact: bool = False) -> None:
        path, self._optimized = folder / "session.onnx", folder / "optimized.onnx"
        ir.save(graph.model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", str(int(exact and products_saturate())))
        options.optimized_model_filepath = str(self._optimized)
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
        self.operators = Counter(node.op_type for node in onnx.load(self._optimized).graph.node)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self._session.get_inputs())

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        names = [item.name for item in self._session.get_outputs()]
        given = {name: array for name, array in feeds.items() if name in self.input_names}
        return dict(zip(names, self._session.run(names, given), strict=True))


def calibrated(
    inputs: Sequence[Mapping[str, Any]], folder: Path, *, kind: str = "cpu", keep: frozenset[str] = frozenset()
) -> PassContext:
    """A context for a target that calibrates on `inputs`."""
    facts = target(kind)
    open_session = partial(PlainSession, folder=folder, disabled=facts.disabled_optimizers, exact=facts.exact_products)
    calibration = Calibration(open_session, lambda: inputs)
    return PassContext(
        target=target(kind),
        observe=calibration,
        distributions=calibration.distributions,
        stream=partial(ActivationStream, open_session=open_session, inputs=lambda: inputs),
        keep=keep,
    )
