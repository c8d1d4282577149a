"""Keys and values of a language model's cache in 8 bits, a quarter of the memory.

    GroupQueryAttention(…, past float32, …)   →   GroupQueryAttention(…, past int8, …, k_scale, v_scale)

One scale for each channel of each head, for half as much again as the calibration inputs' range; rounding is symmetric. What is written into the cache is
rounded by the kernel, attention reads integers. Source of the form: ONNX Runtime's ContribOperators.md, GroupQueryAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import add_constant, set_input
from onnxpress.optimizers.half import with_dtype

_PAST = {"key": 3, "value": 4}  # inputs of GroupQueryAttention
_PRESENT = {"key": 1, "value": 2}  # its outputs
_SCALE = {"key": 12, "value": 13}
_INT8 = ir.DataType.INT8
_MARGIN = 1.5  # other texts go beyond the calibration's ranges, and what is cut off costs more than coarser steps
_PROBE = "onnxpress_probe_"


@dataclass(frozen=True, kw_only=True)
class Int8Cache:
    """No options."""

    name: ClassVar[str] = "int8-cache"
    lossless: ClassVar[bool] = False

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantize the cache of every layer but those in `context.keep`.

        Raises RecipeError when the context has no calibration data, for a cache of another kind than float32, and for a model without one.
        """
        if context.observe is None:
            raise RecipeError("The pass int8-cache needs calibration inputs to measure ranges, and none are at hand.")
        layers = {
            str(node.outputs[0].name): node
            for node in graph.model.graph
            if node.op_type == "GroupQueryAttention" and node.domain == "com.microsoft"
        }
        if not layers:
            raise RecipeError(
                "The model keeps no keys and values that int8-cache could make smaller: leave `cache` out."
            )
        kinds = {name: node.outputs[1].dtype for name, node in layers.items()}
        chosen = {name: node for name, node in layers.items() if name not in context.keep and kinds[name] != _INT8}
        if other := {kinds[name] for name in chosen} - {ir.DataType.FLOAT}:
            raise RecipeError(
                f"The pass int8-cache takes a cache of float32, and this one is {', '.join(map(str, other))}: it goes with weights "
                "of fewer bits, not with fp16 or bf16."
            )
        if not chosen:
            return PassResult(graph=graph, changes=0)
        probed = _with_probes(graph, chosen)
        ranges = context.observe(probed, [f"{_PROBE}{name}_{kind}" for name in chosen for kind in _PAST])
        changed: set[str] = set()
        for name, node in chosen.items():
            for kind in _PAST:
                past, present = node.inputs[_PAST[kind]], node.outputs[_PRESENT[kind]]
                assert past is not None
                assert past.shape is not None
                _, heads, _, size = past.shape
                assert isinstance(heads, int)
                assert isinstance(size, int)
                found = ranges[f"{_PROBE}{name}_{kind}"]
                largest = np.maximum(np.abs(found.low), np.abs(found.high)).reshape(heads, 1, size)
                scales = (np.where(largest > 0, _MARGIN * largest, 1) / 127).astype(np.float32)
                set_input(node, _SCALE[kind], add_constant(graph, f"{past.name}_scale", scales))
                for value in (past, present):
                    value.type = ir.TensorType(_INT8)
                    changed.add(str(value.name))
            for key, setting in (
                ("k_quant_type", "PER_CHANNEL"),
                ("v_quant_type", "PER_CHANNEL"),
                ("kv_cache_bit_width", 8),
            ):
                node.attributes.add(ir.convenience.convert_attribute(key, setting))
        result = Graph(model=graph.model, signature=with_dtype(graph.signature, changed, "int8"))
        return PassResult(
            graph=result, changes=len(chosen), notes=(f"{len(chosen)} of {len(layers)} layers",), touched=tuple(chosen)
        )


def _with_probes(graph: Graph, layers: dict[str, ir.Node]) -> Graph:
    """A copy that also gives each layer's keys and values as (batch, capacity, heads · head_dim)."""
    copy = graph.clone()
    body = copy.model.graph
    shape = add_constant(copy, f"{_PROBE}shape", np.array([0, 0, -1], np.int64))
    for node in list(body):
        name = str(node.outputs[0].name)
        for kind, place in _PRESENT.items() if name in layers else ():
            turned = ir.node("Transpose", [node.outputs[place]], {"perm": [0, 2, 1, 3]})
            flat = ir.node("Reshape", [turned.outputs[0], shape])
            flat.outputs[0].name, flat.outputs[0].type = f"{_PROBE}{name}_{kind}", ir.TensorType(ir.DataType.FLOAT)
            body.insert_after(node, [turned, flat])
    return copy
