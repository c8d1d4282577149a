"""The artifact: a folder that is whole or absent. Reading checks it; writing goes through a part folder and a rename.

manifest.json      what the artifact is: signature, options, ledger, digests of all files but the next two
measured.json      how fast it was, where and when; holds the digest of report.html
report.html        the same for people
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from onnxpress.encryption import SUFFIX, decrypt, read_key
from onnxpress.errors import ArtifactError, OutputError, RecipeError
from onnxpress.manifest import FileEntry, Json, Manifest
from onnxpress.whole import part_of, put, remove, remove_leftovers

MANIFEST, MEASURED, REPORT = "manifest.json", "measured.json", "report.html"
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact on disk. key: of one whose files are encrypted."""

    path: Path
    manifest: Manifest
    measured: Mapping[str, Json]
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True, key: str | bytes | None = None) -> Artifact:
        """Read an artifact. verify: every file has the digest and size of the manifest; of encrypted ones, `read` sees to it.

        key: as encryption.read_key takes it, where the files are encrypted. Raises ArtifactError, UsageError.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ArtifactError(f"{folder} {what}; give the folder of an artifact, made with `onnxpress build`.")
        manifest_path = folder / MANIFEST
        if (folder / "bundle.json").is_file():
            raise ArtifactError(
                f"{folder} is a bundle: its run.py opens it (README.md there); the artifact is in its folder model/DEVICE."
            )
        if not manifest_path.is_file():
            raise ArtifactError(f"{folder} has no {MANIFEST}, so it is no artifact; `onnxpress build` makes one.")
        manifest = Manifest.from_json(_read(manifest_path), where=str(manifest_path))
        encrypted = [name for name in manifest.files if _inside(folder, name + SUFFIX).is_file()]
        if encrypted and key is None:
            raise ArtifactError(
                f"{folder} is encrypted; it needs its key (key=, or --key of run, generate, chat and verify): file:PATH, "
                "env:NAME or command:LINE."
            )
        if not encrypted and key is not None:
            raise ArtifactError(f"A key was given, and {folder} is not encrypted: it is not what it should be.")
        for name, entry in manifest.files.items():
            file = _inside(folder, name + SUFFIX if encrypted else name)
            if not file.is_file():
                raise ArtifactError(f"{folder} is incomplete: {name} is missing. Build or copy it again.")
            try:
                changed = not encrypted and (
                    file.stat().st_size != entry.size or (verify and _sha256(file) != entry.sha256)
                )
            except OSError as error:
                raise ArtifactError(f"{file} cannot be read: {error.strerror or error}.") from None
            if changed:
                raise ArtifactError(
                    f"{file} was changed after the build: its content does not fit the digest in {MANIFEST}. "
                    "Build or copy the artifact again."
                )
        secret = None if key is None else read_key(key)
        return cls(path=folder, manifest=manifest, measured=_read_measured(folder, verify=verify), key=secret)

    def file(self, name: str) -> Path:
        """Path of one of the artifact's files. Raises ArtifactError if the manifest does not have it, or it is encrypted."""
        self._check_name(name)
        if self.key is not None:
            raise ArtifactError(f"{self.path} is encrypted; this needs the artifact that it was made of.")
        return self.path / name

    def read(self, name: str) -> bytes | bytearray:
        """Content of one of the artifact's files, decrypted where it is encrypted. Raises ArtifactError."""
        self._check_name(name)
        path = self.path / name
        if self.key is None:
            try:
                return path.read_bytes()
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None
        content = decrypt(path.with_name(path.name + SUFFIX), name=name, key=self.key)
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise ArtifactError(
                f"{path}{SUFFIX} is not the file of this artifact's {MANIFEST}. Copy the artifact again."
            )
        return content

    def _check_name(self, name: str) -> None:
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.path} has no file {name}; it has: {', '.join(self.manifest.files)}.")


