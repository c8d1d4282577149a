"""A bundle comes to a device over ssh: a real sshd on loopback, only what changed, tested there, switched in one step."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from large_artifacts import save_large
from tiny_artifacts import HERE, save_artifact

from onnxpress.bundle import bundle
from onnxpress.cli import main
from onnxpress.deploy import deploy
from onnxpress.errors import ArtifactError, DeployError, RecipeError, SelfTestError

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs OpenSSH's server and client (Debian: openssh-server)"
)


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that reaches a real sshd on this machine, with keys of its own."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'authorized'}\n"
        f"PasswordAuthentication no\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True) if os.access("/run", os.W_OK) else None  # Debian's sshd asks for it
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "config"], stderr=log)
    command = [
        *("ssh", "-p", str(port), "-i", str(folder / "user"), "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        *("-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder / 'known'}", "-F", "none"),
    ]
    try:
        for _ in range(50):
            if subprocess.run([*command, HOST, "true"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        else:
            pytest.fail((folder / "log").read_text())
        yield command
    finally:
        server.terminate()
        server.wait()


HOST = f"{getpass.getuser()}@127.0.0.1"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An old bundle, one whose weights have eleven bytes more, and one that is too slow by its own word."""
    folder = tmp_path_factory.mktemp("archives")
    old, new = save_large(folder / "old"), save_large(folder / "new", changed=b"hello there")
    return {
        "old": bundle(old, target=HERE, out=folder / "old.tar"),
        "new": bundle(new, target=HERE, out=folder / "new.tar"),
        "slow": bundle(new, target=HERE, latency_ms=1e-6, out=folder / "slow.tar"),
    }


@pytest.fixture
def send(ssh: list[str], tmp_path: Path) -> Callable[..., int]:
    def deployed(archive: Path, **options: object) -> int:
        given = {"place": str(tmp_path / "the place"), "python": sys.executable, "ssh": ssh, "quiet": True, **options}
        return deploy(archive, HOST, **given)  # type: ignore[arg-type]

    return deployed


