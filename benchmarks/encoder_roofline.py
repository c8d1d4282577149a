"""How near an int8 encoder comes to what its 8-bit matrix products alone would take.

    python benchmarks/encoder_roofline.py --artifact DIR [--shapes 1x32 1x128 32x128] [--rounds 5] [--json FILE]

The roof is one graph of the artifact's own 8-bit weights and nothing but MatMulInteger, on as many rows as the batch has tokens: no
quantizing, attention, norms or activations. Both take turns; the model runs a batch in chunks and on lanes of its own, as it always does. Its share of the whole model's time is what is reached.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import report
from measure import cpu_session
from onnx import TensorProto, helper, numpy_helper

from onnxpress.artifact import Artifact
from onnxpress.runtime.loading import load_artifact
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.timing import alternate, random_tokens

PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=("1x32", "1x128", "32x128"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = report.facts()
    artifact = Artifact.open(arguments.artifact)
    weights = eight_bit_weights(artifact.file("model.onnx"))
    if not weights:
        parser.error(f"{arguments.artifact} has none of {', '.join(PRODUCTS)}")
    products, runner = products_alone(weights), load_artifact(artifact)
    if not isinstance(runner, TextRunner):
        parser.error(f"{arguments.artifact} is no encoder of texts")
    multiplications = sum(weight.size for weight in weights)
    rows: dict[str, list[str]] = {}
    figures: dict[str, Any] = {"weights": len(weights)}
    for shape in arguments.shapes:
        batch, length = map(int, shape.split("x"))
        given = {
            name: np.ones((batch * length, int(name.removeprefix("rows"))), np.uint8)
            for name in {f"rows{weight.shape[0]}" for weight in weights}
        }
        binding = products.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for output in products.get_outputs():
            columns = weights[int(output.name.removeprefix("product"))].shape[1]
            binding.bind_ortvalue_output(
                output.name, onnxruntime.OrtValue.ortvalue_from_shape_and_type((batch * length, columns), np.int32)
            )
        times = alternate(
            {
                "products": partial(products.run_with_iobinding, binding),
                "model": partial(runner.run_rows, random_tokens(runner.session.signature, batch, length)),
            },
            rounds=arguments.rounds,
        )
        figures[shape] = times
        rate = 2 * multiplications * batch * length / times["products"] / 1e6
        share = times["products"] / times["model"]
        rows[shape] = [f"{times['model']:.2f}", f"{times['products']:.2f}", f"{rate:.0f}", f"{share:.0%}"]
    report.show(
        f"{artifact.manifest.name}, {artifact.manifest.precision}",
        rows,
        ["ms", "products alone, ms", "GOP/s", "reached"],
    )
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "figures": figures})


def eight_bit_weights(path: Path) -> list[np.ndarray[Any, Any]]:
    """Weights of the graph's 8-bit products, (inputs, outputs)."""
    model = onnx.load(path)
    constants = {constant.name: constant for constant in model.graph.initializer}
    names = [name for node in model.graph.node if node.op_type in PRODUCTS for name in node.input if name in constants]
    found = [numpy_helper.to_array(constants[name]) for name in names if len(constants[name].dims) == 2]
    return [weight for weight in found if weight.dtype.itemsize == 1]


def products_alone(weights: list[np.ndarray[Any, Any]]) -> onnxruntime.InferenceSession:
    """A session of MatMulInteger alone, each on unsigned rows of its width."""
    widths = sorted({weight.shape[0] for weight in weights})
    graph = helper.make_graph(
        [
            helper.make_node("MatMulInteger", [f"rows{weight.shape[0]}", f"weight{index}"], [f"product{index}"])
            for index, weight in enumerate(weights)
        ],
        "products",
        [helper.make_tensor_value_info(f"rows{width}", TensorProto.UINT8, ["tokens", width]) for width in widths],
        [
            helper.make_tensor_value_info(f"product{index}", TensorProto.INT32, ["tokens", weight.shape[1]])
            for index, weight in enumerate(weights)
        ],
        [numpy_helper.from_array(weight, f"weight{index}") for index, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return cpu_session(model.SerializeToString())


if __name__ == "__main__":
    main()
