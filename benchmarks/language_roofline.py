"""How near decoding comes to the memory's bandwidth, and what takes the time: one language model's artifact alone.

    python benchmarks/language_roofline.py --artifact DIR [--past 128 1024] [--json FILE]

The roof is how fast this machine's threads read memory that no cache holds (numpy's maximum over 256 MiB, the best of 20). A step of
decoding has to read every weight once (but for a table that only embeds, and is not the output layer too, and for a dual's int8 copies):
bytes of the weights over the step's time is its bandwidth; of experts, those that one token has chosen. What ONNX Runtime's kernel for
blocks reaches by itself is measured on a graph of the artifact's own MatMulNBits and nothing else, each on one token. ONNX Runtime's
profiler then says how the time is spent; it adds some.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import report
from measure import THREADS, cpu_session

from onnxpress.artifact import Artifact
from onnxpress.runtime.cache import KeyValueCache
from onnxpress.runtime.loading import open_session
from onnxpress.runtime.model_step import ModelStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--past", type=int, nargs="+", default=(128, 1024))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = report.facts()
    artifact = Artifact.open(arguments.artifact)
    weights = bytes_of_a_step(artifact)
    roof = read_bandwidth()
    session = open_session(artifact)
    figures: dict[str, Any] = {"roof": roof, "weight_bytes": weights}
    rows: dict[str, list[str]] = {"reading memory": ["", f"{roof / 1e9:.1f}", ""]}
    if blocks := products(artifact):
        session_of_blocks, size = products_alone(artifact, blocks)
        seconds = statistics.median(timed_alone(session_of_blocks) for _ in range(30))
        del session_of_blocks
        figures["products alone"] = {"seconds": seconds, "bytes": size}
        rows["MatMulNBits alone"] = _row(seconds, size, roof)
    for past in arguments.past:
        cache = KeyValueCache(session.signature.inputs, context=session.signature.axes["length"][1], budget=2**31)
        step = ModelStep(session, cache)
        step.run(0, [np.random.default_rng(0).integers(5, 4000, past).tolist()])
        time.sleep(0.3)
        seconds = statistics.median(timed(step, cache, past) for _ in range(30))
        figures[f"step after {past}"] = seconds
        rows[f"step after {past} tokens"] = _row(seconds, weights, roof)
    report.show(f"{arguments.artifact.name}, {weights / 1e6:.0f} MB of weights", rows, ["ms", "GB/s", "of the roof"])
    for past in arguments.past:
        spent = profile(artifact, past)
        figures[f"profile after {past}"] = spent
        total = sum(spent.values())
        shown = {name: [f"{value:.2f}", f"{value / total:.0%}"] for name, value in list(spent.items())[:6]}
        report.show(f"after {past} tokens, under the profiler", shown, ["ms", "share"])
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, **figures})


def _row(seconds: float, size: float, roof: float) -> list[str]:
    return [f"{1000 * seconds:.2f}", f"{size / seconds / 1e9:.1f}", f"{size / seconds / roof:.0%}"]


def products(artifact: Artifact) -> list[onnx.NodeProto]:
    """The MatMulNBits of a step of one token."""
    graph = onnx.load(artifact.file("model.onnx"), load_external_data=False).graph
    branches = [item.g.node for node in graph.node for item in node.attribute if item.name == "else_branch"]
    return [node for nodes in (graph.node, *branches) for node in nodes if node.op_type == "MatMulNBits"]


def products_alone(artifact: Artifact, nodes: list[onnx.NodeProto]) -> tuple[onnxruntime.InferenceSession, int]:
    """A session of these products alone, each with weights of its own, and the bytes of these."""
    model = onnx.load(artifact.file("model.onnx"))
    kept = {one.name: one for one in model.graph.initializer}
    alone, weights = [], {}
    for index, node in enumerate(nodes):
        blocks, scales, *zero_points = node.input[1:4]
        if blocks not in kept:  # a table that is the output layer too, in the shape of a table
            reshape = next(one for one in model.graph.node if blocks in one.output)
            blocks = reshape.input[0]
        size = {item.name: item.i for item in node.attribute}
        array = onnx.numpy_helper.to_array(kept[blocks])
        array = array.reshape(size["N"], -1, size["block_size"] * size["bits"] // 8)
        weights[f"blocks{index}"] = onnx.numpy_helper.from_array(array, f"blocks{index}")
        others = [name for name in (scales, *zero_points) if name]
        weights |= {name: kept[name] for name in others}
        inputs = [f"x{size['K']}", f"blocks{index}", *others]
        alone.append(onnx.NodeProto(op_type=node.op_type, domain=node.domain, input=inputs, output=[f"y{index}"]))
        alone[-1].attribute.extend(node.attribute)
    value = onnx.helper.make_tensor_value_info
    widths = sorted({int(node.input[0][1:]) for node in alone})
    graph = onnx.helper.make_graph(
        alone,
        "products",
        [value(f"x{width}", onnx.TensorProto.FLOAT, [1, width]) for width in widths],
        [value(node.output[0], onnx.TensorProto.FLOAT, None) for node in alone],
        list(weights.values()),
    )
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    return cpu_session(model.SerializeToString()), sum(len(one.raw_data) for one in weights.values())


def timed_alone(session: onnxruntime.InferenceSession) -> float:
    feeds = {one.name: np.ones(one.shape, np.float32) for one in session.get_inputs()}
    start = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - start


def bytes_of_a_step(artifact: Artifact) -> int:
    """Of the initializers but those that the branch for prompts alone reads."""
    graph = onnx.load(artifact.file("model.onnx"), load_external_data=False).graph
    branches = {item.name: item.g.node for node in graph.node if node.op_type == "If" for item in node.attribute}
    read = {name: {value for node in nodes for value in node.input} for name, nodes in branches.items()}
    prompts_alone = read.get("then_branch", set()) - read.get("else_branch", set())
    prompts_alone -= {value for node in graph.node for value in node.input}
    sizes = {
        one.name: math.prod(one.dims) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(one.data_type)).itemsize
        for one in graph.initializer
    }
    shares = {}
    for node in graph.node:
        if node.op_type in ("MoE", "QMoE"):
            chosen = next(item.i for item in node.attribute if item.name == "k")
            experts = next(one.dims[0] for one in graph.initializer if one.name == node.input[2])
            shares.update(dict.fromkeys(node.input[2:], chosen / experts))
    return round(sum(size * shares.get(name, 1) for name, size in sizes.items() if name not in prompts_alone))


def read_bandwidth() -> float:
    """Bytes a second that all threads together read."""
    array = np.ones(2**26, np.float32)
    parts = np.array_split(array, THREADS)
    best = float("inf")
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(20):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def timed(step: ModelStep, cache: KeyValueCache, past: int) -> float:
    start = time.perf_counter()
    step.run(0, [[7]])
    seconds = time.perf_counter() - start
    cache.truncate(0, past)
    return seconds


def profile(artifact: Artifact, past: int) -> dict[str, float]:
    """Milliseconds of a step by operator, the longest first; means of 30 steps."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "onnxpress-roofline")
    inner = onnxruntime.InferenceSession(artifact.file("model.onnx"), options, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.full((1, 1), 7),
        "past_lengths": np.full(1, past, np.int32),
        "lengths": np.ones(1, np.int32),
        "logit_indices": np.zeros(1, np.int64),
    }
    binding = inner.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    for spec in artifact.manifest.signature.inputs:
        if spec.name not in feeds:
            shape = [{"batch": 1, "capacity": past + 1}.get(str(axis), axis) for axis in spec.shape]
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, spec.dtype))
            binding.bind_ortvalue_input(spec.name, value)
            binding.bind_ortvalue_output(spec.name.replace("past_key_values", "present"), value)
    steps = 30
    for _ in range(steps):
        inner.run_with_iobinding(binding)
    file = Path(inner.end_profiling())
    events = json.loads(file.read_text())
    file.unlink()
    spent: Counter[str] = Counter()
    for event in events:
        within = event.get("args", {}).get("op_name") == "If"  # whose nodes are counted by themselves
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and not within:
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: duration / steps / 1000 for name, duration in spent.most_common()}


if __name__ == "__main__":
    main()
