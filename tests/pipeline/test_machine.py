"""What else the machine is doing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from onnxpress.machine import OtherProcesses
from onnxpress.runtime.providers import usable_cores


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
