"""An artifact is whole or absent: what is edited, missing or misplaced is named, and a kill leaves nothing that matters."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interrupting import interrupt_rename
from tiny_artifacts import fill, manifest, save_artifact

from onnxpress.artifact import Artifact, ArtifactWriter
from onnxpress.errors import ArtifactError, InputError, OutputError
from onnxpress.manifest import FileEntry

FILES = {"golden.safetensors", "manifest.json", "measured.json", "model.onnx", "report.html", "tokenizer.json"}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return save_artifact(tmp_path / "tiny")


def test_what_is_written_is_read(artifact: Artifact, tmp_path: Path) -> None:
    assert {path.name for path in artifact.path.iterdir()} == FILES
    assert set(artifact.manifest.files) == FILES - {"manifest.json", "measured.json", "report.html"}
    found = Artifact.open(str(artifact.path))
    assert found.manifest == artifact.manifest
    assert found.file("model.onnx") == artifact.path / "model.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    with pytest.raises(ArtifactError, match=r"has no file report\.html; it has: golden"):
        found.file("report.html")


def test_the_same_content_gives_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    again = save_artifact(tmp_path / "again", measured={"tokens_per_chunk": 7})
    for name in FILES - {"measured.json"}:
        assert (again.path / name).read_bytes() == (artifact.path / name).read_bytes(), name
    assert again.measured["tokens_per_chunk"] == 7


def test_files_in_folders_are_part_of_it(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "tiny") as writer:
        fill(writer.folder)
        (writer.folder / "part").mkdir()
        (writer.folder / "part" / "manifest.json").write_text("{}")
        writer.seal(manifest())
        artifact = writer.publish()
    assert "part/manifest.json" in artifact.manifest.files
    (artifact.path / "part" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"part/manifest\.json is missing"):
        Artifact.open(artifact.path)


def test_names_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, message in {"file": "is a file", "folder": "has no manifest", "nothing": "does not exist"}.items():
        with pytest.raises(ArtifactError, match=message):
            Artifact.open(tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "golden.safetensors", "report.html"])
def test_names_a_changed_file(artifact: Artifact, name: str) -> None:
    path = artifact.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} was changed after the build"):
        Artifact.open(artifact.path)
    assert Artifact.open(artifact.path, verify=False)  # the size still fits: this is what verify is for


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "golden.safetensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_names_a_missing_or_truncated_file(artifact: Artifact, name: str, verify: bool) -> None:
    path = artifact.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"{name} was changed after the build"):
        Artifact.open(artifact.path, verify=verify)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        Artifact.open(artifact.path, verify=verify)


def test_a_report_or_measurements_may_be_missing(artifact: Artifact) -> None:
    (artifact.path / "report.html").unlink()
    assert Artifact.open(artifact.path).measured
    (artifact.path / "measured.json").unlink()
    assert Artifact.open(artifact.path).measured == {}


@pytest.mark.parametrize("content", ["", "[1]", '{"sha256": 3}', "\udcff"])
def test_names_garbled_measurements(artifact: Artifact, content: str) -> None:
    (artifact.path / "measured.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match=r"measured\.json"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("verify", [True, False])
def test_names_an_edited_manifest(artifact: Artifact, verify: bool) -> None:
    path = artifact.path / "manifest.json"
    content = json.loads(path.read_text())
    content["options"]["max_length"] = 512
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="its digest does not fit its content"):
        Artifact.open(artifact.path, verify=verify)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"schema_version": "1"}', b"\xff\xfe", b'{"schema_version"'])
def test_names_a_garbled_manifest(artifact: Artifact, content: bytes) -> None:
    (artifact.path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "part/../../secret", "link", "part\\..\\secret"])
def test_refuses_paths_that_lead_out(artifact: Artifact, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (artifact.path / "link").symlink_to(tmp_path / "secret")
    forged = manifest(files={name: FileEntry(sha256="0" * 64, size=6)})
    (artifact.path / "manifest.json").write_text(forged.to_json())
    with pytest.raises(ArtifactError, match="outside of the artifact"):
        Artifact.open(artifact.path)


def test_replaces_an_artifact(artifact: Artifact, tmp_path: Path) -> None:
    save_artifact(tmp_path / "tiny", name="second")
    assert Artifact.open(tmp_path / "tiny").manifest.name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_replaces_a_link_to_an_artifact_and_leaves_its_target(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact.path)
    save_artifact(tmp_path / "link", name="second")
    assert Artifact.open(tmp_path / "link").manifest.name == "second"
    assert Artifact.open(artifact.path).manifest.name == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "tiny"]


@pytest.mark.parametrize("kind", ["folder", "web app", "file", "dangling link"])
def test_replaces_nothing_else(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "mine"
    if kind in ("folder", "web app"):
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
        if kind == "web app":
            (place / "manifest.json").write_text('{"schema_version": 1, "name": "mine"}')
    elif kind == "file":
        place.write_text("years of work")
    else:
        place.symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputError, match="exists and is no artifact, so it is not replaced"), ArtifactWriter(place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert kind not in ("folder", "web app") or (place / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_leaves_nothing_behind(artifact: Artifact, tmp_path: Path, error: BaseException) -> None:
    def fail(destination: Path) -> None:
        with ArtifactWriter(destination) as writer:
            fill(writer.folder)
            raise error

    for name in ("tiny", "new"):
        with pytest.raises(type(error)):
            fail(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert Artifact.open(tmp_path / "tiny")


@pytest.mark.parametrize("place", ["/proc/onnxpress/tiny", "/dev/null/tiny", "{file}/tiny", "{folder}/" + "n" * 300])
def test_names_a_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    destination = place.format(file=tmp_path / "file", folder=tmp_path)
    with pytest.raises(OutputError, match=r"cannot be written: .* Choose another --out"), ArtifactWriter(destination):
        raise AssertionError("the writer has to find out before any work is done")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_a_full_disk(tmp_path: Path) -> None:
    def write() -> None:
        with ArtifactWriter(tmp_path / "tiny") as writer:
            (writer.folder / "model.onnx").symlink_to("/dev/full")
            (writer.folder / "model.onnx").write_bytes(bytes(100))

    with pytest.raises(OutputError, match="No space left on device") as caught:
        write()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_names_a_limit_that_was_met_while_hashes_are_written(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from onnxpress.artifact import ArtifactWriter\n"
        "from onnxpress.errors import OutputError\n"
        "from tiny_artifacts import fill, manifest\n"
        "try:\n"
        "    with ArtifactWriter(sys.argv[1]) as writer:\n"
        "        fill(writer.folder)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "        writer.seal(manifest())\n"
        "        writer.publish()\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    done = python(code, tmp_path / "tiny")
    assert "failed: File too large. Nothing was left behind" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_missing_elsewhere_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), ArtifactWriter(tmp_path / "tiny"):
        (tmp_path / "data.jsonl").read_text()
    with pytest.raises(OutputError, match="No such file"), ArtifactWriter(tmp_path / "tiny") as writer:
        (writer.folder / "nothing" / "model.onnx").write_text("")


def test_a_failed_swap_keeps_the_old_artifact(artifact: Artifact, tmp_path: Path) -> None:
    """The part folder vanishes between the two renames."""
    code = (
        "import os, sys\n"
        "from onnxpress.artifact import ArtifactWriter\n"
        "from tiny_artifacts import fill, manifest\n"
        "def steal(event, arguments):\n"
        "    if event == 'os.rename' and os.fspath(arguments[0]) == sys.argv[1]:\n"
        "        os.rename(writer.folder, sys.argv[1] + '-stolen')\n"
        "with ArtifactWriter(sys.argv[1]) as writer:\n"
        "    fill(writer.folder)\n"
        "    writer.seal(manifest(name='second'))\n"
        "    sys.addaudithook(steal)\n"
        "    writer.publish()\n"
    )
    done = python(code, artifact.path)
    assert "OutputError: Writing the artifact" in done.stderr
    assert Artifact.open(tmp_path / "tiny").manifest.name == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny-stolen"]


# A process that is killed at the n-th step that touches the file system; it prints how many steps there were.
KILLED = """
import os, signal, sys
from onnxpress.artifact import ArtifactWriter
from tiny_artifacts import fill, manifest
import onnx, onnxruntime, safetensors.numpy, tokenizers
place, stop, steps = sys.argv[1], int(sys.argv[2]), 0
folder = os.path.dirname(place)

