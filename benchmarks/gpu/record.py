"""What is measured, kept safe: written after every figure, with what failed and what the budget left out."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Call = Callable[[], Any]


class Record:
    """Figures of one run. path: the JSON file. budget: seconds after which nothing new begins; None for no end.

    A figure is a dict: what was measured (`of`), where (`case`), which system, and numbers.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], *, budget: float | None, rounds: int, seconds: float
    ) -> None:
        self.path = path
        self.about = dict(about)
        self.figures: list[dict[str, Any]] = []
        self.errors: list[dict[str, str]] = []
        self.left_out: list[str] = []
        self._began = time.monotonic()
        self._budget = budget
        self._rounds = rounds
        self._seconds = seconds
        self.save()

    def add(self, of: str, case: str, system: str, **numbers: Any) -> None:
        """Keep a figure."""
        self.figures.append({"of": of, "case": case, "system": system, **numbers})
        self.say(f"{of}, {case}, {system}: " + ", ".join(f"{name} {shown(value)}" for name, value in numbers.items()))
        self.save()

    def find(self, of: str, case: str) -> list[dict[str, Any]]:
        """Figures of a case."""
        return [figure for figure in self.figures if (figure["of"], figure["case"]) == (of, case)]

    def has_time(self, what: str) -> bool:
        """Whether a new measurement may begin; notes what does not."""
        if self._budget is None or time.monotonic() - self._began < self._budget:
            return True
        self.left_out.append(what)
        self.say(f"{what}: left out, the budget of {self._budget:.0f} s is spent")
        self.save()
        return False

    def attempt(self, what: str) -> Attempt:
        """Whatever fails inside this `with` is written down, and the run goes on."""
        return Attempt(self, what)

    def take_turns(self, what: str, calls: Mapping[str, Call]) -> dict[str, list[float]]:
        """Milliseconds of a call, the median of each round, by system. A round begins with another system than the one before.

        A call waits until its answer is there. One that fails loses its rounds, and is written down.
        """
        alive: dict[str, Call] = {}
        found: dict[str, list[float]] = {}
        for name, call in calls.items():
            with self.attempt(f"{what}, {name}"):
                for _ in range(3):
                    call()
                alive[name], found[name] = call, []
        for number in range(self._rounds):
            names = list(alive)
            turn = number % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                with self.attempt(f"{what}, {name}"):
                    found[name].append(self._round(alive[name]))
                if len(found[name]) <= number:
                    del alive[name], found[name]
        return found

    def _round(self, call: Call) -> float:
        call()
        durations: list[float] = []
        while len(durations) < 3 or (sum(durations) < self._seconds and len(durations) < 500):
            start = time.perf_counter()
            call()
            durations.append(time.perf_counter() - start)
        return 1000 * statistics.median(durations)

    def say(self, text: str) -> None:
        """A line for who waits, with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:6.1f}] {text}", file=sys.stderr, flush=True)

    def save(self) -> None:
        """The whole record, in the place of the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "about": self.about,
            "seconds": round(time.monotonic() - self._began, 1),
            "figures": self.figures,
            "errors": self.errors,
            "left_out": self.left_out,
        }
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)


class Attempt:
    """See Record.attempt. Whichever system fails, the others' numbers are worth having."""

    def __init__(self, record: Record, what: str) -> None:
        self._record = record
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._record.errors.append({"what": self._what, "error": text[:600]})
        self._record.say(f"{self._what}: failed: {text[:300]}")
        self._record.save()
        return True


def shown(value: Any) -> str:
    """A number, or the median of rounds with their range."""
    if isinstance(value, list):
        return f"{statistics.median(value):.4g} ({min(value):.4g}–{max(value):.4g})" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(figures: list[dict[str, Any]]) -> None:
    """A markdown table of each thing that was measured."""
    for of in dict.fromkeys(figure["of"] for figure in figures):
        rows = [figure for figure in figures if figure["of"] == of]
        columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("of", "case", "system")))
        print(f"\n| {of} | system | " + " | ".join(columns) + " |")
        print("|---" * (len(columns) + 2) + "|")
        for row in rows:
            cells = [shown(row[name]) if name in row else "" for name in columns]
            print(f"| {row['case']} | {row['system']} | " + " | ".join(cells) + " |")
    print(flush=True)
