"""Which of ONNX Runtime's wheels is installed, and the libraries in it. Each of the two overwrites the other's files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from onnxpress.errors import MissingExtraError, ProviderError

_WHEELS = ("onnxruntime", "onnxruntime-gpu")


def check_wheel() -> str:
    """Name of the one onnxruntime wheel that is installed. Raises MissingExtraError, ProviderError."""
    installed = [name for name in _WHEELS if version_of(name) is not None]
    if len(installed) > 1:
        raise ProviderError(
            "Both onnxruntime and onnxruntime-gpu are installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them, e.g. pip install 'onnxpress[cpu]'."
        )
    if not installed and importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError(
            "ONNX Runtime is not installed: pip install 'onnxpress[cpu]', or 'onnxpress[gpu]' for NVIDIA cards."
        )
    try:
        from onnxruntime import InferenceSession  # noqa: F401  an empty folder can still be imported
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime is installed and does not load ({error}), as when one of its two wheels was uninstalled beside "
            "the other: pip uninstall -y onnxruntime onnxruntime-gpu, then install one, e.g. pip install 'onnxpress[cpu]'."
        ) from None
    return installed[0] if installed else "onnxruntime"


def provider_library(provider: str, library: str) -> Path:
    """Where the wheel has a provider's library. Raises ProviderError where it has none."""
    wheel = check_wheel()
    import onnxruntime

    path = Path(onnxruntime.__file__).parent / "capi" / file_name(library)
    if not path.is_file():
        raise ProviderError(
            f"The provider {provider} was asked for and is not in the installed wheel ({wheel}). It comes with "
            f"pip uninstall -y {wheel}, then pip install 'onnxpress[gpu]'; or ask for the provider cpu."
        )
    return path


def file_name(library: str) -> str:
    """The file of one of ONNX Runtime's libraries on this system."""
    if sys.platform == "win32":
        return f"onnxruntime_{library}.dll"
    return f"libonnxruntime_{library}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def onnxruntime_version() -> str:
    """Of the wheel that is installed; unknown where none says so."""
    return next((version for name in _WHEELS if (version := version_of(name)) is not None), "unknown")


def version_of(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
