"""What machine this is: processor, instruction sets that matter for speed, cores, memory."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from pathlib import Path
from typing import Self

from onnxpress.manifest import Json
from onnxpress.runtime.saturation import products_saturate
from onnxpress.runtime.threads import usable_cores

_CROWDED = 0.3  # of a core: what a machine does beside anything
_LOOK_EVERY = 0.1  # seconds
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
# Of a container, under either version of Linux's control groups: its limit, and where it says what is in use and no page cache.
_CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.stat", "total_rss"),
)


def describe() -> dict[str, Json]:
    """Processor, instruction sets, usable cores, memory in bytes, operating system."""
    flags = _flags()
    return {
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def cpu_target() -> str:
    """The target (optimizers/targets.py) that this machine's own CPU is: cpu-arm64, cpu-avx2 for x86 without VNNI, else cpu."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "cpu-arm64"
    return "cpu-avx2" if products_saturate() else "cpu"


class PeakMemory:
    """The most memory that this process has while this lasts; `peak` is in bytes, None where the system does not tell.

    On Linux without mapped files, which leave memory where something else needs the room; looked at ten times a second.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._anonymous = 0
        self._watch = threading.Thread(target=self._look, daemon=True)

    @property
    def peak(self) -> int | None:
        """So far."""
        return self._anonymous or _peak_resident()

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                self._anonymous = max(self._anonymous, 1024 * _field("/proc/self/status", "RssAnon:"))
                if self._over.wait(_LOOK_EVERY):
                    return


def _peak_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


class OtherProcesses:
    """What other processes use of the processors from now on, this one's children aside once they have ended."""

    def __init__(self) -> None:
        self._since = time.perf_counter(), _cpu_seconds()

    def crowding(self) -> float | None:
        """How many cores they have used, where that left less than this process may use; else None, also where the system does not tell."""
        now, (then, before) = _cpu_seconds(), self._since
        if now is None or before is None:
            return None
        cores = (now - before) / max(time.perf_counter() - then, 1e-3)
        return cores if cores + usable_cores() > (os.cpu_count() or 1) + _CROWDED else None


def _cpu_seconds() -> float | None:
    """Of all processors since the machine started, less what this process and its ended children have used."""
    own = os.times()
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()
        user, nice, system, _idle, _waiting, interrupts, soft = map(int, first[1:8])
        return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK") - sum(own[:4])
    except (OSError, ValueError):
        return None


def free_memory_bytes() -> int | None:
    """What this process may still take, the page cache counted as free; None where the system does not tell."""
    found = []
    for limit, usage, name in _CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(Path(limit).read_text(encoding="ascii")) - _field(usage, name))
    with contextlib.suppress(OSError, ValueError):
        found.append(1024 * _field("/proc/meminfo", "MemAvailable:"))
    return max(0, min(found)) if found else None


def _field(path: str, name: str) -> int:
    """The number behind a name, in a file of such lines. Raises OSError, ValueError."""
    for line in Path(path).read_text(encoding="ascii").splitlines():
        first, *rest = line.split() or [""]
        if first == name and rest:
            return int(rest[0])
    raise ValueError(f"{path} has no number for {name}")


def _flags() -> frozenset[str]:
    return frozenset((_cpu_field("flags") or _cpu_field("Features") or "").split())


def _cpu_field(name: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), None)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
