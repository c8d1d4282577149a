"""An onnxpress artifact, through its runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measure import Setting, tokens

import onnxpress
from onnxpress.runtime import Embedder


def open_peer(variant: str, setting: Setting) -> Peer:
    runner = onnxpress.load(setting.artifact)
    if not isinstance(runner, Embedder):
        raise SystemExit(f"{setting.artifact} is no embedding model; this benchmark is about those.")
    return Peer(runner)


class Peer:
    def __init__(self, runner: Embedder) -> None:
        self.runner = runner
        self.description = f"onnxpress {onnxpress.__version__}, chunks of {runner.tokens_per_chunk} tokens"

    def shape(self, batch: int, length: int) -> tuple[Callable[[], Any], str]:
        feeds = {
            name: array for name, array in tokens(batch, length).items() if name in self.runner.session.input_names
        }
        return lambda: self.runner.run_rows(feeds), ""

    def embed(self, texts: list[str], batch_size: int) -> Any:
        """The runner plans its own chunks, by tokens and not by rows: batch_size does not apply."""
        return self.runner.embed(texts)
