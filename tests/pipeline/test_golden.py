"""How far answers may be from the golden ones: little in float, as far as rounding has moved them where there is some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_artifacts import SIGNATURE, save_embedder

from onnxpress.golden import write_golden
from onnxpress.manifest import Arrays
from onnxpress.runtime.loading import golden_difference
from onnxpress.runtime.session import Session
from onnxpress.runtime.tensor_file import read_tensors

FEEDS = {"input_ids": np.array([[2, 5, 6, 3]]), "attention_mask": np.ones((1, 4), np.int64)}


def moved(folder: Path, by: float) -> Session:
    """The embedder, all of whose answers are moved."""
    model = onnx.load(save_embedder(folder / f"{by}.onnx"))
    table = next(constant for constant in model.graph.initializer if constant.name == "table")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table) + np.float32(by), "table"))
    onnx.save(model, folder / f"{by}.onnx")
    return Session(folder / f"{by}.onnx", signature=SIGNATURE)


def allowed(folder: Path, unrounded: Session | None) -> float:
    return write_golden(folder / "golden.safetensors", moved(folder, 0.0), {"one": FEEDS}, unrounded=unrounded)[
        "embeddings"
    ]


def test_the_allowed_difference(tmp_path: Path) -> None:
    in_float = allowed(tmp_path, None)
    largest = float(np.abs(read_tensors(tmp_path / "golden.safetensors")["output.one.embeddings"]).max())
    assert in_float == pytest.approx(1e-3 * largest, rel=1e-2)
    assert allowed(tmp_path, moved(tmp_path, 0.001)) == pytest.approx(5e-2 * largest, rel=1e-2), "rounded by little"
    assert allowed(tmp_path, moved(tmp_path, 0.3)) == pytest.approx(0.3, rel=1e-2), "rounded by as much"
    assert largest < 3, "so that the last is more than the least"


def test_a_graph_of_other_inputs_is_not_asked(tmp_path: Path) -> None:
    other = Session(save_embedder(tmp_path / "other.onnx"))  # the file's own signature has no bounds
    assert allowed(tmp_path, other) == allowed(tmp_path, moved(tmp_path, 0.001))


def test_masks_allow_the_others_nothing(tmp_path: Path) -> None:
    """They are written as minus infinity."""

    class Masking:
        signature = SIGNATURE

        def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
            return {"logits": np.array([[1.0, 2.0, feeds["fill"]]], np.float32)}

    cases = {name: {"fill": np.float32(-1e9 - number)} for number, name in enumerate(("one", "two"))}
    tolerance = write_golden(tmp_path / "golden", Masking(), cases, unrounded=Masking())  # type: ignore[arg-type]
    assert tolerance == {"logits": 0.1}
    written = read_tensors(tmp_path / "golden")["output.one.logits"]
    np.testing.assert_array_equal(written, [[1, 2, -np.inf]])
    assert golden_difference(Masking().run(cases["two"])["logits"], written) == 0
