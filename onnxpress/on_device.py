"""Runs a bundle on its device, and checks it there. This file is the bundle's run.py.

    python run.py --self-test [--json]    files, golden outputs, latency and memory: one page, exit code 0 or 1
    python run.py "a text" […]            one JSON answer a line

Needs Python 3.11 with onnxruntime, numpy and tokenizers. Nothing else of the bundle is opened or imported before every file has the
digest that bundle.json has of it.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  a device's Python is not chosen by pyproject.toml
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}.")
    if not sys.flags.safe_path:
        del sys.path[0]  # the bundle's folder: what is imported below must not come from there
import argparse
import hashlib
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

DESCRIPTION = "bundle.json"
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_TIMED_SECONDS, _TIMED_CALLS = 2.0, 50


class BundleError(Exception):
    """The bundle is not whole, or not for this machine."""


def canonical(description: dict[str, Any]) -> str:
    """The one text of bundle.json: its digest is that of all the rest, so that every changed character shows."""
    rest = {name: value for name, value in description.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
    return json.dumps({**rest, "digest": digest}, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def read_description(folder: Path) -> dict[str, Any]:
    """bundle.json. Raises BundleError where one character of it was changed."""
    path = folder / DESCRIPTION
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BundleError(f"{path} is no plain file. Copy the bundle again, into an empty folder.")
    try:
        text = path.read_bytes()
        description: dict[str, Any] = json.loads(text)
        whole = isinstance(description, dict) and canonical(description).encode() == text
        whole = whole and f"{description['artifact']}/manifest.json" in description["files"]
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.") from None
    except (ValueError, RecursionError, TypeError, KeyError):
        whole = False
    if not whole:
        raise BundleError(f"{path} was changed after the bundle was made. Copy the bundle again.")
    return description


def check_files(folder: Path, description: dict[str, Any]) -> int:
    """Compare all files with the description; returns their number. Raises BundleError for one that differs, lacks, or is foreign."""
    entries = description["files"]
    found = dict(_files(folder))
    found.pop(DESCRIPTION, None)
    for what, names in (("is missing", set(entries) - set(found)), ("is not of the bundle", set(found) - set(entries))):
        if names:
            raise BundleError(f"{folder}: {min(names)!r} {what}. Copy the bundle again, into an empty folder.")
    for name, path in sorted(found.items()):
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.") from None
        if digest != entries[name]:
            raise BundleError(f"{path} was changed after the bundle was made. Copy the bundle again.")
    return len(found)


def this_machine() -> tuple[str, str]:
    """System and processor, as devices are told apart."""
    machine = platform.machine().lower()
    return platform.system().lower(), _MACHINES.get(machine, machine)


def check_machine(description: dict[str, Any]) -> str:
    """This machine in words. Raises BundleError where the bundle is for another kind."""
    system, machine = this_machine()
    wanted = (description["system"], description["machine"])
    if (system, machine) != wanted:
        raise BundleError(
            f"This bundle is for {description['target']} ({' '.join(wanted)}); this machine is {system} {machine}. Make one for it: "
            "onnxpress bundle --target …"
        )
    return f"{platform.node() or 'this machine'}, {system} {machine}, {os.cpu_count()} cores, Python {platform.python_version()}"


def open_artifact(folder: Path, description: dict[str, Any]) -> tuple[Any, Any]:
    """The artifact and the runner of its task, with the bundle's own runtime. Raises BundleError where a package is missing."""
    sys.dont_write_bytecode = True
    sys.pycache_prefix = str(
        folder / "no-bytecode"
    )  # bytecode that lies in the bundle was not compared: it is not read
    library = str(folder / "lib")
    if library not in sys.path:
        sys.path.insert(0, library)
    try:
        import onnxruntime  # noqa: F401

        from onnxpress.artifact import Artifact
        from onnxpress.runtime.loading import load_artifact
        from onnxpress.runtime.providers import CPU

        artifact = Artifact.open(folder / description["artifact"], verify=False)  # its files have just been compared
        providers = [
            CPU(threads=description["threads"]) if name == "cpu" else name for name in description["providers"]
        ]
        return artifact, load_artifact(artifact, providers=providers)
    except ImportError as error:
        needed = " ".join(f'"{name}"' for name in description["requires"])
        raise BundleError(f"{error.name or error} cannot be imported here: python -m pip install {needed}") from None