class ArtifactWriter:
    """Writes an artifact: `with ArtifactWriter(out) as writer`, files into writer.folder, `seal`, then `publish`.

    Until `publish` renames it, everything is in a hidden part folder beside the destination, which is removed on any
    exception. Part folders of processes that were killed are removed by the next writer for the same destination.
    Raises OutputError where the destination cannot be written.
    """

    def __init__(self, destination: Path | str) -> None:
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100  resolve() would follow a link at the end
        self.folder = part_of(self.destination)
        self._manifest: Manifest | None = None
        self._new_parents: list[Path] = []  # made for this artifact, innermost first

    def __enter__(self) -> Self:
        try:
            if os.path.lexists(self.destination) and not _is_artifact(self.destination):
                raise OutputError(
                    f"{self.destination} exists and is no artifact, so it is not replaced; choose another --out or remove "
                    "it."
                )
            parents = [self.destination.parent, *self.destination.parent.parents]
            self._new_parents = [parent for parent in parents if not parent.exists()]
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.destination)
            self.folder.mkdir()
        except OSError as error:
            raise OutputError(
                f"The output folder {self.destination} cannot be written: {error.strerror or error}"
                f"{f' ({error.filename})' if error.filename else ''}. Choose another --out."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        remove(self.folder)
        if error is not None:
            for parent in self._new_parents:
                with suppress(OSError):  # somebody else has put something there
                    parent.rmdir()
        if isinstance(error, OSError) and self._concerns_output(error):
            raise OutputError(
                f"Writing the artifact {self.destination} failed: {error.strerror or error}. Nothing was left behind; free "
                "space or choose another --out."
            ) from error

    def seal(self, manifest: Manifest) -> Manifest:
        """Hash all files, write the manifest with their digests, and return it."""
        unhashed = [self.folder / name for name in (MANIFEST, MEASURED, REPORT)]
        files = {
            path.relative_to(self.folder).as_posix(): FileEntry(sha256=_sha256(path), size=path.stat().st_size)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path not in unhashed
        }
        self._manifest = dataclasses.replace(manifest, files=files)
        manifest_path = self.folder / MANIFEST
        manifest_path.write_text(self._manifest.to_json(), encoding="utf-8")
        for name in files:  # some libraries write files that their owner alone may read
            (self.folder / name).chmod(stat.S_IMODE(manifest_path.stat().st_mode))
        return self._manifest

    def write_measured(self, measured: Mapping[str, Json], report: str) -> None:
        """Write report.html, and measured.json with the report's digest."""
        (self.folder / REPORT).write_text(report, encoding="utf-8")
        content = {**measured, "sha256": {REPORT: _sha256(self.folder / REPORT)}}
        (self.folder / MEASURED).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def publish(self) -> Artifact:
        """Put the sealed artifact in its place; an artifact that was there is replaced."""
        assert self._manifest is not None, "seal first"
        for path in (*self.folder.rglob("*"), self.folder):
            _sync(path)
        put(self.folder, self.destination)
        _sync(self.destination.parent)
        return Artifact.open(self.destination, verify=False)

    def _concerns_output(self, error: OSError) -> bool:
        """Whether the disk or the output folder is at fault, and not, say, a file that was to be read elsewhere."""
        if error.errno in DISK_TROUBLE:
            return True
        return isinstance(error.filename, str) and Path(error.filename).is_relative_to(self.folder)


def check_outside(folder: Path, artifact: Path, what: str) -> None:
    """Raise RecipeError for a folder to keep things in that is inside of an artifact, which is replaced as a whole."""
    if folder.resolve().is_relative_to(artifact.resolve()):
        raise RecipeError(
            f"{folder}, of {what}, is inside of the artifact {artifact}, which is replaced as a whole: choose another."
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Build or copy the artifact again.") from None


def _read_measured(folder: Path, *, verify: bool) -> Mapping[str, Json]:
    path = folder / MEASURED
    if not path.is_file():
        return {}
    try:
        measured = json.loads(_read(path))
        digest = measured.get("sha256", {}).get(REPORT)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not what `onnxpress build` wrote ({error}); build the artifact again."
        ) from None
    report = folder / REPORT
    if verify and digest is not None and report.is_file() and _sha256(report) != digest:
        raise ArtifactError(f"{report} was changed after the build; remove it or build the artifact again.")
    return dict(measured)


def _is_artifact(folder: Path) -> bool:
    """Whether a folder's manifest.json is one of ours: web apps and bundles have a file of that name too."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= {"schema_version", "signature", "ledger"}


def _inside(folder: Path, name: str) -> Path:
    """A manifest is data: its paths must not lead out of the folder, by name or by link."""
    parts = PurePosixPath(name)
    path = folder / name
    odd = parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name
    # realpath and not resolve(), which raises for a link to itself
    if odd or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ArtifactError(f"The manifest of {folder} names a file outside of the artifact: {name!r}. Do not use it.")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
