"""Brings a bundle to a device over ssh: what changed is sent, tested there, and switched to when it is good.

The device needs Python 3.11 and what the bundle's run.py needs; nothing has to be there before. update.py is sent with the bundle, and
is this machine's own: what the device is told to run was checked here first.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from onnxpress.bundle_archive import entries, folder_name, known_parts, unpacked, write_tar
from onnxpress.encryption import SUFFIX
from onnxpress.errors import DeployError, RecipeError, SelfTestError
from onnxpress.on_device import DESCRIPTION
from onnxpress.on_device_update import NotGoodError

_UPDATE = Path(__file__).with_name("on_device_update.py")
_SSH_FAILED, _PARTS_MISSING, _TOO_OLD = 255, 3, 9  # exit codes


def deploy(
    bundle: Path | str,
    host: str,
    *,
    place: str | None = None,
    python: str = "python3",
    signed_by: Path | None = None,
    key: str | None = None,
    ssh: Sequence[str] = ("ssh",),
    quiet: bool = False,
) -> int:
    """Deploy a bundle to user@device; returns the bytes that were sent. The self-test's page goes to standard output.

    place: the folder there, by default onnxpress/NAME in the home folder; PLACE/current leads to the bundle. python: the device's Python
    with the packages that the bundle needs. signed_by: a public key or certificates; the signature is checked here, before anything is
    sent. key: where the device finds the key of an encrypted model. ssh: the command.

    Raises RecipeError, ArtifactError (a bundle that is not whole, or not signed so), SelfTestError where the device found it not good,
    and DeployError for all that stops it on the way; in each case what was current there still is.
    """
    if host.startswith("-") or not host:
        raise RecipeError(f"{host!r} is no host; it is given as user@device.")
    if not ssh:
        raise RecipeError("The ssh command is empty.")
    python = python.removeprefix("~/")  # ssh begins in the home folder
    with unpacked(Path(bundle), signed_by) as (folder, description, _):
        if not (folder / "update.py").is_file():
            raise RecipeError(f"A bundle for {description['target']} cannot be deployed over ssh; copy {bundle} there.")
        encrypted = any(path.endswith(SUFFIX) for path in description["files"])
        if encrypted != (key is not None):
            fault = (
                "is encrypted: name the place of its key there with --key"
                if encrypted
                else "is not encrypted: leave --key out"
            )
            raise RecipeError(f"{bundle} {fault}.")
        there = (place or f"onnxpress/{folder_name(description['name'], description['target'])}").removeprefix("~/")
        if there.rstrip("/") in ("", ".", "..") or there.startswith(("~", "-")):
            raise RecipeError(f"{place!r} is no place of its own for a bundle; name a folder.")
        known = _known(_run([*ssh, host, _asking(python, there)], host, python))
        options = ["-"] if key is None else ["-", "--key", key]
        for attempt in (known, None) if known is not None else (None,):
            code, size, whole = _send(
                folder, description, attempt, [*ssh, host], _command(python, there, options), quiet=quiet
            )
            if code != _PARTS_MISSING:
                break
    if code == NotGoodError.exit_code:
        raise SelfTestError(f"The self-test on {host} is not good; what was current there still is.")
    if whole and (code == _SSH_FAILED or code < 0):
        raise DeployError(
            f"The connection to {host} broke after all was sent: it may have switched. Deploy again, or look there."
        )
    if code == _SSH_FAILED:
        raise DeployError(f"The connection to {host} failed or broke; what was current there still is.")
    if code != 0:
        raise DeployError(
            f"{host} did not take the bundle (exit code {code}, reason above); what was current there still is."
        )
    return size


def _asking(python: str, place: str) -> str:
    """Prints the current bundle's description; fails where Python is missing or too old."""
    version = f"import sys; sys.exit({_TOO_OLD} * (sys.version_info < (3, 11)))"
    return f"{shlex.join([python, '-c', version])} && {{ cat {shlex.quote(f'{place}/current/{DESCRIPTION}')} 2>/dev/null || true; }}"


def _command(python: str, place: str, options: Sequence[str]) -> str:
    """Runs update.py, which standard input begins with."""
    code = f"import sys; exec(compile(sys.stdin.buffer.read({_UPDATE.stat().st_size}), 'update.py', 'exec'))"
    # -I: nothing is imported from the folder where ssh begins.
    return shlex.join([python, "-I", "-c", code, place, *options])


def _send(
    folder: Path, description: dict[str, Any], known: set[str] | None, ssh: Sequence[str], command: str, *, quiet: bool
) -> tuple[int, int, bool]:
    """The remote command's exit code, how many bytes it was sent, and whether that was all."""
    process = _started([*ssh, command])
    assert process.stdin is not None
    with tqdm(
        unit="B", unit_scale=True, unit_divisor=1000, desc="sent", disable=True if quiet else None, leave=False
    ) as bar:
        counted, whole = _Counted(process.stdin, bar), False
        try:
            process.stdin.write(_UPDATE.read_bytes())
            # A tar is named after its folder, whose name does not count there.
            write_tar(counted, ((f"bundle/{path}", source) for path, source in entries(folder, description, known)))
            process.stdin.close()
            whole = True
        except BrokenPipeError:  # the other side has ended; its exit code says why
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        except BaseException:
            _end(process)
            raise
    try:
        return process.wait(), counted.size, whole
    except BaseException:  # a signal
        _end(process)
        print("All was sent: the device may still test it and switch to it. Look there.", file=sys.stderr)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


class _Counted:
    """A file that counts what is written."""

    def __init__(self, file: IO[bytes], bar: Any) -> None:
        self._file, self._bar = file, bar
        self.size = 0

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self._bar.update(len(content))
        return self._file.write(content)


def _known(text: bytes) -> set[str] | None:
    """What the device has, by its own word: a wrong one is met there, where every file is compared."""
    try:
        return known_parts(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _run(command: Sequence[str], host: str, python: str) -> bytes:
    process = _started(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    output, _ = process.communicate()
    if process.returncode == _TOO_OLD:
        raise DeployError(f"{python} on {host} is older than Python 3.11: name another with --python.")
    if process.returncode in (126, 127):
        raise DeployError(f"{python} cannot be started on {host} (reason above): name another with --python.")
    if process.returncode != 0:
        raise DeployError(f"{host} cannot be reached by {command[0]} (exit code {process.returncode}, reason above).")
    return bytes(output)


def _started(
    command: Sequence[str], stdin: int = subprocess.PIPE, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout)
    except OSError as error:
        raise DeployError(f"{command[0]} cannot be started: {error.strerror or error}.") from None