class Verdict:
    """Lines of (what, found, good); whether all are good."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, bool]] = []

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return all(good for _, _, good in self.lines)

    def add(self, what: str, found: str, good: bool = True) -> None:
        """One line more."""
        self.lines.append((what, found, good))


def self_test(folder: Path) -> Verdict:
    """Check a bundle, from its files to its speed; the first thing that fails ends it."""
    verdict = Verdict()
    try:
        description = read_description(folder)
        verdict.add(
            "bundle",
            f"{description['name']} for {description['target']}: {description['task']}, {description['precision']}",
        )
        verdict.add("files", f"{check_files(folder, description)} have the digests of {DESCRIPTION}")
        verdict.add("machine", check_machine(description))
        artifact, runner = open_artifact(folder, description)
        _check_answers(verdict, artifact, runner.session)
        _check_speed(verdict, artifact, runner.session, description["budget"])
    except BundleError as error:
        verdict.add("failed", str(error), False)
    except Exception as error:  # an OnnxpressError of the runtime, or what nobody thought of: a verdict in any case
        verdict.add("failed", f"{error}" if _is_ours(error) else f"{type(error).__name__}: {error}", False)
    return verdict


def _check_answers(verdict: Verdict, artifact: Any, session: Any) -> None:
    import onnxruntime

    from onnxpress.runtime.loading import verify_golden

    verdict.add("runtime", f"ONNX Runtime {onnxruntime.__version__}, {', '.join(session.providers)}")
    for row in verify_golden(artifact, session):
        difference = f"largest difference {row.max_abs:.3g} (allowed {row.tolerance:.3g})"
        verdict.add(f"golden {row.case}", f"{row.output}: {difference}")


def _check_speed(verdict: Verdict, artifact: Any, session: Any, budget: dict[str, float]) -> None:
    from onnxpress.runtime.loading import golden_cases

    for case, arrays in sorted(golden_cases(artifact).items()):
        took = _milliseconds(partial(session.run, arrays["input"]))
        shape = " x ".join(str(size) for size in next(iter(arrays["input"].values())).shape)
        _compare(verdict, f"latency {case}", took, "ms", budget.get("latency_ms"), f", inputs of {shape}")
    peak = _peak_megabytes()
    if peak is not None:
        _compare(verdict, "memory", peak, "MB", budget.get("memory_mb"), " at most, Python and all")
    elif "memory_mb" in budget:
        verdict.add("memory", "this system does not say how much was used", False)


def _compare(verdict: Verdict, what: str, found: float, unit: str, allowed: float | None, more: str) -> None:
    limit = "no budget" if allowed is None else f"allowed {allowed:g}"
    verdict.add(what, f"{found:.1f} {unit}{more} ({limit})", allowed is None or found <= allowed)


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call, after one that does not count."""
    call()
    durations: list[float] = []
    while not durations or (sum(durations) < _TIMED_SECONDS and len(durations) < _TIMED_CALLS):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return 1000 * statistics.median(durations)


def _peak_megabytes() -> float | None:
    status = Path(
        "/proc/self/status"
    )  # of Linux, where the other figure may be that of the process that started this one
    if status.is_file() and "VmHWM:" in (text := status.read_text()):
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files but Python's bytecode, which is not read. Raises BundleError for links, devices, and folders that cannot be read."""

    def unreadable(error: OSError) -> None:
        raise BundleError(
            f"{error.filename} cannot be read: {error.strerror}. Copy the bundle again, into an empty folder."
        )

    for root, folders, names in os.walk(folder, onerror=unreadable):
        for name in [*names, *(each for each in folders if (Path(root) / each).is_symlink())]:
            path = Path(root) / name
            if path.is_symlink() or not path.is_file():
                raise BundleError(
                    f"{path} is no plain file, and not of the bundle. Copy the bundle again, into an empty folder."
                )
            yield path.relative_to(folder).as_posix(), path
        folders[:] = [each for each in folders if each != "__pycache__"]


def _is_ours(error: Exception) -> bool:
    return any(kind.__name__ == "OnnxpressError" for kind in type(error).__mro__)


def _answers(folder: Path, texts: list[str]) -> Iterator[Any]:
    description = read_description(folder)
    check_files(folder, description)
    check_machine(description)
    _, runner = open_artifact(folder, description)
    from onnxpress.runtime.generator import Generator
    from onnxpress.runtime.module_runner import ModuleRunner

    if isinstance(runner, ModuleRunner):
        raise BundleError(
            "This model takes arrays, not text: use it from Python, onnxpress.load(folder).run({name: array})."
        )
    if isinstance(runner, Generator):
        yield from (generation.text for generation in runner.generate(texts))
    else:
        yield from runner.answer_texts(texts)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON")
    options = parser.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # Windows has others
    if options.self_test:
        verdict = self_test(folder)
        if options.json:
            lines = [{"what": what, "found": found, "good": good} for what, found, good in verdict.lines]
            print(json.dumps({"good": verdict.good, "lines": lines}))
        else:
            for what, found, good in verdict.lines:
                print(f"{'ok  ' if good else 'BAD '} {what:<16} {found}")
            print(f"verdict: {'good' if verdict.good else 'NOT GOOD'}")
        return 0 if verdict.good else 1
    if not options.texts:
        parser.error("give a text, or --self-test")
    try:
        for answer in _answers(folder, options.texts):
            print(json.dumps(answer, ensure_ascii=False))
    except Exception as error:
        if not isinstance(error, BundleError) and not _is_ours(error):
            raise
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
