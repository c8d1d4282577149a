from __future__ import annotations

import os
from pathlib import Path

import pytest
from interrupting import interrupt_rename

from onnxpress.whole import part_of, put, remove_leftovers

DEAD, LIVING = 999999999, os.getppid()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("step", "found"), [(1, "before"), (2, "behind"), (3, "behind")])
def test_an_interrupt_leaves_what_was_there_or_what_takes_its_place(
    step: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkpoint"
    for folder, name in ((place, "before"), (part_of(place), "behind")):
        folder.mkdir()
        (folder / name).touch()
    with monkeypatch.context() as patch:
        interrupt_rename(patch, step)
        with pytest.raises(KeyboardInterrupt):
            put(part_of(place), place)
    assert names(place) == {found}
    remove_leftovers(place)
    assert names(tmp_path) == {"checkpoint"}
    assert names(place) == {found}


def test_what_was_there_is_kept_where_nothing_can_take_its_place(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    place.mkdir()
    with pytest.raises(FileNotFoundError):
        put(part_of(place), place)
    assert names(tmp_path) == {"checkpoint"}


def test_what_killed_processes_left_is_put_right(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    (tmp_path / f".checkpoint.part-{DEAD}-old" / "training").mkdir(parents=True)
    for owner in (DEAD, LIVING, os.getpid(), 10**20):  # of a container's processes each may have the number of this one
        (tmp_path / f".checkpoint.part-{owner}").mkdir()
    for other in (".checkpoint.part-mine", f".checkpoint.part-{DEAD}-mine", f".checkpoint2.part-{DEAD}"):
        (tmp_path / other).touch()
    left = {f".checkpoint.part-{LIVING}", ".checkpoint.part-mine", f".checkpoint.part-{DEAD}-mine"}
    left |= {f".checkpoint2.part-{DEAD}", "checkpoint"}
    remove_leftovers(place)  # killed between the renames
    assert names(tmp_path) == left
    assert names(place) == {"training"}
    (tmp_path / f".checkpoint.part-{DEAD}-old").symlink_to(tmp_path)  # killed behind them
    remove_leftovers(place)
    assert names(tmp_path) == left
    assert names(place) == {"training"}
    (tmp_path / ".checkpoint.part-²").touch()  # a digit, and no number
    place.joinpath("training").rmdir()
    place.rmdir()
    (tmp_path / f".checkpoint.part-{DEAD}-old").symlink_to("nothing")
    remove_leftovers(place)
    assert names(tmp_path) == {*left, ".checkpoint.part-²"} - {"checkpoint"}
    remove_leftovers(Path("/"))  # nothing is beside it
    assert part_of(Path("/")).parent == Path("/")
