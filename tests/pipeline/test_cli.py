"""The command line in processes of its own: exit codes, errors in one paragraph on stderr, and JSON that is JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_artifacts import DIM, SIGNATURE, VOCABULARY, fill, manifest, save_artifact, save_per_token
from tiny_models import save_model

from onnxpress import __version__, stopping
from onnxpress.artifact import ArtifactWriter
from onnxpress.cli import main
from onnxpress.manifest import TensorSpec
from onnxpress.runtime import Embedder, load


def onnxpress(*arguments: object, given: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "onnxpress", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, input=given, env={**os.environ, **environment})
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def refused(done: subprocess.CompletedProcess[str], message: str, *, code: int = 2) -> None:
    """Nothing on stdout, one paragraph without a traceback on stderr."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("onnxpress: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_artifact(tmp_path_factory.mktemp("artifacts") / "tiny").path


def save_task(folder: Path, task: str, outputs: dict[str, int | None], **options: Any) -> Path:
    """An artifact with one answer a token."""
    specs = [
        TensorSpec(name=name, dtype="float32", shape=("batch", "length", *([width] if width else [])))
        for name, width in outputs.items()
    ]
    with ArtifactWriter(folder) as writer:
        fill(writer.folder)
        save_per_token(writer.folder / "model.onnx", outputs)
        signature = dataclasses.replace(SIGNATURE, task=task, outputs=tuple(specs))
        writer.seal(manifest(signature=signature, options=options))
        return writer.publish().path


@pytest.fixture(scope="module")
def question_answerer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "answers"
    return save_task(folder, "question-answering", {"start_logits": None, "end_logits": None})


@pytest.fixture(scope="module")
def fill_mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "masks"
    return save_task(folder, "fill-mask", {"logits": len(VOCABULARY)}, mask_token="[MASK]")


def test_version() -> None:
    assert onnxpress("--version").stdout == f"onnxpress {__version__}\n"


def test_run_prints_what_python_answers(artifact: Path) -> None:
    texts = ["the cat sat", "a red dog"]
    done = onnxpress("run", artifact, "--text", texts[0], "--text", texts[1], "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["task"] == "feature-extraction"
    runner = load(artifact)
    assert isinstance(runner, Embedder)
    np.testing.assert_allclose(found["answers"], runner.embed(texts), rtol=0, atol=1e-6)
    done = onnxpress("run", artifact, "--text", texts[0])
    assert done.stdout.startswith("the cat sat\n  [")
    assert f"({DIM} numbers; --json prints all)" in done.stdout


def test_texts_of_a_file_or_standard_input_are_its_lines(artifact: Path, tmp_path: Path) -> None:
    content = "\ufeffthe cat\r\n\r\na\u2028dog\x0cran\nthe house".encode()
    (tmp_path / "texts.txt").write_bytes(content)
    piped = onnxpress("run", artifact, "--file", "-", "--json", given=content, LC_ALL="C")
    assert piped.returncode == 0, piped.stderr
    assert onnxpress("run", artifact, "--file", tmp_path / "texts.txt", "--json").stdout == piped.stdout
    runner = load(artifact)
    assert isinstance(runner, Embedder)
    expected = runner.embed(["the cat", "a dog ran", "the house"])
    np.testing.assert_allclose(json.loads(piped.stdout)["answers"], expected, rtol=0, atol=1e-6)


def test_a_question_has_its_context_as_pair(question_answerer: Path) -> None:
    context = "a red dog ran to the house."
    done = onnxpress("run", question_answerer, "--text", "the cat ?", "--pair", context, "--top-k", 2, "--json")
    assert done.returncode == 0, done.stderr
    (answers,) = json.loads(done.stdout)["answers"]
    assert len(answers) == 2
    for answer in answers:
        assert answer["answer"] == context[answer["start"] : answer["end"]]
    assert answers[0]["score"] >= answers[1]["score"]
    line = onnxpress("run", question_answerer, "--text", "the cat ?", "--pair", context).stdout.splitlines()[1]
    assert f"answer: {answers[0]['answer']}, score: {answers[0]['score']:.4f}" in line


def test_masks_are_filled(fill_mask: Path) -> None:
    done = onnxpress("run", fill_mask, "--text", "the [MASK] sat", "--top-k", 3, "--json")
    assert done.returncode == 0, done.stderr
    ((candidates,),) = json.loads(done.stdout)["answers"]
    assert len(candidates) == 3
    assert candidates[0]["sequence"] == f"the {candidates[0]['token']} sat"


def test_run_refuses(artifact: Path, question_answerer: Path, fill_mask: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, list[object]]] = [
        ("No text was given", [artifact]),
        ("Text 1 is empty", [artifact, "--text", "the cat", "--text", " "]),
        ("half a character", [artifact, "--text", os.fsdecode(b"the \xff")]),
        ("1 texts and 2 --pair were given", [artifact, "--text", "a", "--pair", "b", "--pair", "c"]),
        ("leave top_k out", [artifact, "--text", "a", "--top-k", 3]),
        ("needs a context", [question_answerer, "--text", "the cat ?"]),
        ("top_k=0", [question_answerer, "--text", "the cat ?", "--pair", "a dog", "--top-k", 0]),
        ("top_k=0", [fill_mask, "--text", "the [MASK]", "--top-k", 0]),
        ("has no mask", [fill_mask, "--text", "the cat"]),
        ("cannot be read as UTF-8 text", [artifact, "--file", tmp_path / "nothing"]),
        ("cannot be read as UTF-8 text", [artifact, "--file", tmp_path]),
        ("does not exist", [tmp_path / "nothing", "--text", "a"]),
        ("has no manifest.json", [tmp_path, "--text", "a"]),
        ("Unknown provider 'gpu'", [artifact, "--text", "a", "--provider", "gpu"]),
        ("each once", [artifact, "--text", "a", "--provider", "cpu", "--provider", "cpu"]),
        ("onnxpress[gpu]", [artifact, "--text", "a", "--provider", "cuda"]),
    ]
    for message, arguments in cases:
        refused(onnxpress("run", *arguments), message)
    refused(onnxpress("run", artifact, "--file", "-", given=b"\xff\xfe"), "cannot be read as UTF-8 text")


