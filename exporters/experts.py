"""Emits ONNX Runtime's operator for mixtures of experts from any transformers model that uses the experts interface.

    Σ over the chosen experts e of w_e · down_e(g · σ(α g) · (u + β))   →   MoE(x, log of w, gate_up, down) · Σ w
    where g = min(gate_e x, limit) and u = min(max(up_e x, -limit), limit)

With α = 1, β = 0 and no limit that is the usual SwiGLU; gpt-oss has others.

The interface hands over which experts each token has chosen and what they weigh. The operator chooses by itself, from numbers whose
softmax weighs the experts: the logarithm of the weights, minus infinity where there is none, makes it choose the same experts,
whatever way the model took to them.

How a model stores and gates its experts is told by comparing what the operator would answer with what the model does, with the
numbers of a forward pass and with numbers large enough to meet any limit; experts that fit no form are exported as transformers'
batched_mm computes them, which copies the weights of every token's experts.
Source of the operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.onnx.ops import symbolic
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "onnxpress_experts"
_COPYING = "batched_mm"  # of transformers' own forms the one whose shapes do not hang on the routing
_TRANSPOSED, _INTERLEAVED = "onnxpress_transposed", "onnxpress_interleaved"  # attributes until the weights are arranged
_TOKENS = 3  # of the recorded forward pass that forms are tried on
_TOLERANCE = 1e-5  # of the largest number
# Forms are tried on multiples of what the forward pass brings: no limit of a gate, of 7 or 10 with trained weights, lies beyond.
_SCALES = (1.0, 1000.0)
_SMALL, _NO_LIMIT = 0.01, 1e6  # a limit of a gate lies between

Experts = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """min(g, limit) · σ(alpha · min(g, limit)) · (u within ±limit + beta), of a gate g and what it lets through, u."""

    alpha: float
    beta: float
    limit: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of two tensors of one shape."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


@dataclass(frozen=True, kw_only=True)
class ExpertsForm:
    """How a module stores and gates its experts.

    transposed: the weights are (experts, in, out), not (experts, out, in). interleaved: gate and up alternate; otherwise all of
    the gate comes first.
    """

    transposed: bool
    interleaved: bool
    gate: Gate


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a model has mixtures of experts that go through transformers' experts interface."""
    return _with_experts(model) is not None


