"""An onnxpress artifact, through its runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import THREADS, tokens

import onnxpress


def open_peer(variant: str, model: Path, cache: Path, artifact: str | None) -> Peer:
    assert artifact is not None
    return Peer(onnxpress.load(artifact))


class Peer:
    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def describe(self) -> str:
        return f"onnxpress {onnxpress.__version__}, {THREADS} threads, chunks of {self.runner.tokens_per_chunk} tokens"

    def shape(self, batch: int, length: int) -> Callable[[], Any]:
        feeds = {
            name: array for name, array in tokens(batch, length).items() if name in self.runner.session.input_names
        }
        return lambda: self.runner.run_rows(feeds)

    def texts(self, texts: list[str]) -> Callable[[], Any]:
        return lambda: self.runner.embed(texts)