def test_a_fallback_is_said(artifact: Path) -> None:
    ask = ("--provider", "cuda", "--provider", "cpu", "--allow-fallback")
    for command in (
        ("run", artifact, "--text", "the cat", "--json"),
        ("verify", artifact, "--json"),
        ("inspect", artifact, "--placement", "--json"),
        ("bench", artifact, "--batch", 1, "--length", 4, "--rounds", 1),
    ):
        done = onnxpress(*command, *ask)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("onnxpress: The provider cuda was asked for and is not in the installed wheel")
        assert done.stderr.endswith("It runs on: cpu.\n")
        if "--json" in command:
            json.loads(done.stdout)


def test_truncation_is_said_on_stderr(artifact: Path) -> None:
    command = [sys.executable, "-m", "onnxpress", "run", str(artifact), "--text", "the cat " * 30, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["answers"]
    assert done.stderr == "onnxpress: 1 of 1 texts were longer than 16 tokens and were cut; the longest lost 46.\n"


def test_a_module_is_no_matter_of_text(tmp_path: Path) -> None:
    signature = dataclasses.replace(SIGNATURE, task="module")
    path = save_artifact(tmp_path / "module", signature=signature).path
    refused(onnxpress("run", path, "--text", "the cat"), "takes named arrays, not text")
    refused(onnxpress("bench", path, "--length", 4), "takes named arrays, which have no --length")
    done = onnxpress("bench", path, "--batch", "1,5", "--rounds", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[2:4] for line in done.stdout.splitlines()] == [["batch", "1"], ["batch", "5"]]
    assert onnxpress("verify", path).returncode == 0


def test_verify(artifact: Path, tmp_path: Path) -> None:
    done = onnxpress("verify", artifact)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "3 files have the digests of the manifest.",
        "golden pair, embeddings: difference 0 (allowed 1e-06)",
    ]
    found = json.loads(onnxpress("verify", artifact, "--json").stdout)
    assert found["files"] == 3
    assert found["golden"] == [{"case": "pair", "output": "embeddings", "difference": 0.0, "tolerance": 1e-6}]

    with ArtifactWriter(tmp_path / "other") as writer:
        fill(writer.folder)
        ids = np.array([[5, 6]])
        golden = {"input.a.input_ids": ids, "input.a.attention_mask": np.ones_like(ids)}
        save_file(
            {**golden, "output.a.embeddings": np.ones((1, DIM), np.float32)}, writer.folder / "golden.safetensors"
        )
        writer.seal(manifest())
        other = writer.publish().path
    refused(onnxpress("verify", other), "does not answer here as it did when it was built", code=1)
    (other / "model.onnx").write_bytes(b"")
    refused(onnxpress("verify", other), "model.onnx was changed after the build")


