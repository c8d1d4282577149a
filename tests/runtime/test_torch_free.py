"""A device has the runtime's packages alone: with all others out of reach, an artifact loads, answers and is verified."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_artifacts import save_artifact

# A module that is None in sys.modules raises ModuleNotFoundError when it is imported.
BLOCKED = """
import sys
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "pydantic", "rich", "optimum", "safetensors",
         "scipy", "sklearn", "matplotlib", "ml_dtypes", "huggingface_hub", "requests")
for name in HEAVY:
    sys.modules[name] = None
"""


def blocked(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_artifact_answers(tmp_path: Path) -> None:
    code = (
        "import onnxpress\n"
        "from onnxpress.artifact import Artifact\n"
        "from onnxpress.runtime.loading import open_session, verify_golden\n"
        "runner = onnxpress.load(sys.argv[1])\n"
        "assert runner.embed(['the cat sat', 'a dog'] * 9).shape == (18, 6)\n"
        "artifact = Artifact.open(sys.argv[1])\n"
        "assert len(verify_golden(artifact, open_session(artifact))) == 1\n"
        "assert all(sys.modules[name] is None for name in HEAVY)\n"
    )
    done = blocked(code, save_artifact(tmp_path / "tiny").path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--text", "the cat"],
        ["verify"],
        ["inspect", "--placement"],
        ["bench", "--batch", "1,8", "--length", "4", "--rounds", "1"],
        ["doctor"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_command_line_works(tmp_path: Path, arguments: list[str]) -> None:
    if arguments[0] != "doctor":
        arguments = [arguments[0], str(save_artifact(tmp_path / "tiny").path), *arguments[1:]]
    done = blocked("from onnxpress.cli import main\nsys.exit(main(sys.argv[1:]))\n", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    "arguments", [["build", "model"], ["bench", "ARTIFACT", "--against", "torch"], ["inspect", "ARTIFACT/model.onnx"]]
)
def test_what_needs_the_build_extra_says_so(tmp_path: Path, arguments: list[str]) -> None:
    artifact = str(save_artifact(tmp_path / "tiny").path)
    arguments = [argument.replace("ARTIFACT", artifact) for argument in arguments]
    done = blocked("from onnxpress.cli import main\nsys.exit(main(sys.argv[1:]))\n", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("onnxpress: This command needs the package ")
    assert done.stderr.endswith("which is not installed: pip install 'onnxpress[build,cpu]'.\n")


def test_without_onnx_runtime_both_extras_are_named(tmp_path: Path) -> None:
    """Site packages of an environment that has all but onnxruntime, its metadata included."""
    import numpy
    import tokenizers

    import onnxpress

    for package in (numpy, tokenizers, onnxpress):
        source = Path(str(package.__file__)).parent
        for folder in (source, source.with_name(f"{source.name}.libs")):
            if folder.is_dir():
                (tmp_path / folder.name).symlink_to(folder)
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from onnxpress.cli import main\n"
        "sys.exit(main(['run', sys.argv[2], '--text', 'the cat']))\n"
    )
    artifact = save_artifact(tmp_path / "tiny").path
    # -S: without the site packages of this environment; -I: without variables that lead to them.
    command = [sys.executable, "-S", "-I", "-c", code, str(tmp_path), str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "onnxpress: ONNX Runtime is not installed: pip install 'onnxpress[cpu]', or 'onnxpress[gpu]' for NVIDIA cards.\n"
    )
