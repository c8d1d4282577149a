"""Facts about each target: which passes pay there and which ONNX Runtime optimizers are switched off.

Beside each choice stands its measurement or its source, so that it can be checked again when a version moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnxpress.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class QdqForm:
    """How QuantizeLinear and DequantizeLinear are written for what runs them.

    activations, weights: dtypes. symmetric: activations have zero point 0. weight_limit: the largest weight, away from its zero
    point. integer_bias: biases of convolutions and Gemm are int32. chained: a kernel is an integer one only where its output is
    quantized as well, so that what lies between layers is quantized too; else only what layers and residual sums read. tables: embedding
    tables are blocks of 8 bits (GatherBlockQuantized). wary: as OpenVINO
    reads it right and runs it fast; layers that it would misread stay in float (openvino_forms.py, openvino_misread.py).
    """

    activations: Literal["uint8", "int8", "float8e4m3fn"]
    weights: Literal["int8", "float8e4m3fn"]
    symmetric: bool
    weight_limit: int
    integer_bias: bool
    chained: bool
    tables: bool
    wary: bool = False


GENERATION = "text-generation"  # the task of language models, whose default precision is another one
DUAL = "dual"  # a precision for them alone


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of machine.

    providers: ONNX Runtime execution providers in order. lossless: passes that run by default, in order.
    precisions: what `--precision` may be, the default first, each with the passes it stands for. generation: those for language
    models, the default first; none where they do not run.
    disabled_optimizers: ONNX Runtime graph optimizers that lose time here, or answers. qdq: how int8-qdq writes integers.
    uniform_steps: language models are exported for a kernel that is not told how many new tokens each row of a step has.
    exact_products: on CPUs whose only kernels for signed 8-bit weights add in 16 bits, which overflows, the session avoids them.
    flash_attention: prompts of language models may take GroupQueryAttention's tiled kernel. half_floats: what is float in graphs
    of integers, and graphs of half precision, may be computed in half precision. needed: of the lossless passes those without
    which graphs may not run here, so that no clock undoes them.
    """

    name: str
    providers: tuple[str, ...]
    lossless: tuple[str, ...]
    precisions: Mapping[str, tuple[str, ...]]
    disabled_optimizers: tuple[str, ...]
    generation: tuple[str, ...]
    qdq: QdqForm
    uniform_steps: bool = False
    exact_products: bool = False
    flash_attention: bool = True
    half_floats: bool = False
    needed: tuple[str, ...] = ()

    def allowed_precisions(self, task: str) -> tuple[str, ...]:
        """What `--precision` may be for a task, the default first. Raises RecipeError where the task does not run here."""
        others = tuple(name for name in self.precisions if name != DUAL)
        allowed = self.generation if task == GENERATION else others
        if not allowed:
            raise RecipeError(
                f"Target {self.name!r} takes no language models: their attention is ONNX Runtime's own operator, which it does not know. "
                f"Build with --target {'cuda' if 'cuda' in self.providers else 'cpu'}."
            )
        return allowed


_CLEAN = ("fold", "deduplicate", "fuse-convolutions")
_FUSE = ("fuse-gelu", "fuse-layer-norm", "fuse-attention")
_DECODER = ("fuse-skip-norm", "fuse-rotary")

_WEIGHT_ONLY = {"int8-weights": ("int8-weights",), "int4-weights": ("int4-weights",)}

_X86 = QdqForm(
    activations="uint8", weights="int8", symmetric=False, weight_limit=127, integer_bias=True, chained=True, tables=True
)
_NVIDIA = QdqForm(
    activations="int8",
    weights="int8",
    symmetric=True,
    weight_limit=127,
    integer_bias=False,
    chained=False,
    tables=False,
)
# Of the CPU provider, on which graphs for NVIDIA's are tried where there is no GPU: one drops a Relu before FP8, its sibling fails over a Clip there, one takes kernels whose
# 16-bit sums overflow on CPUs without VNNI for signed weights of 8 bits, one rounds biases, and loses those that 32 bits do not hold.
# onnxruntime 1.32: Relu, QuantizeLinear to float8e4m3fn, DequantizeLinear answers -5 for -5, and two convolutions on AVX2 are off by 17 %
# where the same graph in float is off by 1.8 % (tests/optimizers/test_qdq.py).
_WRONG_FOR_NVIDIA = ("ReluQuantRewrite", "ClipQuantRewrite", "QDQSelectorActionTransformer", "WeightBiasQuantization")
_NVIDIA_QDQ = {"int8-qdq": ("int8-qdq",), "fp8-qdq": ("fp8-qdq",)}

