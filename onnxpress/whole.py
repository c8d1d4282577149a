"""Files and folders that are whole or absent: written under a hidden name beside their place, then renamed into it."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from contextlib import suppress
from pathlib import Path

_OLD = "old"  # kind of what was in a place before, while something else takes it


def part_of(place: Path) -> Path:
    """Where this process writes what is to take a place, until it is whole."""
    return place.parent / f"{_prefix(place)}{os.getpid()}"


def put(part: Path, place: Path) -> None:
    """Rename a folder into its place; one that was there goes. An interrupt leaves the old or the new one there. Raises OSError."""
    old = part.with_name(f"{part.name}-{_OLD}")
    try:
        if os.path.lexists(place):
            place.rename(old)
        part.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OSError(error.errno, "another process has put one there meanwhile", str(place)) from None
        raise
    finally:
        if os.path.lexists(old) and not os.path.lexists(place):
            old.rename(place)
        elif os.path.lexists(old):
            remove(part)
            old.rename(part)  # what a kill leaves of it from here on is not to be put back
            remove(part)


def remove_leftovers(place: Path) -> None:
    """Remove what processes that were killed have left beside a place; what was there before goes back where nothing is. Raises OSError."""
    prefix = _prefix(place)
    for leftover in place.parent.glob(f"{glob.escape(prefix)}*"):
        owner, _, kind = leftover.name.removeprefix(prefix).partition("-")
        if not owner.isdecimal() or kind not in ("", _OLD) or (int(owner) != os.getpid() and _is_alive(int(owner))):
            continue
        if kind == _OLD and leftover.exists() and not os.path.lexists(place):
            leftover.rename(place)
        else:
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, where it is there and can be."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _prefix(place: Path) -> str:
    return f".{place.name}.part-"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