def current(tmp_path: Path) -> str:
    return str(json.loads((tmp_path / "the place" / "current" / "bundle.json").read_text())["digest"])


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_only_what_changed_is_sent_and_switched_to(
    archives: dict[str, Path], send: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = send(archives["old"])
    assert whole == archives["old"].stat().st_size
    assert "verdict: good" in capfd.readouterr().out
    first = current(tmp_path)
    part = send(archives["new"])
    assert part < whole / 5
    assert current(tmp_path) != first
    assert send(archives["new"]) < 40_000, "nothing but the description"
    done = subprocess.run(
        [sys.executable, tmp_path / "the place" / "current" / "run.py", "the cat"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_self_test_that_fails_rolls_back(
    archives: dict[str, Path], send: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send(archives["old"])
    before, files = current(tmp_path), tree(tmp_path)
    capfd.readouterr()
    with pytest.raises(SelfTestError, match="is not good; what was current there still is"):
        send(archives["slow"])
    assert "BAD  latency" in capfd.readouterr().out
    assert (current(tmp_path), tree(tmp_path)) == (before, files)


def test_a_device_whose_files_were_damaged_gets_the_whole(
    archives: dict[str, Path], send: Callable[..., int], tmp_path: Path
) -> None:
    send(archives["old"])
    model = tmp_path / "the place" / "current" / "model" / HERE / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:1_000_000] + bytes([content[1_000_000] ^ 1]) + content[1_000_001:])
    assert send(archives["new"]) == archives["new"].stat().st_size
    (tmp_path / "the place" / "current" / "bundle.json").write_text("{}")
    assert send(archives["old"]) == archives["old"].stat().st_size


def test_a_connection_that_breaks_half_way(
    archives: dict[str, Path], send: Callable[..., int], ssh: list[str], tmp_path: Path
) -> None:
    send(archives["old"])
    before, files = current(tmp_path), tree(tmp_path)
    # A client that dies after two million bytes: the device sees the end of the stream.
    breaking = tmp_path / "ssh"
    breaking.write_text(
        '#!/bin/sh\ncase "$*" in *current/bundle.json*) exec "$@";; esac\nhead -c 2000000 | "$@" >&2\nexit 255\n'
    )
    breaking.chmod(0o755)
    (tmp_path / "the place" / "current" / "bundle.json").rename(tmp_path / "aside")  # so that all of it is sent
    with pytest.raises(DeployError, match="failed or broke; what was current there still is"):
        send(archives["new"], ssh=[str(breaking), *ssh])
    (tmp_path / "aside").rename(tmp_path / "the place" / "current" / "bundle.json")
    for _ in range(50):  # the device's side ends by itself
        if not list((tmp_path / "the place" / "releases").glob(".part-*")):
            break
        time.sleep(0.1)
    assert (current(tmp_path), tree(tmp_path) - {"ssh"}) == (before, files)
    send(archives["new"])


def test_two_at_once(
    archives: dict[str, Path], send: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send(archives["old"])
    before = current(tmp_path)
    holding = f"import fcntl, time; f = open({str(tmp_path / 'the place' / '.lock')!r}, 'a'); "
    holding += "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DeployError, match="did not take the bundle"):
            send(archives["new"])
        assert "Another update of" in capfd.readouterr().err
        assert current(tmp_path) == before
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    send(archives["new"])


def test_signatures_are_checked_before_anything_is_sent(send: Callable[..., int], tmp_path: Path) -> None:
    for name in ("signer", "other"):
        key = tmp_path / f"{name}.pem"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
        public = ["openssl", "ec", "-in", key, "-pubout", "-out", key.with_suffix(".pub")]
        subprocess.run(public, check=True, capture_output=True)
    signed = bundle(save_artifact(tmp_path / "tiny").path, target=HERE, sign=tmp_path / "signer.pem")
    with pytest.raises(ArtifactError, match="is not that of"):
        send(signed, signed_by=tmp_path / "other.pub")
    assert not (tmp_path / "the place").exists()
    send(signed, signed_by=tmp_path / "signer.pub")


def test_an_encrypted_model_is_tested_with_the_devices_key(
    archives: dict[str, Path], send: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(bytes(32).hex())
    place = bundle(save_artifact(tmp_path / "tiny").path, target=HERE, encrypt_with=bytes(32))
    with pytest.raises(RecipeError, match="is encrypted: name the place of its key there"):
        send(place)
    with pytest.raises(RecipeError, match="is not encrypted: leave --key out"):
        send(archives["old"], key="env:NOTHING")
    with pytest.raises(SelfTestError):
        send(place, key="env:NOTHING")
    assert "has no variable of the name" in capfd.readouterr().out
    send(place, key=f"file:{tmp_path / 'key'}")


def test_devices_that_cannot(
    archives: dict[str, Path],
    send: Callable[..., int],
    ssh: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(DeployError, match="cannot be reached by ssh"):
        send(archives["old"], ssh=[*ssh[:2], "1", *ssh[3:]])
    with pytest.raises(DeployError, match="no-such-ssh cannot be started"):
        send(archives["old"], ssh=["no-such-ssh"])
    with pytest.raises(DeployError, match="no-such-python cannot be started"):
        send(archives["old"], python="no-such-python")
    (tmp_path / "a file").write_text("")
    with pytest.raises(DeployError, match="did not take the bundle"):
        send(archives["old"], place=str(tmp_path / "a file"))
    assert "cannot be put in its place" in capfd.readouterr().err
    for host in ("-oProxyCommand=true", ""):
        with pytest.raises(RecipeError, match="is no host"):
            deploy(archives["old"], host, ssh=ssh)
    android = bundle(save_artifact(tmp_path / "tiny").path, target="android-arm64")
    with pytest.raises(RecipeError, match="cannot be deployed over ssh"):
        send(android)
    with pytest.raises(ArtifactError, match="cannot be read"):
        send(tmp_path / "nothing.tar")


def test_a_place_in_the_home_folder(archives: dict[str, Path], send: Callable[..., int]) -> None:
    name = f"onnxpress-test-{os.getpid()}"
    try:
        send(archives["old"], place=f"~/{name}")
        assert (Path.home() / name / "current" / "run.py").is_file()
    finally:
        shutil.rmtree(Path.home() / name, ignore_errors=True)


def test_the_command(
    archives: dict[str, Path], ssh: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--place", str(tmp_path / "there"), "--python", sys.executable, "--ssh", " ".join(ssh)]
    assert main(["deploy", str(archives["old"]), HOST, *given]) == 0
    assert "runs it now" in capfd.readouterr().out
    assert main(["deploy", str(archives["slow"]), HOST, *given]) == 1
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "there")
