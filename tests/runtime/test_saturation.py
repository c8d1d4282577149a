"""The one product that tells whether this CPU's kernels saturate, and what a session makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxpress import machine
from onnxpress.runtime import opening, saturation
from onnxpress.runtime.session import Session


def product(weight: np.ndarray[Any, Any], columns: list[str | int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, columns)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)


def test_the_model_is_the_product_that_it_says() -> None:
    expected = product(np.full((4, 1), 127, np.int8), ["m", 4])
    found = onnx.load_from_string(saturation.MODEL)
    assert found == expected


def test_it_agrees_with_the_processor() -> None:
    flags = machine._flags()
    if "avx2" not in flags:
        pytest.skip("not an x86 CPU, or one that /proc/cpuinfo does not describe")
    assert saturation.products_saturate() == (not flags & {"avx512_vnni", "avx_vnni"})
    assert machine.cpu_target() == ("cpu-avx2" if saturation.products_saturate() else "cpu")


@pytest.mark.parametrize("saturates", [False, True])
def test_slower_kernels_are_asked_for_only_where_the_faster_ones_saturate(
    saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(product(np.full((64, 32), 127, np.int8), ["batch", 64]), tmp_path / "p.onnx")
    monkeypatch.setattr(opening, "products_saturate", lambda: saturates or saturation.products_saturate())
    opened = Session(tmp_path / "p.onnx", exact_products=True)
    x = np.full((3, 64), 255, np.uint8)
    np.testing.assert_array_equal(opened.run({"x": x})["y"], np.full((3, 32), 255 * 127 * 64))
    options = opened._session.get_session_options()
    key = "session.x64quantprecision"
    asked = options.get_session_config_entry(key) if saturates or saturation.products_saturate() else "1"
    assert asked == "1"
    if not saturates and not saturation.products_saturate():
        with pytest.raises(RuntimeError, match=key):
            options.get_session_config_entry(key)
