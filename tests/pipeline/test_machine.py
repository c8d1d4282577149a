"""What else the machine is doing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onnxpress.machine import OtherProcesses, PeakMemory
from onnxpress.runtime.threads import usable_cores


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_other_processes_are_seen_and_ended_children_are_not() -> None:
    others = OtherProcesses()
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(usable_cores())]
    time.sleep(2)
    crowding = others.crowding()
    for process in busy:
        process.kill()
        process.wait()
    assert crowding is not None
    assert crowding > 0.5
    mine = others.crowding()
    assert mine is None or mine < crowding, "children count as this process's own once they have ended"


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell files from memory")
def test_peak_memory_is_what_files_do_not_hold(tmp_path: Path) -> None:
    size = 200 * 2**20
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with PeakMemory() as idle:
        mapped = np.memmap(path, np.uint8, "r")
        assert mapped.sum() == 0
        time.sleep(0.3)
    with PeakMemory() as busy:
        held = np.ones(size, np.uint8)
        time.sleep(0.3)
        del held
        time.sleep(0.3)
    assert idle.peak is not None
    assert busy.peak is not None
    assert 0.8 * size < busy.peak - idle.peak < 1.5 * size