def test_inspect(artifact: Path, tmp_path: Path) -> None:
    done = onnxpress("inspect", artifact)
    assert (done.returncode, done.stderr) == (0, "")
    assert "input input_ids: int64" in done.stdout
    found = json.loads(onnxpress("inspect", artifact, "--placement", "--json").stdout)
    assert found["signature"]["axes"]["length"] == [1, 16]
    assert set(found["placement"].values()) == {"CPUExecutionProvider"}
    found = json.loads(onnxpress("inspect", artifact / "model.onnx", "--placement", "--json").stdout)
    assert set(found["placement"].values()) == {"CPUExecutionProvider"}
    assert found["operators"]["Gather"] == 1
    assert found["largest_weights"] == json.loads(onnxpress("inspect", artifact, "--json").stdout)["largest_weights"]
    assert found["largest_weights"][0]["bytes"] == len(VOCABULARY) * DIM * 4
    refused(onnxpress("inspect", artifact, "--provider", "cpu"), "say where --placement opens an artifact")
    refused(onnxpress("inspect", tmp_path / "nothing"), "does not exist")
    refused(onnxpress("inspect", tmp_path / "nothing.onnx"), "does not exist")
    (tmp_path / "bad.onnx").write_bytes(b"this is no model")
    refused(onnxpress("inspect", tmp_path / "bad.onnx"), "bad.onnx")


def test_bench(artifact: Path, tmp_path: Path) -> None:
    done = onnxpress("bench", artifact, "--batch", "1,2", "--rounds", 1, "--json", tmp_path / "times.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 16), (2, 16)]  # as long as it takes
    assert all(row["rounds_ms"] == [row["median_ms"]] and row["median_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch takes positive whole numbers separated by commas"),
        (["--batch", "1,"], "--batch takes positive whole numbers separated by commas"),
        (["--length", "many"], "--length takes positive whole numbers separated by commas"),
        (["--rounds", "0"], "--rounds takes"),
        (["--rounds", "1,2"], "--rounds takes one positive whole number"),
        (["--length", "4,900"], "takes texts of at most 16 tokens"),
        (["--batch", "1", "--length", "4", "--against", "nothing"], "nothing does not exist"),
    ],
)
def test_bench_refuses(artifact: Path, arguments: list[str], message: str) -> None:
    refused(onnxpress("bench", artifact, *arguments), message)


def test_bench_calls_no_function_that_an_artifact_names(tmp_path: Path) -> None:
    called = tmp_path / "called"
    (tmp_path / "stranger.py").write_text(f"def make():\n    open({str(called)!r}, 'w').close()\n")
    model = {"source": "stranger:make", "revision": None, "max_length": None}
    other = save_artifact(tmp_path / "other", recipe={"model": model}).path
    done = onnxpress("bench", other, "--against", "torch", PYTHONPATH=str(tmp_path))
    refused(done, "is made by stranger:make, and no function is called because an artifact names it")
    assert not called.exists()


