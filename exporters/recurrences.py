"""Emits ONNX Runtime's operator for layers that read a text in a state of one size: linear attention, state spaces, convolutions.

    S ← exp(g) S + β k (v - exp(g) Sᵀ k)ᵀ,   o = scale · Sᵀ q      the gated delta rule (Qwen3-Next and 3.5, OLMo Hybrid, Kimi Linear)
    S ← exp(g) S + k vᵀ,                     o = scale · Sᵀ q      Mamba 2, whose time steps scale v and g

transformers computes them in functions that are the same in every architecture; they are known by their parameters, and what they
answer is compared with the operator's formula. The past comes in and the present goes out as tensors: `past_states.N.recurrent`,
(batch, heads, key_dim, value_dim), and `past_states.N.conv`, (batch, kernel - 1, channels), the last numbers that a convolution has
read. Padding changes no state.
Sources: Yang et al. 2024, Gated Delta Networks; Dao and Gu 2024, Transformers are SSMs;
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.onnx.ops import symbolic, symbolic_multi_out
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from onnxpress.errors import ConversionError
from onnxpress.exporters.replaced import replaced_functions

PAST_STATES, PRESENT_STATES = "past_states", "present_states"  # how the names of inputs and outputs begin
_TOLERANCE = 1e-4  # of the largest number: transformers computes chunks of texts at once
_NORM_EPSILON = 1e-6  # of queries and keys that are brought to length 1


@dataclass(frozen=True, kw_only=True)
class State:
    """What one layer keeps of a text. kind: conv or recurrent. shape: without the batch."""

    kind: str
    shape: tuple[int, ...]


@dataclass
class Recurrence:
    """What one forward pass reads and writes. lengths: int32 (batch,), new tokens of each row. past: in the order of the calls.

    present: what was written so far.
    """

    lengths: torch.Tensor
    past: list[torch.Tensor]
    present: list[torch.Tensor] = field(default_factory=list)

    def next_past(self) -> torch.Tensor:
        """The state of the call that is running; each has one."""
        return self.past[len(self.present)]


def real_tokens(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """bool (batch, length): false for the padding of rows that have so many tokens."""
    return torch.arange(length)[None] < lengths[:, None]


def state_names(states: tuple[State, ...], prefix: str) -> list[str]:
    """Of the inputs or outputs: numbered by kind."""
    counts: dict[str, int] = {}
    names = []
    for state in states:
        counts[state.kind] = number = counts.get(state.kind, -1) + 1
        names.append(f"{prefix}.{number}.{state.kind}")
    return names


@contextmanager
def recorded_recurrences(model: PreTrainedModel, found: list[State]) -> Iterator[None]:
    """Write into `found`, while this lasts, the states of all layers that keep one. Raises ConversionError where one is of another kind."""

    def convolution(original: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any = None, **options: Any) -> Any:
        answer = original(x, weight, bias, **options)
        before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[1])
        expected, _ = _convolved(before, x, weight, bias, options.get("activation"))
        _compare(model, original, expected, answer)
        found.append(State(kind="conv", shape=tuple(before.shape[1:])))
        return answer

    def recurrence(operands: Callable[..., _Operands], original: Any, *args: Any, **options: Any) -> Any:
        answer = original(*args, **options)
        if options.get("initial_state") is not None or options.get("initial_states") is not None:
            raise ConversionError(f"{type(model).__name__} begins with a state that is not zero.")
        given = operands(_unit_length, torch.ones(1), *args, **options)
        _compare(model, original, given.residual(_recurrent(given)), answer[0] if isinstance(answer, tuple) else answer)
        found.append(State(kind="recurrent", shape=(given.key.shape[2], given.key.shape[3], given.value.shape[3])))
        return answer

    with _replaced(model, convolution, partial(recurrence, _delta_rule), partial(recurrence, _state_space)):
        yield


@contextmanager
def emitted_recurrences(model: PreTrainedModel, current: Callable[[], Recurrence]) -> Iterator[None]:
    """Let the model emit the operators while this lasts. current: of the forward pass that is running. Only for tracing."""

    def convolution(_: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any = None, **options: Any) -> torch.Tensor:
        step = current()
        out, joined = _convolved(step.next_past(), x, weight, bias, options.get("activation"))
        batch, length, channels = joined.shape
        kept = weight.shape[1] - 1
        rows = torch.arange(batch)[:, None] * length + step.lengths.to(torch.int64)[:, None] + torch.arange(kept)[None]
        kept_numbers = joined.reshape(-1, channels).index_select(0, rows.reshape(-1))
        step.present.append(kept_numbers.reshape(batch, kept, channels))
        return out

    def recurrence(operands: Callable[..., _Operands], returns_pair: bool, _: Any, *args: Any, **options: Any) -> Any:
        step = current()
        real = real_tokens(step.lengths, args[0].shape[1])[..., None].to(torch.float32)
        given = operands(_emitted_unit_length, real, *args, **options)
        out, state = _emitted(given, step.next_past())
        step.present.append(state)
        answer = given.residual(out)
        return (answer, None) if returns_pair else answer

    with _replaced(
        model, convolution, partial(recurrence, _delta_rule, True), partial(recurrence, _state_space, False)
    ):
        yield


@contextmanager
def deaf_recurrences(model: PreTrainedModel) -> Iterator[None]:
    """Let no token hear of others through these layers while this lasts: each answers from the token's own numbers."""

    def delta_rule(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any, **___: Any) -> Any:
        return value, None

    def unchanged(_: Any, x: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
        return x

    with _replaced(model, unchanged, delta_rule, unchanged):
        yield


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """query, key (batch, length, heads, key_dim), value (batch, length, heads, value_dim), decay, the logarithm, (batch, length, heads)
    or with a number for each of the key's, and beta (batch, length, heads), None where the rule is not the delta rule. residual: what the
    answer becomes.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor | None
    scale: float
    residual: Callable[[torch.Tensor], torch.Tensor]


Normalize = Callable[[torch.Tensor], torch.Tensor]


def _delta_rule(
    unit_length: Normalize,
    real: torch.Tensor,  # (batch, length, 1): 0 for padding
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> _Operands:
    if use_qk_l2norm_in_kernel:
        query, key = unit_length(query), unit_length(key)
    heads = value.shape[2]
    return _Operands(
        query=_repeated(query, heads),
        key=_repeated(key, heads),
        value=value,
        decay=g * (real if g.dim() == 3 else real[..., None]),
        beta=beta * real,
        scale=float(query.shape[3] ** -0.5),
        residual=lambda out: out,
    )


def _state_space(
    _: Normalize,
    real: torch.Tensor,
    x: torch.Tensor,  # (batch, length, heads, head_dim)
    dt: torch.Tensor,  # (batch, length, heads)
    A: torch.Tensor,  # noqa: N803, as the paper and every implementation name them
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    *__: Any,
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **___: Any,
) -> _Operands:
    if x.dim() != 4:
        raise ConversionError(
            "The model has state spaces of the first kind (Mamba 1), in which every number of a state has a decay of its own; ONNX "
            "Runtime has no operator for them."
        )
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    dt = dt.clamp(*dt_limit) * real
    return _Operands(
        query=_repeated(C, x.shape[2]),
        key=_repeated(B, x.shape[2]),
        value=x * dt[..., None],
        decay=dt * A,
        beta=None,
        scale=1.0,
        residual=lambda out: out if D is None else out + D[:, None] * x,
    )


def _repeated(groups: torch.Tensor, heads: int) -> torch.Tensor:
    count = heads // groups.shape[2]
    return groups if count == 1 else groups.repeat_interleave(count, 2)


def _unit_length(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + _NORM_EPSILON)


def _emitted_unit_length(x: torch.Tensor) -> torch.Tensor:
    """A root-mean-square norm whose weight takes the number of numbers out again."""
    size = x.shape[-1]
    attributes: dict[str, Any] = {"axis": -1, "epsilon": _NORM_EPSILON / size, "stash_type": 1}
    weight = torch.full((size,), size**-0.5)
    return symbolic("SimplifiedLayerNormalization", (x, weight), attributes, dtype=x.dtype, shape=x.shape, version=1)


def _recurrent(given: _Operands) -> torch.Tensor:
    """What the operator answers to a text without a past, token by token."""
    state = torch.zeros_like(given.key[:, 0, :, :, None] * given.value[:, 0, :, None])
    answers = []
    for query, key, value, decay, *beta in zip(
        *(
            part.unbind(1)
            for part in (given.query, given.key, given.value, given.decay, given.beta)
            if part is not None
        ),
        strict=True,
    ):
        state = state * (decay[..., None, None] if decay.dim() == 2 else decay[..., None]).exp()
        if beta:
            value = (value - (state * key[..., None]).sum(2)) * beta[0][..., None]
        state = state + key[..., None] * value[:, :, None]
        answers.append((state * query[..., None]).sum(2) * given.scale)
    return torch.stack(answers, 1)


def _emitted(given: _Operands, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, value_dim = given.value.shape
    inputs = [given.query, given.key, given.value, past, given.decay, given.beta]
    joined = [part if part is None or part is past else part.reshape(batch, length, -1) for part in inputs]
    out, state = symbolic_multi_out(
        "com.microsoft::LinearAttention",
        joined[: None if given.beta is not None else -1],
        {
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "scale": given.scale,
            "update_rule": "gated" if given.beta is None else "gated_delta",
        },
        dtypes=(given.value.dtype, past.dtype),
        shapes=((batch, length, heads * value_dim), past.shape),
        version=1,
    )
    return out.reshape(batch, length, heads, value_dim), state


def _convolved(
    before: torch.Tensor,  # (batch, kernel - 1, channels)
    x: torch.Tensor,  # (batch, channels, length)
    weight: torch.Tensor,  # (channels, kernel)
    bias: torch.Tensor | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, channels, length) after a convolution of each channel, and what it read, (batch, kernel - 1 + length, channels).

    As a sum of products: for one token ONNX Runtime's Conv takes seven times as long, for 128 two thirds.
    """
    joined = torch.cat((before, x.transpose(1, 2)), 1)
    last = weight.shape[1] - 1
    parts = [joined[:, tap : tap - last or None] * weight[:, tap] for tap in range(last + 1)]
    out = functools.reduce(torch.add, parts if bias is None else [*parts, bias])
    return (out if activation is None else ACT2FN[activation](out)).transpose(1, 2), joined


def _compare(model: PreTrainedModel, original: Any, expected: torch.Tensor, answer: torch.Tensor) -> None:
    if not torch.allclose(expected, answer, rtol=0, atol=_TOLERANCE * float(answer.abs().max())):
        name = getattr(original, "__name__", "a function")
        raise ConversionError(
            f"{type(model).__name__} computes in {name} something else than ONNX Runtime's operators do."
        )


@contextmanager
def _replaced(model: PreTrainedModel, convolution: Any, delta_rule: Any, state_space: Any) -> Iterator[None]:
    """Let these, each called with the original first, stand for the model's functions while this lasts."""

    def chosen(_name: str, function: Any) -> Callable[..., Any] | None:
        names = _parameters(function)
        if names[:5] == ["query", "key", "value", "g", "beta"]:
            return partial(delta_rule, function)
        if names[:5] == ["hidden_states", "dt", "A", "B", "C"]:
            return partial(state_space, function)
        if names[:2] == ["hidden_states", "weight"] and "activation" in names:
            return partial(convolution, function)
        return None

    with replaced_functions(model, chosen):
        yield


def _parameters(function: Any) -> list[str]:
    if not inspect.isfunction(function):
        return []
    return list(inspect.signature(function).parameters)
