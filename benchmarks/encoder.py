"""An encoder side by side with other tools: taking turns, medians of rounds.

    python benchmarks/encoder.py MODEL_FOLDER --int8 ARTIFACT --fp32 ARTIFACT [--rounds 5] [--texts FILE] [--json FILE]

Each system is a process in its own environment (benchmarks/peers/setup.sh makes them) and waits, blocked, while the
others are timed. --texts adds sentences per second on the lines of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from onnxpress import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
SHAPES = ((1, 32), (1, 128), (32, 128))

# name: (environment, system)
SYSTEMS = {
    "PyTorch fp32": ("onnxruntime", "torch_eager:fp32"),
    "PyTorch bf16": ("onnxruntime", "torch_eager:bf16"),
    "ONNX Runtime fp32": ("onnxruntime", "onnxruntime_plain:fp32"),
    "ONNX Runtime int8 (quantize_dynamic)": ("onnxruntime", "onnxruntime_plain:int8"),
    "OpenVINO fp32": ("openvino", "openvino_static:fp32"),
    "OpenVINO bf16": ("openvino", "openvino_static:bf16"),
    "OpenVINO int8 (NNCF)": ("openvino", "openvino_static:int8"),
    "onnxpress fp32": ("", "ours:fp32"),
    "onnxpress int8": ("", "ours:int8"),
}
TEXT_SYSTEMS = {
    "sentence-transformers, torch": ("sentence-transformers", "sentence_transformers_texts:torch"),
    "sentence-transformers, ONNX": ("sentence-transformers", "sentence_transformers_texts:onnx"),
    "onnxpress fp32": ("", "ours:fp32"),
    "onnxpress int8": ("", "ours:int8"),
}
PAUSE = 0.3  # seconds for a system's spinning threads to fall asleep before the next one's turn


class System:
    """A worker process."""

    def __init__(self, environment: str, system: str, arguments: argparse.Namespace) -> None:
        python = ROOT / ".venv-peers" / environment / "bin" / "python" if environment else Path(sys.executable)
        if not python.exists():
            sys.exit(f"{python} does not exist: run `make bench-peers` first.")
        command = [str(python), str(HERE / "worker.py"), system, str(arguments.model), str(arguments.cache)]
        if not environment:
            command.append(str(arguments.int8 if system.endswith("int8") else arguments.fp32))
        log = (arguments.cache / "workers.log").open("a")
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environ
        )
        self.description = self._read()["ready"]

    def ask(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._read()
        time.sleep(PAUSE)
        return answer

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"A worker ended: {' '.join(map(str, self.process.args))}; see workers.log in the cache folder.")  # type: ignore[arg-type]
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--int8", type=Path, required=True)
    parser.add_argument("--fp32", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench-cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", help="part of a system's name (repeatable)")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": arguments.rounds,
    }

    chosen = {name: spec for name, spec in SYSTEMS.items() if _chosen(name, arguments.only)}
    systems = {name: System(*spec, arguments) for name, spec in chosen.items()}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    for batch, length in SHAPES:  # what a worker prepares for a shape is not for the rounds
        for system in systems.values():
            system.ask(do="shape", batch=batch, length=length, seconds=0.1)
    for round_number in range(arguments.rounds):
        for batch, length in SHAPES:
            for name, system in systems.items():
                answer = system.ask(do="shape", batch=batch, length=length, seconds=0.5)
                times[name].setdefault(f"{batch}x{length}", []).append(answer["ms"])
        print(f"round {round_number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    result["systems"] = {name: system.description for name, system in systems.items()}
    result["milliseconds"] = times
    _table("median milliseconds of a batch", times, [f"{batch}x{length}" for batch, length in SHAPES])
    _end(systems)

    if arguments.texts is not None:
        chosen = {name: spec for name, spec in TEXT_SYSTEMS.items() if _chosen(name, arguments.only)}
        systems = {name: System(*spec, arguments) for name, spec in chosen.items()}
        rates: dict[str, dict[str, list[float]]] = {name: {"texts": []} for name in systems}
        for _ in range(arguments.rounds):
            for name, system in systems.items():
                rates[name]["texts"].append(system.ask(do="texts", file=str(arguments.texts))["per_second"])
        result["sentences_per_second"] = rates
        _table("sentences per second", rates, ["texts"])
        _end(systems)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


def _chosen(name: str, only: list[str] | None) -> bool:
    return only is None or any(part in name for part in only)


def _table(title: str, rows: dict[str, dict[str, list[float]]], columns: list[str]) -> None:
    """A markdown table: the median of the rounds, and their range."""
    print(f"\n| {title} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [
            f"{statistics.median(row[column]):.4g} ({min(row[column]):.4g}–{max(row[column]):.4g})"
            for column in columns
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _end(systems: dict[str, System]) -> None:
    for system in systems.values():
        system.process.terminate()
        system.process.wait()


if __name__ == "__main__":
    main()
