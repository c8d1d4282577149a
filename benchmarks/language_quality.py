"""What quantization costs a trained language model: perplexity, divergence and top-1 agreement on text it never saw.

    python benchmarks/language_quality.py --model FOLDER [--only NAME …] [--json FILE]

FOLDER is what benchmarks/train_language_model.py writes, its held_out.txt and calibration.txt (part of what it was trained on)
included. Every form of our passes is applied to one export and judged against the original in fp32, beside llama.cpp's Q4_0 and Q4_K_M and onnxruntime-genai's int4 of the
same model, which answer the same tokens in their own environments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
import turns

from onnxpress.calibration import ActivationStream, Calibration
from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.exporters import export
from onnxpress.machine import cpu_target
from onnxpress.optimizers import make_pass
from onnxpress.optimizers.base import PassContext
from onnxpress.optimizers.targets import target
from onnxpress.workbench import Workbench

LOSSLESS = ("fuse-skip-norm", "fuse-rotary", "scale-queries", "pack-projections")
_INT4: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"method": "gptq"},
    "rtn, table at 8 bits": {"table_bits": 8},
    "gptq, table at 8 bits": {"method": "gptq", "table_bits": 8},
}
_ALSO: dict[str, dict[str, Any]] = {  # at the smallest and the largest block
    "rtn, searched": {"search": True},
    "rtn, zero points": {"symmetric": False},
    "awq": {"method": "awq"},
    "awq-gptq": {"method": "awq-gptq"},
    "gptq, searched": {"method": "gptq", "search": True},
    "gptq, zero points": {"method": "gptq", "symmetric": False},
}
_CACHE = ("int8-cache", dict[str, Any]())
_PROMPTS = ("int8-prompts", dict[str, Any]())
FORMS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "int8-dynamic": [("int8-dynamic", {})],
    "int8-weights, block 128": [("int8-weights", {"block_size": 128})],
    **{
        f"int4-weights, block {size}, {name}": [("int4-weights", {"block_size": size, **options})]
        for size in (32, 64, 128)
        for name, options in (_INT4 if size == 64 else {**_INT4, **_ALSO}).items()
    },
    "dual, block 32": [("int4-weights", {"block_size": 32}), _PROMPTS],
    "dual, block 128, gptq, table at 8 bits": [
        ("int4-weights", {"block_size": 128, "method": "gptq", "table_bits": 8}),
        _PROMPTS,
    ],
    "fp32, int8 cache": [_CACHE],
    "int4-weights, block 32, rtn, int8 cache": [("int4-weights", {"block_size": 32}), _CACHE],
}
PEERS = {
    "llama.cpp Q4_0": ("llama_cpp", "llama_cpp_logits.py", "q4_0"),
    "llama.cpp Q4_K_M": ("llama_cpp", "llama_cpp_logits.py", "q4_k_m"),
    "onnxruntime-genai int4, block 32": ("onnxruntime_genai", "genai_logits.py", "int4"),
}
COLUMNS = ("perplexity", "kl_mean", "top1_agreement", "MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="forms and peers whose names contain one of these")
    parser.add_argument("--cache", type=Path, default=turns.ROOT / ".bench-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cache = turns.cache_of(arguments.model, arguments.cache)
    machine = report.facts()
    exported = export(str(arguments.model), max_length=1024)
    workload = DecoderWorkload(
        signature=exported.graph.signature,
        options=exported.options,
        tokenizer_folder=arguments.model,
        file=arguments.model / "held_out.txt",
        calibration=arguments.model / "calibration.txt",
        samples=64,
    )
    reference = workload.answers(exported.reference)
    found: dict[str, dict[str, float]] = {"PyTorch fp32": workload.metrics(reference, reference)}
    context = PassContext(target=target(cpu_target()))
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder), context.target)
        graph = exported.graph.clone()
        for name in LOSSLESS:
            graph = make_pass(name).apply(graph, context).graph
        context = PassContext(
            target=context.target,
            observe=Calibration(bench.open, workload.calibration),
            stream=partial(ActivationStream, open_session=bench.open, inputs=workload.calibration),
        )
        wanted = arguments.only or [""]
        for name, steps in FORMS.items():
            if not any(part in name for part in wanted):
                continue
            started, pressed = time.perf_counter(), graph.clone()
            for step, options in steps:
                pressed = make_pass(step, options).apply(pressed, context).graph
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
            found[name] = workload.metrics(reference, workload.answers(bench.open(pressed)))
            found[name]["MB"] = pressed.weight_bytes() / 1e6
        for name, (environment, script, kind) in PEERS.items():
            if not any(part in name for part in wanted):
                continue
            windows = Path(folder) / "windows.json"
            windows.write_text(json.dumps([window for window, _ in workload.questions()]))
            out = Path(folder) / "logits.npz"
            command = [str(turns.python(environment)), str(turns.HERE / "peers" / script), kind]
            command += [
                "--model",
                str(arguments.model),
                "--cache",
                str(cache),
                "--windows",
                str(windows),
                "--out",
                str(out),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with np.load(out) as saved:
                answers = [
                    {"logits": saved[str(index)][asked]} for index, (_, asked) in enumerate(workload.questions())
                ]
                found[name] = workload.metrics(reference, answers) | {"MB": float(saved["bytes"]) / 1e6}
    rows = {
        name: [f"{metrics[column]:.4g}" if column in metrics else "" for column in COLUMNS]
        for name, metrics in found.items()
    }
    report.show("held-out text", rows, COLUMNS)
    print("; ".join(workload.notes))
    report.save(arguments.json, {"machine": machine, "notes": workload.notes, "metrics": found})


if __name__ == "__main__":
    main()
