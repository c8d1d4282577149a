"""Finds attention in models that compute it by themselves, not through transformers' attention interface (Falcon, GPT-Neo, XGLM).

    scores = q kᵀ   →   scale, mask, …   →   weights = softmax(scores)   →   weights v

Whatever lies between is followed from one product to the softmax to the other product, and what it comes to is told by the weights:
they have to be those of causal attention, with one scale and perhaps a window, on a text of the longest context. A bias (ALiBi) is not that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from onnxpress.errors import ConversionError
from onnxpress.exporters.attention import registered_attention, uses_interface

_PRODUCTS = frozenset({"matmul", "bmm"})
# Between the products, without the underscores of methods and the letters that their other forms begin with (__radd__, __itruediv__).
_BETWEEN = frozenset({"add", "mul", "div", "truediv", "where", "masked_fill", "max", "maximum", "to", "float", "type"})
_BETWEEN |= frozenset({"view", "reshape", "contiguous", "dropout", "softmax"})
_TOLERANCE = 1e-3  # of a weight
_NONE = 1e-6  # a weight that is as good as none

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], "torch.Tensor | None"]


@dataclass(frozen=True, kw_only=True)
class _Followed:
    """A tensor of scores, or of weights, and the query and key, turned, whose product it began as.

    heads: how many, None before a tensor with an axis for them was met.
    """

    tensor: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    heads: int | None
    softmaxed: bool

    def by_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, …) of a tensor whose heads may be part of the batch."""
        return x if x.dim() == 4 else x.reshape(-1, self.heads or 1, *x.shape[-2:])


class OwnAttention(TorchFunctionMode):
    """Lets `attend(query, key, value, weights)` stand for the second product of every attention while this lasts; None leaves it as it is.

    Queries, keys and values are (batch, heads, length, head_dim), and so is the answer.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend
        self._known: dict[int, _Followed] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        kwargs = kwargs or {}
        known = next((self._known[id(part)] for part in (*args, *kwargs.values()) if id(part) in self._known), None)
        if name in _PRODUCTS and known is not None and known.softmaxed and known.tensor is args[0]:
            value = args[1]
            given = (known.query, known.key.transpose(-1, -2), value, known.tensor)
            self._known.clear()  # scores of long texts are large
            if (answer := self._attend(*map(known.by_heads, given))) is None:
                return function(*args, **kwargs)
            return answer.reshape(*known.tensor.shape[:-2], *answer.shape[-2:])
        answer = function(*args, **kwargs)
        if name in _PRODUCTS:
            self._follow(answer, args[0], args[1])
        elif name == "baddbmm":
            _, query, key = (*args, *(kwargs[part] for part in ("batch1", "batch2") if part in kwargs))[:3]
            self._follow(answer, query, key)
        elif known is not None and (name in _BETWEEN or name[1:] in _BETWEEN):
            softmaxed = known.softmaxed or name == "softmax"
            self._follow(answer, known.query, known.key, heads=known.heads, softmaxed=softmaxed)
        return answer

    def _follow(
        self,
        tensor: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        heads: int | None = None,
        softmaxed: bool = False,
    ) -> None:
        if tensor.dim() == 4 and isinstance(tensor.shape[1], int):  # a length is none while a model is traced
            heads = tensor.shape[1]
        self._known[id(tensor)] = _Followed(tensor=tensor, query=query, key=key, heads=heads, softmaxed=softmaxed)


@contextmanager
def replaced_attention(
    model: PreTrainedModel,
    name: str,
    attention: Callable[..., tuple[torch.Tensor, None]],
    mask: Callable[..., Any],
) -> Iterator[None]:
    """Let `attention`, as the interface calls it, stand for the model's while this lasts, whether it uses the interface or not.

    name, mask: for the interface.
    """
    if uses_interface(model):
        with registered_attention(model, name, attention, mask):
            yield
        return

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return attention(model, query, key, value, None)[0].transpose(1, 2)

    with OwnAttention(attend):
        yield


def scale_and_window(
    query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, name: str
) -> tuple[float, int | None]:
    """Of causal attention that has these weights, (batch, heads, length, length). Raises ConversionError."""
    products = query @ key.transpose(2, 3)
    last = weights[..., -1:, :].double()
    seen = last > 0
    count = seen.sum(-1, keepdim=True)
    # The logarithms of weights are products, scaled and moved.
    x, y = (torch.where(seen, part, 0.0) for part in (products[..., -1:, :].double(), last.log()))
    x, y = (torch.where(seen, part - part.sum(-1, keepdim=True) / count, 0.0) for part in (x, y))
    scale = float((x * y).sum() / (x * x).sum())
    index = torch.arange(weights.shape[-1])
    back = index[:, None] - index
    widest = 1 + int(back.masked_fill(~(weights > 0).any(0).any(0), -1).max())
    for window in (len(index), widest):
        expected = (products * scale).masked_fill((back < 0) | (back >= window), -torch.inf).softmax(-1)
        if torch.allclose(expected, weights, rtol=_TOLERANCE, atol=_NONE):
            return scale, None if window == len(index) else window
    raise ConversionError(
        f"{name} computes attention by itself, not through transformers' attention interface, and otherwise than as "
        "softmax(q kᵀ · scale) v over all tokens before or a window of them."
    )
