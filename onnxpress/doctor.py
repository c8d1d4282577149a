"""Says what this installation can do: versions, wheels in conflict, providers that really load, cores, memory.

Providers are tried, not asked for: ONNX Runtime lists CUDA and TensorRT on machines that have neither.
"""

from __future__ import annotations

import platform
from typing import Any

from onnxpress import machine
from onnxpress.errors import OnnxpressError
from onnxpress.runtime.providers import PROVIDERS, check_provider
from onnxpress.runtime.wheel import version_of

_PACKAGES = (
    "onnxpress",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx",
    "onnxruntime-ep-openvino",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
)


def examine() -> dict[str, Any]:
    """All findings; `problems` lists what has to be mended, `lines` is the text for a person."""
    versions = {name: version for name in _PACKAGES if (version := version_of(name)) is not None}
    providers: dict[str, str] = {}
    for name in PROVIDERS:
        try:
            check_provider(name)
            providers[name] = "loads"
        except OnnxpressError as error:
            providers[name] = str(error)
    problems: list[str] = []
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        problems.append(
            "both onnxruntime and onnxruntime-gpu are installed and overwrite each other: uninstall both, "
            "then install one"
        )
    elif providers["cpu"] != "loads":
        problems.append(providers["cpu"])
    facts = machine.describe()
    lines = [f"Python {platform.python_version()}"]
    lines += [f"{name} {version}" for name, version in versions.items()]
    lines += [f"{name}: {finding}" for name, finding in providers.items()]
    lines.append(f"processor: {facts['processor']} ({', '.join(facts['instruction_sets']) or 'no known extensions'})")
    lines.append(f"usable cores: {facts['cores']}")
    if facts["memory_bytes"]:
        lines.append(f"memory: {facts['memory_bytes'] / 2**30:.1f} GiB")
    lines += [f"PROBLEM: {problem}" for problem in problems] or ["no problems found"]
    return {"versions": versions, "providers": providers, "machine": facts, "problems": problems, "lines": lines}
