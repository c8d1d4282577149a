"""The bill of materials is valid CycloneDX, names all that is there, and licences are those of the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from tiny_artifacts import HERE, fill, manifest, save_artifact
from tiny_models import save_model

from onnxpress.artifact import Artifact, ArtifactWriter
from onnxpress.bundle import bundle
from onnxpress.bundle_archive import unpacked
from onnxpress.exporters.license import license_files, stated_license
from onnxpress.pipeline import build


def test_the_bill_of_materials_is_valid_and_whole(tmp_path: Path) -> None:
    ledger = ({"pass": "int8", "metrics": {"spearman": 86.65}},)
    artifact = save_artifact(tmp_path / "tiny", options={"license": "apache-2.0"}, ledger=ledger).path
    with unpacked(bundle(artifact, target=HERE, encrypt_with=bytes(32))) as (folder, description, _):
        text = (folder / "sbom.cdx.json").read_text()
        files = description["files"]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content = json.loads(text)
    model, runtime, *packages = content["components"]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == [{"type": "spearman", "value": "86.65"}]
    listed = {
        one["name"]: one["hashes"][0]["content"] for component in (model, runtime) for one in component["components"]
    }
    assert {"run.py", "README.md"} < set(listed)
    assert listed == {path: digest for path, digest in files.items() if path not in ("LICENSES.md", "sbom.cdx.json")}
    assert [package["name"] for package in packages] == ["onnxruntime", "numpy", "tokenizers", "tqdm", "cryptography"]
    assert content["dependencies"][0]["dependsOn"] == [
        "model",
        "onnxpress",
        *(package["bom-ref"] for package in packages),
    ]


@pytest.mark.parametrize("stated", [None, "other", "llama3.2"])
def test_licences_that_are_not_of_the_standard_list(stated: str | None, tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny", options={} if stated is None else {"license": stated}).path
    with unpacked(bundle(artifact, target=HERE)) as (folder, _, _):
        text = (folder / "sbom.cdx.json").read_text()
        words = (folder / "LICENSES.md").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert (f"{stated}, as its model card states" if stated else "not stated by the checkpoint") in words
    assert "- onnxruntime>=1.30: MIT" in words
    assert "Apache License" in words


def test_texts_that_the_model_came_with_are_in_the_notes(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "tiny") as writer:
        fill(writer.folder)
        (writer.folder / "NOTICE").write_text("Made by somebody.\n")
        writer.seal(manifest())
        writer.write_measured({}, "<html></html>")
        writer.publish()
    with unpacked(bundle(tmp_path / "tiny", target=HERE)) as (folder, _, _):
        assert "## The model's NOTICE\n\n    Made by somebody.\n" in (folder / "LICENSES.md").read_text()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n", {"license": "apache-2.0"}),
        ("---\nlicense: 'MIT'\n---\n", {"license": "mit"}),
        ("# Model\n\nlicense: mit\n", {}),
        ("---\ntags:\n- license: mit\n---\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("", {}),
    ],
)
def test_the_model_cards_licence(card: str, expected: dict[str, str], tmp_path: Path) -> None:
    assert stated_license(tmp_path) == {}
    (tmp_path / "README.md").write_text(card)
    assert stated_license(tmp_path) == expected


def test_texts_beside_the_weights(tmp_path: Path) -> None:
    for name in ("LICENSE", "LICENSE.md", "NOTICE.txt", "config.json"):
        (tmp_path / name).write_text("text")
    (tmp_path / "LICENSES").mkdir()
    assert [path.name for path in license_files(tmp_path)] == ["LICENSE", "LICENSE.md", "NOTICE.txt"]


def test_an_artifact_keeps_the_licence_of_its_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").write_text("Do as you like.")
    artifact = build(folder, out=tmp_path / "artifact", precision="fp32", measure=False, quiet=True)
    assert artifact.manifest.options["license"] == "mit"
    assert Artifact.open(artifact.path).read("LICENSE") == b"Do as you like."


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm, from which the page's libraries come")
def test_a_bundle_for_browsers_names_the_libraries_that_it_holds(tmp_path: Path) -> None:
    with unpacked(bundle(save_artifact(tmp_path / "tiny").path, target="browser")) as (folder, description, _):
        text = (folder / "sbom.cdx.json").read_text()
        assert "python3 -m http.server" in (folder / "README.md").read_text()
        assert "- onnxruntime-web 1.30.0: MIT" in (folder / "LICENSES.md").read_text()
    assert description["requires"] == []
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    _, runtime, *held = json.loads(text)["components"]
    assert {"index.html", "README.md"} < {one["name"] for one in runtime["components"]}
    assert not any(one["name"].startswith("vendor/") for one in runtime["components"])
    assert [one["purl"] for one in held] == [
        "pkg:npm/onnxruntime-web@1.30.0",
        "pkg:npm/%40huggingface/tokenizers@0.2.0",
    ]
