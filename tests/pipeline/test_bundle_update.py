"""What changed is sent alone, becomes the same folder, and is switched to only when it is good."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from large_artifacts import save_large
from tiny_artifacts import HERE, save_artifact

from onnxpress import on_device_update
from onnxpress.bundle import bundle
from onnxpress.bundle_archive import unpacked
from onnxpress.chunks import LARGEST, SMALLEST, chunks
from onnxpress.errors import ArtifactError, RecipeError
from onnxpress.on_device_update import NotGoodError, PartsError, UpdateError, back, update


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An old bundle, a new one whose weights have eleven bytes more, and what changed."""
    folder = tmp_path_factory.mktemp("archives")
    old, new = save_large(folder / "old"), save_large(folder / "new", changed=b"hello there")
    made = {"old": bundle(old, target=HERE, out=folder / "old.tar")}
    made["new"] = bundle(new, target=HERE, out=folder / "new.tar")
    made["delta"] = bundle(new, target=HERE, delta=made["old"], out=folder / "delta.tar")
    return made


def put(place: Path, archive: Path) -> Path:
    with archive.open("rb") as file:
        return update(place, file)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_follow_their_content() -> None:
    whole = random.Random(0).randbytes(5_000_000)
    parts = list(chunks(io.BytesIO(whole)))
    assert b"".join(parts) == whole
    assert all(SMALLEST <= len(part) <= LARGEST for part in parts[:-1])
    assert 8 < len(parts) < 40
    other = list(chunks(io.BytesIO(whole[:2_000_000] + b"in between" + whole[2_000_010:])))
    assert len(set(other) - set(parts)) <= 2
    assert [len(part) for part in chunks(io.BytesIO(bytes(2 * LARGEST + 1)))] == [LARGEST, LARGEST, 1]
    assert list(chunks(io.BytesIO(b""))) == []


def test_what_changed_is_small_and_becomes_the_same_folder(archives: dict[str, Path], tmp_path: Path) -> None:
    assert archives["delta"].stat().st_size < archives["new"].stat().st_size / 5
    put(tmp_path / "there", archives["old"])
    first = (tmp_path / "there" / "current").resolve()
    release = put(tmp_path / "there", archives["delta"])
    with unpacked(archives["new"]) as (folder, _, _):
        assert content(release) == content(folder)
    assert (tmp_path / "there" / "current").resolve() == release.resolve()
    assert (tmp_path / "there" / "previous").resolve() == first
    assert back(tmp_path / "there") == first
    assert (tmp_path / "there" / "current").resolve() == first
    put(tmp_path / "there", archives["new"])
    put(tmp_path / "there", archives["new"])  # the same again
    releases = sorted(path.name for path in (tmp_path / "there" / "releases").iterdir())
    assert len(releases) == 3, releases  # the current one, the one before, and the one that may still be in use


