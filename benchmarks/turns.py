"""Starts systems as waiting processes, each in its own environment, and lets one at a time work."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAUSE = 0.3  # seconds for a system's spinning threads to fall asleep before the next one's turn
SENTENCES = ROOT / "onnxpress" / "data" / "sentences.jsonl"


@dataclass(frozen=True, kw_only=True)
class System:
    """environment: a folder of .venv-peers, or None for the one that runs this. peer: MODULE:VARIANT in peers/.

    artifact: the onnxpress artifact that it opens, or None. needs: a file of the cache that ONNX Runtime's peer makes.
    """

    name: str
    environment: str | None
    peer: str
    artifact: Path | None = None
    needs: str | None = None


class Worker:
    """The process of a system. `workers` starts and ends them."""

    def __init__(self, system: System, *, model: Path, cache: Path, calibration: Path) -> None:
        self.name = system.name
        self.log = cache / f"{system.peer.replace(':', '-')}.log"
        command = [str(python(system.environment)), str(HERE / "worker.py"), system.peer]
        command += ["--model", str(model), "--cache", str(cache), "--calibration", str(calibration)]
        command += ["--artifact", str(system.artifact or "none")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
            )
        greeting = self._read()
        self.description: str = greeting["ready"]
        self.seconds: float = greeting["seconds"]
        self.versions: dict[str, str] = greeting["versions"]

    def ask(self, cmd: str, **request: Any) -> dict[str, Any]:
        """The answer to one request, and the pause after it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading says so, with its log
            print(json.dumps({"cmd": cmd, **request}), file=self.process.stdin, flush=True)
        answer = self._read()
        time.sleep(PAUSE)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        if self.process.poll() is None:
            try:
                print(json.dumps({"cmd": "quit"}), file=self.process.stdin, flush=True)
                self.process.wait(timeout=20)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            sys.exit(f"{self.name} ended with exit code {self.process.wait()}. The end of {self.log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def workers(systems: Iterable[System], *, model: Path, cache: Path, calibration: Path) -> Iterator[list[Worker]]:
    """All workers, started one after the other; they end with the block."""
    with ExitStack() as stack:
        started = []
        for system in systems:
            if system.needs is not None and not (cache / system.needs).exists():
                exporter = System(name="export", environment="onnxruntime", peer="onnxruntime_plain:fp32")
                print("preparing: the model's export", file=sys.stderr, flush=True)
                Worker(exporter, model=model, cache=cache, calibration=calibration).close()
            print(f"starting {system.name}", file=sys.stderr, flush=True)
            worker = Worker(system, model=model, cache=cache, calibration=calibration)
            stack.callback(worker.close)
            started.append(worker)
        yield started


def in_turns(started: list[Worker], round_number: int) -> list[Worker]:
    """The order of a round: another system begins in each, so that none always follows the same neighbour's heat."""
    first = round_number % len(started)
    return started[first:] + started[:first]


def python(environment: str | None) -> Path:
    """The interpreter of an environment."""
    if environment is None:
        return Path(sys.executable)
    path = ROOT / ".venv-peers" / environment / "bin" / "python"
    if not path.exists():
        sys.exit(f"{path} does not exist: run `make bench-peers` first.")
    return path


def cache_of(model: Path, cache: Path) -> Path:
    """The folder for what peers make of this model with these versions: another model or other pins, another folder."""
    if not (model / "config.json").is_file():
        sys.exit(f"{model} is no model folder: it has no config.json.")
    digest = hashlib.sha256()
    pins = sorted((HERE / "peers").glob("requirements-*.txt"))
    makers = [HERE / "measure.py", *sorted((HERE / "peers").glob("*.py"))]  # what the exports depend on, and more
    for path in [*sorted(path for path in model.rglob("*") if path.is_file()), *pins, *makers]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    folder = cache / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def calibration_file(data: Path | None, cache: Path) -> Path:
    """A JSON list of sentences: of the *train*.csv in the folder, or else onnxpress' own English calibration sentences."""
    if data is None:
        rows = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
        texts = [row["text"] for row in rows if row["language"] == "en" and row["split"] == "calibration"]
    else:
        files = sorted(data.glob("*train*.csv"))
        if len(files) != 1:
            sys.exit(f"{data} has {len(files)} files named *train*.csv; one is needed: sentence1,sentence2,score.")
        texts = [row[0] for row in read_pairs(files[0])]
    path = cache / "calibration.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Rows of sentence1,sentence2,score; no header."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [(first, second, float(score)) for first, second, score in csv.reader(file)]
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read as rows of sentence1,sentence2,score without a header: {error}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks that start workers."""
    parser.add_argument("--model", type=Path, required=True, help="sentence-transformers folder")
    parser.add_argument("--artifact", type=Path, required=True, help="onnxpress artifact, int8")
    parser.add_argument("--artifact-fp32", type=Path, help="onnxpress artifact, fp32")
    parser.add_argument(
        "--artifact-openvino", type=Path, nargs="+", default=[], help="onnxpress artifacts for the target openvino"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="systems whose names contain one of these")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench-cache", help="where peers keep their exports")
    parser.add_argument("--json", type=Path, help="write all figures here")


def ours(arguments: argparse.Namespace) -> list[System]:
    """The systems made of our artifacts."""
    systems = []
    if arguments.artifact_fp32 is not None:
        systems.append(
            System(name="onnxpress fp32", environment=None, peer="ours:fp32", artifact=arguments.artifact_fp32)
        )
    systems.append(System(name="onnxpress int8", environment=None, peer="ours:int8", artifact=arguments.artifact))
    for number, artifact in enumerate(arguments.artifact_openvino):
        name = f"onnxpress for openvino, {artifact.name}"
        systems.append(System(name=name, environment=None, peer=f"ours:openvino-{number}", artifact=artifact))
    return systems


def chosen(systems: list[System], only: list[str] | None) -> list[System]:
    """The systems that were asked for."""
    found = [system for system in systems if only is None or any(part.lower() in system.name.lower() for part in only)]
    if not found:
        sys.exit(f"{' '.join(only or ())} names none of: {', '.join(system.name for system in systems)}.")
    return found
