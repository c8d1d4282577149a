"""A bundle is one file that proves itself where it is unpacked: same input, same bytes; no change goes unseen."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import marshal
import os
import platform
import py_compile
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
from tiny_artifacts import HERE, SIGNATURE, save_artifact
from tiny_artifacts import manifest as tiny_manifest
from tiny_decoders import save_decoder

from onnxpress import build, load, on_device
from onnxpress.bundle import _CHAT, _CORE, _requirements, bundle
from onnxpress.cli import main
from onnxpress.devices import check_fit
from onnxpress.errors import ArtifactError, ConversionError, OutputError, RecipeError
from onnxpress.on_device import BundleError, canonical, check_files, read_description, self_test
from onnxpress.runtime.tensor_file import read_tensors


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return bundle(save_artifact(folder / "tiny").path, target=HERE)


@pytest.fixture
def unpacked(archive: Path, tmp_path: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path / f"tiny-{HERE}"


# An installation that leads to the sources would stand in for what a bundle lacks.
_NOT_INSTALLED = (
    "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in getattr(finder, '__module__', '')]; "
)


def run(
    folder: Path, *arguments: str, without: tuple[str, ...] = (), given: str = ""
) -> subprocess.CompletedProcess[str]:
    """run.py in a process of its own, where some packages cannot be imported, and onnxpress' own is not installed."""
    blocked = ", ".join(f"{name}=None" for name in without)
    code = f"import runpy, sys; sys.modules.update({blocked}); sys.argv = {['run.py', *arguments]!r}; {_NOT_INSTALLED}"
    code += f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parent, input=given)


def test_it_answers_and_checks_itself_with_three_packages_alone(unpacked: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")}
    without = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "tqdm", "jinja2", "rich", "pydantic")
    done = run(unpacked, "--self-test", without=without)
    assert (done.returncode, done.stderr) == (0, "")
    assert "golden pair" in done.stdout
    assert "verdict: good" in done.stdout
    done = run(unpacked, "the cat", "a mat", without=without)
    assert done.returncode == 0, done.stderr
    expected: Any = load(unpacked / "model" / HERE)
    for line, vector in zip(done.stdout.splitlines(), expected.embed(["the cat", "a mat"]), strict=True):
        np.testing.assert_allclose(json.loads(line), vector, atol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")} == before, (
        "a self-test leaves nothing behind"
    )


