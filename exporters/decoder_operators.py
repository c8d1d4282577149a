"""Emits ONNX Runtime's operators for language models from any transformers model that uses the attention interface.

    softmax(q kᵀ · scale + mask) v over past and new tokens   →   GroupQueryAttention(q, k, v, …) → out
    q · cos + rotate(q) · sin                                 →   RotaryEmbedding(q, positions, cos, sin)
    x / sqrt(mean(x²) + ε) · w                                →   SimplifiedLayerNormalization(x, w)

Which convention the model follows was found by conventions.py. No Cache object is made, and the tracer sees no cache: past
and present, which nothing but the attention reads, are added to the graph by `add_cache`.
Source of the operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx.ops import symbolic
from transformers import PreTrainedModel

from onnxpress.exporters.attention import joined
from onnxpress.exporters.conventions import (
    AttentionCall,
    Conventions,
    Norm,
    RotaryCall,
    no_mask,
    rotary_functions,
    rotary_modules,
)
from onnxpress.exporters.indexers import silent_indexers
from onnxpress.exporters.own_attention import replaced_attention
from onnxpress.exporters.recurrences import real_tokens
from onnxpress.exporters.replaced import replaced_forwards

_NAME = "onnxpress_grouped_query"
_LAYER = "onnxpress_layer"  # attribute of an attention node until it has its cache


@dataclass
class Step:
    """What one forward pass reads and writes beside the model's own inputs.

    positions: int64 (batch, length). ends: int32 (batch,), index of each row's last token. total: int32 (), the longest row's
    tokens. lengths: int32 (batch,), new tokens, None for kernels that are not told. tables: (cosines, sines) as conventions number
    them. norm_weights: of the norms whose weight is not a parameter as it stands. attentions, rotaries: how many calls there were so
    far.
    """

    positions: torch.Tensor
    ends: torch.Tensor
    total: torch.Tensor
    lengths: torch.Tensor | None
    tables: list[tuple[torch.Tensor, torch.Tensor]]
    norm_weights: dict[torch.nn.Module, torch.Tensor]
    attentions: int = 0
    rotaries: int = 0


@contextmanager
def decoder_operators(model: PreTrainedModel, conventions: Conventions, step: Callable[[], Step]) -> Iterator[None]:
    """Let `model` emit the operators while this lasts; afterwards it is exactly as before.

    step: gives the step of the forward pass that is running. Only for tracing: with real numbers inside, the model
    answers nonsense.
    """
    attention = partial(_attention, conventions, step)
    norms = {module: partial(_norm, norm, step) for module, norm in conventions.norms.items()}
    with ExitStack() as stack:
        stack.enter_context(replaced_attention(model, _NAME, attention, no_mask))
        stack.enter_context(rotary_functions(model, partial(_rotary, conventions, step)))
        stack.enter_context(replaced_forwards(norms))
        stack.enter_context(silent_indexers(conventions.indexers))
        if conventions.rotaries and None not in conventions.rotaries:  # then nobody looks at what these modules answer
            stack.enter_context(rotary_modules(model, _no_rotary))
        yield


def _attention(
    conventions: Conventions,
    current: Callable[[], Step],
    module: torch.nn.Module,
    query: torch.Tensor,  # (batch, heads, length, head_dim)
    key: torch.Tensor,  # (batch, kv_heads, length, head_dim)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    s_aux: torch.Tensor | None = None,  # (heads,): scores of a sink, which takes its share and gives nothing
    **_: Any,  # all of it was looked at when it was learned
) -> tuple[torch.Tensor, None]:
    step = current()
    call: AttentionCall = conventions.attentions[step.attentions]
    batch, heads, length, _width = query.shape
    value_dim, head_dim = value.shape[3], call.head_dim
    query, key, value = (_widened(part, head_dim) for part in (query, key, value))
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": call.kv_num_heads,
        "scale": call.scale,
        _LAYER: step.attentions,
    }
    step.attentions += 1
    if call.window is not None:
        attributes["local_window_size"] = call.window
    if call.softcap is not None:
        attributes["softcap"] = call.softcap
    # Past follows later; cosines, sines, positions, bias, scales and norms of queries and keys are not given.
    inputs = [joined(query), joined(key), joined(value), None, None, step.ends, step.total]
    inputs += [*[None] * 4, s_aux, *[None] * 4, step.lengths]
    while inputs[-1] is None:  # CUDA's operator has no lengths
        inputs.pop()
    out = symbolic(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtype=query.dtype,
        shape=(batch, length, heads * head_dim),
        version=1,
    )
    if conventions.states and step.lengths is not None:
        # What the kernel leaves for padding is anything, not a number too, and may not come into a state.
        out = torch.where(real_tokens(step.lengths, length)[..., None], out, 0.0)
    return out.reshape(batch, length, heads, head_dim)[..., :value_dim], None


def _rotary(
    conventions: Conventions,
    current: Callable[[], Step],
    original: Callable[..., Any],
    count: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    step = current()
    call = conventions.rotaries[step.rotaries]
    step.rotaries += 1
    if call is None:
        return original(*args, **kwargs)
    turned = tuple(_turned(x, call, step) for x in args[:count])
    return turned if count > 1 else turned[0]


def _turned(x: torch.Tensor, call: RotaryCall, step: Step) -> torch.Tensor:
    """x: (batch, heads, length, head_dim) or (batch, length, heads, head_dim)."""
    x = x if call.lengths_first else x.transpose(1, 2)
    batch, length, heads, head_dim = x.shape
    attributes: dict[str, Any] = {"interleaved": int(call.interleaved), "num_heads": heads}
    if call.width != head_dim:
        attributes["rotary_embedding_dim"] = call.width
    answer = symbolic(
        "com.microsoft::RotaryEmbedding",
        (x.reshape(batch, length, heads * head_dim), step.positions, *step.tables[call.table]),
        attributes,
        dtype=x.dtype,
        shape=(batch, length, heads * head_dim),
        version=1,
    )
    turned = answer.reshape(batch, length, heads, head_dim)
    return turned if call.lengths_first else turned.transpose(1, 2)


class _Unread(tuple[torch.Tensor, torch.Tensor]):
    """Stands where cosines and sines, or complex numbers, are handed on."""

    def to(self, *_: Any) -> _Unread:
        return self


def _no_rotary(_module: torch.nn.Module, _original: Callable[..., Any], x: torch.Tensor, *_: Any, **__: Any) -> _Unread:
    return _Unread((x, x))


def _norm(
    norm: Norm,
    current: Callable[[], Step],
    module: torch.nn.Module,
    original: Callable[..., Any],
    x: torch.Tensor,
    *gate: Any,  # a norm of another kind, which was tried without
    **named: Any,
) -> Any:
    if gate or named:
        return original(x, *gate, **named)
    weight = current().norm_weights[module] if norm.offset else next(module.parameters())
    attributes: dict[str, Any] = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    return symbolic("SimplifiedLayerNormalization", (x, weight), attributes, dtype=x.dtype, shape=x.shape, version=1)


def _widened(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Heads with zeros up to head_dim, which change no score, and give numbers that are cut off again."""
    missing = head_dim - heads.shape[3]
    return torch.nn.functional.pad(heads, (0, missing)) if missing else heads


def add_cache(model: ir.Model, conventions: Conventions) -> None:
    """Give the attention of each layer its past and present: inputs and outputs past_key_values.N.key and so on."""
    graph = model.graph
    nodes = {}
    for node in graph:
        if _LAYER in node.attributes:
            nodes[node.attributes.pop(_LAYER).as_int()] = node
    for layer, call in enumerate(conventions.attentions):
        shape = ir.Shape(["batch", call.kv_num_heads, "capacity", call.head_dim])
        nodes[layer].resize_outputs(3)
        for index, kind in enumerate(("key", "value")):
            past = ir.Value(name=f"past_key_values.{layer}.{kind}", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
            graph.inputs.append(past)
            nodes[layer].replace_input_with(3 + index, past)
            present = nodes[layer].outputs[1 + index]
            present.name, present.shape, present.type = f"present.{layer}.{kind}", ir.Shape(shape), past.type
            graph.outputs.append(present)
