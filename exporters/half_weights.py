"""Keeps the large weights of a language model in half precision, as they were published, for a build that memory does not hold in float32.

A layer has them in float32 while it computes, so that answers are those of the whole model in float32; the graph has them as constants
that are widened where they are read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook

from onnxpress.errors import ConversionError
from onnxpress.exporters.shared_weights import axes_in_memory, read_array
from onnxpress.graph import Widened

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"))
_LARGE = 2**20  # bytes of a weight; smaller ones are float32
# Numbers of a weight at most that takes its turn in memory that is kept; tables and output layers have more.
_ROOM = 2**27
_WHOLE = 256  # bytes of a constant that is one of the weights, and no number beside them


def stored_half(folder: Path) -> torch.dtype | None:
    """The half precision that all weights in a folder are stored in; None where they are stored otherwise, or in several ways."""
    found = set()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="np") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError):
        return None  # said where they are loaded
    floats = found & _FLOATS
    return _HALVES.get(next(iter(floats))) if len(floats) == 1 else None


def widen_buffers(model: torch.nn.Module, skeleton: torch.nn.Module) -> None:
    """Give a model that was made in half precision the buffers of one that was made in float32, but for those that were loaded."""
    made, loaded = dict(skeleton.named_buffers(remove_duplicate=False)), set(model.state_dict())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            whole = f"{path}.{name}".lstrip(".")
            if buffer.is_floating_point():
                module._buffers[name] = (buffer if whole in loaded else made[whole]).float()


@contextmanager
def without_parameters() -> Iterator[None]:
    """Modules that this thread makes while this lasts have no memory for their parameters, but buffers as ever."""
    thread = threading.get_ident()

    def laid_out(_: torch.nn.Module, __: str, weight: torch.nn.Parameter | None) -> Any:
        here = threading.get_ident() == thread  # the hook is all threads'
        return _parameter(weight.to("meta")) if here and weight is not None else weight

    hook = register_module_parameter_registration_hook(laid_out)
    try:
        yield
    finally:
        hook.remove()


class HalfWeights:
    """The large weights of a model, in half precision but while their layers compute; the small ones become float32."""

    def __init__(self, model: torch.nn.Module) -> None:
        model.requires_grad_(False)
        self._places: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self._traced = False
        self._room = torch.empty(0)
        self._in_use: torch.nn.Module | None = None
        small: dict[torch.nn.Parameter, torch.nn.Parameter] = {}  # one for all who share it
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype not in _HALVES.values():
                    continue
                if weight.nbytes >= _LARGE and weight.dim() > 1:
                    self._places.append((module, name, weight))
                else:
                    module._parameters[name] = small.setdefault(weight, _parameter(weight.float()))
        for module in {module for module, _, _ in self._places}:
            module.register_forward_pre_hook(self._widen)
            module.register_forward_hook(self._narrow, always_call=True)

    @contextmanager
    def traced(self) -> Iterator[Mapping[int, torch.Tensor]]:
        """Let the model be traced in float32 while this lasts; gives the weights by where the memory begins that stands for them.

        That memory is never touched, so that it takes none.
        """
        stand_ins = {
            weight: _parameter(torch.empty(weight.shape, dtype=torch.float32)) for _, _, weight in self._places
        }
        self._traced = True
        try:
            for module, name, weight in self._places:
                module._parameters[name] = stand_ins[weight]
            yield {stand_in.data_ptr(): weight.data for weight, stand_in in stand_ins.items()}
        finally:
            self._traced = False
            for module, name, weight in self._places:
                module._parameters[name] = weight

    def _widen(self, layer: torch.nn.Module, _: Any) -> None:
        for module, name, weight in self._places:
            if module is layer and not self._traced:
                module._parameters[name] = _parameter(self._in_room(weight, layer))

    def _narrow(self, layer: torch.nn.Module, *_: Any) -> None:
        for module, name, weight in self._places:
            if module is layer and not self._traced:
                module._parameters[name] = weight
        if self._in_use is layer:
            self._in_use = None

    def _in_room(self, weight: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """A weight in float32, in memory that all take in turns: to get it from the system anew takes longer than the cast."""
        # A layer may be around this one, or have two; and for the largest the room would be theirs alone.
        if self._in_use is not None or weight.numel() > _ROOM:
            return weight.float()
        self._in_use = layer
        with torch.inference_mode(False):
            if self._room.numel() < weight.numel():
                self._room = torch.empty(weight.numel())
        return self._room[: weight.numel()].as_strided(weight.shape, weight.stride()).copy_(weight)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def put_weights(model: ir.Model, weights: Mapping[int, torch.Tensor]) -> None:
    """Put weights of half precision where a traced graph has the memory that stands for them. Raises ConversionError."""
    for value in model.graph.initializers.values():
        if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        array = value.const_value.numpy()
        start = array.ctypes.data
        if start in weights:
            half, axes = weights[start], axes_in_memory(array)
            if array.transpose(axes).shape == tuple(half.shape):
                whole = np.transpose(read_array(half), np.argsort(axes))
                value.const_value = Widened(ir.Tensor(whole, name=value.name))
                continue
        if array.nbytes > _WHOLE and any(begin <= start < begin + 2 * half.nbytes for begin, half in weights.items()):
            raise ConversionError(
                f"The constant {value.name} is a part of a weight, or one in another form, and the weights stay in half precision, since "
                "memory does not hold them in float32: build the model on a machine with more."
            )
