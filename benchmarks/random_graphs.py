"""Random graphs on OpenVINO beside the CPU provider without its optimizers: what it misreads shows here. No clock is read.

    python benchmarks/random_graphs.py [--graphs 1000] [--first 0] [--precision int8-qdq fp32] [--as-exported] [--fixed]

Each graph is a chain of operators as encoders and convolution networks have them, with random weights, spelled as a build for OpenVINO spells
it; --as-exported leaves that out. Floats are bfloat16 where the processor has it, but for fp32. Those are printed whose answers, for one to
three samples, have a likeness (share of variance) below LEAST; and those that do not compile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxpress.calibration import ActivationStream, Calibration
from onnxpress.errors import OnnxpressError
from onnxpress.foreign import open_onnx
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.openvino_forms import respell
from onnxpress.optimizers.targets import target
from onnxpress.runtime import Session

LEAST = {"int8-qdq": 0.97, "bf16": 0.99, "fp32": 0.9999}
LAST = 16  # features of the last layer
OPSET, IR_VERSION = 21, 10

Array = npt.NDArray[Any]


class Chain:
    """A graph on its way: the value at its end, its sizes without the batch, and earlier values for residual sums."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        size = int(self.random.choice([4, 6]))
        width = int(self.random.choice([8, 20, 30, 32]))
        self.sizes = [width, size, size] if self.random.random() < 0.6 else [size, width]
        self.given = list(self.sizes)
        self.end = "x"
        self.earlier: list[tuple[str, list[int]]] = []
        self.signs = self.random.random() < 0.5  # whether factors may be negative

    def constant(self, array: Any) -> str:
        """A new initializer's name."""
        self.weights.append(numpy_helper.from_array(np.asarray(array), f"c{len(self.weights)}"))
        return self.weights[-1].name

    def put(self, op_type: str, *inputs: str, sizes: list[int] | None = None, **attributes: Any) -> str:
        """A node behind the end; without inputs it reads the end."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs or (self.end,)), [name], name=name, **attributes))
        self.end, self.sizes = name, self.sizes if sizes is None else sizes
        return name

    def channels(self) -> tuple[int, ...]:
        """The shape of a number for each channel."""
        return (self.sizes[0], 1, 1) if len(self.sizes) == 3 else (self.sizes[-1],)

    def factors(self, shape: tuple[int, ...]) -> Array:
        """Of 0.5 to 1.5, some of them negative in some graphs."""
        found = self.random.uniform(0.5, 1.5, shape)
        return (found * np.sign(self.random.standard_normal(shape)) if self.signs else found).astype(np.float32)

    def normal(self, *shape: int, of: int = 1) -> Array:
        """Standard normal numbers, for weights that sum up `of` of them."""
        return (self.random.standard_normal(shape) / np.sqrt(of)).astype(np.float32)

    def linear(self, width: int, *, bias: bool) -> None:
        """Over the last axis."""
        inner = self.sizes[-1]
        self.put(
            "MatMul", self.end, self.constant(self.normal(inner, width, of=inner)), sizes=[*self.sizes[:-1], width]
        )
        if bias:
            self.put("Add", self.end, self.constant(self.normal(width)))

    def convolve(self, width: int, kernel: int, *, bias: bool, group: int = 1, height: int = 0) -> None:
        """Of an image, whose size stays. kernel: as high as it is wide, where no height is given."""
        inner, high = self.sizes[0] // group, height or kernel
        weight = self.normal(width, inner, high, kernel, of=inner * high * kernel)
        inputs = [self.end, self.constant(weight)] + ([self.constant(self.normal(width))] if bias else [])
        pads = [high // 2, kernel // 2, (high - 1) // 2, (kernel - 1) // 2]
        self.put("Conv", *inputs, sizes=[width, *self.sizes[1:]], pads=pads, group=group)

    def convolve_widely(self) -> None:
        """With a long kernel, groups of channels by themselves."""
        group, kernel = (int(self.random.choice(choices)) for choices in ([2, 4], [8, 12, 16, 32]))
        if self.sizes[0] % group == 0:
            bias = bool(self.random.random() < 0.5)
            self.convolve(self.sizes[0], kernel, bias=bias, group=group, height=int(self.random.choice([1, 3])))

    def norm(self) -> None:
        """LayerNormalization of the last axis."""
        width = self.sizes[-1]
        self.put(
            "LayerNormalization", self.end, self.constant(self.factors((width,))), self.constant(self.normal(width))
        )

    def reduce(self, op_type: str, axes: list[int], keepdims: int = 0) -> None:
        """axes are counted with the batch."""
        sizes = [1 if at + 1 in axes else size for at, size in enumerate(self.sizes)]
        if not keepdims:
            sizes = [size for at, size in enumerate(self.sizes) if at + 1 not in axes]
        self.put(op_type, self.end, self.constant(np.array(axes)), sizes=sizes, keepdims=keepdims)

    def reshape(self, *sizes: int) -> None:
        """Of all but the batch."""
        self.put("Reshape", self.end, self.constant(np.array([0, *sizes])), sizes=list(sizes))

    def transpose(self, *order: int) -> None:
        """order: with the batch."""
        self.put("Transpose", sizes=[self.sizes[at - 1] for at in order[1:]], perm=list(order))

    def residual(self) -> None:
        """A sum with an earlier value of these sizes, if there is one."""
        same = [name for name, sizes in self.earlier if sizes == self.sizes and name != self.end]
        if same:
            self.put("Add", self.end, str(self.random.choice(same)))

    def join(self) -> None:
        """With an earlier image of this size, or earlier tokens."""
        rank = len(self.sizes)
        same = [(name, sizes) for name, sizes in self.earlier if sizes[1:] == self.sizes[1:] and len(sizes) == rank]
        if same:
            name, sizes = same[int(self.random.integers(len(same)))]
            self.put("Concat", self.end, name, sizes=[self.sizes[0] + sizes[0], *self.sizes[1:]], axis=1)

    def gate(self) -> None:
        """Squeeze and excitation."""
        before, sizes = self.end, self.sizes
        self.put("GlobalAveragePool", sizes=[sizes[0], 1, 1])
        self.convolve(8, 1, bias=True)
        self.put("Relu")
        self.convolve(sizes[0], 1, bias=True)
        self.put(str(self.random.choice(["Sigmoid", "HardSigmoid"])))
        self.put("Mul", before, self.end, sizes=sizes)

    def attention(self) -> None:
        """Of heads that are four wide."""
        before, sizes, heads = self.end, self.sizes, self.sizes[-1] // 4
        parts = []
        for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
            self.end, self.sizes = before, sizes
            self.linear(heads * 4, bias=False)
            self.reshape(sizes[0], heads, 4)
            self.transpose(*order)
            parts.append(self.end)
        self.put("MatMul", parts[0], parts[1])
        self.put("Softmax", axis=-1)
        self.put("MatMul", self.end, parts[2], sizes=[heads, sizes[0], 4])
        self.transpose(0, 2, 1, 3)
        self.reshape(sizes[0], heads * 4)
        self.linear(sizes[-1], bias=False)

    def block(self) -> None:
        """A convolution beside what it reads, and a Relu."""
        before = self.end
        self.convolve(self.sizes[0], int(self.random.choice([1, 3])), bias=bool(self.random.random() < 0.5))
        self.put("Add", *([self.end, before] if self.random.random() < 0.5 else [before, self.end]))
        if self.random.random() < 0.7:
            self.put("Relu")

    def group_norm(self) -> None:
        """Of all channels."""
        width = self.sizes[0]
        scale, shift = self.constant(self.factors((width,))), self.constant(self.normal(width))
        self.put("GroupNormalization", self.end, scale, shift, num_groups=1)

    def transposed_convolution(self) -> None:
        """Twice the size."""
        inner, height, width = self.sizes
        weight = self.constant(self.normal(inner, 12, 2, 2, of=inner))
        self.put("ConvTranspose", self.end, weight, sizes=[12, 2 * height, 2 * width], strides=[2, 2])

    def model(self, batch: int | str = "batch") -> onnx.ModelProto:
        """With a layer at the end."""
        if len(self.sizes) == 3:
            self.convolve(LAST, 1, bias=False)
        else:
            self.linear(LAST, bias=bool(self.random.random() < 0.5))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *self.given])
        y = helper.make_tensor_value_info(self.end, TensorProto.FLOAT, [batch, *self.sizes])
        graph = helper.make_graph(self.nodes, "random", [x], [y], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        return onnx.shape_inference.infer_shapes(made)


def multiplied(chain: Chain) -> None:
    chain.put("Mul", chain.end, chain.constant(chain.factors(chain.channels())))


def shifted(chain: Chain) -> None:
    chain.put("Add", chain.end, chain.constant(chain.normal(*chain.channels())))


def batch_norm(chain: Chain) -> None:
    width = chain.sizes[0]
    numbers = [chain.factors((width,)), chain.normal(width), 0.1 * chain.normal(width), np.abs(chain.factors((width,)))]
    chain.put("BatchNormalization", chain.end, *map(chain.constant, numbers))


def pooled(op_type: str, **attributes: Any) -> Callable[[Chain], Any]:
    return lambda chain: chain.put(op_type, kernel_shape=[3, 3], pads=[1, 1, 1, 1], **attributes)


Step = Callable[[Chain], Any]
ANY: dict[str, Step] = {
    "Mul": multiplied,
    "Add": shifted,
    **{name: lambda chain, name=name: chain.put(name) for name in ("Relu", "Gelu", "Sigmoid", "HardSwish", "Tanh")},
    "residual": Chain.residual,
}
IMAGES: dict[str, Step] = {
    "BatchNormalization": batch_norm,
    "Conv": lambda chain: chain.convolve(int(chain.random.choice([8, 20, 32])), 3, bias=False),
    "Conv 1x1": lambda chain: chain.convolve(int(chain.random.choice([8, 20, 32])), 1, bias=True),
    "depthwise": lambda chain: chain.convolve(chain.sizes[0], 3, bias=False, group=chain.sizes[0]),
    "groups": lambda chain: chain.convolve(chain.sizes[0], 3, bias=True, group=1 if chain.sizes[0] % 2 else 2),
    "long kernels": Chain.convolve_widely,
    "ConvTranspose": Chain.transposed_convolution,
    "gate": Chain.gate,
    "Concat": Chain.join,
    "block": Chain.block,
    "GroupNormalization": Chain.group_norm,
    "MaxPool": pooled("MaxPool"),
    "Relu, MaxPool": lambda chain: (chain.put("Relu"), pooled("MaxPool")(chain)),
    "AveragePool": pooled("AveragePool"),
    "padded mean": pooled("AveragePool", count_include_pad=1),
    "GlobalAveragePool": lambda chain: chain.put("GlobalAveragePool", sizes=[chain.sizes[0], 1, 1]),
    "mean": lambda chain: chain.reduce("ReduceMean", [2, 3]),
    "kept mean": lambda chain: chain.reduce("ReduceMean", [2, 3], keepdims=1),
    "maximum": lambda chain: chain.reduce("ReduceMax", [2, 3]),
    "flatten": lambda chain: chain.reshape(int(np.prod(chain.sizes))),
    "rows": lambda chain: chain.reshape(chain.sizes[0], chain.sizes[1] * chain.sizes[2]),
    "tokens": lambda chain: (chain.reshape(chain.sizes[0], chain.sizes[1] * chain.sizes[2]), chain.transpose(0, 2, 1)),
    "norm of channels": lambda chain: (chain.transpose(0, 2, 3, 1), chain.norm(), chain.transpose(0, 3, 1, 2)),
}  # fmt: skip
TOKENS: dict[str, Step] = {
    "LayerNormalization": Chain.norm,
    "linear": lambda chain: chain.linear(20, bias=True),
    "MatMul": lambda chain: chain.linear(20, bias=False),
    "attention": Chain.attention,
    "transpose": lambda chain: chain.transpose(0, 2, 1),
    "mean of tokens": lambda chain: chain.reduce("ReduceMean", [1]),
    "mean of features": lambda chain: chain.reduce("ReduceMean", [2]),
    "sum of tokens": lambda chain: chain.reduce("ReduceSum", [1]),
    "minimum of tokens": lambda chain: chain.reduce("ReduceMin", [1]),
    "Concat": Chain.join,
    "maximum of tokens": lambda chain: chain.reduce("ReduceMax", [1]),
    "first": lambda chain: chain.put("Gather", chain.end, chain.constant(np.array(0)), sizes=chain.sizes[1:], axis=1),
    "Softmax": lambda chain: chain.put("Softmax", axis=-1),
}  # fmt: skip
VECTORS: dict[str, Step] = {
    "LayerNormalization": Chain.norm,
    "linear": lambda chain: chain.linear(20, bias=True),
    "BatchNormalization": batch_norm,
}


def random_chain(seed: int) -> tuple[Chain, list[str]]:
    """A chain of one to eight steps, and what they are called."""
    chain, names = Chain(seed), []
    for _ in range(int(chain.random.integers(1, 9))):
        steps = ANY | {1: VECTORS, 2: TOKENS, 3: IMAGES}[len(chain.sizes)]
        name = str(chain.random.choice(list(steps)))
        if name == "attention" and chain.sizes[-1] < 8:
            continue  # of one head: its Reshape does not compile on integers
        before = (chain.end, chain.sizes)
        steps[name](chain)
        chain.earlier.append(before)
        names.append(name)
    return chain, names


class Plain:
    """The CPU provider without its optimizers."""

    def __init__(self, graph_or_path: Any, folder: Path) -> None:
        path = folder / "plain.onnx"
        if isinstance(graph_or_path, Path):
            path = graph_or_path
        else:
            ir.save(graph_or_path.model, path)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = ("x",)

    def run(self, feeds: Any) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))


def written(path: Path, folder: Path, precision: str, *, spelled: bool, sizes: list[int], batch: int) -> str:
    """Write the graph as a build has it to folder/model.onnx; what stays in float."""
    graph = open_onnx(path, task=None, samples=None).graph
    if spelled:
        respell(graph)
    samples = [{"x": samples_of(sizes, batch, 100 + index)} for index in range(16)]
    calibration = Calibration(lambda graph: Plain(graph, folder), lambda: samples)
    context = PassContext(
        target=target("openvino"),
        observe=calibration,
        distributions=calibration.distributions,
        stream=lambda graph: ActivationStream(
            graph, open_session=lambda one: Plain(one, folder), inputs=lambda: samples
        ),
    )
    notes: tuple[str, ...] = ()
    for name in ("fold", "deduplicate", "fuse-convolutions", *([precision] if precision == "int8-qdq" else [])):
        result = make_pass(name).apply(graph, context)
        graph, notes = result.graph, result.notes
    ir.save(graph.model, folder / "model.onnx")
    return "; ".join(note for note in notes if "misread" in note)


def samples_of(sizes: list[int], count: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, *sizes)).astype(np.float32)


def likeness(given: Array, wanted: Array) -> float:
    return float(1 - ((given - wanted) ** 2).sum() / (((wanted - wanted.mean()) ** 2).sum() + 1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first graph's number, which is its seed")
    parser.add_argument("--precision", nargs="+", choices=LEAST, default=list(LEAST))
    parser.add_argument("--as-exported", action="store_true", help="do not spell graphs as builds do")
    parser.add_argument("--fixed", action="store_true", help="graphs of one batch, 1 to 3")
    arguments = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    found = dict.fromkeys(["right", "misread", "do not compile"], 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(arguments.first, arguments.first + arguments.graphs):
            chain, names = random_chain(seed)
            batches = (1 + seed % 3,) if arguments.fixed else (1, 2, 3)
            onnx.save(chain.model(batches[0] if arguments.fixed else "batch"), folder / "random.onnx")
            for precision in arguments.precision:
                left = written(
                    folder / "random.onnx",
                    folder,
                    precision,
                    spelled=not arguments.as_exported,
                    sizes=chain.given,
                    batch=batches[0],
                )
                plain = Plain(folder / "model.onnx", folder)
                try:
                    session = Session(
                        folder / "model.onnx", providers=["openvino", "cpu"], half_floats=precision != "fp32"
                    )
                    alike = []
                    for batch in batches:
                        feeds = {"x": samples_of(chain.given, batch, batch)}
                        alike.append(likeness(session.run(feeds)[chain.end], plain.run(feeds)[chain.end]))
                except OnnxpressError as error:
                    verdict, why = "do not compile", str(error)[-200:]
                else:
                    verdict = "right" if min(alike) >= LEAST[precision] else "misread"
                    why = f"likeness {min(alike):.4f}"
                found[verdict] += 1
                if verdict != "right":
                    print(f"{seed} {precision} {verdict}: {', '.join(names)}; {why}. {left}", flush=True)
            if (seed + 1) % 100 == 0:
                print(f"{seed + 1 - arguments.first} of {arguments.graphs}", file=sys.stderr, flush=True)
    print(", ".join(f"{count} {what}" for what, count in found.items()))


if __name__ == "__main__":
    main()
