"""Passes over graphs. PASSES is the one list of them, in the order in which they make sense."""

from __future__ import annotations

from collections.abc import Mapping

from onnxpress.errors import RecipeError
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.deduplicate import Deduplicate
from onnxpress.optimizers.fold import Fold
from onnxpress.optimizers.fuse_attention import FuseAttention
from onnxpress.optimizers.fuse_gelu import FuseGelu
from onnxpress.optimizers.fuse_layer_norm import FuseLayerNorm
from onnxpress.optimizers.half import BFloat16, Float16
from onnxpress.optimizers.int8 import Int8
from onnxpress.optimizers.int8_dynamic import Int8Dynamic
from onnxpress.optimizers.weights import WeightsInt4, WeightsInt8

PASSES: Mapping[str, type[Pass]] = {
    "fold": Fold,
    "deduplicate": Deduplicate,
    "fuse-gelu": FuseGelu,
    "fuse-layer-norm": FuseLayerNorm,
    "fuse-attention": FuseAttention,
    "fp16": Float16,
    "bf16": BFloat16,
    "int8": Int8,
    "int8-dynamic": Int8Dynamic,
    "weights-int8": WeightsInt8,
    "weights-int4": WeightsInt4,
}


def make_pass(name: str, options: Mapping[str, object] | None = None) -> Pass:
    """The named pass with its options. Raises RecipeError for an unknown pass or option."""
    if name not in PASSES:
        raise RecipeError(f"Unknown pass {name!r}; the passes are: {', '.join(PASSES)}.")
    kind = PASSES[name]
    try:
        return kind(**(options or {}))
    except TypeError:
        allowed = ", ".join(getattr(kind, "__dataclass_fields__", {})) or "none"
        raise RecipeError(f"Pass {name!r} does not take {sorted(options or {})}; its options are: {allowed}.") from None
