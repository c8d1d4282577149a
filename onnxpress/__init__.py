"""onnxpress: export PyTorch models to ONNX, press them, prove them, run them.

`load`, `Engine` with an artifact, and the errors need only the runtime; `build` and training need the build extra and are imported when first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from onnxpress.errors import OnnxpressError

if TYPE_CHECKING:
    from onnxpress.engine import Engine
    from onnxpress.pipeline import build
    from onnxpress.runtime import load

# ONNX Runtime's wheels report how they are used, unless this is set before they are imported. Set it to 0 to let them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["Engine", "OnnxpressError", "__version__", "build", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from onnxpress.runtime import load

        return load
    if name == "build":
        from onnxpress.pipeline import build

        return build
    if name == "Engine":
        from onnxpress.engine import Engine

        return Engine
    raise AttributeError(f"module 'onnxpress' has no attribute {name!r}")
