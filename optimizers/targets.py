"""Facts about each target: which passes pay there and which ONNX Runtime optimizers are switched off.

Every row carries its measurement or its source, so that it can be checked again when a version moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from onnxpress.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing known about a target, with the measurement or the source that says so."""

    claim: str
    evidence: str


GENERATION = "text-generation"  # the task of language models, whose default precision is another one


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of machine.

    providers: ONNX Runtime execution providers in order. lossless: passes that run by default, in order.
    precisions: what `--precision` may be, the default first, each with the lossy passes it stands for. generation: the
    default for language models.
    disabled_optimizers: ONNX Runtime graph optimizers that lose time here. reduce_range: int8 weights are signed and use
    7 bits.
    """

    name: str
    providers: tuple[str, ...]
    lossless: tuple[str, ...]
    precisions: Mapping[str, tuple[str, ...]]
    disabled_optimizers: tuple[str, ...]
    facts: tuple[Fact, ...]
    generation: str
    reduce_range: bool = False

    def default_precision(self, task: str) -> str:
        """What `--precision` is where it is not given."""
        return self.generation if task == GENERATION else next(iter(self.precisions))


_CLEAN = ("fold", "deduplicate")
_FUSE = ("fuse-gelu", "fuse-layer-norm", "fuse-attention")
_DECODER = ("fuse-skip-norm", "fuse-rotary", "pack-projections")

_WEIGHT_ONLY = {"int8-weights": ("int8-weights",), "int4-weights": ("int4-weights",)}

_CPU = Target(
    name="cpu",
    providers=("cpu",),
    lossless=(*_CLEAN, *_FUSE, *_DECODER),
    precisions={
        "int8": ("int8",),
        "fp32": (),
        "int8-dynamic": ("int8-dynamic",),
        **_WEIGHT_ONLY,
    },
    disabled_optimizers=("SkipLayerNormFusion",),
    generation="int4-weights",
    facts=(
        Fact(
            claim="SkipLayerNormalization loses against Add + LayerNormalization, so its fusion is switched off",
            evidence="4.09 against 0.76 ms at 4096x384, 2 threads, onnxruntime 1.32, AVX512-VNNI",
        ),
        Fact(
            claim="Attention (opset 23) with an additive mask costs what MultiHeadAttention costs without one",
            evidence="1 thread, 12 heads of 32: 0.050/0.364/1.83 ms at (1,32)/(1,128)/(4,128), against "
            "0.083/0.449/2.18 for MultiHeadAttention with a padding mask and 0.068/0.378/1.70 without",
        ),
        Fact(
            claim="int8 with calibrated activation scales beats dynamic scales, and answers do not move with "
            "batch-mates",
            evidence="MiniLM-L6, 2 threads: 1.64/6.45 ms against 1.95/6.78 at (1,32)/(1,128)",
        ),
        Fact(
            claim="int8 weights are unsigned: right on every x86 CPU, and with VNNI the same kernel as signed ones",
            evidence="without VNNI the kernel for u8 x s8 adds two products in 16 bits, which overflow: two layers with a "
            "ReLU between them were off by 4.1 %, by 0.8 % with u8 x u8 (tests/optimizers/test_quantization.py); "
            "onnxruntime's mlas/lib/platform.cpp sends both to one kernel where there is VNNI",
        ),
    ),
)

TARGETS: Mapping[str, Target] = {
    "cpu": _CPU,
    "cpu-avx2": dataclasses.replace(
        _CPU,
        name="cpu-avx2",
        reduce_range=True,
        facts=(
            *_CPU.facts,
            Fact(
                claim="without VNNI, signed weights of 7 bits are faster than unsigned ones of 8, and cannot overflow",
                evidence="AMD EPYC with AVX2, one MatMul 1536 to 384 of 128 rows, 1 thread: 1.09 against 1.36 ms; MiniLM-L6, "
                "2 threads, (1,128)/(2,128): 16.0/33.6 against 18.4/39.6 ms; mean cosine 0.9913 against 0.9923",
            ),
        ),
    ),
    "cuda": Target(
        name="cuda",
        providers=("cuda",),
        lossless=(*_CLEAN, *_FUSE, *_DECODER),
        precisions={"fp16": ("fp16",), "fp32": (), "bf16": ("bf16",), **_WEIGHT_ONLY},
        generation="fp16",
        disabled_optimizers=(),
        facts=(
            Fact(
                claim="float16 is the default: tensor cores run it at twice the rate of TF32",
                evidence="989 against 494 TFLOP/s, dense (NVIDIA, H100 SXM data sheet); not measured here",
            ),
        ),
    ),
    "tensorrt": Target(
        name="tensorrt",
        providers=("tensorrt", "cuda"),
        lossless=_CLEAN,
        precisions={"fp16": ("fp16",), "fp32": (), "bf16": ("bf16",), "fp16-sparse": ("sparse-2-4", "fp16")},
        generation="fp16",
        disabled_optimizers=(),
        facts=(
            Fact(
                claim="no contrib operators are emitted: TensorRT's parser takes standard operators",
                evidence="NVIDIA's parser refuses com.microsoft operators (TensorRT-RTX 1.7 builder)",
            ),
        ),
    ),
}


def target(name: str) -> Target:
    """The named target. Raises RecipeError."""
    try:
        return TARGETS[name]
    except KeyError:
        raise RecipeError(f"Unknown target {name!r}; the targets are: {', '.join(TARGETS)}.") from None
