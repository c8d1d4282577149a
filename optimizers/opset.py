"""Raises a graph's opset, so that a fusion may use an operator of a later one.

onnxscript's converter goes from 18 on; onnx's own converter, which it calls, brings earlier graphs to 18 first.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx import helper
from onnxscript.version_converter import ConvertVersionPass

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph

_FIRST = 18  # the earliest opset that onnxscript's converter reads


def raise_opset(graph: Graph, version: int) -> None:
    """Bring a graph to opset `version` or later, and to the IR version that belongs to it.

    Replaces `graph.model`: nodes found before are no longer the graph's. Raises ConversionError, with the graph as it
    was, when a part of it has no conversion.
    """
    current = graph.model.opset_imports.get("", version)
    if current < version:
        version = max(version, _FIRST)
        graph.model = _converted(graph.model, current, version)
    reached = max(current, version)
    graph.model.ir_version = max(
        graph.model.ir_version, helper.find_min_ir_version_for([helper.make_opsetid("", reached)])
    )


def refused_opset(graph: Graph, version: int) -> tuple[str, ...]:
    """As `raise_opset`; says why it cannot be, where it cannot."""
    try:
        raise_opset(graph, version)
    except ConversionError as error:
        return (str(error),)
    return ()


def _converted(model: ir.Model, current: int, version: int) -> ir.Model:
    unclear = [node.name for node in model.graph.all_nodes() if _is_unclear(node)]
    if current < 21 <= version and unclear:
        raise ConversionError(_refusal(current, version, f"{unclear[0]}'s channels are not known"))
    model = model.clone()
    failures = _Failures(level=logging.WARNING)
    logger = logging.getLogger("onnxscript.version_converter")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(failures)
    try:
        for step in (_FIRST, version) if current < _FIRST else (version,):
            ConvertVersionPass(step, fallback=step == _FIRST)(model)
            if failures.messages:
                raise ConversionError(_refusal(current, version, failures.messages[0]))
    except (RuntimeError, ValueError) as error:
        raise ConversionError(_refusal(current, version, str(error))) from error
    finally:
        logger.removeHandler(failures)
        logger.propagate = propagated
    return model


class _Failures(logging.Handler):
    """Keeps what the converter logs when it leaves a node or the model as it was: it raises nothing then."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith(("Skipping", "Failed")):
            reason = record.exc_info[1] if record.exc_info else None
            self.messages.append(record.getMessage() + (f": {reason}" if reason else ""))


def _is_unclear(node: ir.Node) -> bool:
    """A GroupNormalization of unknown channels: its scale became (channels,) in opset 21, and it would stay (groups,)."""
    if node.op_type != "GroupNormalization" or node.domain != "":
        return False
    x, scale, bias = (None if value is None else value.shape for value in node.inputs)
    sizes = [shape[axis] if shape is not None else None for shape, axis in ((x, 1), (scale, 0), (bias, 0))]
    return not all(isinstance(size, int) for size in sizes)


def _refusal(current: int, version: int, reason: str) -> str:
    return f"The graph is at opset {current} and does not convert to {version}: {' '.join(reason.split())}"