def _with_experts(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model whose experts go through the interface: itself, or the language model in one that takes images too."""
    models = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    chosen = (
        part
        for part in models
        if getattr(part.config, "_experts_implementation", None) and part._can_set_experts_implementation()
    )
    return next(chosen, None)


@contextmanager
def recorded_experts(model: PreTrainedModel, found: dict[torch.nn.Module, ExpertsForm | None]) -> Iterator[None]:
    """Write into `found`, while this lasts, which form each module has whose experts are called; None where none fits."""
    owner = _with_experts(model)
    before = owner and owner.config._experts_implementation

    def record(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        original = ALL_EXPERTS_FUNCTIONS.get_interface(before, type(module).forward.__wrapped__)
        answer: torch.Tensor = original(module, x, index, weights)
        cases = [(scale * x[:_TOKENS], index[:_TOKENS], weights[:_TOKENS]) for scale in _SCALES]
        tried = [(*case, original(module, *case)) for case in cases]
        fitting = (form for form in _forms(module) if all(_fits(form, module, *case) for case in tried))
        found[module] = next(fitting, None) if _routes(index, weights) else None
        return answer

    with _experts_function(model, record):
        yield


@contextmanager
def emitted_experts(model: PreTrainedModel, forms: Mapping[torch.nn.Module, ExpertsForm | None]) -> Iterator[None]:
    """Let the model emit the operator while this lasts, for the modules that have a form. Only for tracing."""
    copying: Experts = ALL_EXPERTS_FUNCTIONS[_COPYING]

    def emit(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        form = forms.get(module)
        return copying(module, x, index, weights) if form is None else _emit(form, module, x, index, weights)

    with _experts_function(model, emit):
        yield


def experts_notes(forms: Mapping[torch.nn.Module, ExpertsForm | None]) -> tuple[str, ...]:
    """What became of a model's mixtures of experts."""
    as_operator = sum(form is not None for form in forms.values())
    notes = [f"{as_operator} mixtures of experts as MoE"] if as_operator else []
    if copied := len(forms) - as_operator:
        notes.append(
            f"{copied} mixtures of experts fit no operator here: the weights of every token's experts are copied, which is slow, and they "
            "stay in floating point"
        )
    return tuple(notes)


def arrange_experts(model: ir.Model) -> None:
    """Give the emitted operators their weights as (experts, out, in) with gate and up alternating, the one form that CPUs have.

    The rearranged copies are made when they are read, one at a time.
    """
    done: set[ir.Value] = set()
    for node in model.graph:
        if _TRANSPOSED not in node.attributes:
            continue
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        transposed, interleaved = (bool(node.attributes.pop(name).as_int()) for name in (_TRANSPOSED, _INTERLEAVED))
        gate_up, gate_up_bias, down = node.inputs[2:5]
        assert gate_up is not None
        node.name = str(gate_up.name).rpartition(".")[0]
        for value, turned, halves in (
            (gate_up, transposed, not interleaved),
            (gate_up_bias, False, not interleaved),
            (down, transposed, False),
        ):
            if value is not None and (turned or halves) and value not in done:
                done.add(value)
                _rearrange(value, turned=turned, halves=halves)


@contextmanager
def _experts_function(model: PreTrainedModel, function: Experts) -> Iterator[None]:
    """Let `function(module, x, index, weights)` compute a model's experts; models without any are left alone."""
    owner = _with_experts(model)
    if owner is None:
        yield
        return
    before = owner.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register(_NAME, function)
    owner.set_experts_implementation(_NAME)
    try:
        yield
    finally:
        owner.set_experts_implementation(before)


def _routes(index: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether the operator can route like this: weights that have logarithms, and no expert twice, which would be one to it."""
    once = all(len(set(chosen)) == len(chosen) for chosen in index.tolist())
    return once and not bool((weights < 0).any())


def _forms(module: Any) -> Iterator[ExpertsForm]:
    """The forms that a module may have: any way to store, and the gate that its answers to a few pairs of numbers tell."""
    g = _SMALL
    pairs = torch.tensor([[g, 0.0], [g, g], [g, _NO_LIMIT]], dtype=torch.float64)
    try:
        nothing, little, most = (answer / g for answer in module._apply_gate(pairs)[:, 0].tolist())
        sigmoid = (little - nothing) / g  # σ(alpha · g)
        alpha, beta = math.log(sigmoid / (1 - sigmoid)) / g, nothing / sigmoid
        limit = most / sigmoid - beta
    except (AttributeError, IndexError, ArithmeticError, RuntimeError, TypeError, ValueError):  # no gate of this kind
        return
    gate = Gate(
        alpha=round(alpha, 6), beta=round(beta, 6), limit=round(limit, 4) if limit < 0.99 * _NO_LIMIT else math.inf
    )
    for transposed in (False, True):
        for interleaved in (False, True):
            yield ExpertsForm(transposed=transposed, interleaved=interleaved, gate=gate)


def _fits(
    form: ExpertsForm,
    module: Any,
    x: torch.Tensor,  # (tokens, hidden)
    index: torch.Tensor,  # (tokens, chosen)
    weights: torch.Tensor,  # (tokens, chosen)
    answer: torch.Tensor,  # (tokens, hidden)
) -> bool:
    """Whether the operator would answer what the module does."""
    try:
        found = [_answer(form, module, *token) for token in zip(x, index, weights, strict=True)]
        difference = (torch.stack(found) - answer).abs().max()
    except (AttributeError, IndexError, RuntimeError):  # without such weights, or with others' shapes
        return False
    return bool(difference <= _TOLERANCE * answer.abs().max())


def _answer(
    form: ExpertsForm, module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What the operator would answer for one token, (hidden,)."""
    gate_up_all, gate_up_bias, down_all, down_bias = _parameters(module)
    found = torch.zeros_like(x)
    for number, weight in zip(index.tolist(), weights, strict=True):
        gate_up, down = (part[number].T if form.transposed else part[number] for part in (gate_up_all, down_all))
        both = gate_up @ x if gate_up_bias is None else gate_up @ x + gate_up_bias[number]
        gate, up = (both[0::2], both[1::2]) if form.interleaved else both.chunk(2)
        one = down @ form.gate(gate, up)
        found = found + weight * (one if down_bias is None else one + down_bias[number])
    return found


def _parameters(module: Any) -> tuple[Any, ...]:
    """Gate and up, down, and their biases where there are any, by the names that the interface gives them."""
    gate_up_bias, down_bias = (getattr(module, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj"))
    return module.gate_up_proj, gate_up_bias, module.down_proj, down_bias


def _emit(form: ExpertsForm, module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate_up, gate_up_bias, down, down_bias = _parameters(module)
    weighed = x.new_zeros(x.shape[0], gate_up.shape[0]).scatter(1, index, weights.to(x.dtype))  # (tokens, experts)
    attributes: dict[str, Any] = {
        "k": index.shape[1],
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        "activation_alpha": form.gate.alpha,
        "activation_beta": form.gate.beta,
        _TRANSPOSED: int(form.transposed),
        _INTERLEAVED: int(form.interleaved),
    }
    if form.gate.limit < math.inf:
        attributes["swiglu_limit"] = form.gate.limit
    inputs = (x, weighed.log(), gate_up, gate_up_bias, down, down_bias)
    out = symbolic("com.microsoft::MoE", inputs, attributes, dtype=x.dtype, shape=x.shape, version=1)
    return out * weights.sum(-1, keepdim=True)


def _rearrange(value: ir.Value, *, turned: bool, halves: bool) -> None:
    """turned: swap the last two axes. halves: let the two halves of what then is the second axis alternate."""
    tensor = value.const_value
    assert tensor is not None
    experts, *shape = tensor.shape.numpy()
    shape = shape[::-1] if turned else shape

    def read() -> ir.TensorProtocol:
        array = tensor.numpy()
        array = array.swapaxes(1, 2) if turned else array
        if halves:
            array = array.reshape(experts, 2, shape[0] // 2, *shape[1:]).swapaxes(1, 2).reshape(experts, *shape)
        return ir.Tensor(np.ascontiguousarray(array), name=value.name)

    value.shape = ir.Shape((experts, *shape))
    value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=value.shape, name=value.name)
