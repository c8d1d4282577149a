"""Writes the graph that a build for `cuda` gives for a decoder of Qwen2's kind, with random weights that all lie in one file.

Speed does not depend on weights, and a build of seven billion takes long. tests/pipeline/test_gpu_decoder_graph.py holds this graph against
one that the product built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxpress.manifest import Signature, TensorSpec

WEIGHTS = "weights.bin"
MICROSOFT = "com.microsoft"
BLOCK = 32  # weights that share a scale, where they have 4 bits
_BYTES: dict[int, int] = {TensorProto.FLOAT16: 2, TensorProto.UINT8: 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder, as its config names them. tied: whether the output layer is the embedding table."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    context: int = 4096

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Weights that a step multiplies by: all but a table that only embeds, norms and biases."""
        attention = self.hidden * (self.heads + 2 * self.kv_heads) * self.head + self.heads * self.head * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    def bytes_per_step(self, bits: int, past: int) -> float:
        """Bytes that one step has to read: the weights with their scales, and the keys and values of the tokens before."""
        weight = 2.0 if bits == 16 else bits / 8 + 2 / BLOCK
        return self.weights * weight + 2 * 2 * self.layers * self.kv_heads * self.head * past

    def operations(self, tokens: int) -> float:
        """Additions and multiplications of a prompt of so many tokens; the output layer for its last alone."""
        inner = self.weights - self.vocabulary * self.hidden
        attention = 2 * 2 * self.layers * self.hidden * tokens * tokens / 2  # causal: half of it
        return 2.0 * (inner * tokens + self.vocabulary * self.hidden) + attention


SHAPES = {
    "qwen2.5-0.5b": Shape(layers=24, hidden=896, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936, tied=True),
    "qwen2.5-7b": Shape(
        layers=28, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False
    ),
}


