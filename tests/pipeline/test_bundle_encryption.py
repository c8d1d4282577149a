"""Encrypted at rest, decrypted in memory alone; a wrong key or a changed file gives one error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_artifacts import HERE, fill, manifest, save_artifact

import onnxpress
from onnxpress.artifact import Artifact, ArtifactWriter
from onnxpress.bundle import bundle
from onnxpress.cli import main
from onnxpress.encryption import decrypt, encrypt, read_key
from onnxpress.errors import ArtifactError, RecipeError, UsageError
from onnxpress.on_device import self_test

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
MIB = 2**20


def encrypted(path: Path, content: bytes, name: str = "a file") -> Path:
    with path.open("wb") as place:
        encrypt(io.BytesIO(content), place, name=name, key=KEY)
    return path


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB, 3 * MIB + 5])
def test_a_file_comes_back(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = encrypted(tmp_path / "file", content)
    assert bytes(decrypt(path, name="a file", key=KEY)) == content
    assert path.read_bytes() == encrypted(tmp_path / "again", content).read_bytes()
    assert size < 100 or content[:100] not in path.read_bytes()


def test_segments_cannot_be_changed_moved_left_out_or_cut_off(tmp_path: Path) -> None:
    whole = encrypted(tmp_path / "file", np.random.default_rng(0).bytes(3 * MIB + 5)).read_bytes()
    head, segment = 22 + 32, MIB + 16
    parts = [whole[head + start : head + start + segment] for start in range(0, len(whole) - head, segment)]
    assert len(parts) == 4
    flipped = [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for place in (0, 21, 22, 53, 54, head + segment - 1, len(whole) - 1)
    ]
    rearranged = [
        whole[:head] + b"".join(order)
        for order in (parts[:3], parts[1:], [parts[1], parts[0], *parts[2:]], [*parts, parts[3]], parts[:1], [])
    ]
    for broken in (*flipped, *rearranged, whole[:-1], whole[:head], whole[:10], b""):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ArtifactError, match="was changed"):
            decrypt(tmp_path / "broken", name="a file", key=KEY)
    (tmp_path / "broken").write_bytes(whole)
    for wrong in ({"name": "another", "key": KEY}, {"name": "a file", "key": OTHER}):
        with pytest.raises(ArtifactError, match="cannot be decrypted: the key is another one"):
            decrypt(tmp_path / "broken", **wrong)  # type: ignore[arg-type]


def unpack(place: Path, folder: Path) -> Path:
    with tarfile.open(place) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"tiny-{HERE}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encrypted bundle, unpacked."""
    place = tmp_path_factory.mktemp("encrypted")
    artifact = save_artifact(place / "tiny").path
    return unpack(bundle(artifact, target=HERE, encrypt_with=KEY, out=place / "it.tar"), place / "there")


def test_nothing_of_the_model_or_its_tokenizer_is_readable(folder: Path) -> None:
    content = b"".join(path.read_bytes() for path in (folder / "model").rglob("*") if path.is_file())
    for word in (b"[MASK]", b"WordPiece", b"ReduceSum"):
        assert word not in content
    names = {path.name for path in (folder / "model" / HERE).iterdir()}
    assert names == {
        *("manifest.json", "measured.json", "model.onnx.encrypted", "tokenizer.json.encrypted"),
        "golden.safetensors.encrypted",
    }


