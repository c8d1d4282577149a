"""Small graphs for the tests of QDQ passes, and inputs for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from small_graphs import small_graph

from onnxpress.graph import Graph

IMAGE = "float[batch,3,8,8] x"
RESIDUAL = """
c0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
r0 = Relu(c0)
c1 = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=16>(r0, w1, b1)
s = Add(c1, r0)
r1 = Relu(s)
p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(p)
k = Concat<axis=1>(p, a)
c2 = Conv<kernel_shape=[1,1]>(k, w2)
t = Clip(c2, zero, six)
g = Sigmoid(t)
m = Mul(t, g)
q = ReduceMean<keepdims=0>(m, axes)
y = Gemm<transB=1>(q, w3, b3)
"""


def residual(opset: int = 18) -> Graph:
    random = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return (random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    weights = {
        "w0": weight(16, 3, 3, 3),
        "b0": 0.1 * weight(16),
        "w1": weight(16, 1, 3, 3),
        "b1": 0.1 * weight(16),
        "w2": weight(8, 32, 1, 1),
        "w3": weight(10, 8),
        "b3": 0.1 * weight(10),
        "zero": np.float32(0),
        "six": np.float32(6),
        "axes": np.array([2, 3]),
    }
    return small_graph(RESIDUAL, inputs=IMAGE, outputs="float[batch,10] y", weights=weights, opset=opset, ir_version=10)


def images(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Of unequal colours and contrast, so that means over an image tell them apart; within bounds that few samples show."""
    random = np.random.default_rng(seed)
    colours = random.uniform(-2, 2, (count, 1, 3, 1, 1)), random.uniform(0.2, 1, (count, 1, 1, 1, 1))
    noise = random.uniform(-1, 1, (count, 1, 3, 8, 8))
    return [{"x": image.astype(np.float32)} for image in colours[0] + colours[1] * noise]


def together(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


NORMED = """
n = LayerNormalization<axis=-1>(x, g, b)
q = MatMul(n, wq)
k = MatMul(n, wk)
h = Mul(q, k)
y = MatMul(h, wo)
"""


def normed(*, residual_reads_norm: bool = False) -> Graph:
    """A norm with outliers in two channels, as language models and their encoders have them."""
    random = np.random.default_rng(0)
    scale = random.uniform(0.5, 1.5, 32)
    scale[[3, 17]] = 60
    weights = {
        "g": scale,
        "b": random.standard_normal(32),
        **{name: random.standard_normal((32, 32)) / 8 for name in ("wq", "wk", "wo")},
    }
    for name in ("wq", "wk"):
        weights[name][[3, 17]] /= 60
    body = NORMED.replace("y = MatMul(h, wo)", "o = MatMul(h, wo)\ny = Add(o, n)") if residual_reads_norm else NORMED
    return small_graph(body, weights={name: array.astype(np.float32) for name, array in weights.items()})


def vectors(count: int, seed: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((1, 16, 32)).astype(np.float32)} for _ in range(count)]