_CPU = Target(
    name="cpu",
    providers=("cpu",),
    # fuse-attention: Attention (opset 23) with an additive mask costs what MultiHeadAttention costs without one. 1 thread, 12 heads of 32,
    # at (1,32)/(1,128)/(4,128): 0.050/0.364/1.83 ms, against 0.083/0.449/2.18 for MultiHeadAttention with a padding mask and
    # 0.068/0.378/1.70 without.
    # select-early: Xeon with VNNI, 2 threads, a classifier of MiniLM-L6's shape, int8 at (1,32)/(1,128)/(8,128): 3.30/10.1/76.1 ms before
    # and 3.05/9.35/67.2 with it, float32 7.07/21.0/149 and 6.87/18.6/137.
    # scale-queries: Xeon with AMX, 2 threads, onnxruntime 1.32, a step after 1,024 tokens: 13.5 ms against 15.6 for the SmolLM2-135M
    # shape, 21.1 against 23.4 for the Qwen2.5-0.5B shape; after 128 tokens level.
    lossless=(*_CLEAN, *_FUSE, *_DECODER, "select-early", "scale-queries", "pack-projections"),
    precisions={
        # Calibrated scales beat dynamic ones, and answers do not move with batch-mates. MiniLM-L6, 2 threads, at (1,32)/(1,128):
        # 1.64/6.45 ms against 1.95/6.78. Its 8-bit weights are signed, since VNNI and AMX have kernels for u8 x s8 alone (onnxruntime's
        # mlas/lib/platform.cpp): Xeon with AMX, onnxruntime 1.32, MatMulIntegerToFloat of 128 rows, 384 to 1536, 1 thread: 0.14 ms, 1.09
        # with unsigned weights, 1.05 in float32.
        "int8": ("int8",),
        "fp32": (),
        "int8-dynamic": ("int8-dynamic",),
        "int8-qdq": ("int8-qdq",),
        **_WEIGHT_ONLY,
        # Steps of 8 tokens and more pay in int8, shorter ones in 4 bits. Xeon with AMX, 2 threads, 896 to 4864, blocks of 128 /
        # DynamicQuantizeMatMul, ms: 1 row 0.058/0.104, 4 rows 0.15/0.14, 8 rows 0.37/0.22, 128 rows 5.1/1.3.
        DUAL: ("int4-weights", "int8-prompts"),
    },
    qdq=_X86,
    # AMD EPYC with AVX2: two layers with a ReLU between them were off by 4.1 %, by 0.8 % with session.x64quantprecision, whose kernels do
    # not add two products in 16 bits and take unsigned weights (tests/optimizers/test_quantization.py).
    exact_products=True,
    # Xeon with AMX, 2 threads, SmolLM2-135M's shape, 30 layers: 256 tokens after 768 take 219 ms with it and 149 without, 128 first tokens
    # 24 and 14. The other kernel holds heads x new tokens x capacity numbers: 235 MB for 14 heads, 128 tokens, 32,768.
    flash_attention=False,
    # SkipLayerNormalization loses against Add + LayerNormalization: 4.09 against 0.76 ms at 4096x384, 2 threads, onnxruntime 1.32,
    # AVX512-VNNI.
    disabled_optimizers=("SkipLayerNormFusion",),
    generation=("int4-weights", DUAL, "int8", "fp32", "int8-dynamic", "int8-qdq", "int8-weights"),
)