def write(shape: Shape, bits: int, folder: Path) -> tuple[Path, Signature]:
    """model.onnx and its weights in `folder`, float16 (bits 16) or in blocks of 4 bits, with the signature it answers to."""
    graph = _Graph()
    half = shape.head // 2
    angles = np.outer(np.arange(shape.context), 1e6 ** -(np.arange(half) / half))
    cos = graph.constant("cos", np.cos(angles).astype(np.float16))
    sin = graph.constant("sin", np.sin(angles).astype(np.float16))
    norm = graph.constant("norm", np.ones(shape.hidden, np.float16))
    width = (shape.heads + 2 * shape.kv_heads) * shape.head
    bias = graph.constant("bias", np.random.default_rng(0).normal(0, 0.02, width).astype(np.float16))
    last = graph.op("Sub", [graph.op("Add", ["past_lengths", "lengths"]), graph.constant("one", np.array(1, np.int32))])

    table = [shape.vocabulary, shape.hidden]
    if bits == 16:
        hidden = graph.op("Gather", [graph.large("table", TensorProto.FLOAT16, table), "input_ids"])
    else:
        blocks = graph.large("table", TensorProto.UINT8, [table[0], table[1] * bits // 8])
        scales = graph.large("table_scales", TensorProto.FLOAT16, [table[0], table[1] // BLOCK])
        attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": bits}
        hidden = graph.op("GatherBlockQuantized", [blocks, "input_ids", scales], domain=MICROSOFT, **attributes)

    def product(given: str, name: str, inputs: int, outputs: int, added: str = "") -> str:
        if bits == 16:
            found = graph.op("MatMul", [given, graph.large(name, TensorProto.FLOAT16, [inputs, outputs])])
            return graph.op("Add", [found, added]) if added else found
        blocks = graph.large(name, TensorProto.UINT8, [outputs, inputs // BLOCK, BLOCK * bits // 8])
        scales = graph.large(f"{name}_scales", TensorProto.FLOAT16, [outputs, inputs // BLOCK])
        attributes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        extra = ["", "", added] if added else []
        return graph.op("MatMulNBits", [given, blocks, scales, *extra], domain=MICROSOFT, **attributes)

    def normalized_sum(one: str, other: str) -> tuple[str, str]:
        names = [graph.name(), "", "", graph.name()]
        graph.op("SkipSimplifiedLayerNormalization", [one, other, norm], names, domain=MICROSOFT, epsilon=1e-6)
        return names[0], names[3]

    state = graph.op("SimplifiedLayerNormalization", [hidden, norm], axis=-1, epsilon=1e-6, stash_type=1)
    for layer in range(shape.layers):
        packed = product(state, f"qkv_{layer}", shape.hidden, width, bias)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        attended = graph.name()
        graph.op(
            "GroupQueryAttention",
            [packed, "", "", *past, last, "total_length", cos, sin],
            [attended, *(name.replace("past_key_values", "present") for name in past)],
            domain=MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            scale=1 / math.sqrt(shape.head),
            do_rotary=1,
            rotary_interleaved=0,
        )
        projected = product(attended, f"o_{layer}", shape.heads * shape.head, shape.hidden)
        state, hidden = normalized_sum(hidden, projected)
        gate = product(state, f"gate_{layer}", shape.hidden, shape.intermediate)
        gate = graph.op("Mul", [gate, graph.op("Sigmoid", [gate])])  # SiLU, which ONNX Runtime makes one operator
        up = product(state, f"up_{layer}", shape.hidden, shape.intermediate)
        down = product(graph.op("Mul", [gate, up]), f"down_{layer}", shape.intermediate, shape.hidden)
        state, hidden = normalized_sum(hidden, down)

    rows = graph.op("Reshape", [state, graph.constant("rows", np.array([-1, shape.hidden]))])
    flat = graph.op("Reshape", ["logit_indices", graph.constant("flat", np.array([-1]))])
    chosen = graph.op("Gather", [rows, flat], axis=0)
    if bits == 16:
        head = "table" if shape.tied else graph.large("head", TensorProto.FLOAT16, table)
        logits = graph.op("Gemm", [chosen, head], transB=1)
    else:
        logits = product(chosen, "head", shape.hidden, shape.vocabulary)
    graph.op("Cast", [logits], ["logits"], to=TensorProto.FLOAT)

    signature = _signature(shape)
    folder.mkdir(parents=True, exist_ok=True)
    _write_random(folder / WEIGHTS, graph.largest)
    onnx.save(graph.model(signature), folder / "model.onnx")
    return folder / "model.onnx", signature


def _signature(shape: Shape) -> Signature:
    bounds = (0, shape.context)
    kept = ("batch", shape.kv_heads, "capacity", shape.head)
    names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
    return Signature(
        task="text-generation",
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length"), bounds=(0, shape.vocabulary - 1)),
            TensorSpec(name="past_lengths", dtype="int32", shape=("batch",), bounds=bounds),
            TensorSpec(name="lengths", dtype="int32", shape=("batch",), bounds=bounds),
            TensorSpec(name="logit_indices", dtype="int64", shape=("answers",)),
            TensorSpec(name="total_length", dtype="int32", shape=(), bounds=bounds),
            *(TensorSpec(name=f"past_key_values.{name}", dtype="float16", shape=kept) for name in names),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("answers", shape.vocabulary)),
            *(TensorSpec(name=f"present.{name}", dtype="float16", shape=kept) for name in names),
        ),
        axes={
            "answers": (1, 2**20),
            "batch": (1, 1024),
            "capacity": (1, shape.context),
            "length": (1, shape.context),
        },
    )


def _write_random(path: Path, size: int) -> None:
    """`size` bytes of float16 numbers around 0, 64 MiB of them over and over.

    As scales of 4-bit blocks, which have numbers from -8 to 7, they give weights of a standard deviation of 0.02, as models begin with.
    """
    numbers = np.random.default_rng(0).standard_normal(min(size // 2, 2**25) + 1, np.float32)
    content = memoryview((numbers * 0.005).astype(np.float16).tobytes())
    with path.open("wb") as file:
        while size > 0:
            size -= file.write(content[:size])


class _Graph:
    """Nodes and initializers as they come. largest: bytes of the largest initializer in the file, where all begin at 0."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.names = 0
        self.largest = 0

    def name(self) -> str:
        self.names += 1
        return f"value_{self.names}"

    def op(self, kind: str, inputs: list[str], outputs: list[str] | None = None, **more: Any) -> str:
        outputs = outputs or [self.name()]
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **more))
        return outputs[0]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def large(self, name: str, kind: int, dims: list[int]) -> str:
        size = math.prod(dims) * _BYTES[kind]
        self.largest = max(self.largest, size)
        tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        return name

    def model(self, signature: Signature) -> Any:
        def values(specs: tuple[TensorSpec, ...]) -> list[Any]:
            kinds = {spec.dtype: helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)) for spec in specs}
            return [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]

        graph = helper.make_graph(
            self.nodes, "decoder", values(signature.inputs), values(signature.outputs), self.initializers
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
