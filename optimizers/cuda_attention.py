"""Attention over padded texts in the form for which the CUDA provider has fused kernels.

    Attention(q, k, v, mask of the padding)   →   MultiHeadAttention(q, k, v, –, number of tokens of each row)

The mask of (batch, 1, length, length) numbers goes: with a mask that is added the provider computes all scores, with lengths
it takes its flash kernels. That the mask hides the padding and nothing else is found by computing it (see `_hides_padding`); causal
masks, sliding windows and biases stay as they are. Rows then have to be padded on the right, which the signature says.
Source of the operator: ONNX Runtime's ContribOperators.md, MultiHeadAttention.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.manifest import TensorSpec
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import add_constant, insert, replace_node
from onnxpress.optimizers.matching import attribute, body_nodes, carries_cache, optional

_MASK = "attention_mask"
_LONGEST = 8192  # tokens; masks for longer texts take gigabytes
_HIDDEN = -1e4  # a score this low has weight 0 beside any other
_KEPT = ("scale",)  # attributes that both operators have
_NOT_THERE = (
    "softcap",
    "softmax_precision",
    "qk_matmul_output_mode",
)  # and those that MultiHeadAttention does not have


@dataclass(frozen=True, kw_only=True)
class CudaAttention:
    """No options."""

    name: ClassVar[str] = "cuda-attention"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite. `changes` counts the attentions."""
        masks: dict[str, bool] = {}
        lengths: ir.Value | None = None
        count, misses = 0, []
        for attention in body_nodes(graph, "Attention"):
            reason = _obstacle(attention)
            mask = optional(attention, 3)
            if not reason and mask is not None:
                name = str(mask.name)
                if name not in masks:
                    masks[name] = _hides_padding(graph, mask)
                if not masks[name]:
                    reason = "its mask hides more than padding, or it is not known what"
            if reason:
                misses.append(Miss(node=attention, reason=reason))
                continue
            if mask is not None and lengths is None:
                lengths = _lengths(graph)
            _rewrite(graph, attention, None if mask is None else lengths)
            count += 1
        if count:
            graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
            RemoveUnusedNodesPass()(graph.model)
            if lengths is not None:
                graph = _right_padded(graph)
        notes = coverage(count, misses, what="Attention", into="MultiHeadAttention with the lengths of rows")
        return PassResult(graph=graph, changes=count, notes=notes)


def _obstacle(attention: ir.Node) -> str:
    """Why an attention stays as it is, or nothing."""
    if "q_num_heads" not in attention.attributes:
        return "its queries have their heads apart already"
    if attribute(attention, "q_num_heads", 0) != attribute(attention, "kv_num_heads", 0):
        return "several heads of queries share keys and values"
    if carries_cache(attention):
        return "it carries past keys and values"
    if any(attribute(attention, name, 0) for name in (*_NOT_THERE, "is_causal")):
        return "it has a setting that MultiHeadAttention has not"
    return ""


def _hides_padding(graph: Graph, mask: ir.Value) -> bool:
    """Whether a mask is 0 for the tokens of a row and hides what is behind them, whatever the texts: computed for a few.

    The longest row has no padding, so that a window or an order of tokens shows, however wide.
    """
    specs = {spec.name: spec for spec in graph.signature.inputs}
    padding = specs.get(_MASK)
    if padding is None or len(padding.shape) != 2 or graph.signature.task == "module":
        return False
    batch, length = padding.shape
    if isinstance(batch, int) or isinstance(length, int) or graph.signature.axes[length][1] > _LONGEST:
        return False
    part = graph.clone().model
    body = part.graph
    found = next((value for node in body for value in node.outputs if value.name == mask.name), None)
    if found is None:
        return False
    body.outputs[:] = [found]
    RemoveUnusedNodesPass()(part)
    read = {str(value.name): {use.node.op_type for use in value.uses()} for value in body.inputs if value.uses()}
    others = [name for name in read if name != _MASK]
    if _MASK not in read or any(read[name] != {"Shape"} or specs[name].shape != padding.shape for name in others):
        return False  # a mask that hangs on tokens hides more than padding
    random = np.random.default_rng(0)
    longest = graph.signature.axes[length][1]
    for counts, width in (([longest], longest), ([1], 1), (random.integers(1, 6, 3), 5)):
        given = (np.arange(min(width, longest))[None] < np.array(counts)[:, None]).astype(padding.dtype)
        feeds = {str(value.name): np.zeros(given.shape, specs[str(value.name)].dtype) for value in body.inputs}
        feeds[_MASK] = given
        try:
            with np.errstate(all="ignore"):
                answer = ReferenceEvaluator(ir.to_proto(part)).run(None, feeds)
            scores = np.asarray(next(iter(answer)))
            if scores.dtype == np.bool_:
                scores = np.where(scores, 0.0, -np.inf)
            rows, tokens = given.shape
            scores = np.broadcast_to(scores, (rows, *scores.shape[1:2], tokens, tokens))
        except Exception:  # an operator that onnx does not compute, or a mask of another form
            return False
        seen = given.astype(bool)[:, None, None, :]
        if not np.all(np.where(seen, scores == 0, scores <= _HIDDEN)):
            return False
    return True


def _lengths(graph: Graph) -> ir.Value:
    """int32 (batch,): the tokens of each row, at the head of the graph."""
    body = graph.model.graph
    mask = next(value for value in body.inputs if value.name == _MASK)
    first = body[0]
    axes = add_constant(graph, "token_axis", np.array([1], np.int64))
    assert mask.shape is not None
    shape = [mask.shape[0]]
    numbers = insert(first, "Cast", [mask], {"to": ir.DataType.INT32.value}, name="tokens", dtype=ir.DataType.INT32)
    numbers.shape = ir.Shape(list(mask.shape))
    total = insert(first, "ReduceSum", [numbers, axes], {"keepdims": 0}, name="token_counts", dtype=ir.DataType.INT32)
    total.shape = ir.Shape(shape)
    return total


def _rewrite(graph: Graph, attention: ir.Node, lengths: ir.Value | None) -> None:
    inputs = [*attention.inputs[:3], *([] if lengths is None else [None, lengths])]
    attributes = {name: attribute(attention, name, None) for name in _KEPT if name in attention.attributes}
    new = ir.node(
        "MultiHeadAttention",
        inputs,
        {"num_heads": attribute(attention, "q_num_heads", 0), **attributes},
        domain="com.microsoft",
        name=attention.name,
    )
    replace_node(graph, attention, new)


def _right_padded(graph: Graph) -> Graph:
    def changed(spec: TensorSpec) -> TensorSpec:
        return dataclasses.replace(spec, right_padded=True) if spec.name == _MASK else spec

    inputs = tuple(map(changed, graph.signature.inputs))
    return Graph(model=graph.model, signature=dataclasses.replace(graph.signature, inputs=inputs))
