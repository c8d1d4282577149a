"""Raises a graph's opset, so that a fusion may use an operator of a later one.

onnxscript's converter goes from 18 on; below that onnx's own converter first brings the graph to 18.
"""

from __future__ import annotations

from onnx import helper
from onnxscript import version_converter

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph

_FIRST = 18  # the earliest opset that onnxscript's converter reads


def raise_opset(graph: Graph, version: int) -> None:
    """Bring a graph to at least opset `version`, with the IR version that belongs to it.

    Raises ConversionError, and leaves the graph as it was, when an operator has no conversion. Replaces
    `graph.model`, so nodes found before are no longer the graph's.
    """
    current = graph.model.opset_imports.get("", 0)
    if current >= version:
        return
    model = graph.model.clone()
    try:
        if current < _FIRST:
            version_converter.ConvertVersionPass(_FIRST, fallback=True)(model)
        if model.opset_imports.get("") != _FIRST:
            pass
        version_converter.ConvertVersionPass(version)(model)
    except Exception as error:
        raise ConversionError(str(error)) from error
    needed = helper.find_min_ir_version_for([helper.make_opsetid("", version)])
    model.ir_version = max(model.ir_version, needed)
    graph.model = model