@pytest.mark.newest
def test_a_language_model_goes_on_with_texts_and_chats(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    folder = save_decoder(tmp_path / "model", template=template)
    built = build(folder, precision="fp32", measure=False, out=tmp_path / "tiny")
    with tarfile.open(bundle(built.path, target=HERE)) as file:
        file.extractall(tmp_path / "there", filter="data")
    unpacked = next((tmp_path / "there").iterdir())
    assert "python run.py --chat" in (unpacked / "README.md").read_text()
    without = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "rich", "pydantic")
    generator: Any = load(built.path)
    done = run(unpacked, "the", without=without)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == generator.generate(["the"])[0].text
    done = run(unpacked, "--chat", without=without, given="the\n/undo\nin a\n")
    assert done.returncode == 0, done.stderr
    for text in ("the", "in a"):
        answer = generator.generate(messages=[{"role": "user", "content": text}])[0]
        assert f"{answer.text}\n" in done.stdout
        assert f"prompt {answer.prompt_tokens} tokens" in done.stderr
    line = [sys.executable, unpacked / "run.py", "--chat"]
    for closed in ("<&-", "< /dev/null | true"):
        done = subprocess.run(f"{shlex.join(map(str, line))} {closed}", shell=True, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_model_that_generates_no_text_does_not_chat(unpacked: Path) -> None:
    done = run(unpacked, "--chat")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "This model generates no text, so it cannot chat.\n"


def test_what_bundles_hold_imports_nothing_that_they_lack() -> None:
    """But for what the package's own names stand for: __init__.py imports it when it is asked for."""
    source = Path(on_device.__file__).parent
    held = {name.removesuffix(".py") for name in (*_CORE, *_CHAT)} | {"runtime"}
    for path in [
        *(source / name for name in (*_CORE, *_CHAT) if name != "__init__.py"),
        *(source / "runtime").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("onnxpress."):
                assert str(node.module).split(".")[1] in held, f"{path} imports {node.module}"


def test_it_asks_for_the_versions_that_the_project_does() -> None:
    project = tomllib.loads((Path(on_device.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    bounds = set(project["dependencies"]).union(*project["optional-dependencies"].values())
    asked = {
        requirement
        for changes in (
            {"signature": replace(SIGNATURE, task="text-generation")},
            {"session": {"providers": ["openvino"]}},
        )
        for requirement in _requirements(cast(Any, SimpleNamespace(manifest=tiny_manifest(**changes))), secured=True)
    }
    assert len(asked) > 5
    assert {one for one in asked if not one.startswith(("onnxruntime>", "onnxruntime-gpu>"))} <= bounds


def test_nothing_of_the_bundles_folder_is_imported_before_it_is_compared(unpacked: Path) -> None:
    (unpacked / "statistics.py").write_text("raise SystemExit('imported')")
    done = subprocess.run([sys.executable, unpacked / "run.py", "--self-test"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "'statistics.py' is not of the bundle" in done.stdout, done.stderr


def test_bytecode_is_foreign_and_the_readmes_way_does_not_read_it(unpacked: Path) -> None:
    evil = marshal.dumps(compile("raise SystemExit('read')", "run.py", "exec"))
    bytecode = unpacked / "__pycache__" / f"run.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(unpacked / "run.py"), cfile=str(bytecode), doraise=True)
    bytecode.write_bytes(bytecode.read_bytes()[:16] + evil)
    (unpacked / "base64.py").write_text("raise SystemExit('imported')")
    code = f"import runpy; runpy.run_path({str(unpacked / 'run.py')!r})['load']()"
    for command in ([unpacked / "run.py", "--self-test"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=unpacked,
            env={**os.environ, "PYTHONPATH": ":"},
        )
        assert done.returncode == 1
        assert "is not of the bundle" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["__future__", "os", "argparse", "hashlib", "tarfile"])
def test_a_bare_python_imports_nothing_of_the_folder_either(unpacked: Path, name: str) -> None:
    (unpacked / f"{name}.py").write_text("raise SystemExit('imported')")
    done = subprocess.run([sys.executable, "-S", unpacked / "run.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{name}.py' is not of the bundle" in done.stderr
    command = [sys.executable, "-S", unpacked / "update.py", unpacked.parent / "there", "--back"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "has no release before" in done.stderr


def test_all_that_it_imports_is_in_it(unpacked: Path) -> None:
    library = unpacked / "lib"
    wanted = set()
    for path in library.rglob("*.py"):
        if path.parent.name == "onnxpress" and path.name == "__init__.py":
            continue  # on a computer it has more
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onnxpress."):
                wanted.add(library / f"{str(node.module).replace('.', '/')}.py")
    assert len(wanted) > 10
    assert not [path for path in wanted if not path.exists() and not path.with_suffix("").is_dir()]


def test_what_is_found_does_not_hang_on_who_reads_it(unpacked: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(unpacked / "run.py")]
    with Path("/dev/full").open("w") as full:
        for stdout, said in ((writer, ""), (full, "Nothing more can be printed: No space left on device.\n")):
            for arguments in (["--self-test"], ["--self-test", "--json"], ["--check"]):
                done = subprocess.run([*command, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True)
                assert (done.returncode, done.stderr) == (0, said)
        assert subprocess.run([*command, "a text"], stdout=full, stderr=subprocess.DEVNULL).returncode == 2
    done = subprocess.run([*command, "a text"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    (unpacked / "README.md").write_text("changed")
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*command, "--self-test"], stdout=full, stderr=full).returncode == 1
        assert subprocess.run([*command, "--check"], stdout=full, stderr=full).returncode == 2


def test_the_runtime_is_the_bundles_own(unpacked: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r}); import run; run.self_test(run.Path({str(unpacked)!r})); "
    )
    code += "import onnxpress; print(onnxpress.__file__)"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(unpacked / "lib" / "onnxpress" / "__init__.py"), done.stderr


@pytest.mark.newest
def test_onnx_runtime_opens_it_as_a_model_package(unpacked: Path) -> None:
    package = onnxruntime.ModelPackage.open(str(unpacked))
    assert package.get_info()["package_name"] == "tiny"
    package.close()
    options = onnxruntime.SessionOptions()
    options.add_provider("CPUExecutionProvider", {})
    chosen = onnxruntime.ModelPackageContext(str(unpacked)).select_component(
        "model", onnxruntime.ModelPackageOptions(options)
    )
    assert chosen.get_selected_variant_name() == HERE
    feeds = {"input_ids": np.array([[2, 5, 3]]), "attention_mask": np.ones((1, 3), np.int64)}
    assert chosen.create_session().run(None, feeds)[0].shape == (1, 6)


def test_operators_are_those_of_the_graph(unpacked: Path) -> None:
    lines = (unpacked / "required_operators_and_types.config").read_text().splitlines()
    assert any(line.startswith("ai.onnx;13;") and "Gather" in line and "ReduceSum" in line for line in lines), lines


def test_the_same_artifact_gives_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    shutil.copytree(archive.parent / "tiny", tmp_path / "copy", copy_function=shutil.copyfile)  # with other dates
    for path in (tmp_path / "copy").rglob("*"):
        path.chmod(0o700)
    code = f"from onnxpress.bundle import bundle; bundle({str(tmp_path / 'copy')!r}, target={HERE!r}, out={str(tmp_path / 'again.tar')!r})"
    surroundings = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code], check=True, env=surroundings, umask=0o077)
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    fits = save_artifact(tmp_path / "x86", target="cpu-avx2", precision="int8").path
    first, second = (bundle(fits, target="windows-x86_64", out=tmp_path / f"{n}.zip").read_bytes() for n in (1, 2))
    assert first == second


def test_what_a_killed_bundling_left_is_removed(archive: Path, tmp_path: Path) -> None:
    living = f".b.tar.part-{os.getppid()}"
    for name in (living, ".b.tar.part-999999999", ".b.tar.part-mine", ".other.tar.part-999999999"):
        (tmp_path / name).touch()
    bundle(archive.with_name("tiny"), target=HERE, out=tmp_path / "b.tar")
    assert {path.name for path in tmp_path.iterdir()} == {
        "b.tar",
        living,
        ".b.tar.part-mine",
        ".other.tar.part-999999999",
    }


def test_no_room_for_onnx_runtimes_own_format_is_said(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("failed to save")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    with pytest.raises(ConversionError, match="in its own format: failed to save"):
        bundle(archive.with_name("tiny"), target=HERE, out=tmp_path / "b.tar")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(OutputError, match=r"no room in .* set TMPDIR"):
        bundle(archive.with_name("tiny"), target=HERE, out=tmp_path / "b.tar")


def test_a_zip_for_windows_holds_what_a_tar_does(archive: Path, tmp_path: Path) -> None:
    place = bundle(archive.parent / "tiny", target="windows-x86_64", out=tmp_path / "tiny.zip")
    with zipfile.ZipFile(place) as file:
        assert file.testzip() is None
        file.extractall(tmp_path)
    folder = tmp_path / "tiny-windows-x86_64"
    assert check_files(folder, read_description(folder)) > 20


def test_every_flipped_bit_of_every_file_is_seen(unpacked: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in unpacked.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(1000):
        path = files[number % len(files)]
        content = path.read_bytes()
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        with pytest.raises(BundleError, match="was changed after the bundle was made"):
            check_files(unpacked, read_description(unpacked))
        path.write_bytes(content)
    assert self_test(unpacked).good


def mutations(content: bytes) -> Iterator[bytes]:
    """Archives with a bit flipped, cut short, or with parts put twice or left out."""
    draw = random.Random(1)
    for _ in range(200):
        place = draw.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    for _ in range(50):
        yield content[: draw.randrange(len(content))]
    for _ in range(50):
        start = 512 * draw.randrange(len(content) // 512)
        end = start + 512 * draw.randrange(1, 40)
        yield draw.choice((content[:start] + content[end:], content[:end] + content[start:]))


def test_no_broken_archive_passes_for_a_whole_one(archive: Path, tmp_path: Path) -> None:
    whole = tree(archive.read_bytes(), tmp_path / "whole")
    refused = 0
    for broken in mutations(archive.read_bytes()):
        target = tmp_path / "inside" / "target"
        try:
            found = tree(broken, target)
            check_files(target / f"tiny-{HERE}", read_description(target / f"tiny-{HERE}"))
            assert found == whole, "what changed was padding, a date, or another name for the same content"
        except (tarfile.TarError, BundleError, OSError, EOFError, UnicodeError, ValueError):
            refused += 1
        assert [path.name for path in (tmp_path / "inside").iterdir()] == ["target"], "written outside of the folder"
        shutil.rmtree(tmp_path / "inside")
    assert refused > 200


def tree(content: bytes, folder: Path) -> dict[str, bytes]:
    """Unpack as `tar` and Python do, and read everything."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        file.extractall(folder, filter="data")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resealed(folder: Path, **changes: Any) -> None:
    """bundle.json with other content and the right digest."""
    description = {**json.loads((folder / "bundle.json").read_text()), **changes}
    (folder / "bundle.json").write_text(canonical(description))


def failed(folder: Path) -> str:
    verdict = self_test(folder)
    assert not verdict.good
    return "; ".join(found for _, found, good in verdict.lines if not good)


def test_what_is_missing_foreign_or_a_link_is_named(unpacked: Path) -> None:
    (unpacked / "lib" / "extra.py").write_text("")
    assert "'lib/extra.py' is not of the bundle" in failed(unpacked)
    (unpacked / "lib" / "extra.py").unlink()
    (unpacked / "README.md").rename(unpacked.parent / "README.md")
    assert "'README.md' is missing" in failed(unpacked)
    (unpacked / "README.md").symlink_to(unpacked.parent / "README.md")
    assert "README.md is no plain file" in failed(unpacked)
    (unpacked / "bundle.json").write_text("[]")
    assert "bundle.json was changed" in failed(unpacked)
    (unpacked / "bundle.json").unlink()
    assert "bundle.json cannot be read" in failed(unpacked)


def test_a_description_of_a_later_version_is_named(unpacked: Path) -> None:
    resealed(unpacked, schema_version=2)
    assert "has the schema version 2; this run.py reads 1" in failed(unpacked)


def test_an_artifact_elsewhere_is_not_opened(unpacked: Path) -> None:
    resealed(unpacked, artifact="../elsewhere")
    assert "bundle.json was changed" in failed(unpacked)


def test_another_machine_a_missing_package_and_a_wrong_answer(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr(platform, "machine", lambda: "riscv64")
        assert f"is for {HERE}" in failed(unpacked)
        assert "riscv64" in failed(unpacked)
    done = run(unpacked, "--self-test", without=("tokenizers",))
    assert done.returncode == 1
    assert 'pip install "onnxruntime>=1.30" "numpy>=2.0" "tokenizers>=0.21" "tqdm>=4.66"' in done.stdout
    done = run(unpacked, "the cat", without=("onnxruntime",))
    assert done.returncode == 2
    assert "onnxruntime" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_budget_is_held(archive: Path, tmp_path: Path) -> None:
    artifact = archive.parent / "tiny"
    for budget, good in (
        ({"latency_ms": 1e6, "memory_mb": 1e6}, True),
        ({"latency_ms": 1e-6}, False),
        ({"memory_mb": 1.0}, False),
    ):
        place = bundle(artifact, target=HERE, out=tmp_path / "tiny.tar", **budget)
        tree(place.read_bytes(), tmp_path / "there")
        assert self_test(tmp_path / "there" / f"tiny-{HERE}").good == good, budget
        shutil.rmtree(tmp_path / "there")


def test_another_answer_than_the_golden_one_is_not_good(tmp_path: Path) -> None:
    options = {"golden_tolerance": {"embeddings": -1.0}}
    place = bundle(save_artifact(tmp_path / "wrong", options=options).path, target=HERE)
    tree(place.read_bytes(), tmp_path / "there")
    assert "does not answer here as it did" in failed(tmp_path / "there" / f"tiny-{HERE}")


def test_what_a_device_has_no_kernels_for_is_refused(tmp_path: Path) -> None:
    ledger = ({"pass": "export", "status": "kept"}, {"pass": "fp8-qdq", "status": "repaired"})
    artifact = save_artifact(tmp_path / "tiny", target="tensorrt", precision="fp8-qdq", ledger=ledger)
    with pytest.raises(RecipeError, match="in FP8, which jetson-orin has no kernels for"):
        bundle(artifact.path, target="jetson-orin")
    assert bundle(artifact.path, target="jetson-thor").is_file()


@pytest.mark.parametrize(
    ("target", "precision", "built_for", "said"),
    [
        ("raspberry-pi-5", "int8", "cpu-avx2", "--target cpu-arm64"),
        ("linux-x86_64", "int8-qdq", "cpu-arm64", "--target cpu"),
        ("jetson-orin", "fp32", "cpu", "--target tensorrt"),
        ("android-arm64", "fp16", "cuda", "--target cpu-arm64"),
        ("linux-x86_64", "fp32", "tensorrt", "--target cpu"),
    ],
)
def test_a_build_for_something_else_is_refused(
    target: str, precision: str, built_for: str, said: str, tmp_path: Path
) -> None:
    artifact = save_artifact(tmp_path / "tiny", target=built_for, precision=precision)
    with pytest.raises(
        RecipeError, match=f"built for {built_for} at {precision}, which does not suit {target}.*{said}"
    ):
        bundle(artifact.path, target=target)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("target", "precision", "built_for"),
    [("raspberry-pi-5", "fp32", "cpu-avx2"), ("macos-arm64", "int4-weights", "cpu"), ("jetson-thor", "fp16", "cuda")],
)
def test_builds_that_suit(target: str, precision: str, built_for: str, tmp_path: Path) -> None:
    check_fit(target, save_artifact(tmp_path / "tiny", target=built_for, precision=precision).manifest)


def test_several_passes_are_judged_by_the_target_alone(tmp_path: Path) -> None:
    recipe = {"build": {"only": ["int8", "int8-weights"]}}
    artifact = save_artifact(tmp_path / "tiny", target="cpu-avx2", precision="int8-weights", recipe=recipe)
    with pytest.raises(RecipeError, match="does not suit raspberry-pi-5"):
        check_fit("raspberry-pi-5", artifact.manifest)


def test_a_bundle_for_android_and_one_for_jetson(tmp_path: Path) -> None:
    android = bundle(save_artifact(tmp_path / "tiny").path, target="android-arm64")
    names = zipfile.ZipFile(android).namelist()
    assert "tiny-android-arm64/required_operators_and_types.config" in names
    assert not any(name.endswith((".py", ".onnx")) for name in names)
    with zipfile.ZipFile(android) as file:
        file.extractall(tmp_path / "android")
    package = tmp_path / "android" / "tiny-android-arm64"
    chosen = json.loads((package / "model" / "component.json").read_text())["variants"]["android-arm64"]
    model = package / "model" / "android-arm64" / chosen["executor_info"]["ort"]["model_file"]
    golden = read_tensors(model.with_name("golden.safetensors"))
    feeds = {name: golden[f"input.pair.{name}"] for name in ("input_ids", "attention_mask")}
    found = onnxruntime.InferenceSession(model).run(None, feeds)[0]
    np.testing.assert_allclose(found, golden["output.pair.embeddings"], atol=1e-6)
    jetson = bundle(save_artifact(tmp_path / "gpu", target="tensorrt", precision="fp16").path, target="jetson-orin")
    tree(jetson.read_bytes(), tmp_path / "there")
    description = read_description(tmp_path / "there" / "tiny-jetson-orin")
    assert description["providers"] == ["tensorrt", "cpu"]
    assert description["requires"][0] == "onnxruntime-gpu>=1.30"


def test_an_older_runtime_and_a_missing_provider(unpacked: Path, tmp_path: Path) -> None:
    newer = bundle(
        save_artifact(tmp_path / "newer", minimum_onnxruntime="99.1").path, target=HERE, out=tmp_path / "n.tar"
    )
    tree(newer.read_bytes(), tmp_path / "there")
    assert "needs ONNX Runtime 99.1 or newer" in failed(tmp_path / "there" / f"tiny-{HERE}")
    resealed(unpacked, providers=["tensorrt", "cpu"])
    assert "The provider tensorrt was asked for" in failed(unpacked)


def test_mistakes(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = archive.parent / "tiny"
    with pytest.raises(RecipeError, match="Unknown device 'toaster'; bundles are made for: linux-x86_64"):
        bundle(artifact, target="toaster")
    with pytest.raises(RecipeError, match="latency_ms is -1"):
        bundle(artifact, target=HERE, latency_ms=-1)
    with pytest.raises(RecipeError, match="memory budget cannot be held to on Windows"):
        bundle(artifact, target="windows-x86_64", memory_mb=100.0)
    with pytest.raises(RecipeError, match="android-arm64 has no self-test"):
        bundle(artifact, target="android-arm64", latency_ms=100.0)
    with pytest.raises(ArtifactError, match="does not exist"):
        bundle(tmp_path / "nothing", target=HERE)
    with pytest.raises(RecipeError, match=r"is a tar; .* has to end in \.tar"):
        bundle(artifact, target=HERE, out=tmp_path / "it.zip")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        bundle(artifact, target=HERE, out=tmp_path / "folder.tar")
    (tmp_path / "folder.tar").rmdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        bundle(artifact, target=HERE, out=tmp_path / "file" / "tiny.tar")
    assert main(["bundle", str(artifact), "--target", HERE, "--out", str(tmp_path / "tiny.tar")]) == 0
    assert "python run.py --self-test" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"file", "tiny.tar"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a text, --chat, --self-test or --check"),
        (["a text", "--check"], "give a text, --chat, --self-test or --check"),
        (["--self-test", "--check", "."], "give a text, --chat, --self-test or --check"),
        (["--self-test", "--pair", "b"], "--pair goes with texts"),
        (["a text", "--json"], "--json goes with --self-test"),
    ],
)
def test_arguments_that_would_be_ignored(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_device.main(arguments)
    assert said in capsys.readouterr().err


def test_a_full_disk_leaves_what_was_there(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tiny.tar"
    place.write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OutputError, match="No space left on device"):
        bundle(archive.parent / "tiny", target=HERE, out=place)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("tiny.tar", b"before")]


def test_the_description_says_what_it_is_for(unpacked: Path) -> None:
    description = read_description(unpacked)
    assert description["target"] == HERE
    assert description["providers"] == ["cpu"]
    assert description["files"]["run.py"] == hashlib.sha256(Path(on_device.__file__).read_bytes()).hexdigest()
