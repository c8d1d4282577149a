"""What a checkpoint says of how its weights are stored, and what was left of them when transformers had read them.

transformers computes with whatever it could read: where scales of quantized weights are left out, with noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxpress.errors import SourceError

_UNFOLDED = ("mxfp4", "fp8")  # forms of stored weights that transformers turns into numbers
_ADVICE = "Give the model from before it was quantized; onnxpress quantizes it itself."
# How names end of what belongs to quantized weights: those of GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt and FP8.
_OF_QUANTIZED = frozenset((
    *("qweight", "qzeros", "scales", "g_idx", "absmax", "SCB", "weight_packed", "weight_format"),
    *("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_zero_point", "input_scale", "activation_scale"),
))  # fmt: skip


def unfold(folder: Path, config: Any) -> None:
    """Have transformers turn quantized weights into numbers, whatever this machine could compute with. Raises SourceError where it cannot."""
    stored = getattr(config, "quantization_config", None)
    if stored is None and not (folder / "hf_quant_config.json").is_file():
        return
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    if not isinstance(stored, dict) or method not in _UNFOLDED:
        form = "ModelOpt's" if stored is None else method or "no name"
        raise SourceError(
            f"The weights in {folder} are quantized (form: {form}); of such forms, mxfp4 and fp8 are read. {_ADVICE}"
        )
    config.quantization_config = {**stored, "dequantize": True}


def left_out(folder: Path, unexpected: Iterable[str]) -> tuple[str, ...]:
    """A remark on weights of the files that the model does not have. Raises SourceError where they belong to quantized ones."""
    names = sorted(unexpected)
    packed = next((name for name in names if name.rpartition(".")[2] in _OF_QUANTIZED), None)
    if packed is not None:
        raise SourceError(
            f"The weights in {folder} are quantized: {packed} is among them, and config.json does not say in which form. {_ADVICE}"
        )
    if not names:
        return ()
    return (
        f"not of this model, and left out: {len(names)} weights of the files ({names[0]}{', …' if len(names) > 1 else ''})",
    )
