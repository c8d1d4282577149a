"""An onnxpress language model, through the runtime's model step and a greedy choice."""

from __future__ import annotations

import time

from measure import Setting

import onnxpress
from onnxpress.runtime import Generator


def open_peer(variant: str, setting: Setting) -> Peer:
    runner = onnxpress.load(setting.artifact, verify=False)
    if not isinstance(runner, Generator):
        raise SystemExit(f"{setting.artifact} is no language model; this benchmark is about those.")
    return Peer(runner)


class Peer:
    def __init__(self, runner: Generator) -> None:
        self.runner = runner
        self.description = f"onnxpress {onnxpress.__version__}"

    def generate(self, prompt: list[int], count: int) -> dict[str, float]:
        start = time.perf_counter()
        first = last = 0.0
        for piece in self.runner.stream([prompt], max_new_tokens=count + 1, ignore_eos=True):
            last = time.perf_counter()
            first = first or last
            assert piece.index == 0
        return {"prompt_seconds": first - start, "token_seconds": (last - first) / count}
