"""The runtime stays light: no torch, transformers, onnx or safetensors, and nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tiny_artifacts import save_artifact

SCRIPT = """
import pathlib
import sys
import onnxpress.runtime
early = {{"onnxruntime", "tokenizers", "tqdm", "torch"}} & set(sys.modules)
assert not early, early
runner = onnxpress.runtime.load({path!r})
runner.embed(["the cat sat"])
# Not getrusage: its peak starts at that of the process that started this one.
status = pathlib.Path("/proc/self/status").read_text()
peak = status.split("VmHWM:")[1].split()[0]
runner.embed(["the cat sat", "a dog"] * 40)
runner.session.placement()
heavy = {{"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "pydantic", "rich", "tqdm"}} & set(sys.modules)
assert not heavy, heavy
print(peak)
"""


def test_loading_and_answering_import_nothing_heavy(tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT.format(path=str(artifact.path))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) < 110 * 1024, f"{int(done.stdout) / 1024:.0f} MiB for one sentence"