def count(event, arguments):
    global steps
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        if arguments and isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]).startswith(folder):
            steps += 1
            if steps == stop:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
with ArtifactWriter(place) as writer:
    fill(writer.folder)
    writer.seal(manifest(name="new"))
    writer.write_measured({}, "<html></html>")
    writer.publish()
print(steps)
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_kill_at_any_step_leaves_no_broken_artifact(tmp_path: Path, replacing: bool) -> None:
    place = tmp_path / "out" / "tiny"

    def prepare() -> None:
        if replacing:
            save_artifact(place, name="old")

    prepare()
    whole = python(KILLED, place, 0)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout)
    assert steps > 15
    # Every step around the publishing, where the folder is swapped, and a few of the many before.
    for stop in (1, 2, steps // 2, *range(steps - 14, steps + 1)):
        prepare()
        killed = python(KILLED, place, stop)
        assert killed.returncode == -signal.SIGKILL, (stop, killed.stderr)
        if place.exists():
            assert Artifact.open(place).manifest.name in ({"old", "new"} if replacing else {"new"})
        if replacing:  # the old one is there until the new one is, if need be beside its place
            assert place.exists() or list(place.parent.glob(".tiny.part-*-old"))
        with ArtifactWriter(place):
            left = {path.name for path in place.parent.iterdir()} - {f".tiny.part-{os.getpid()}"}
            assert left <= {"tiny"}, (stop, left)
        assert not replacing or Artifact.open(place).manifest.name in {"old", "new"}
        save_artifact(place, name="next")
        assert [path.name for path in place.parent.iterdir()] == ["tiny"]
        assert Artifact.open(place).manifest.name == "next"
        if not replacing:
            for path in place.iterdir():
                path.unlink()
            place.rmdir()


@pytest.mark.parametrize(("step", "found"), [(1, "old"), (2, "new")])
def test_an_interrupt_while_an_artifact_is_replaced_leaves_one(
    step: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tiny"
    save_artifact(place, name="old")
    interrupt_rename(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(place, name="new")
    assert Artifact.open(place).manifest.name == found
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_part_folders_of_living_processes_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".tiny.part-{os.getppid()}"
    other.mkdir()
    neighbour = tmp_path / ".tiny2.part-999999999"
    neighbour.mkdir()
    unknown = tmp_path / ".tiny.part-backup"
    unknown.mkdir()
    save_artifact(tmp_path / "tiny")
    assert other.is_dir()
    assert neighbour.is_dir()
    assert unknown.is_dir()


def test_leftovers_of_any_kind_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".tiny.part-999999999").mkdir()
    (tmp_path / ".tiny.part-999999999" / "model.onnx").write_text("")
    (tmp_path / ".tiny.part-999999998").write_text("a file")
    (tmp_path / ".tiny.part-999999997-old").symlink_to(tmp_path / "nothing")
    (tmp_path / f".tiny.part-{os.getpid()}").mkdir()
    save_artifact(tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "content",
    ["[" * 10**5, '{"schema_version": 1, "x": "\\ud800"}', '{"schema_version": NaN}', '{"schema_version": 1e400}'],
    ids=["deep", "half a character", "not a number", "infinite"],
)
def test_names_a_manifest_that_only_looks_like_json(artifact: Artifact, content: str) -> None:
    (artifact.path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("field", ["files", "signature", "ledger"])
@pytest.mark.parametrize("value", [None, 3, [1], "text"])
def test_names_a_field_of_the_wrong_kind(artifact: Artifact, field: str, value: Any) -> None:
    """With a digest that fits, as another program might write it."""
    content = json.loads((artifact.path / "manifest.json").read_text())
    del content["digest"]
    content[field] = value
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    content["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (artifact.path / "manifest.json").write_text(json.dumps(content))
    if field == "ledger" and value not in (None, 3):
        assert Artifact.open(artifact.path)  # rows that nothing but the report reads
        return
    with pytest.raises(ArtifactError, match="lacks or garbles a field"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize("name", ["a\0b", "loop", "", "."])
def test_names_paths_that_are_none(artifact: Artifact, name: str) -> None:
    (artifact.path / "loop").symlink_to("loop")
    forged = manifest(files={name: FileEntry(sha256="0" * 64, size=6)})
    (artifact.path / "manifest.json").write_text(forged.to_json())
    with pytest.raises(ArtifactError, match=r"outside of the artifact|is missing"):
        Artifact.open(artifact.path)


def test_names_a_file_that_may_not_be_read(artifact: Artifact) -> None:
    """Permissions do not bind root, so that a process of root's turns into nobody's first."""
    code = (
        "import os, sys\n"
        "from onnxpress.artifact import Artifact\n"
        "from onnxpress.errors import ArtifactError\n"
        "os.chdir(sys.argv[1])\n"
        "os.getuid() or os.setuid(65534)\n"
        "try:\n"
        "    Artifact.open('.')\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    (artifact.path / "model.onnx").chmod(0)
    done = python(code, artifact.path)
    assert done.stdout == "model.onnx cannot be read: Permission denied.\n", done.stderr


def test_all_files_have_the_permissions_of_the_process(tmp_path: Path) -> None:
    """An artifact that root built has to open for the user that a server runs as."""
    before = os.umask(0o027)
    try:
        artifact = save_artifact(tmp_path / "tiny")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {0o640}
    assert artifact.path.stat().st_mode & 0o777 == 0o750