def test_doctor() -> None:
    done = onnxpress("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu: loads\n" in done.stdout
    assert done.stdout.endswith("no problems found\n")
    found = json.loads(onnxpress("doctor", "--json").stdout)
    assert found["problems"] == []
    assert found["providers"]["cpu"] == "loads"
    assert "onnxruntime" in found["versions"]


def test_doctor_reports_two_wheels(tmp_path: Path) -> None:
    info = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    done = onnxpress("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "PROBLEM: both onnxruntime and onnxruntime-gpu are installed" in done.stdout


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    done = onnxpress("run", tmp_path / "nothing", "--text", "the cat", "--debug")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.splitlines()[-1].startswith("onnxpress: ")


def test_wrong_use() -> None:
    done = onnxpress()
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("usage: onnxpress")
    for arguments, message in (
        (["frob"], "Argument COMMAND: invalid choice: 'frob'"),
        (["run"], "The following arguments are required: artifact; `onnxpress run --help` says what there is."),
        (["run", "a", "--top-k", "many"], "Argument --top-k: invalid int value: 'many'"),
        (["run", "a", "--top-k", "-3x"], "Argument --top-k: invalid int value: '-3x'"),
        (["bench", "a", "--frob"], "Unrecognized arguments: --frob"),
        (["generate", "a", "--stop", "---"], "expected one argument, and one that begins with - is written with =;"),
        (["generate", "a", "--prompt", "x", "--logprobs", "3"], "--logprobs are shown with --json"),
    ):
        refused(onnxpress(*arguments), message)
    done = onnxpress("--help")
    assert done.returncode == 0
    for command in ("build", "run", "bench", "verify", "inspect", "doctor"):
        assert f"    {command} " in done.stdout


def test_python_m_is_the_same_command(artifact: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "onnxpress", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("--help").stdout.startswith("usage: onnxpress [-h]")
    done = run("verify", artifact)
    assert (done.returncode, done.stderr) == (0, "")
    refused(onnxpress("verify", tmp_path / "nothing"), "nothing does not exist")
    refused(onnxpress("verify"), "`onnxpress verify --help` says what there is")


def test_a_reader_that_goes_away_is_no_error(artifact: Path) -> None:
    """As in `onnxpress inspect ARTIFACT | head -1`: the pipe is closed before anything is written."""
    command = [sys.executable, "-m", "onnxpress", "inspect", str(artifact)]
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_told_to_stop_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM, as `timeout` and containers send it, or SIGHUP of a terminal that closes, at a moment when the part folder is there."""
    folder = save_model(tmp_path / "model", "bert")
    command = [
        sys.executable,
        "-m",
        "onnxpress",
        "build",
        folder,
        "--out",
        tmp_path / "new" / "out",
        "--no-measure",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "new").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nohup_is_heeded() -> None:
    line = "import signal; from onnxpress.cli import main; main(['inspect', 'nothing']); signal.raise_signal(signal.SIGHUP); print('on')"
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", line], preexec_fn=ignored, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_the_third_signal_is_obeyed_where_the_first_was_dropped() -> None:
    """Python drops what is raised in a weak reference's callback; the second would end what tidies up behind the first."""
    line = (
        "import signal, weakref; from onnxpress.stopping import end_on_signals; end_on_signals(); thing = type('', (), {})()\n"
        "weakref.finalize(thing, signal.raise_signal, signal.SIGTERM); del thing\n"
        "print('one'); signal.raise_signal(signal.SIGTERM); print('two'); signal.raise_signal(signal.SIGTERM); print('three')"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "one\ntwo\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_is_no_error_of_the_library_that_it_met(number: int, code: int) -> None:
    """Nor is the exit code another one where nobody can read what is said."""
    line = (
        f"import signal, sys; from onnxpress import cli; from onnxpress.errors import ProviderError\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background, it is ignored\n"
        "def meets(_):\n"
        "    try:\n"
        f"        signal.raise_signal({int(number)})\n"
        "    except SystemExit:\n"
        "        raise ProviderError('ONNX Runtime does not load') from None\n"
        "cli.examine.doctor = meets; cli.examine.add_doctor = lambda c: c.add_parser('doctor').set_defaults(command=meets)\n"
        "sys.exit(cli.main(['doctor']))"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", line], stderr=full)
    assert done.returncode == code


def test_what_the_system_refuses_is_one_clear_error(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(onnxpress("run", "a" * 300, "--text", "hi"), "cannot be read or written: File name too long")
    for name in ("pipe.tar", "pipe.zip"):
        os.mkfifo(tmp_path / name)
        refused(onnxpress("verify", tmp_path / name), "it is no file")

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    command = [sys.executable, "-m", "onnxpress", "inspect", str(artifact), "--json"]
    with (tmp_path / "out.json").open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, preexec_fn=small)
    assert (done.returncode, done.stderr) == (2, "onnxpress: Nothing more can be written: File too large.\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(onnxpress("build", artifact), "The working directory was removed")


def test_progress_that_nobody_reads_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = (
        "from onnxpress.terminal import Progress\n"
        "with Progress(enabled=True) as progress:\n"
        "    progress.step('one'); progress.step('two')\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, "done\n")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", line], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_terminal_that_is_closed_ends_nothing_either() -> None:
    master, terminal = pty.openpty()
    line = (
        "import os\n"
        "from onnxpress.terminal import Progress\n"
        "with Progress(enabled=True) as progress:\n"
        "    progress.step('one'); progress.detail('half'); os.write(1, b'begun\\n'); input()\n"
        "    progress.detail('whole'); progress.step('two')\n"
        "print('done')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.close(master)
        os.close(terminal)
        assert process.communicate("\n")[0] == "done\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    "ending",
    [
        "weakref.finalize(torch.nn.Identity(), signal.raise_signal, signal.SIGTERM)",
        "signal.raise_signal(signal.SIGTERM)",
    ],
    ids=["dropped", "taken"],
)
def test_a_build_ends_even_where_the_exception_is_dropped_or_taken(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what is raised in a weak reference's callback; a factory that ends the program is the user's mistake otherwise."""
    (tmp_path / "ending.py").write_text(
        "import signal, torch, weakref\n"
        "def make():\n"
        f"    {ending}\n"
        "    return torch.nn.Linear(2, 2), (torch.zeros(3, 2),)\n"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stopping, "_told", 0)
    monkeypatch.setattr(stopping, "_times", 0)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        main(["build", "ending:make", "--no-measure"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "artifacts").exists()


def test_a_model_that_branches_on_data_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(
        "import torch\n"
        "class Branching(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def make():\n"
        "    return Branching(), (torch.randn(2, 3),)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "onnxpress", "build", "branching:make", "--no-measure", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    refused(done, "Branching does not convert to ONNX")
    assert not (tmp_path / "artifacts").exists()
