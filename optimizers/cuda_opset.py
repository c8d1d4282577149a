"""Opset 21 for graphs with operators that the CUDA provider knows in no later version.

Opset 22 gave pooling, convolutions and others bfloat16, opset 23 gave shapes' operators four-bit floats and quantization an attribute each;
nothing else changed, so that a graph of older operators without these means the same under the older number. ONNX Runtime has CUDA kernels of MaxPool up to version 12 (opset 21)
and runs version 22 on the CPU (onnxruntime-gpu 1.31).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx import defs

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult

_OPSET = 21
_CHANGED = 22  # the opset whose versions of operators CUDA kernels are missing for
_LAST = 23  # nothing is known of what later opsets change
_NEW_TYPE = ir.DataType.BFLOAT16


@dataclass(frozen=True, kw_only=True)
class CudaOpset:
    """No options."""

    name: ClassVar[str] = "cuda-opset"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Relabel. `changes` counts the operators that have an older version then."""
        current = graph.model.opset_imports.get("", _LAST)
        nodes = [node for node in graph.model.graph.all_nodes() if node.domain == ""]
        # Those that ONNX itself does not have are ONNX Runtime's, which do not hang on the opset.
        known = {node.op_type for node in nodes if defs.has(node.op_type, current, "")}
        versions = {name: defs.get_schema(name, current, "").since_version for name in sorted(known)}
        changed = [node for node in nodes if versions.get(node.op_type) == _CHANGED]
        if not _OPSET < current <= _LAST or not changed:
            return PassResult(graph=graph, changes=0)
        for op_type in versions:
            if not defs.has(op_type, _OPSET, ""):
                return PassResult(graph=graph, changes=0, notes=(f"{op_type} is newer than opset {_OPSET}",))
        for node in nodes:
            allowed = defs.get_schema(node.op_type, _OPSET, "").attributes if node.op_type in known else node.attributes
            if newer := sorted(set(node.attributes) - set(allowed)):
                return PassResult(
                    graph=graph, changes=0, notes=(f"{node.op_type} has {newer[0]}, newer than opset {_OPSET}",)
                )
        if any(
            value.dtype == _NEW_TYPE for node in changed for value in (*node.inputs, *node.outputs) if value is not None
        ):
            return PassResult(graph=graph, changes=0, notes=(f"an operator needs opset {_CHANGED} for bfloat16",))
        graph.model.opset_imports[""] = _OPSET
        names = ", ".join(sorted({node.op_type for node in changed}))
        return PassResult(graph=graph, changes=len(changed), notes=(f"opset {_OPSET} for {names}",))
