"""Whether ONNX Runtime's products of unsigned and signed 8-bit integers are exact on this CPU. Found by one such product."""

from __future__ import annotations

from functools import cache

import numpy as np

from onnxpress.runtime.wheel import check_wheel

# y = MatMulInteger(x, w), x: uint8 (m, 4), w: int8 (4, 1), all 127. tests/runtime/test_saturation.py writes it anew.
MODEL = (
    b'\x08\x05:O\n\x18\n\x01x\n\x01w\x12\x01y"\rMatMulInteger\x12\x01g*\x0f\x08\x04\x08\x01\x10\x03B\x01wJ\x04\x7f\x7f\x7f\x7f'
    b"Z\x14\n\x01x\x12\x0f\n\r\x08\x02\x12\t\n\x03\x12\x01m\n\x02\x08\x04b\t\n\x01y\x12\x04\n\x02\x08\x06B\x04\n\x00\x10\n"
)


@cache
def products_saturate() -> bool:
    """Whether two neighbouring products are added in 16 bits, which do not hold the largest: x86 without VNNI.

    Raises MissingExtraError where ONNX Runtime is not installed.
    """
    check_wheel()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((2, 4), 255, np.uint8)})
    return bool((sums != 255 * 127 * 4).any())