def test_the_delta_is_the_same_each_time_and_of_itself_nearly_nothing(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    artifact = archives["new"].with_name("new")
    again = bundle(artifact, target=HERE, delta=archives["old"], out=tmp_path / "again.tar")
    assert again.read_bytes() == archives["delta"].read_bytes()
    nothing = bundle(artifact, target=HERE, delta=archives["new"], out=tmp_path / "nothing.tar")
    with tarfile.open(nothing) as file:
        assert [Path(name).name for name in file.getnames()] == ["bundle.json"]


def test_it_runs_as_a_program_with_python_alone(archives: dict[str, Path], tmp_path: Path) -> None:
    script = Path(on_device_update.__file__)
    run = [sys.executable, "-I", script, tmp_path / "there"]
    done = subprocess.run([*run, archives["old"]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "verdict: good" in done.stdout
    with archives["delta"].open("rb") as file:
        done = subprocess.run([*run, "-"], capture_output=True, text=True, stdin=file)
    assert done.returncode == 0, done.stderr
    assert "is now" in done.stdout
    done = subprocess.run([*run, "--back"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*run, tmp_path / "nothing.tar"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such file" in done.stderr


def test_a_bundle_that_is_not_good_is_not_switched_to(archives: dict[str, Path], tmp_path: Path) -> None:
    there = tmp_path / "there"
    put(there, archives["old"])
    before = content(there)
    slow = bundle(archives["new"].with_name("new"), target=HERE, latency_ms=1e-6, out=tmp_path / "slow.tar")
    with pytest.raises(NotGoodError, match="nothing was switched"):
        put(there, slow)
    assert content(there) == before


def test_a_delta_of_another_bundle_or_on_a_damaged_one_asks_for_the_whole(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    with pytest.raises(PartsError, match="Send the whole bundle"):
        put(there, archives["delta"])
    release = put(there, archives["old"])
    model = release / "model" / HERE / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:1_000_000] + bytes([whole[1_000_000] ^ 1]) + whole[1_000_001:])
    before = content(there)
    with pytest.raises(PartsError, match="Send the whole bundle"):
        put(there, archives["delta"])
    assert content(there) == before
    put(there, archives["new"])


def test_no_broken_archive_is_switched_to_and_nothing_is_left(archives: dict[str, Path], tmp_path: Path) -> None:
    there = tmp_path / "inside" / "there"
    put(there, archives["old"])
    before = content(tmp_path)
    whole = archives["delta"].read_bytes()
    draw = random.Random(2)
    for number in range(150):
        place = draw.randrange(len(whole))
        broken = (
            whole[:place]
            if number % 3 == 0
            else whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        )
        try:
            update(there, io.BytesIO(broken))
        except (UpdateError, tarfile.TarError, EOFError, OSError):
            assert content(tmp_path) == before
            continue
        # What was changed is in the padding, a date or a name's first part: the folder is the whole one's.
        with unpacked(archives["new"]) as (folder, _, _):
            assert content(there / "current") == content(folder)
        back(there)
        shutil.rmtree((there / "previous").resolve())
        (there / "previous").unlink()


def described(archive: Path) -> dict[str, object]:
    with tarfile.open(archive) as file:
        first = file.next()
        assert first is not None
        read = file.extractfile(first)
        assert read is not None
        return dict(json.load(read))


@pytest.mark.parametrize(
    "path", ["../outside", "/tmp/outside", "a/../../outside", "bundle.json", ".chunks/x", "a\\b", "./a", ""]
)
def test_paths_that_lead_elsewhere_are_refused(archives: dict[str, Path], path: str, tmp_path: Path) -> None:
    description = described(archives["old"]) | {"files": {path: "0" * 64}, "sizes": {path: 4}, "chunks": {}}
    text = json.dumps(description).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        for name, data in (("b/bundle.json", text), (f"b/{path}", b"evil")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    archive.seek(0)
    with pytest.raises(UpdateError, match="cannot be a file of a bundle"):
        update(tmp_path / "inside", archive)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "inside",
        "inside/.lock",
        "inside/releases",
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_plain_files_are_taken(archives: dict[str, Path], kind: bytes, tmp_path: Path) -> None:
    text = json.dumps(described(archives["old"])).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        entry = tarfile.TarInfo("b/bundle.json")
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text))
        entry = tarfile.TarInfo("b/run.py")
        entry.type, entry.linkname = kind, "/etc/passwd"
        file.addfile(entry)
    archive.seek(0)
    with pytest.raises(UpdateError, match="is no plain file"):
        update(tmp_path, archive)


def test_two_at_once(archives: dict[str, Path], tmp_path: Path) -> None:
    put(tmp_path, archives["old"])
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UpdateError, match=r"Another update of .* is at work"):
            put(tmp_path, archives["delta"])
    put(tmp_path, archives["delta"])


def test_no_space(archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, archives["old"])
    before = content(tmp_path)
    with monkeypatch.context() as full:
        usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UpdateError, match=r"6\.\d MB are needed .* and 0\.0 MB are free"):
            put(tmp_path, archives["new"])
    assert content(tmp_path) == before
    # A disk that is full all of a sudden: the system stops a file from growing.
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); "
    limited += f"sys.path.insert(0, {str(Path(on_device_update.__file__).parent)!r}); import on_device_update as u; "
    limited += f"sys.exit(u.main([{str(tmp_path)!r}, {str(archives['new'])!r}]))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-B", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 2
    assert "The bundle cannot be put in its place: File too large" in done.stderr
    assert content(tmp_path) == before


