"""Puts a bundle in its place on a device, or what changed of one, and switches to it if it is good. This file is the bundle's update.py.

    python update.py PLACE FILE     FILE: the tar of a bundle, whole or made with --delta; - is standard input
    python update.py PLACE --back   switches to the release before the current one

    PLACE/releases/ID      bundles, unpacked: the current one and the one before
    PLACE/current          a link to one of them, switched in one step, after the new one's self-test said that it is good
    PLACE/previous         a link to the one before

Needs Python 3.11 on a POSIX system and nothing else; the self-test needs what run.py needs. Exit codes: 0 switched, 4 the self-test is
not good, 3 the current bundle is not the one that the changes are of, or damaged, 2 anything else, 128 and a signal's number where that ended it; where
it is not 0, nothing was switched, and nothing of the new bundle is left. With --signed-by, the run.py
beside this file, or the current one's, checks the signature before anything of the new bundle is run. An older bundle that was signed is taken, too.
"""

import sys

if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  a device's Python is not chosen by pyproject.toml
        print(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.", file=sys.stderr)
        sys.exit(2)
    if not sys.flags.safe_path:
        del sys.path[0]  # the bundle's folder: nothing is imported from there
import argparse
import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

DESCRIPTION, CHUNKS = "bundle.json", ".chunks"
_BESIDE = ("model.sig", "model.sig.sha256")  # what bundle.json cannot list
_LARGEST = 2**26  # bytes of what no other file gives the size of
_RELEASE, _PART = re.compile(r"[0-9a-f]{16}(-\d+)?"), re.compile(r"\.part-\d+")
_CHUNK = re.compile(r"(\d{1,8})-[0-9a-f]{32}")
_BLOCK = 2**20
_deaf = False  # whether signals are not heard any more


class UpdateError(Exception):
    """The bundle cannot be put in its place."""

    exit_code = 2


class PartsError(UpdateError):
    """What the bundle builds upon is not here as it should be."""

    exit_code = 3


class NotGoodError(UpdateError):
    """The new bundle's self-test says that it is not good."""

    exit_code = 4  # and not 1, with which Python ends where a program breaks down


def update(place: Path, stream: IO[bytes], *, signed_by: str | None = None, key: str | None = None) -> Path:
    """Receive a bundle, test it, switch to it; returns its folder. Raises UpdateError."""
    with _alone(place):
        releases = place / "releases"
        releases.mkdir(exist_ok=True)
        before = _current(place)
        part = releases / f".part-{os.getpid()}"
        try:
            _receive(stream, part, place / "current")
            if signed_by is not None:
                _check(part, place / "current", signed_by)
            _self_test(part, key)
            name = hashlib.sha256((part / DESCRIPTION).read_bytes()).hexdigest()[:16]
            release, number = releases / name, 1
            while release.exists():  # the same bundle again: beside itself, so that the link never leads nowhere
                release, number = releases / f"{name}-{number}", number + 1
            for path in (part, *part.rglob("*")):
                _sync_folder(path)
            _hear_no_more()
            part.rename(release)
            _sync_folder(releases)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        links = {"current": release}
        if before is not None and not before.name.startswith(name):  # the same again leaves the way back as it was
            links["previous"] = before
        try:
            _link(place, links)
        except OSError:
            shutil.rmtree(release, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):  # what was asked for is done; the next update puts this right
            # The one before stays for as long as somebody may be using it: until the next update.
            kept = {before, *(Path(os.path.realpath(place / link)) for link in ("current", "previous"))}
            for old in releases.iterdir():
                if _RELEASE.fullmatch(old.name) and old.resolve() not in kept:
                    shutil.rmtree(old, ignore_errors=True)
        return release


def back(place: Path, *, signed_by: str | None = None) -> Path:
    """Switch to the release before the current one, if it is whole; returns its folder. Raises UpdateError."""
    if not (place / "current").is_symlink():
        raise UpdateError(f"{place} has no release before the current one.")
    with _alone(place):
        _finish(place)
        current, previous = (Path(os.path.realpath(place / link)) for link in ("current", "previous"))
        releases = Path(os.path.realpath(place / "releases"))
        inside = all(path.parent == releases and _RELEASE.fullmatch(path.name) for path in (current, previous))
        if not inside or not previous.is_dir() or previous == current:
            raise UpdateError(f"{place} has no release before the current one.")
        _check(previous, place / "current", signed_by)
        _hear_no_more()
        _link(place, {"current": previous, "previous": current})
        return previous


def _current(place: Path) -> Path | None:
    """The release that is switched to; what a killed update left is removed. Raises UpdateError where the place is another's."""
    link, releases = place / "current", place / "releases"
    _finish(place)
    foreign = [
        path.name for path in releases.iterdir() if not _RELEASE.fullmatch(path.name) and not _PART.fullmatch(path.name)
    ]
    if foreign:
        raise UpdateError(f"{releases} holds {min(foreign)!r}, which no update put there: choose another place.")
    inside = Path(os.path.realpath(link)).parent == Path(os.path.realpath(releases))  # resolve() raises for a loop
    if os.path.lexists(link) and not (link.is_symlink() and inside):
        raise UpdateError(f"{link} is not a link to one of {releases}: choose another place.")
    for leftover in releases.glob(".part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (*place.glob(".current-*"), *place.glob(".previous-*")):
        if leftover.is_symlink():
            leftover.unlink()
    return link.resolve() if link.is_dir() else None


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """No other update is at work in this place. A lock of the system: whoever dies lets go of it."""
    import fcntl  # of POSIX systems; the rest of this file is imported on others too

    if (place / DESCRIPTION).exists() or any(_RELEASE.fullmatch(path.name) for path in place.glob("*")):
        raise UpdateError(
            f"{place} is a bundle itself, or holds some; name the place that has them in its folder releases."
        )
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpdateError(f"Another update of {place} is at work; try again when it has ended.") from None
        yield


def _receive(stream: IO[bytes], part: Path, current: Path) -> None:
    """Write the bundle's files into a folder, each with the digest that its bundle.json has of it."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        first = archive.next()
        if first is None or _path(first) != DESCRIPTION or not 0 < first.size <= _LARGEST:
            raise UpdateError(f"This is no bundle: it does not begin with {DESCRIPTION}.")
        text = _member(archive, first).read()
        files, sizes, chunks = _described(text)
        with contextlib.suppress(OSError):
            ours, its = _whose((current / DESCRIPTION).read_bytes()), _whose(text)
            if ours is not None and its is not None and ours != its:
                raise UpdateError(f"{current.parent} has {ours}, and this is {its}: choose another place.")
        here = _parts_of(current)
        wanted = {name for names in chunks.values() for name in names}
        needed = sum(size for path, size in sizes.items() if files[path] not in here)
        part.mkdir()
        free = shutil.disk_usage(part).free
        if needed > free:
            raise UpdateError(
                f"{needed / 1e6:.1f} MB are needed in {part.parent.parent}, and {free / 1e6:.1f} MB are free."
            )
        with _new(part / DESCRIPTION) as place:
            place.write(text)
        with (part / CHUNKS).open("w+b") as store:
            sent: dict[str, tuple[Path, int, int]] = {}
            while (member := archive.next()) is not None:
                path = _path(member)
                content = _member(archive, member)
                chunk = path.removeprefix(f"{CHUNKS}/")
                size = min(member.size, _LARGEST) if path in _BESIDE else sizes.get(path, _chunk_size(chunk))
                if path not in _BESIDE and path not in files and chunk not in wanted:
                    raise UpdateError(
                        f"The bundle holds {path!r}, which its {DESCRIPTION} does not name. Nothing was changed."
                    )
                if member.size != size:
                    raise UpdateError(
                        f"The bundle holds {path!r} at another size than {DESCRIPTION} says. Nothing was changed."
                    )
                if path in files and _is_here(files[path], here):
                    continue  # it is linked, as what is not sent
                if path in _BESIDE or path in files:
                    with _new(part / path) as place:
                        shutil.copyfileobj(content, place, _BLOCK)
                elif chunk not in sent:
                    sent[chunk] = (part / CHUNKS, store.tell(), member.size)
                    shutil.copyfileobj(content, store, _BLOCK)
            store.flush()
            for path, digest in files.items():
                try:
                    _assemble(part / path, digest, chunks.get(path, [digest]), here | sent)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EIO):
                        raise
                    raise PartsError(
                        f"{path} of the current bundle cannot be read: {error.strerror}. Send the whole bundle."
                    ) from None
        (part / CHUNKS).unlink()


def _assemble(place: Path, digest: str, parts: list[str], found: dict[str, tuple[Path, int, int]]) -> None:
    """Make a file that was not sent whole of its parts, and compare its digest."""
    if not place.exists():
        if digest in found and found[digest][0].name != CHUNKS:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(found[digest][0], place)
            except OSError:  # a file system without links
                shutil.copyfile(found[digest][0], place)
        else:
            with _new(place) as file:
                for name in parts:
                    if name not in found:
                        raise PartsError(
                            "Parts are lacking: it ended too early, or holds what changed since another bundle than the current one. "
                            "Send the whole bundle."
                        )
                    source, start, size = found[name]
                    with source.open("rb") as content:
                        content.seek(start)
                        while size and (block := content.read(min(size, _BLOCK))):
                            file.write(block)
                            size -= len(block)
    with place.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise PartsError(
                f"{place.name} is not what {DESCRIPTION} says: it was changed on the way, or here. Send the whole bundle."
            )


def _is_here(digest: str, here: dict[str, tuple[Path, int, int]]) -> bool:
    """Whether the current bundle has a whole file, undamaged."""
    if digest not in here:
        return False
    try:
        with here[digest][0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def _parts_of(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Where the current bundle has the content of a digest: {digest: (file, start, bytes)}."""
    try:
        files, sizes, chunks = _described((folder / DESCRIPTION).read_bytes())
    except (OSError, UpdateError):
        return {}
    found: dict[str, tuple[Path, int, int]] = {}
    for path, digest in files.items():
        file, start = folder.resolve() / path, 0
        try:
            whole = file.is_file() and file.stat().st_size == sizes[path]
        except OSError:
            continue
        if not whole:
            continue
        found[digest] = (file, 0, sizes[path])
        for entry in chunks.get(path, ()):
            found[entry] = (file, start, _chunk_size(entry))
            start += _chunk_size(entry)
    return found


def _whose(text: bytes) -> str | None:
    """Of which model a bundle.json is, and for which device; None where it was changed."""
    try:
        content = json.loads(text)
        rest = json.dumps({name: value for name, value in content.items() if name != "digest"}, sort_keys=True)
        whole = hashlib.sha256(rest.encode()).hexdigest() == content["digest"]
        return f"{content['name']} for {content['target']}" if whole else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _described(text: bytes) -> tuple[dict[str, str], dict[str, int], dict[str, list[str]]]:
    """Digests, sizes and chunks of bundle.json, whose paths must not lead out of the folder."""
    try:
        content = json.loads(text)
        files = {str(path): str(digest) for path, digest in content["files"].items()}
        sizes = {path: int(content["sizes"][path]) for path in files}
        chunks = {str(path): [str(entry) for entry in entries] for path, entries in content["chunks"].items()}
        valid = all(size >= 0 for size in sizes.values()) and all(
            map(_CHUNK.fullmatch, itertools.chain(*chunks.values()))
        )
        json.dumps([files, chunks], ensure_ascii=False).encode()  # half a character can hide behind an escape
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise UpdateError(f"{DESCRIPTION} is not valid: this is no bundle, or one of another version.") from None
    for path in files:
        parts = PurePosixPath(path)
        odd = parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path or parts.as_posix() != path
        if odd or path == "." or parts.parts[0] in (DESCRIPTION, CHUNKS, *_BESIDE):
            raise UpdateError(f"{DESCRIPTION} names {path!r}, which cannot be a file of a bundle. Do not use it.")
    return files, sizes, chunks


def _chunk_size(name: str) -> int:
    """Bytes of a part, with which its name begins; -1 for what is no name of one."""
    match = _CHUNK.fullmatch(name)
    return int(match[1]) if match else -1


def _path(member: tarfile.TarInfo) -> str:
    """Path in the bundle, without the bundle's own folder."""
    return member.name.partition("/")[2]


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
    if content is None:
        raise UpdateError(f"The bundle holds {member.name!r}, which is no plain file. Nothing was changed.")
    return content


@contextlib.contextmanager
def _new(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise UpdateError(f"The bundle holds {path.name!r} twice. Nothing was changed.")
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _check(folder: Path, current: Path, signed_by: str | None) -> None:
    """Have a run.py that is there already compare a bundle's files and signature; nothing of the bundle is run."""
    beside = Path(globals().get("__file__", "/none")).resolve().with_name("run.py")
    checker = next((path for path in (beside, current / "run.py") if path.is_file()), None)
    if checker is None:
        raise UpdateError(
            "No run.py is here that could check the bundle: start the update.py of a bundle that you trust."
        )
    command = [
        sys.executable,
        str(checker),
        "--check",
        str(folder),
        *([] if signed_by is None else ["--signed-by", signed_by]),
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise UpdateError(done.stderr.strip().replace(str(folder), "The bundle") or "The bundle could not be checked.")


def _self_test(part: Path, key: str | None) -> None:
    if not (part / "run.py").is_file():
        raise UpdateError("This bundle brings no self-test: it is for a device that runs no Python.")
    command = [sys.executable, str(part / "run.py"), "--self-test", *([] if key is None else ["--key", key])]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise NotGoodError("The self-test is not good: nothing was switched, and the new bundle is gone again.")


def _link(place: Path, links: dict[str, Path]) -> None:
    """Point `current` to a release, and then `previous`, each in one step. Raises OSError where `current` is what it was."""
    new = {name: place / f".{name}-next" for name in links}
    try:
        for name, release in links.items():
            new[name].symlink_to(Path("releases") / release.name)
        new["current"].replace(place / "current")
    except OSError:
        with contextlib.suppress(OSError):
            _finish(place)
        raise
    with contextlib.suppress(OSError):  # what was asked for is done; the next one finishes it
        _finish(place)
    _sync_folder(place)


def _finish(place: Path) -> None:
    """Do what `_link` had still to do when it was killed: `previous`, where `current` was switched."""
    current, previous = place / ".current-next", place / ".previous-next"
    if previous.is_symlink() and not current.is_symlink():
        previous.replace(place / "previous")
    previous.unlink(missing_ok=True)  # before the other one: alone it says that `current` was switched
    current.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """The names in a folder survive a power cut, as its files do, where the file system knows how."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class _EndedError(BaseException):
    """A signal wants the end."""


def _end(number: int, _: Any) -> None:
    if not _deaf:
        _hear_no_more()  # a second one would end the tidying
        raise _EndedError(number)


def _hear_no_more() -> None:
    """From here on to the end: both links are switched, or what was begun is removed."""
    global _deaf
    _deaf = True


def _say(text: object) -> None:
    """Whoever listened may be gone, and the exit code says it too."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(text, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("file", nargs="?", help="- is standard input")
    parser.add_argument("--back", action="store_true")
    parser.add_argument("--signed-by", metavar="FILE", help="PEM: the signer's public key, or certificates")
    parser.add_argument("--key", metavar="SOURCE", help="of an encrypted model, for the self-test")
    options = parser.parse_args(arguments)
    if options.back == (options.file is not None):
        parser.error("give the bundle's file, or --back")
    if options.back and options.key is not None:
        parser.error("--back tests nothing anew: leave --key out")
    if options.file == "-" and sys.stdin is None:
        parser.error("standard input is closed")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _end)  # so that what was begun is removed
    try:
        if options.back:
            release = back(options.place, signed_by=options.signed_by)
        elif options.file == "-":
            release = update(options.place, sys.stdin.buffer, signed_by=options.signed_by, key=options.key)
        else:
            with Path(options.file).open("rb") as file:
                release = update(options.place, file, signed_by=options.signed_by, key=options.key)
    except _EndedError as ended:
        _say("Interrupted. Nothing was changed.")
        return 128 + int(ended.args[0])
    except UpdateError as error:
        _say(error)
        return error.exit_code
    except (tarfile.TarError, EOFError) as error:
        _say(f"The bundle ended too early, or is no tar: {error}. Nothing was changed.")
        return 2
    except OSError as error:
        what = f" ({error.filename})" if error.filename else ""
        _say(f"The bundle cannot be put in its place: {error.strerror or error}{what}. Nothing was changed.")
        return 2
    try:
        print(f"{options.place / 'current'} is now {release.name}", flush=True)
    except OSError:  # whoever listened may be gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
