"""An artifact opens with its task's runner, and its golden outputs are checked here and now."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_artifacts import DIM, fill, manifest, save_artifact

from onnxpress.artifact import Artifact, ArtifactWriter
from onnxpress.errors import ArtifactError, GoldenError, ProviderError
from onnxpress.manifest import SCHEMA_VERSION, Arrays
from onnxpress.runtime import (
    CPU,
    Embedder,
    FillMask,
    ModuleRunner,
    QuestionAnswerer,
    TextClassifier,
    TokenClassifier,
    load,
)
from onnxpress.runtime.loading import golden_difference, open_session, verify_golden
from onnxpress.runtime.tensor_file import read_tensors
from onnxpress.runtime.text_runner import TOKENS_PER_CHUNK


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return save_artifact(tmp_path / "tiny")


def of_task(task: str) -> Any:
    return dataclasses.replace(manifest().signature, task=task)


@pytest.mark.parametrize(
    ("task", "runner"),
    [
        ("feature-extraction", Embedder),
        ("text-classification", TextClassifier),
        ("token-classification", TokenClassifier),
        ("question-answering", QuestionAnswerer),
        ("fill-mask", FillMask),
        ("module", ModuleRunner),
    ],
)
def test_each_task_has_its_runner(tmp_path: Path, task: str, runner: type) -> None:
    loaded = load(save_artifact(tmp_path / "tiny", signature=of_task(task)).path)
    assert type(loaded) is runner
    assert loaded.session.input_names == ("input_ids", "attention_mask")


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny", signature=of_task("time-travel"))
    with pytest.raises(ArtifactError, match="'time-travel'; this onnxpress runs: feature-extraction"):
        load(artifact.path)


def test_the_runner_answers(artifact: Artifact) -> None:
    runner = load(artifact.path, providers=[CPU(threads=1)])
    assert isinstance(runner, Embedder)
    assert runner.embed(["the cat", "a dog ran to the house"]).shape == (2, DIM)
    assert runner.dim == DIM
    assert runner.session.providers == ("cpu",)  # type: ignore[attr-defined]


def test_a_module_takes_arrays(tmp_path: Path) -> None:
    runner = load(save_artifact(tmp_path / "tiny", signature=of_task("module")).path)
    assert isinstance(runner, ModuleRunner)
    feeds = {"input_ids": np.array([[5, 6]]), "attention_mask": np.array([[1, 1]])}
    assert runner.run(feeds)["embeddings"].shape == (1, DIM)


def test_chunks_are_those_that_measured_fastest_unless_the_build_needs_others(tmp_path: Path) -> None:
    def chunk(**more: Any) -> int:
        loaded = load(save_artifact(tmp_path / "tiny", **more).path)
        assert isinstance(loaded, Embedder)
        return loaded.tokens_per_chunk

    assert chunk() == TOKENS_PER_CHUNK
    assert chunk(measured={"tokens_per_chunk": 512}) == 512
    assert chunk(measured={"tokens_per_chunk": 512}, session={"tokens_per_chunk": 1}) == 1


def test_a_provider_that_is_not_there_is_refused_or_reported(artifact: Artifact) -> None:
    with pytest.raises(ProviderError, match="cuda"):
        load(artifact.path, providers=["cuda", "cpu"])
    loaded = load(artifact.path, providers=["cuda", "cpu"], allow_fallback=True)
    assert "cuda" in loaded.session.fallback_note  # type: ignore[attr-defined]


def test_eight_threads_load_and_answer(artifact: Artifact) -> None:
    runner = load(artifact.path)
    assert isinstance(runner, Embedder)
    texts = ["the cat sat on a mat", "a dog"] * 100
    expected = runner.embed(texts)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: runner.embed(texts), range(16)):
            np.testing.assert_array_equal(found, expected)


def test_golden_outputs_hold(artifact: Artifact) -> None:
    rows = verify_golden(artifact, open_session(artifact))
    assert [(row.case, row.output) for row in rows] == [("pair", "embeddings")]
    assert rows[0].difference <= rows[0].tolerance == 1e-6


class Changed:
    """The session with its answers changed."""

    def __init__(self, artifact: Artifact, change: Any) -> None:
        self.session, self.change = open_session(artifact), change
        self.input_names = self.session.input_names

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        return {name: self.change(array) for name, array in self.session.run(feeds).items()}


@pytest.mark.parametrize(
    "change", [lambda a: a + 1e-4, lambda a: a * np.nan, lambda a: a[:1], lambda a: a[None]], ids=range(4)
)
def test_golden_outputs_that_do_not_hold_are_named(artifact: Artifact, change: Any) -> None:
    with pytest.raises(GoldenError, match="output embeddings of golden case pair differs by"):
        verify_golden(artifact, Changed(artifact, change))


def test_how_far_answers_are_from_the_golden_ones() -> None:
    masked = np.array([1.0, -np.inf, np.inf], np.float32)
    assert golden_difference(masked, masked) == 0
    assert golden_difference(masked + np.float32([0.5, 0, 0]), masked) == 0.5
    assert golden_difference(-masked, masked) == np.inf
    assert golden_difference(np.zeros(3, np.float32), masked) == np.inf
    assert np.isnan(golden_difference(masked * np.nan, masked))
    assert golden_difference(np.array([1.0, -1e4, 1e9], np.float32), masked) == 0, "a mask stands for infinity"
    assert golden_difference(np.array([1.0, -400, 1e9], np.float32), masked) == np.inf
    classes = np.array([[1000, 7, 7, 0]])
    assert golden_difference(classes - [[1, 0, 0, 0]], classes) == 0.25, "of classes the share"
    assert golden_difference(classes.astype(bool), np.ones((1, 4), bool)) == 0.25
    assert golden_difference(classes[:, :0], classes[:, :0]) == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds nothing"),
        ({"something": np.zeros(1)}, "'something', which is no golden"),
        ({"input.a.input_ids": np.zeros((1, 1), np.int64), "target.a.x": np.zeros(1)}, "'target.a.x'"),
    ],
)
def test_garbled_golden_files_are_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with ArtifactWriter(tmp_path / "tiny") as writer:
        fill(writer.folder)
        save_file(tensors, writer.folder / "golden.safetensors")
        writer.seal(manifest())
        artifact = writer.publish()
    with pytest.raises(ArtifactError, match=message):
        verify_golden(artifact, open_session(artifact))


def test_a_golden_output_without_a_tolerance_is_named(tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny", options={"golden_tolerance": {}})
    with pytest.raises(ArtifactError, match="golden output embeddings that is not the model's"):
        verify_golden(artifact, open_session(artifact))


def test_our_reader_reads_what_safetensors_writes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        str(np.dtype(kind)): (random.normal(size=(2, 3, 4)) * 50).astype(kind)
        for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    }
    tensors |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(3.5)}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "np"})
    found = read_tensors(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def header(**entry: Any) -> bytes:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        header() + bytes(7),
        header(data_offsets=[0, 4]) + bytes(8),
        header(data_offsets=[-8, 0]) + bytes(8),
        header(data_offsets=[8, 0]) + bytes(8),
        header(shape=[-2]) + bytes(8),
        header(shape="wide") + bytes(8),
        header(dtype="F3") + bytes(8),
        (4).to_bytes(8, "little") + b"[1] ",
        (12).to_bytes(8, "little") + b'{"x": "text"}',
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_our_reader_names_garbled_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"file\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "file.safetensors")


def test_what_is_corrupt_is_named_when_opened(artifact: Artifact) -> None:
    for name in ("model.onnx", "tokenizer.json", "golden.safetensors"):
        path = artifact.path / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=rf"{name} was changed after the build"):
            load(artifact.path)
        path.write_bytes(content)
    assert load(artifact.path)


def test_a_newer_schema_is_named(artifact: Artifact) -> None:
    newer = dataclasses.replace(artifact.manifest, schema_version=SCHEMA_VERSION + 1)
    (artifact.path / "manifest.json").write_text(newer.to_json())
    with pytest.raises(ArtifactError, match=f"schema version {SCHEMA_VERSION + 1}; .* Upgrade onnxpress"):
        load(artifact.path)


def test_an_artifact_moves_anywhere(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "ein Ordner mit ü"
    artifact.path.rename(moved)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(moved)
    for path in (moved, "ein Ordner mit ü", tmp_path / "link"):
        loaded = load(path)
        assert isinstance(loaded, Embedder)
        assert loaded.embed(["the cat"]).shape == (1, DIM)
