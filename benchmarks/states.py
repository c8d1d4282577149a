"""The operators that layers with a state could be: forms of the gated delta rule, and of a short convolution of every channel.

    python benchmarks/states.py [--rounds 5] [--json FILE]

Milliseconds of one text, the forms taking turns, inputs and outputs in place. Sizes are those of Qwen3.5 0.8B: 16 heads of 128 by 128, and 4 taps
over 6,144 channels with SiLU after them. For why it matters see docs/decisions/0021-states.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import report
from measure import cpu_session
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxpress.timing import alternate

LENGTHS = (1, 128, 1024)
HEADS, WIDTH = 16, 128
CHANNELS, TAPS = 6144, 4

Form = tuple[list[NodeProto], dict[str, np.ndarray[Any, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = report.facts()
    rows: dict[str, list[float]] = {}
    for length in LENGTHS:
        for forms, inputs in ((delta_rules(length), delta_inputs(length)), (convolutions(), conv_inputs(length))):
            tasks = {name: _bound(form, inputs).run for name, form in forms.items()}
            for name, milliseconds in alternate(tasks, rounds=arguments.rounds, seconds=0.2).items():
                rows.setdefault(name, []).append(round(milliseconds, 3))
    columns = [f"{length} tokens (ms)" for length in LENGTHS]
    report.show("operator", {name: [str(cell) for cell in row] for name, row in rows.items()}, columns)
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "columns": columns, "rows": rows})


def delta_inputs(length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Queries, keys of length 1, values, a state, decays and update rates of one text, heads side by side."""
    random = np.random.default_rng(0)
    query, key, value = random.standard_normal((3, 1, length, HEADS, WIDTH)).astype(np.float32)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    decay = -0.1 * np.abs(random.standard_normal((1, length, HEADS))).astype(np.float32)
    rate = random.random((1, length, HEADS)).astype(np.float32)
    state = np.zeros((1, HEADS, WIDTH, WIDTH), np.float32)
    return {"query": query, "key": key, "value": value, "state": state, "decay": decay, "rate": rate}


def delta_rules(length: int) -> dict[str, Form]:
    """Both operators that ONNX Runtime has; one takes heads side by side, the other apart."""
    joined = {"joined": np.array([1, length, HEADS * WIDTH], np.int64)}
    reshapes = [helper.make_node("Reshape", [name, "joined"], [f"{name}_joined"]) for name in ("query", "key", "value")]
    given = ["query_joined", "key_joined", "value_joined", "state", "decay", "rate"]
    attention = _contrib("LinearAttention", given, ["out", "next"], q_num_heads=HEADS, kv_num_heads=HEADS)
    network = _contrib("GatedDeltaNet", ["query", "key", "value", "", "decay", "rate", "state"], ["out", "next"])
    return {"LinearAttention": ([*reshapes, attention], joined), "GatedDeltaNet": ([network], {})}


def conv_inputs(length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Numbers of one text, channels last, and the last ones before it."""
    x = np.random.default_rng(0).standard_normal((1, length, CHANNELS)).astype(np.float32)
    return {"x": x, "past": np.zeros((1, TAPS - 1, CHANNELS), np.float32)}


def convolutions() -> dict[str, Form]:
    """Four forms of one convolution that takes and answers numbers with channels last."""
    weight = np.random.default_rng(1).standard_normal((CHANNELS, 1, TAPS)).astype(np.float32)
    turn = {"perm": [0, 2, 1]}
    joined = helper.make_node("Concat", ["past", "x"], ["joined"], axis=1)
    silu = _contrib("QuickGelu", ["sum"], ["out"], alpha=1.0)
    products, taps = [joined], {"one": np.array([1], np.int64)}
    for tap in range(TAPS):
        taps |= {f"weight_{tap}": weight[:, 0, tap], f"start_{tap}": np.array([tap], np.int64)}
        taps[f"end_{tap}"] = np.array([tap + 1 - TAPS or np.iinfo(np.int64).max], np.int64)
        products += [
            helper.make_node("Slice", ["joined", f"start_{tap}", f"end_{tap}", "one"], [f"slice_{tap}"]),
            helper.make_node("Mul", [f"slice_{tap}", f"weight_{tap}"], [f"product_{tap}"]),
        ]
    products += [helper.make_node("Add", ["product_0", "product_1"], ["sum_1"])]
    products += [helper.make_node("Add", [f"sum_{tap - 1}", f"product_{tap}"], [f"sum_{tap}"]) for tap in (2, 3)]
    products += [_contrib("QuickGelu", ["sum_3"], ["out"], alpha=1.0)]
    whole = [
        joined,
        helper.make_node("Transpose", ["joined"], ["turned"], **turn),
        helper.make_node("Conv", ["turned", "weight"], ["convolved"], group=CHANNELS),
        helper.make_node("Transpose", ["convolved"], ["sum"], **turn),
        silu,
    ]
    last = _contrib(
        "CausalConvWithState", ["x", "weight", "", "past"], ["out", "next"], activation="silu", channels_last=1
    )
    first = [
        helper.make_node("Transpose", ["x"], ["x_turned"], **turn),
        helper.make_node("Transpose", ["past"], ["past_turned"], **turn),
        _contrib("CausalConvWithState", ["x_turned", "weight", "", "past_turned"], ["y", "next"], activation="silu"),
        helper.make_node("Transpose", ["y"], ["out"], **turn),
    ]
    return {
        "sum of products": (products, taps),
        "Conv": (whole, {"weight": weight}),
        "CausalConvWithState, channels last": ([last], {"weight": weight}),
        "CausalConvWithState, channels first": (first, {"weight": weight}),
    }


class _Bound:
    def __init__(self, session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray[Any, Any]]) -> None:
        self._session = session
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output("out")

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def _bound(form: Form, inputs: dict[str, np.ndarray[Any, Any]]) -> _Bound:
    nodes, weights = form
    graph = helper.make_graph(
        nodes,
        "form",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return _Bound(cpu_session(model.SerializeToString()), inputs)


def _contrib(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, outputs, domain="com.microsoft", **attributes)


if __name__ == "__main__":
    main()
