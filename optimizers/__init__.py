"""Passes over graphs. PASSES is the one list of them, in the order in which they make sense."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from onnxpress.errors import RecipeError
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.cuda_attention import CudaAttention
from onnxpress.optimizers.cuda_opset import CudaOpset
from onnxpress.optimizers.deduplicate import Deduplicate
from onnxpress.optimizers.fold import Fold
from onnxpress.optimizers.fuse_attention import FuseAttention
from onnxpress.optimizers.fuse_convolutions import FuseConvolutions
from onnxpress.optimizers.fuse_gelu import FuseGelu
from onnxpress.optimizers.fuse_layer_norm import FuseLayerNorm
from onnxpress.optimizers.fuse_rotary import FuseRotary
from onnxpress.optimizers.fuse_skip_norm import FuseSkipNorm
from onnxpress.optimizers.half import BFloat16, Float16
from onnxpress.optimizers.int8 import Int8
from onnxpress.optimizers.int8_cache import Int8Cache
from onnxpress.optimizers.int8_dynamic import Int8Dynamic
from onnxpress.optimizers.int8_prompts import Int8Prompts
from onnxpress.optimizers.pack_attention import PackAttention
from onnxpress.optimizers.pack_projections import PackProjections
from onnxpress.optimizers.plain_attention import PlainAttention
from onnxpress.optimizers.qdq import Fp8Qdq, Int8Qdq
from onnxpress.optimizers.scale_queries import ScaleQueries
from onnxpress.optimizers.select_early import SelectEarly
from onnxpress.optimizers.sparse import Sparse24
from onnxpress.optimizers.weights import WeightsInt4, WeightsInt8

PASSES: Mapping[str, type[Pass]] = {
    "fold": Fold,
    "deduplicate": Deduplicate,
    "fuse-convolutions": FuseConvolutions,
    "fuse-gelu": FuseGelu,
    "fuse-layer-norm": FuseLayerNorm,
    "fuse-attention": FuseAttention,
    "fuse-skip-norm": FuseSkipNorm,
    "fuse-rotary": FuseRotary,
    "select-early": SelectEarly,
    "scale-queries": ScaleQueries,
    "pack-projections": PackProjections,
    "plain-attention": PlainAttention,
    "cuda-attention": CudaAttention,
    "cuda-opset": CudaOpset,
    "pack-attention": PackAttention,
    "sparse-2-4": Sparse24,
    "fp16": Float16,
    "bf16": BFloat16,
    "int8": Int8,
    "int8-dynamic": Int8Dynamic,
    "int8-qdq": Int8Qdq,
    "fp8-qdq": Fp8Qdq,
    "int8-weights": WeightsInt8,
    "int4-weights": WeightsInt4,
    "int8-cache": Int8Cache,
    "int8-prompts": Int8Prompts,
}


_CALIBRATED = ("sparse-2-4", "int8", "int8-qdq", "fp8-qdq", "int8-cache")


def calibrates(step: Pass) -> bool:
    """Whether a pass looks at calibration inputs."""
    return step.name in _CALIBRATED or getattr(step, "method", "rtn") != "rtn"


def make_pass(name: str, options: Mapping[str, object] | None = None) -> Pass:
    """The named pass with its options. Raises RecipeError for an unknown pass or option."""
    if name not in PASSES:
        raise RecipeError(f"Unknown pass {name!r}; the passes are: {', '.join(PASSES)}.")
    kind = PASSES[name]
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    given: dict[str, object] = {}
    for option, value in (options or {}).items():
        if option not in defaults:
            allowed = ", ".join(defaults) or "none"
            raise RecipeError(f"Pass {name!r} does not take {option!r}; its options are: {allowed}.")
        default = defaults[option]
        given[option] = float(value) if type(value) is int and isinstance(default, float) else value
        if type(given[option]) is not type(default):
            kinds = {bool: "true or false", int: "whole numbers", float: "numbers"}
            kind_of_value = kinds.get(type(default), "a word")
            raise RecipeError(
                f"Pass {name!r}: {option} is {value!r}; it takes {kind_of_value}, and is {default!r} by default."
            )
    step = kind(**given)  # which says what its own ranges are
    negative = next((option for option, value in given.items() if type(value) is int and value < 0), None)
    if negative is not None:
        raise RecipeError(f"Pass {name!r}: {negative} is {given[negative]}; it takes whole numbers from 0 on.")
    return step