TARGETS: Mapping[str, Target] = {
    "cpu": _CPU,
    # Without VNNI, signed weights of 7 bits are faster than unsigned ones of 8, and cannot overflow. AMD EPYC with AVX2, one MatMul 1536 to
    # 384 of 128 rows, 1 thread: 1.09 against 1.36 ms; MiniLM-L6, 2 threads, at (1,128)/(2,128): 16.0/33.6 against 18.4/39.6 ms; mean
    # cosine 0.9913 against 0.9923.
    "cpu-avx2": dataclasses.replace(
        _CPU,
        name="cpu-avx2",
        exact_products=False,
        flash_attention=True,  # not tried without
        qdq=dataclasses.replace(_X86, weight_limit=63),
    ),
    # exact_products is for the x86 CPU that it is built on: MiniLM at int8-qdq: onnxruntime 1.32 on AVX2 answers 0.024 beside what it answers
    # on arm64 (emulated), and with session.x64quantprecision within 5e-8 of it.
    "cpu-arm64": dataclasses.replace(
        _CPU,
        name="cpu-arm64",
        # onnxruntime's advice for ARM64 (its quantization guide: S8S8); not measured here
        qdq=dataclasses.replace(_X86, activations="int8"),
        flash_attention=True,  # not tried without
    ),
    "cuda": Target(
        name="cuda",
        providers=("cuda",),
        # pack-projections: gate and up projections stay apart. H200, steps of 7B: packed with a Split 4.77 ms, apart 4.77. MatMulNBits keeps
        # its own kernels: int4 blocks of 32 2.9 ms, 3.6 with ep.cuda.fpa_intb_gemm, which takes 16 s to open.
        # The provider chooses the kernel of attention itself (cuDNN's on Hopper). H200, flash attention alone (sdpa_kernel 1): 0.19/0.21/1.32
        # ms for MiniLM's shape, 1.48 against 1.22 ms for a step of 0.5B, 5.10 against 4.77 of 7B.
        # Launches are captured as CUDA graphs. H200, a step of the Qwen2.5-0.5B shape in float16: 1.2 against 3.8 ms; MiniLM's at (1,32):
        # 0.18 against 0.47.
        lossless=(*_CLEAN, *_FUSE, *_DECODER, "pack-projections", "cuda-attention"),
        precisions={
            # float16 is the default: tensor cores run it at twice the rate of TF32, 989 against 494 TFLOP/s, dense (NVIDIA, H100 SXM data
            # sheet); 760 with random float16 numbers on an H200.
            # pack-attention: H200, onnxruntime-gpu 1.31.1, the six layers of MiniLM's shape (no pooling) in float16 as CUDA graph at
            # (1,32)/(1,128)/(64,128): 0.18/0.19/0.87 ms; Attention with an added mask 0.23/0.27/1.05, MultiHeadAttention with lengths
            # 0.24/0.24/0.92, one operator with a mask of ones and zeros 0.18/0.20/1.43.
            # cuda-opset: onnxruntime-gpu 1.31.1 runs opset 22's MaxPool on the CPU (tests/gpu/test_session.py).
            "fp16": ("pack-attention", "cuda-opset", "fp16"),
            "fp32": ("pack-attention", "cuda-opset"),
            "bf16": ("pack-attention", "bf16"),  # operators that bfloat16 came to with opset 22 need it
            **_NVIDIA_QDQ,
            # Beside half precision: the provider has no attention with a cache in float32.
            **{name: ("cuda-opset", *passes, "fp16") for name, passes in _WEIGHT_ONLY.items()},
            **{f"{name}-bf16": (*passes, "bf16") for name, passes in _WEIGHT_ONLY.items()},
        },
        generation=("fp16", "bf16", *_WEIGHT_ONLY, *(f"{name}-bf16" for name in _WEIGHT_ONLY)),
        # onnxruntime-gpu 1.31.1: GroupQueryAttention has 16 inputs, no query_seqlens among them, no float32 kernel on CUDA, and reads the
        # longest row's length on the CPU, so that it is an input of the graph.
        uniform_steps=True,
        qdq=_NVIDIA,
        disabled_optimizers=_WRONG_FOR_NVIDIA,
    ),
    "tensorrt": Target(
        name="tensorrt",
        providers=("tensorrt", "cuda"),
        # NVIDIA's parser refuses com.microsoft operators, and its builder takes Attention where it has a kernel alone: of float32, or heads
        # of 8, it has none (TensorRT-RTX 1.7, tests/optimizers/test_tensorrt_rtx.py). What products and a softmax cost there is not measured.
        lossless=(*_CLEAN, "plain-attention"),
        precisions={
            "fp16": ("fp16",),
            "fp32": (),
            "bf16": ("bf16",),
            "fp16-sparse": ("sparse-2-4", "fp16"),
            **_NVIDIA_QDQ,
        },
        generation=(),
        # TensorRT-RTX 1.7 builds that, at int8 and at FP8 E4M3, and refuses zero points, uint8 and int32 biases
        # (tests/optimizers/test_tensorrt_rtx.py); its speed is not measured here.
        qdq=_NVIDIA,
        needed=("plain-attention",),
        disabled_optimizers=_WRONG_FOR_NVIDIA,
    ),
    "openvino": Target(
        name="openvino",
        providers=("openvino",),
        lossless=(*_CLEAN, "select-early", "plain-attention"),
        # Attention as one operator is left to the CPU provider, which cuts the graph in two at each: MiniLM, Xeon with AMX, 2 threads, at
        # (1,32)/(1,128)/(32,128), float32: 3.5/11.0/342 ms, and 1.9/8.6/190 in matrix products (both in bfloat16, as OpenVINO likes).
        precisions={
            "int8-qdq": ("int8-qdq",),
            "bf16": ("bf16",),
            "fp32": (),
        },
        generation=(),
        # Xeon with AMX, 2 threads, batch 1/8, ms; likeness to float in brackets. Only what layers read, as here / chained, as for the CPU
        # provider / symmetric int8, as for NVIDIA: PP-LCNet 1.9/6.4 (0.904), 5.8/25.4 (0.572), 1.6/6.0 (0.866); ResNet-50 4.7/26.1 (0.991),
        # 4.7/26.4 (0.991), 4.6/24.2 (0.985); HGNetV2 8.8/43.5 (0.855), 6.0/29.6 (0.859), 9.1/46.7 (0.845); ConvNeXtV2 9.5/51.8 (0.9996),
        # 10.3/56.7 (0.9995), 8.6/48.9 (0.907).
        qdq=dataclasses.replace(_X86, integer_bias=False, chained=False, wary=True),
        half_floats=True,
        # OpenVINO 2026.4 on a Haswell, emulated (qemu-x86_64 -cpu Haswell): a product of 224 by 1,000 with weights of all 8 bits is off by
        # 10 % of its size, on VNNI by nothing.
        exact_products=True,
        needed=("plain-attention",),
        disabled_optimizers=(),
    ),
}


def target(name: str) -> Target:
    """The named target. Raises RecipeError."""
    try:
        return TARGETS[name]
    except KeyError:
        raise RecipeError(f"Unknown target {name!r}; the targets are: {', '.join(TARGETS)}.") from None