def test_it_answers_and_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain: Any = onnxpress.load(save_artifact(tmp_path / "plain").path)
    opened: Any = onnxpress.load(folder / "model" / HERE, key=KEY)
    np.testing.assert_array_equal(opened.embed(["the cat sat"]), plain.embed(["the cat sat"]))
    before = set(folder.rglob("*"))
    monkeypatch.setenv("THE_KEY", KEY.hex())
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))  # where a decrypted copy would go
    command = [sys.executable, folder / "run.py", "the cat", "--key", "env:THE_KEY"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), plain.embed(["the cat"])[0], atol=1e-6)
    assert set(folder.rglob("*")) == before
    assert not list((tmp_path / "scratch").iterdir())
    assert self_test(folder, key="env:THE_KEY").good
    command = [
        sys.executable,
        folder / "run.py",
        "--check",
        "--key",
        "env:THE_KEY",
    ]  # as the README of a module's bundle has it
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_wrong_keys(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = folder / "model" / HERE
    with pytest.raises(ArtifactError, match="is encrypted; it needs its key"):
        onnxpress.load(artifact)
    with pytest.raises(ArtifactError, match="cannot be decrypted: the key is another one, or the file was changed"):
        onnxpress.load(artifact, key=OTHER)
    with pytest.raises(ArtifactError, match=r"A key was given, and .* is not encrypted"):
        onnxpress.load(save_artifact(tmp_path / "plain").path, key=KEY)
    (tmp_path / "key").write_text(OTHER.hex() + "\n")
    assert main(["run", str(artifact), "--text", "the cat", "--key", f"file:{tmp_path / 'key'}"]) == 2
    assert "the key is another one" in capsys.readouterr().err
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    assert main(["verify", str(artifact), "--key", f"file:{tmp_path / 'key'}"]) == 0
    assert main(["run", str(artifact), "--text", "the cat", "--key", f"command:cat {tmp_path / 'key'}"]) == 0
    verdict = self_test(folder, key=f"file:{tmp_path / 'nothing'}")
    assert not verdict.good
    assert "cannot be read: No such file" in verdict.lines[-1][1]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (KEY.hex(), "never itself"),
        ("password:abc", "never itself"),
        ("file:", "never itself"),
        ("env:NO_SUCH_VARIABLE", "no variable of the name"),
        ("command:no-such-program", "cannot be run"),
        ("command:false", "failed with exit code 1"),
        ("command:'", "cannot be run"),
        ("command:echo abc", "is not 64 hexadecimal digits"),
        (b"short", "is not 64 hexadecimal digits"),
    ],
)
def test_keys_that_are_none(source: str | bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_key(source)
    assert KEY.hex() not in str(caught.value)


def test_files_of_two_builds_cannot_be_mixed(folder: Path, tmp_path: Path) -> None:
    other = save_artifact(tmp_path / "tiny", options={"max_length": 8}).path
    model = onnx.load(other / "model.onnx")
    model.doc_string = "another"
    with ArtifactWriter(tmp_path / "changed") as writer:
        fill(writer.folder)
        onnx.save(model, writer.folder / "model.onnx")
        writer.seal(manifest())
        writer.write_measured({}, "<html></html>")
        changed = writer.publish().path
    there = unpack(bundle(changed, target=HERE, encrypt_with=KEY, out=tmp_path / "it.tar"), tmp_path / "there")
    mine, theirs = (place / "model" / HERE / "model.onnx.encrypted" for place in (there, folder))
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(ArtifactError, match=r"is not the file of this artifact's manifest\.json"):
        onnxpress.load(there / "model" / HERE, key=KEY)


def test_weights_beside_the_model_and_a_second_opening(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "tiny") as writer:
        fill(writer.folder)
        model = onnx.load(writer.folder / "model.onnx")
        (writer.folder / "model.onnx").unlink()
        onnx.save(
            model,
            writer.folder / "model.onnx",
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=200,
        )
        writer.seal(manifest())
        writer.write_measured({}, "<html></html>")
        artifact = writer.publish()
    assert "model.onnx.data" in artifact.manifest.files
    there = unpack(bundle(artifact.path, target=HERE, encrypt_with=KEY), tmp_path / "there")
    runner: Any = onnxpress.load(there / "model" / HERE, key=KEY)
    feeds = {"input_ids": np.array([[2, 5, 3]]), "attention_mask": np.ones((1, 3), np.int64)}
    plain: Any = onnxpress.load(artifact.path)
    expected = plain.session.run(feeds)["embeddings"]
    np.testing.assert_array_equal(runner.session.run(feeds)["embeddings"], expected)
    np.testing.assert_array_equal(runner.session.run_on_one_thread(feeds)["embeddings"], expected)
    assert runner.session.placement()


def test_what_needs_the_plain_artifact_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encrypted_artifact = folder / "model" / HERE
    with pytest.raises(ArtifactError, match="is encrypted"):
        bundle(encrypted_artifact, target=HERE, out=tmp_path / "it.tar")
    assert main(["inspect", str(encrypted_artifact)]) == 2
    assert "is encrypted" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="needs the artifact that it was made of"):
        Artifact.open(encrypted_artifact, key=KEY).file("model.onnx")
    assert "key=" not in repr(Artifact.open(encrypted_artifact, key=KEY))
    with pytest.raises(RecipeError, match="brings nothing that decrypts"):
        bundle(save_artifact(tmp_path / "tiny").path, target="android-arm64", encrypt_with=KEY)
