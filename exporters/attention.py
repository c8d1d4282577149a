"""Emits ONNX's `Attention` operator (opset 23) from any transformers model that routes attention through the interface.

The model's own attention function is replaced for the length of an export, so nothing has to be matched afterwards:

    softmax(q kᵀ · scale + mask) v   →   Attention(q, k, v, mask)      (batch, length, heads · head_dim) in and out

The mask is the model's own mask function, evaluated on the padding: bidirectional, causal and sliding windows all
come out of it. Source: https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from onnxpress.errors import ConversionError

_NAME = "onnxpress_attention"

# Half of float16's lowest number: exp() of it is exactly zero, a score can be added without overflow in float16 too,
# and a row that is masked everywhere (a padded query) still has a finite softmax.
MASKED = -32752.0

# What attention functions are told and what their eager form ignores, because the mask already says it.
_SAID_BY_THE_MASK = frozenset({"is_causal", "sliding_window", "position_ids", "cache_position"})
_NOT_ABOUT_THE_RESULT = frozenset({"use_cache", "output_attentions", "output_hidden_states", "return_dict"})
_HARMLESS = _SAID_BY_THE_MASK | _NOT_ABOUT_THE_RESULT


@contextmanager
def fused_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` emit Attention operators while this lasts. The model is afterwards exactly as before.

    Raises ConversionError where the model computes attention by itself. Only for tracing: run with real numbers
    inside, the model answers nonsense.
    """
    with registered_attention(model, _NAME, _attention, _mask):
        yield


@contextmanager
def registered_attention(
    model: PreTrainedModel, name: str, attention: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """Let a model's attention be a function of the interface while this lasts; the interface, which outlives models, holds it no longer then."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    try:
        with attention_implementation(model, name):
            yield
    finally:
        AttentionInterface.register(name, _ended)
        AttentionMaskInterface.register(name, _ended)


def _ended(*_: Any, **__: Any) -> Any:
    raise AssertionError("this attention was for an export that has ended")


def uses_interface(model: PreTrainedModel) -> bool:
    """Whether a model's attention can be switched."""
    return bool(model._can_set_attn_implementation())


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch a model's attention to `name`, and back. Raises ConversionError if the model cannot be switched."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ConversionError(
                f"{type(model).__name__} computes attention by itself, not through transformers' attention interface."
            )
        yield
    finally:
        for config, implementation in before:  # outer configs first: setting one sets those inside it, too
            config._attn_implementation = implementation


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (batch, heads, length, head_dim)
    key: torch.Tensor,  # (batch, key_value_heads, length, head_dim)
    value: torch.Tensor,  # (batch, key_value_heads, length, value_dim)
    attention_mask: torch.Tensor | None,  # (batch, 1 or heads, 1 or length, length)
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    unknown = sorted(
        name for name, given in options.items() if name not in _HARMLESS and given is not None and given is not False
    )
    if unknown or dropout:
        raise ConversionError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown) or 'dropout'}, "
            f"which the Attention operator does not have."
        )
    batch, heads, length, head_dim = query.shape
    value_dim = value.shape[3]
    inputs = [joined(query), joined(key), joined(value)]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = _additive(attention_mask, query.dtype)
        # ONNX Runtime's kernel wants the length of the queries spelled out, not broadcast.
        inputs.append(attention_mask.expand(batch, -1, length, key.shape[2]))
    attributes: dict[str, Any] = {
        "q_num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": float(head_dim**-0.5 if scaling is None else scaling),
    }
    if softcap:
        attributes["softcap"] = float(softcap)
    answer = torch.onnx.ops.symbolic(
        "Attention", inputs, attributes, dtype=query.dtype, shape=(batch, length, heads * value_dim), version=23
    )
    return answer.reshape(batch, length, heads, value_dim), None


def joined(heads: torch.Tensor) -> torch.Tensor:
    """(batch, heads, length, head_dim) → (batch, length, heads · head_dim)."""
    batch, count, length, head_dim = heads.shape
    return heads.transpose(1, 2).reshape(batch, length, count * head_dim)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **hints: Any,  # whether a mask may be left out: never here, one graph serves padded and unpadded batches
) -> torch.Tensor:
    """The additive mask (batch, 1, q_length, kv_length) of any index-based mask function, and of the padding."""
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.arange(1, device=device)[None, :, None, None]
    query = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    key = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    allowed = mask_function(batch, head, query, key)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, kv_offset : kv_offset + kv_length].to(torch.bool)
    return _additive(allowed.expand(batch_size, -1, q_length, kv_length), dtype)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(allowed, torch.zeros((), dtype=dtype), torch.full((), MASKED, dtype=dtype))


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config that says how to compute attention, each once, outer ones first."""
    found: dict[int, Any] = {}
    waiting = [model.config, *(module.config for module in model.modules() if isinstance(module, PreTrainedModel))]
    while waiting:
        config = waiting.pop(0)
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        waiting.extend(getattr(config, name, None) for name in config.sub_configs)
    return list(found.values())
