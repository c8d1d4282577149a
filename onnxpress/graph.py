"""The graph that travels through a build: an onnx_ir model and its signature."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.manifest import Signature


@dataclass(kw_only=True)
class Graph:
    """An `onnx_ir.Model` with the signature it answers to. Weights are shared between clones."""

    model: ir.Model
    signature: Signature

    def clone(self) -> Graph:
        """A copy whose nodes can be changed freely; the weights are not copied."""
        return Graph(model=self.model.clone(), signature=self.signature)

    def operators(self) -> dict[str, int]:
        """How often each operator occurs, subgraphs included; contrib operators carry their domain."""
        counts = Counter(
            node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}"
            for node in self.model.graph.all_nodes()
        )
        return dict(sorted(counts.items()))

    def digest(self) -> str:
        """SHA-256 over nodes and weights."""
        total = hashlib.sha256()
        model = self.model.clone()
        for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING:  # a text has no bytes of its own
                total.update(f"{value.name} {tensor.dtype} {tensor.shape} ".encode())
                total.update(tensor.tobytes())
                value.const_value = ir.ExternalTensor(
                    "", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name)
                )
        total.update(ir.to_proto(model).SerializeToString(deterministic=True))
        return total.hexdigest()

    def weight_bytes(self) -> int:
        """Total size of the initializers in bytes."""
        return sum(
            value.const_value.nbytes
            for value in self.model.graph.initializers.values()
            if value.const_value is not None
        )

    def widens(self) -> bool:
        """Whether there are constants that are kept in half precision."""
        return any(isinstance(value.const_value, Widened) for value in self.model.graph.initializers.values())


class Widened(ir.LazyTensor):
    """A constant of float32 that memory and files hold in half precision, without a loss; each reading makes it anew."""

    def __init__(self, half: ir.Tensor[Any]) -> None:
        super().__init__(partial(_in_float32, half), ir.DataType.FLOAT, ir.Shape(half.shape), name=half.name)
        self.half = half


def _in_float32(half: ir.Tensor[Any]) -> ir.Tensor[Any]:
    return ir.Tensor(half.numpy().astype(np.float32), name=half.name)
