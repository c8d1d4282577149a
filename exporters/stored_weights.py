"""What a checkpoint says of how its weights are stored, and what was left of them when transformers had read them.

transformers computes with whatever it could read: where scales of quantized weights are left out, with noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxpress.errors import SourceError

_UNFOLDED = ("mxfp4", "fp8")  # forms of stored weights that transformers turns into numbers
_ADVICE = "Give the model from before it was quantized; onnxpress quantizes it itself."
# How names end of what belongs to quantized weights: those of GPTQ, AWQ, bitsandbytes, compressed-tensors, ModelOpt and FP8.
_OF_QUANTIZED = frozenset((
    *("qweight", "qzeros", "SCB", "quant_map", "weight_packed", "weight_scale", "weight_scale_2", "weight_scale_inv"),
    *("weight_zero_point", "input_scale"),
))  # fmt: skip


def unfold(folder: Path, config: Any) -> None:
    """Have transformers turn quantized weights into numbers, whatever this machine could compute with. Raises SourceError where it cannot."""
    stored = getattr(config, "quantization_config", None)
    if not stored and not (folder / "hf_quant_config.json").is_file():
        return
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    if not isinstance(stored, dict) or method not in _UNFOLDED:
        form = "ModelOpt's" if not stored else method or "no name"
        raise SourceError(
            f"The weights in {folder} are quantized (form: {form}); of such forms, mxfp4 and fp8 are read. {_ADVICE}"
        )
    config.quantization_config = {**stored, "dequantize": True}


def is_unfolded(config: Any) -> bool:
    """Whether `unfold` has found quantized weights that transformers turns into numbers."""
    stored = getattr(config, "quantization_config", None)
    return isinstance(stored, dict) and bool(stored)


def refuse_other_shapes(folder: Path, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raise SourceError for weights (name, shape in the files, shape in the model), which transformers would begin anew."""
    for name, in_files, in_model in sorted(mismatched):
        raise SourceError(
            f"The weights in {folder} are not those that its config.json describes: {name} is {tuple(in_files)} in the files and "
            f"{tuple(in_model)} in the model."
        )


def left_out(folder: Path, unexpected: Iterable[str], *, unfolded: bool) -> tuple[str, ...]:
    """A remark on weights of the files that the model does not have. Raises SourceError where they belong to quantized ones.

    unfolded: whether transformers has turned quantized weights into numbers, so that scales which are left are those of activations.
    """
    names = sorted(unexpected)
    packed = next((name for name in names if name.rpartition(".")[2] in _OF_QUANTIZED), None)
    if packed is not None and not unfolded:
        raise SourceError(
            f"The weights in {folder} are quantized: {packed} is among them, and config.json does not say in which form. {_ADVICE}"
        )
    if not names:
        return ()
    return (
        f"not of this model, and left out: {len(names)} of the files' weights ({names[0]}{', …' if len(names) > 1 else ''})",
    )