def test_one_that_is_killed_leaves_the_current_one_and_the_next_cleans_up(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    put(tmp_path, archives["old"])
    before = content(tmp_path)
    run = [sys.executable, Path(on_device_update.__file__), tmp_path, "-"]
    for kill in (subprocess.Popen.terminate, subprocess.Popen.kill):
        process = subprocess.Popen(run, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(archives["new"].read_bytes()[:2_000_000])
        process.stdin.flush()
        kill(process)
        process.wait()
        process.stdin.close()
        if kill is subprocess.Popen.terminate:
            assert content(tmp_path) == before
    put(tmp_path, archives["delta"])
    assert not list((tmp_path / "releases").glob(".part-*"))


def test_a_place_of_somebody_else_is_left_alone(archives: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "releases" / "my-thesis").mkdir(parents=True)
    with pytest.raises(UpdateError, match="holds 'my-thesis', which no update put there"):
        put(tmp_path, archives["old"])
    (tmp_path / "releases" / "my-thesis").rmdir()
    (tmp_path / "current").mkdir()
    with pytest.raises(UpdateError, match="is not a link to one of"):
        put(tmp_path, archives["old"])
    (tmp_path / "current").rmdir()
    (tmp_path / "current").symlink_to("elsewhere")
    with pytest.raises(UpdateError, match="is not a link to one of"):
        put(tmp_path, archives["old"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "current", "releases"]
    assert not list((tmp_path / "releases").iterdir())


def test_the_same_twice_leaves_the_way_back(archives: dict[str, Path], tmp_path: Path) -> None:
    first = put(tmp_path, archives["old"])
    put(tmp_path, archives["delta"])
    put(tmp_path, archives["new"])
    assert back(tmp_path) == first.resolve()


def test_the_way_back_is_checked(archives: dict[str, Path], tmp_path: Path) -> None:
    first = put(tmp_path, archives["old"])
    second = put(tmp_path, archives["new"])
    (first / "README.md").write_text("damaged")
    with pytest.raises(UpdateError, match=r"README\.md was changed"):
        back(tmp_path)
    assert (tmp_path / "current").resolve() == second.resolve()


@pytest.mark.parametrize("undone", [0, 1])
def test_a_kill_between_the_links_leaves_the_way_back(
    archives: dict[str, Path], undone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """undone: how many of the two renames are done."""
    first = put(tmp_path, archives["old"]).resolve()
    second = put(tmp_path, archives["delta"]).resolve()
    replace, done = Path.replace, [0]

    def killed(path: Path, to: Path) -> Path:
        if done[0] == undone:
            raise SystemExit
        done[0] += 1
        return replace(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            back(tmp_path)
    assert (tmp_path / "current").resolve() == (first if undone else second)
    assert back(tmp_path) == (second if undone else first)
    assert back(tmp_path) == (first if undone else second)
    assert (tmp_path / "current").resolve() == second or back(tmp_path) == second
    done[0] = 0
    third = bundle(archives["new"].with_name("new"), target=HERE, memory_mb=5000, out=tmp_path / "third.tar")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            put(tmp_path, third)
    switched = (tmp_path / "current").resolve()
    assert (switched == second) != bool(undone)
    assert back(tmp_path) == (second if undone else first)
    assert back(tmp_path) == switched
    assert not list(tmp_path.glob(".*-next"))


def test_a_first_update_that_is_killed_has_no_way_back(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = put(tmp_path, archives["old"]).resolve()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: sys.exit())
        with pytest.raises(SystemExit):
            put(tmp_path, archives["delta"])
    put(tmp_path, archives["old"])  # the same again
    with pytest.raises(UpdateError, match="has no release before the current one"):
        back(tmp_path)
    assert (tmp_path / "current").resolve().name == f"{current.name}-1"


@pytest.mark.parametrize(("step", "switched"), [(1, False), (2, True)])
def test_a_link_that_cannot_be_switched(
    archives: dict[str, Path], step: int, switched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(tmp_path, archives["old"]).resolve()
    before = content(tmp_path)
    replace, steps = Path.replace, [0]

    def fails(path: Path, to: Path) -> Path:
        steps[0] += 1
        if steps[0] == step:
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        if switched:
            put(tmp_path, archives["delta"])
        else:
            with pytest.raises(OSError, match="Input/output error"):
                put(tmp_path, archives["delta"])
    if not switched:
        assert content(tmp_path) == before
        assert not list(tmp_path.glob(".*-next"))
    else:
        assert back(tmp_path) == first


def test_a_way_back_that_leads_elsewhere_is_not_gone(archives: dict[str, Path], tmp_path: Path) -> None:
    there = tmp_path / "there"
    current = put(there, archives["old"]).resolve()
    shutil.copytree(current, tmp_path / current.name[::-1])
    for target in (tmp_path / current.name[::-1], "previous", "releases"):
        (there / "previous").unlink(missing_ok=True)
        (there / "previous").symlink_to(target)
        with pytest.raises(UpdateError, match="has no release before the current one"):
            back(there)
        assert (there / "current").resolve() == current


def test_a_bundle_is_no_place_for_bundles(archives: dict[str, Path], tmp_path: Path) -> None:
    current = put(tmp_path, archives["old"])
    before = content(tmp_path)
    for place in (current, tmp_path / "current", tmp_path / "releases"):
        with pytest.raises(UpdateError, match="is a bundle itself"):
            put(place, archives["new"])
    assert content(tmp_path) == before


def test_another_model_does_not_take_the_place(archives: dict[str, Path], tmp_path: Path) -> None:
    put(tmp_path, archives["old"])
    before = content(tmp_path)
    other = bundle(save_artifact(tmp_path.with_name(f"{tmp_path.name}-other") / "tiny").path, target=HERE)
    with pytest.raises(UpdateError, match=f"has large for {HERE}, and this is tiny for {HERE}"):
        put(tmp_path, other)
    assert content(tmp_path) == before


def test_a_current_file_that_cannot_be_read_asks_for_the_whole(
    archives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = put(tmp_path, archives["old"]) / "run.py"
    before, node, digest = content(tmp_path), broken.stat().st_ino, hashlib.file_digest

    def fails(file: BinaryIO, kind: str) -> Any:
        if os.fstat(file.fileno()).st_ino == node:
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", fails)
    with pytest.raises(PartsError, match="of the current bundle cannot be read: Input/output error"):
        put(tmp_path, archives["delta"])
    assert content(tmp_path) == before
    release = put(tmp_path, archives["new"])
    assert (release / "run.py").stat().st_ino != node
    assert (release / "update.py").stat().st_nlink == 2, "what is alike is shared"


def test_a_delta_does_not_take_the_place_of_what_it_builds_upon(archives: dict[str, Path], tmp_path: Path) -> None:
    whole = tmp_path / "old.tar"
    shutil.copy(archives["old"], whole)
    with pytest.raises(RecipeError, match="is the bundle of --delta"):
        bundle(archives["new"].with_name("new"), target=HERE, delta=whole, out=tmp_path / "." / "old.tar")
    assert whole.read_bytes() == archives["old"].read_bytes()


def test_an_interrupt_is_said(archives: dict[str, Path], tmp_path: Path) -> None:
    run = [sys.executable, Path(on_device_update.__file__), tmp_path, "-"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(run, stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard)
        assert process.stdin is not None
        process.stdin.write(archives["new"].read_bytes()[:2_000_000])
        process.stdin.flush()
        process.send_signal(number)
        assert process.communicate()[1] == b"Interrupted. Nothing was changed.\n"
        assert process.returncode == 128 + number
    assert not content(tmp_path / "releases")
    done = subprocess.run("exec " + shlex.join(map(str, run)) + " <&-", shell=True, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.splitlines()[-1].endswith(b"standard input is closed")) == (2, True)


def heard() -> None:
    """Signals end the process, though whoever runs the tests may have them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_damaged_description_of_the_current_one_does_not_block_the_next(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    release = put(tmp_path, archives["old"])
    text = (release / "bundle.json").read_text()
    for damaged in (text.replace('"chunks"', '"chunkz"'), text.replace("-", "x"), "[]", "{}", ""):
        (release / "bundle.json").write_text(damaged)
        with pytest.raises(PartsError):
            put(tmp_path, archives["delta"])
    put(tmp_path, archives["new"])


@pytest.mark.parametrize("name", ["run.py", ".chunks/70000-" + "0" * 32, ".chunks/x"])
def test_more_than_was_described_is_not_written(archives: dict[str, Path], name: str, tmp_path: Path) -> None:
    text = json.dumps(described(archives["old"])).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        for path, data in (("b/bundle.json", text), (f"b/{name}", bytes(500_000))):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    archive.seek(0)
    with pytest.raises(UpdateError, match="at another size than" if name == "run.py" else "does not name"):
        update(tmp_path, archive)


def test_what_is_no_bundle(archives: dict[str, Path], tmp_path: Path) -> None:
    for broken in (b"", b"not a tar", os.urandom(20000)):
        with pytest.raises((UpdateError, tarfile.TarError)):
            update(tmp_path / "there", io.BytesIO(broken))
    with pytest.raises(UpdateError, match="no release before"):
        back(tmp_path / "there")
    (tmp_path / "file").write_text("no bundle")
    artifact = archives["new"].with_name("new")
    with pytest.raises(ArtifactError, match="is no bundle that can be read"):
        bundle(artifact, target=HERE, delta=tmp_path / "file")
    with pytest.raises(ArtifactError, match="cannot be read or unpacked: No such file"):
        bundle(artifact, target=HERE, delta=tmp_path / "nothing")
    with pytest.raises(RecipeError, match="is a zip, which is put in its place whole"):
        bundle(artifact, target="windows-x86_64", delta=archives["old"])
