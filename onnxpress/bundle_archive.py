"""A bundle's archive: written so that the same files give the same bytes, read with all checks.

What changed since another bundle is the same tar with the parts alone that the other one does not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

from onnxpress.chunks import chunks
from onnxpress.errors import ArtifactError, OutputError
from onnxpress.on_device import DESCRIPTION, SIGNATURE, SIGNATURE_DIGEST, BundleError, check
from onnxpress.on_device_update import CHUNKS
from onnxpress.whole import part_of, remove, remove_leftovers

Source = Path | bytes


class Writable(Protocol):
    """What an archive is written to."""

    def write(self, content: bytes, /) -> int:
        """Write all of it."""
        ...


def known_parts(description: Mapping[str, Any]) -> set[str]:
    """Digests of the files of a bundle, and names of their parts."""
    return {*description["files"].values(), *(name for names in description["chunks"].values() for name in names)}


@contextlib.contextmanager
def unpacked(bundle: Path, signed_by: Path | None = None) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """The folder of a bundle, unpacked for as long as it is needed, its description, and what the checks found, all passed.

    bundle: a tar, a zip, or a folder that is unpacked already. signed_by: as on_device.check takes it. Raises ArtifactError.
    """
    with tempfile.TemporaryDirectory(prefix="onnxpress-bundle-") as scratch:
        folder = bundle
        try:
            if not bundle.is_dir():
                folder = _unpack(bundle, Path(scratch))
            elif (bundle / "manifest.json").is_file() and not (bundle / DESCRIPTION).exists():
                raise ArtifactError(f"{bundle} is no bundle; of an artifact `onnxpress bundle` makes one.")
            description, found = check(folder, signed_by)
            if folder != bundle and not _is_as_written(bundle, folder, description, Path(scratch)):
                raise ArtifactError(
                    f"{bundle} was packed again, or something was added to it: another program may unpack other files than were "
                    "compared here. Take the file that `onnxpress bundle` wrote, or give the unpacked folder."
                )
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{bundle} is no bundle that can be read: {error}.") from None
        except OSError as error:
            raise ArtifactError(f"{bundle} cannot be read or unpacked: {error.strerror or error}.") from None
        except BundleError as error:
            if (folder / CHUNKS).is_dir() or bundle.name.endswith(".delta.tar"):
                raise ArtifactError(f"{bundle} holds only what changed; give the whole bundle.") from None
            raise ArtifactError(str(error).replace(str(folder), str(bundle))) from None
        yield folder, description, found


def _unpack(bundle: Path, scratch: Path) -> Path:
    """The bundle's folder in scratch: plain files alone, none outside of it."""
    if bundle.exists() and not bundle.is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    if bundle.suffix == ".zip":
        with zipfile.ZipFile(bundle) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:  # nothing of ours is, and it may be larger than the disk
                    raise ValueError(f"it holds {entry.filename!r}, which is compressed")
            archive.extractall(scratch)  # which leaves out what leads outside
    else:
        with tarfile.open(bundle, "r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None or not parts or parts[0] == "/" or ".." in parts or "\\" in member.name:
                    raise ValueError(f"it holds {member.name!r}")
                place = scratch.joinpath(*parts)
                if ":" in member.name or not place.resolve().is_relative_to(scratch.resolve()):  # drives of Windows
                    raise ValueError(f"it holds {member.name!r}")
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("xb") as file:
                    shutil.copyfileobj(content, file)
    inside = list(scratch.iterdir())
    if len(inside) != 1 or not inside[0].is_dir():
        raise ValueError("it is not one folder")
    return inside[0]


def _is_as_written(bundle: Path, folder: Path, description: Mapping[str, Any], scratch: Path) -> bool:
    """Whether an archive has the very bytes that are written of what was unpacked of it."""
    files = ((f"{folder.name}/{path}", source) for path, source in entries(folder, description))
    if bundle.suffix == ".zip":
        with (scratch / "again").open("wb") as file:
            write_zip(file, files)
        return sha256(scratch / "again") == sha256(bundle)
    hashed = _Hashed()
    write_tar(hashed, files)
    return hashed.digest.hexdigest() == sha256(bundle)


class _Hashed:
    """A file of which only the digest is kept."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, content: bytes, /) -> int:
        self.digest.update(content)
        return len(content)


def entries(
    folder: Path, description: Mapping[str, Any], known: set[str] | None = None
) -> Iterator[tuple[str, Source]]:
    """What the archive of an unpacked bundle holds, in order; known: parts to leave out."""
    head = (DESCRIPTION, SIGNATURE, SIGNATURE_DIGEST)
    yield from ((name, folder / name) for name in head if (folder / name).is_file())
    yield from sent({path: folder / path for path in description["files"]}, description, known)


def folder_name(name: str, target: str) -> str:
    """NAME-DEVICE, of which a bundle's archive and folder are called; names from strangers lead nowhere."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or 'model'}-{target}"


def read_bundle(bundle: Path) -> dict[str, Any]:
    """What a bundle says of itself. Raises ArtifactError where it is not whole."""
    with unpacked(bundle) as (_, description, _):
        return description


def sent(
    files: Mapping[str, Source], description: Mapping[str, Any], known: set[str] | None
) -> Iterator[tuple[str, Source]]:
    """What a bundle's archive holds beside the description and the signature: all files, or what is not known yet."""
    known = None if known is None else set(known)
    for path, source in sorted(files.items()):
        if known is None:
            yield path, source
        elif description["files"][path] in known:
            continue
        elif path not in description["chunks"]:
            yield path, source
        else:
            for name, content in named_chunks(source):
                if name not in known:
                    known.add(name)
                    yield f"{CHUNKS}/{name}", content


def named_chunks(source: Source) -> Iterator[tuple[str, bytes]]:
    """Parts of a file, with names of their sizes and digests."""
    with opened(source) as file:
        for part in chunks(file):
            yield f"{len(part)}-{hashlib.sha256(part).hexdigest()[:32]}", part


def size(source: Source) -> int:
    """Bytes of a file."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def sha256(source: Source) -> str:
    """Digest of a file, in hexadecimal digits."""
    with opened(source) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(place: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place when it is whole. Raises OutputError."""
    if place.is_dir():
        raise OutputError(f"{place} is a folder; --out names the bundle's file.")
    part = part_of(place)
    try:
        remove_leftovers(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    except OSError as error:
        raise OutputError(f"The bundle {place} cannot be written: {error.strerror or error}.") from None
    finally:
        remove(part)


def write_tar(file: Writable, files: Iterable[tuple[str, Source]]) -> None:
    """Write files in the order in which they come, without times and owners."""
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path, source in files:
            entry = tarfile.TarInfo(path)
            entry.mode = 0o644
            entry.size = size(source)
            with opened(source) as content:
                archive.addfile(entry, content)


def write_zip(file: IO[bytes], files: Iterable[tuple[str, Source]]) -> None:
    """As `write_tar`, not compressed: weights hardly can be."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path, source in files:
            entry = zipfile.ZipInfo(path)  # of the first day that a zip knows
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix, wherever it is made
            entry.file_size = size(source)  # by which zip64 is chosen
            with opened(source) as content, archive.open(entry, "w") as place:
                while block := content.read(2**20):
                    place.write(block)


def opened(source: Source) -> io.BytesIO | io.BufferedReader:
    """A file to read."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
