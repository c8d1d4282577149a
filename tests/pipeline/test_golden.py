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
    session = moved(folder, 0.0)
    found = write_golden(folder / "golden.safetensors", session, {"one": FEEDS}, unrounded=unrounded)
    assert not found.sizes, "nothing is masked"
    return found.tolerances["embeddings"]


def test_the_allowed_difference(tmp_path: Path) -> None:
    in_float = allowed(tmp_path, None)
    largest = float(np.abs(read_tensors(tmp_path / "golden.safetensors")["output.one.embeddings"]).max())
    assert in_float == pytest.approx(1e-3 * largest, rel=1e-2)
    assert allowed(tmp_path, moved(tmp_path, 0.001)) == pytest.approx(5e-2 * largest, rel=1e-2), "rounded by little"
    assert allowed(tmp_path, moved(tmp_path, 0.3)) == pytest.approx(0.3, rel=1e-2), "rounded by as much"
    assert largest < 3, "so that the last is more than the least"
    assert allowed(tmp_path, moved(tmp_path, 9.0)) == pytest.approx(largest / 2, rel=1e-2), "which would prove nothing"


def test_a_graph_of_other_inputs_is_not_asked(tmp_path: Path) -> None:
    other = Session(save_embedder(tmp_path / "other.onnx"))  # the file's own signature has no bounds
    assert allowed(tmp_path, other) == allowed(tmp_path, moved(tmp_path, 0.001))


class Masking:
    """Two scores of a half, and a mask that is the input's."""

    signature = SIGNATURE

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return {"logits": np.array([[0.5, -0.5, feeds["fill"]]] * 2, np.float32)}


@pytest.mark.parametrize("mask", [-1e9, 1e9, -1e4])
def test_masks_allow_the_others_nothing(mask: float, tmp_path: Path) -> None:
    cases = {name: {"fill": np.float32(mask + number)} for number, name in enumerate(("one", "two"))}
    allowed = write_golden(tmp_path / "golden", Masking(), cases, unrounded=Masking())  # type: ignore[arg-type]
    assert allowed.tolerances == {"logits": 0.025}
    assert allowed.sizes == {"logits": 0.5}
    written = read_tensors(tmp_path / "golden")["output.one.logits"]
    np.testing.assert_array_equal(written, Masking().run(cases["one"])["logits"])
    for moved, difference in ((mask + 1, 0.0), (0.96 * mask, 0.02), (0.9 * mask, 0.05), (-mask, 1.0), (0.5, 0.5)):
        found = golden_difference(Masking().run({"fill": np.float32(moved)})["logits"], written, 0.5)
        assert found == pytest.approx(difference, abs=1e-4)


def test_few_large_numbers_are_no_masks(tmp_path: Path) -> None:
    """Where answers to many samples have none, what is allowed is a share of the largest."""
    cases = {"one": {"fill": np.float32(4000)}}
    masks_from = {"logits": float("inf")}
    allowed = write_golden(tmp_path / "golden", Masking(), cases, unrounded=None, masks_from=masks_from)  # type: ignore[arg-type]
    assert allowed.tolerances == {"logits": 4}
    assert not allowed.sizes


@pytest.mark.parametrize(("mask", "found"), [(-1e9, -65504), (-1e9, -np.inf), (1e9, np.inf)])
def test_of_half_precision_a_mask_past_its_largest_number_is_infinite(
    mask: float, found: float, tmp_path: Path
) -> None:
    cases = {"one": {"fill": np.float32(found)}}
    masks_from = {"logits": abs(mask) / 2}
    allowed = write_golden(tmp_path / "golden", Masking(), cases, unrounded=None, masks_from=masks_from, half=True)  # type: ignore[arg-type]
    written = read_tensors(tmp_path / "golden")["output.one.logits"]
    np.testing.assert_array_equal(written[:, 2], np.copysign(np.inf, mask))
    assert allowed.sizes == {"logits": 0.5}
