"""Artifacts whose weights have several parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from tiny_artifacts import fill, manifest

from onnxpress.artifact import ArtifactWriter


def save_large(destination: Path, *, changed: bytes = b"") -> Path:
    """A tiny embedder with 6 MB of further weights; changed: what is put into their middle."""
    with ArtifactWriter(destination) as writer:
        fill(writer.folder)
        model = onnx.load(writer.folder / "model.onnx")
        content = np.random.default_rng(7).bytes(6_000_000)
        content = content[:3_000_000] + changed + content[3_000_000:]
        model.graph.initializer.append(numpy_helper.from_array(np.frombuffer(content, np.uint8), "weights"))
        onnx.save(model, writer.folder / "model.onnx")
        writer.seal(manifest(name="large"))
        writer.write_measured({}, "<html></html>")
        return writer.publish().path
